// What the emulation asks of the machine below it: the sanitizers' hooks, stacks to switch between, and the whereabouts
// of shared memory. Linux on any processor; the switch is hand-written for x86-64.
#pragma once

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace pygen_emulation {

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("pygen emulation: ", stderr);
  vfprintf(stderr, format, arguments);
  fputs("\n", stderr);
  va_end(arguments);
  abort();
}

// ---- The sanitizers ------------------------------------------------------------------------------------------------

#ifdef __SANITIZE_THREAD__
// ThreadSanitizer would take two CUDA threads that run on one of its fibres, one after the other, for one thread. So
// each of a launch has its own, and this is how large a launch may be: a fibre takes a dozen of a process's 65530 maps.
inline constexpr int64_t kMaxTsanThreads = 4096;
inline void* create_tsan_fiber() { return __tsan_create_fiber(0); }
inline void release(void* place) { __tsan_release(place); }
inline void acquire(void* place) { __tsan_acquire(place); }
// Fences are unknown to it: what came before any of them is in order with what follows a later one.
inline char fence_order;
inline void fence() {
  acquire(&fence_order);
  release(&fence_order);
}
// The scheduler's own reads and writes are no part of the kernel.
struct Unseen {
  Unseen() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unseen() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
};
#else
inline constexpr int64_t kMaxTsanThreads = 0;
inline void* create_tsan_fiber() { return nullptr; }
inline void release(void*) {}
inline void acquire(void*) {}
inline void fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
struct Unseen {
  Unseen() {}
};
#endif

// ---- Stacks --------------------------------------------------------------------------------------------------------

inline constexpr size_t kStackBytes = 256 << 10;

#ifdef __x86_64__
using Context = void*;
extern "C" void pygen_emulation_switch(Context* from, Context to);
asm(R"(
  .pushsection .text
  .weak pygen_emulation_switch
  .hidden pygen_emulation_switch
  .type pygen_emulation_switch, @function
pygen_emulation_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
  .size pygen_emulation_switch, . - pygen_emulation_switch
  .popsection
)");
inline void switch_context(Context& from, Context& to) { pygen_emulation_switch(&from, to); }
inline void prepare_context(Context& context, char*, char* top, void (*entry)()) {
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // where entry would return to: it never does
  *--stack = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  context = stack;
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare_context(Context& context, char* bottom, char* top, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = bottom;
  context.uc_stack.ss_size = top - bottom;
  makecontext(&context, entry, 0);
}
#endif

// What a CUDA thread runs on.
struct Strand {
  char* stack;
  void* tsan_fiber;
};

// Strands are kept from launch to launch.
struct StrandPool {
  std::mutex mutex;
  std::vector<Strand> strands;

  Strand take() {
    {
      std::lock_guard lock(mutex);
      if (!strands.empty()) {
        const Strand strand = strands.back();
        strands.pop_back();
        return strand;
      }
    }
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // The lowest page faults, so that a stack which overflows does not run into its neighbour.
    if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE) != 0) fail("no memory for the stacks of a grid");
    return {static_cast<char*>(stack), create_tsan_fiber()};
  }
  void give(const std::vector<Strand>& used) {
    std::lock_guard lock(mutex);
    strands.insert(strands.end(), used.begin(), used.end());
  }
};
inline StrandPool strand_pool;

struct Fiber;
inline thread_local Fiber* current;  // the CUDA thread that this OS thread is running

// ---- Shared memory -------------------------------------------------------------------------------------------------

// A __shared__ variable is a static thread_local one. They are found among the symbols of the executable or library
// that this header is compiled into, which may hold no other thread_local variables, as offsets from `current`.
struct SharedVariable {
  ptrdiff_t offset;
  size_t size;
};

inline std::vector<SharedVariable> find_shared_variables() {
  Dl_info info;
  link_map* map = nullptr;
  dladdr1(reinterpret_cast<void*>(&find_shared_variables), &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP);
  const char* path = map == nullptr || *map->l_name == 0 ? "/proc/self/exe" : map->l_name;
  FILE* file = fopen(path, "rb");
  if (file == nullptr) fail("cannot read %s, whose symbols say where shared memory is", path);
  const auto read = [&]<class T>(T, size_t offset, size_t bytes) {
    std::vector<T> data(bytes / sizeof(T));
    if (fseek(file, static_cast<long>(offset), SEEK_SET) != 0 || fread(data.data(), 1, bytes, file) != bytes) {
      fail("cannot read the symbols of %s", path);
    }
    return data;
  };
  const Elf64_Ehdr header = read(Elf64_Ehdr{}, 0, sizeof(Elf64_Ehdr))[0];
  const auto sections = read(Elf64_Shdr{}, header.e_shoff, header.e_shnum * sizeof(Elf64_Shdr));
  std::vector<SharedVariable> variables;
  ptrdiff_t anchor = -1;
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    const auto names = read(char{}, sections[section.sh_link].sh_offset, sections[section.sh_link].sh_size);
    for (const Elf64_Sym& symbol : read(Elf64_Sym{}, section.sh_offset, section.sh_size)) {
      if (ELF64_ST_TYPE(symbol.st_info) != STT_TLS || symbol.st_shndx == SHN_UNDEF) continue;
      const char* name = &names[symbol.st_name];
      if (strcmp(name, "_ZN15pygen_emulation7currentE") == 0) {
        anchor = static_cast<ptrdiff_t>(symbol.st_value);
      } else if (strncmp(name, "_ZZ", 3) == 0) {  // a variable of a function
        variables.push_back({static_cast<ptrdiff_t>(symbol.st_value), symbol.st_size});
      }
    }
  }
  fclose(file);
  if (anchor < 0) fail("%s is stripped: its symbols say where shared memory is", path);
  for (SharedVariable& variable : variables) variable.offset -= anchor;
  return variables;
}

inline const std::vector<SharedVariable>& shared_variables() {
  static const std::vector<SharedVariable> variables = find_shared_variables();
  return variables;
}
inline char* address(const SharedVariable& variable) { return reinterpret_cast<char*>(&current) + variable.offset; }

// AddressSanitizer puts no red zone around a thread_local variable. Alignment makes room for one: a variable is smaller
// than this, for static shared memory ends at 48 KB.
#ifdef __SANITIZE_ADDRESS__
#define PYGEN_EMULATION_SHARED static thread_local __attribute__((aligned(65536)))
inline constexpr size_t kRedZone = 256;
inline void put_red_zones() {
  for (const SharedVariable& variable : shared_variables()) {
    if (variable.size <= 48 << 10) __asan_poison_memory_region(address(variable) + variable.size, kRedZone);
  }
}
// Before the OS thread ends, whose memory may then become something else.
inline void remove_red_zones() {
  for (const SharedVariable& variable : shared_variables()) {
    if (variable.size <= 48 << 10) __asan_unpoison_memory_region(address(variable) + variable.size, kRedZone);
  }
}
#else
#define PYGEN_EMULATION_SHARED static thread_local
inline void put_red_zones() {}
inline void remove_red_zones() {}
#endif

}  // namespace pygen_emulation
