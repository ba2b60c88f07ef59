// Runs a grid on the host. A block has an OS thread to itself while it runs, and each of its CUDA threads is a fibre that
// runs until it waits at a barrier, a warp collective or grid_sync; when no fibre of a block can go on, the kernel is
// wrong, and `explain` says who waits for whom. emulation.h gives these things the names that they have in CUDA.
//
// The sanitizers see each CUDA thread as a thread of its own. ThreadSanitizer learns an order between two of them only
// where CUDA promises one, so a missing barrier is a data race even though nothing here runs at the same time.
#pragma once

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <source_location>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
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

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace pygen_emulation {

inline constexpr int kWarpSize = 32;
inline constexpr size_t kStackBytes = 256 << 10;
inline constexpr size_t kMaxDynamicShared = 227 << 10;  // of an sm_90 block
inline constexpr int64_t kMaxResidentBlocks = 256;      // a cooperative launch holds an OS thread for each
inline constexpr int64_t kMaxResidentThreads = 16384;   // and a stack for each of their threads

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
// ThreadSanitizer has 8128 threads and takes a new one that got an old one's number for the old one itself. So the
// fibres of a launch are kept until it ends, and a launch is at most this large.
inline constexpr int64_t kMaxTsanThreads = 7900;
inline void release(void* place) { __tsan_release(place); }
inline void acquire(void* place) { __tsan_acquire(place); }
// The scheduler's own reads and writes are no part of the kernel.
struct Unseen {
  Unseen() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unseen() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
};
#else
inline constexpr int64_t kMaxTsanThreads = 0;
inline void release(void*) {}
inline void acquire(void*) {}
struct Unseen {
  Unseen() {}
};
#endif

// ---- Stacks --------------------------------------------------------------------------------------------------------

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

// Stacks are kept from launch to launch, but not under ThreadSanitizer, to which a fresh mapping is fresh memory.
struct StackPool {
  std::mutex mutex;
  std::vector<char*> stacks;

  char* take() {
    {
      std::lock_guard lock(mutex);
      if (!stacks.empty()) {
        char* stack = stacks.back();
        stacks.pop_back();
        return stack;
      }
    }
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // The lowest page faults, so that a stack which overflows does not run into its neighbour.
    if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE) != 0) fail("no memory for the stacks of a grid");
    return static_cast<char*>(stack);
  }
  void give(const std::vector<char*>& used) {
    if (kMaxTsanThreads > 0) {
      for (char* stack : used) munmap(stack, kStackBytes);
    } else {
      std::lock_guard lock(mutex);
      stacks.insert(stacks.end(), used.begin(), used.end());
    }
  }
};
inline StackPool stack_pool;

// ---- A launch, a block, a warp, a thread ---------------------------------------------------------------------------

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;
  void (*run)(const void* arguments);
  const void* arguments;

  std::mutex mutex;
  std::condition_variable changed;
  int64_t arrived = 0, finished = 0, generation = 0;  // blocks at grid_sync
  char order[2] = {}, end = 0;                        // what `release` and `acquire` meet at
  std::vector<void*> tsan_fibers;

  int64_t blocks() const { return int64_t{grid.x} * grid.y * grid.z; }
  int threads() const { return static_cast<int>(block.x * block.y * block.z); }

  bool wait_for_grid() {
    std::unique_lock lock(mutex);
    const int64_t before = generation;
    if (++arrived == blocks()) {
      arrived = 0;
      ++generation;
      changed.notify_all();
    }
    changed.wait(lock, [&] { return generation != before || finished > 0; });
    return generation != before;
  }
  void finish_block() {
    std::lock_guard lock(mutex);
    ++finished;
    changed.notify_all();
  }
};

struct Call {
  const char* name;
  std::source_location where;
};
inline constexpr char kSyncWarp[] = "__syncwarp";
// Threads meet only if they came to one call at one place: what branches apart may not meet. The exception is __syncwarp.
inline bool same(const Call& a, const Call& b) {
  return a.name == b.name &&
         (a.name == kSyncWarp || (a.where.line() == b.where.line() && a.where.column() == b.where.column()));
}

// A warp collective, from its first lane's coming to its last lane's leaving.
struct Meeting {
  Call call;
  unsigned mask, expected, arrived, left;
  uint64_t value[kWarpSize];
};

// A lane is in one meeting at a time, so there are never more of them than lanes.
struct Warp {
  unsigned lanes = 0;  // those that exist: the last warp of a block may be partial
  unsigned open = 0, used = 0;
  Meeting meetings[kWarpSize];
};

enum class Status : uint8_t { kNew, kReady, kWaiting, kDone };

struct Fiber {
  Context context;
  char* stack;
  struct Block* block;
  Warp* warp;
  uint3 index;
  int lane;
  Status status;
  Call call;        // while it waits: where
  unsigned mask;    // and for which lanes; 0 is for the whole block
  unsigned active;  // what __activemask answers
  void *tsan_fiber, *asan_stack;
};

inline thread_local Fiber* current;
inline constexpr char kActiveMask[] = "__activemask", kGridSync[] = "grid_sync";

inline std::string text(const char* format, auto... values) {
  char buffer[512];
  snprintf(buffer, sizeof buffer, format, values...);
  return buffer;
}
inline std::string text(const Call& call, unsigned mask) {
  const std::string with = mask == 0 ? "" : text(" with mask 0x%08x", mask);
  return text("%s%s (%s:%u)", call.name, with.c_str(), call.where.file_name(), call.where.line());
}

// ---- Shared memory -------------------------------------------------------------------------------------------------

// A __shared__ variable is a static thread_local one. They are found among the symbols of the module that this header
// is compiled into, as offsets from `current`.
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
      if (strstr(&names[symbol.st_name], "15pygen_emulation7current") != nullptr) {
        anchor = static_cast<ptrdiff_t>(symbol.st_value);
      } else {
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
inline void put_red_zones() {
  for (const SharedVariable& variable : shared_variables()) {
    if (variable.size <= 48 << 10) __asan_poison_memory_region(address(variable) + variable.size, 256);
  }
}
#else
#define PYGEN_EMULATION_SHARED static thread_local
inline void put_red_zones() {}
#endif

// ---- Running a block -----------------------------------------------------------------------------------------------

inline void fiber_main();

struct Block {
  Launch& launch;
  uint3 index{};
  int threads, arrived = 0, trues = 0, result = 0, at_grid = 0, done = 0;
  unsigned barriers = 0, grid_barriers = 0;
  char order[2] = {};
  Call call{};  // of the barrier that threads are at
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  void* dynamic_shared = nullptr;
  std::vector<char*> stacks, free_stacks;
  // The worker's own side of a switch.
  Context context;
  void *tsan_fiber = nullptr, *asan_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;

  explicit Block(Launch& launch)
      : launch(launch), threads(launch.threads()), fibers(threads), warps((threads + kWarpSize - 1) / kWarpSize) {
    for (int i = 0; i < threads; ++i) {
      const unsigned n = static_cast<unsigned>(i), x = launch.block.x, y = launch.block.y;
      fibers[i].block = this;
      fibers[i].index = {n % x, n / x % y, n / x / y};
      fibers[i].lane = i % kWarpSize;
      fibers[i].warp = &warps[i / kWarpSize];
      fibers[i].warp->lanes |= 1u << fibers[i].lane;
    }
    // Of exactly this size, so that AddressSanitizer sees the first byte beyond it.
    if (launch.shared_bytes > 0 && posix_memalign(&dynamic_shared, 1024, launch.shared_bytes) != 0) {
      fail("no memory for %zu bytes of shared memory", launch.shared_bytes);
    }
    put_red_zones();
#ifdef __SANITIZE_THREAD__
    tsan_fiber = __tsan_get_current_fiber();
#endif
  }
  ~Block() {
    free(dynamic_shared);
    stack_pool.give(stacks);
  }
  Block(const Block&) = delete;

  void run(int64_t number) {
    const int64_t x = launch.grid.x, y = launch.grid.y;
    index = {unsigned(number % x), unsigned(number / x % y), unsigned(number / x / y)};
    done = 0;
    for (Fiber& fiber : fibers) fiber.status = Status::kNew;
    // Nobody may rely on what shared memory holds at first: NaN, and -1.
    for (const SharedVariable& variable : shared_variables()) memset(address(variable), 0xff, variable.size);
    if (dynamic_shared != nullptr) memset(dynamic_shared, 0xff, launch.shared_bytes);
    do {
      while (run_warps()) {
      }
    } while (answer_active_mask() || pass_grid_barrier());
    for (const Fiber& fiber : fibers) {
      if (fiber.status == Status::kWaiting) explain(fiber);
    }
    if (launch.cooperative) launch.finish_block();
  }

  // Runs each warp until all its lanes wait, before the next one: its stacks stay in the cache.
  bool run_warps() {
    bool any = false;
    for (int first = 0; first < threads; first += kWarpSize) {
      const int last = std::min(first + kWarpSize, threads);
      for (bool again = true; again;) {
        again = false;
        for (int i = first; i < last; ++i) {
          if (fibers[i].status > Status::kReady) continue;
          resume(fibers[i]);
          again = any = true;
        }
      }
    }
    return any;
  }

  // The lanes which are active together are those that came to one place when none can go further.
  bool answer_active_mask() {
    bool any = false;
    const auto asks = [](const Fiber& fiber) {
      return fiber.status == Status::kWaiting && fiber.call.name == kActiveMask;
    };
    for (Fiber& first : fibers) {
      if (!asks(first)) continue;
      any = true;
      unsigned active = 0;
      const auto together = [&](auto use) {
        for (Fiber* f = &first; f != fibers.data() + threads && f->warp == first.warp; ++f) {
          if (f == &first || (asks(*f) && same(f->call, first.call))) use(*f);
        }
      };
      together([&](Fiber& f) { active |= 1u << f.lane; });
      together([&](Fiber& f) { f.active = active, f.status = Status::kReady; });
    }
    return any;
  }

  bool pass_grid_barrier() {
    if (at_grid < threads) return false;
    for (const Fiber& fiber : fibers) {
      if (!same(fiber.call, fibers[0].call)) explain(fiber);
    }
    if (!launch.wait_for_grid()) {
      fail("%s waits at %s, and another block has ended", name(fibers[0]).c_str(), text(fibers[0].call, 0).c_str());
    }
    at_grid = 0;
    ++grid_barriers;
    wake_all();
    return true;
  }

  void wake_all() {
    for (Fiber& fiber : fibers) fiber.status = Status::kReady;
  }

  void start(Fiber& fiber) {
    if (free_stacks.empty()) {
      stacks.push_back(stack_pool.take());
      free_stacks.push_back(stacks.back());
    }
    fiber.stack = free_stacks.back();
    free_stacks.pop_back();
    // Tops at one place of every page would all fall into the same lines of the cache.
    const size_t color = reinterpret_cast<size_t>(fiber.stack) / kStackBytes % 16 * 256;
    prepare_context(fiber.context, fiber.stack, fiber.stack + kStackBytes - color, fiber_main);
#ifdef __SANITIZE_THREAD__
    fiber.tsan_fiber = __tsan_create_fiber(0);
    std::lock_guard lock(launch.mutex);
    launch.tsan_fibers.push_back(fiber.tsan_fiber);
#endif
  }

  void resume(Fiber& fiber) {
    if (fiber.status == Status::kNew) {
      start(fiber);
      fiber.status = Status::kReady;
    }
    current = &fiber;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&asan_stack, fiber.stack, kStackBytes);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    switch_context(context, fiber.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(asan_stack, nullptr, nullptr);
#endif
    if (fiber.status == Status::kDone) {
      ++done;
      if (kMaxTsanThreads == 0) free_stacks.push_back(fiber.stack);  // hot in the cache for the next thread
    }
  }

  // Back from a fibre to the worker; its counterpart is `resume`.
  void leave(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    const bool ends = fiber.status == Status::kDone;
    __sanitizer_start_switch_fiber(ends ? nullptr : &fiber.asan_stack, stack_bottom, stack_size);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    switch_context(fiber.context, context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber.asan_stack, &stack_bottom, &stack_size);
#endif
  }

  std::string name(const Fiber& fiber) const {
    const uint3 t = fiber.index;
    return text("thread (%u, %u, %u) of block (%u, %u, %u)", t.x, t.y, t.z, index.x, index.y, index.z);
  }

  [[noreturn]] void explain(const Fiber& waiting) const {
    std::string other = "another thread";
    for (const Fiber& fiber : fibers) {
      const bool wanted = waiting.mask == 0 || (fiber.warp == waiting.warp && waiting.mask >> fiber.lane & 1);
      const bool there =
          fiber.status == Status::kWaiting && same(fiber.call, waiting.call) && fiber.mask == waiting.mask;
      if (!wanted || there) continue;
      other = name(fiber) + (fiber.status == Status::kDone ? ", which has exited"
                             : fiber.status == Status::kWaiting
                                 ? ", which waits at " + text(fiber.call, fiber.mask)
                                 : ", which has gone elsewhere");
      break;
    }
    fail("%s waits at %s for %s", name(waiting).c_str(), text(waiting.call, waiting.mask).c_str(), other.c_str());
  }
};

inline void fiber_main() {
  Fiber& self = *current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &self.block->stack_bottom, &self.block->stack_size);
#endif
  self.block->launch.run(self.block->launch.arguments);
  release(&self.block->launch.end);
  {
    const Unseen unseen;
    self.status = Status::kDone;
  }
  self.block->leave(self);
}

// ---- What a thread waits at ----------------------------------------------------------------------------------------

// noipa: nothing may be assumed about memory across a switch.
[[gnu::noipa]] inline void wait(Fiber& self, const Call& call, unsigned mask) {
  self.call = call;
  self.mask = mask;
  self.status = Status::kWaiting;
  self.block->leave(self);
}

// __syncthreads; the answer is how many threads came with a predicate that is not 0. Two places to meet at alternate: a
// thread that is already on its way to the next barrier must not be in order with one that has yet to leave this one.
inline int barrier(const char* name, int predicate, std::source_location where) {
  const Unseen unseen;
  Fiber& self = *current;
  Block& block = *self.block;
  char* order = &block.order[block.barriers & 1];
  release(order);
  const Call call{name, where};
  block.trues += predicate != 0;
  if (block.arrived++ == 0) block.call = call;
  if (block.arrived < block.threads) {
    wait(self, call, 0);
  } else {
    for (const Fiber& fiber : block.fibers) {
      if (&fiber != &self && !same(fiber.call, call)) {
        self.call = call;
        self.mask = 0;
        self.status = Status::kWaiting;
        block.explain(self);
      }
    }
    block.result = block.trues;
    block.arrived = block.trues = 0;
    ++block.barriers;
    block.wake_all();
  }
  acquire(order);
  return block.result;
}

inline void grid_barrier(std::source_location where) {
  const Unseen unseen;
  Fiber& self = *current;
  Launch& launch = self.block->launch;
  const Call call{kGridSync, where};
  if (!launch.cooperative) fail("%s in a launch that is not cooperative", text(call, 0).c_str());
  char* order = &launch.order[self.block->grid_barriers & 1];
  release(order);
  ++self.block->at_grid;
  wait(self, call, 0);
  acquire(order);
}

inline unsigned active_mask(std::source_location where) {
  const Unseen unseen;
  Fiber& self = *current;
  wait(self, {kActiveMask, where}, 1u << self.lane);
  return self.active;
}

// The lanes of `mask` each bring a value; each leaves with answer(the meeting, its lane). Only __syncwarp orders memory:
// CUDA promises nothing of the kind for shuffles and votes.
template <class Answer>
auto collective(const char* name, unsigned mask, uint64_t value, std::source_location where, Answer answer) {
  const Unseen unseen;
  Fiber& self = *current;
  Warp& warp = *self.warp;
  const Call call{name, where};
  const unsigned me = 1u << self.lane;
  if ((mask & me) == 0) {
    fail("%s calls %s, which does not name its lane %d", self.block->name(self).c_str(), text(call, mask).c_str(),
         self.lane);
  }
  Meeting* meeting = nullptr;
  for (unsigned open = warp.open; open != 0 && meeting == nullptr; open &= open - 1) {
    Meeting& candidate = warp.meetings[std::countr_zero(open)];
    if (candidate.mask == mask && same(candidate.call, call)) meeting = &candidate;
  }
  if (meeting == nullptr) {
    meeting = &warp.meetings[std::countr_one(warp.used)];
    meeting->call = call;
    meeting->mask = mask;
    meeting->expected = mask & warp.lanes;
    meeting->arrived = meeting->left = 0;
    warp.open |= 1u << (meeting - warp.meetings);
    warp.used |= 1u << (meeting - warp.meetings);
  }
  const bool orders = name == kSyncWarp;
  if (orders) release(meeting);
  meeting->value[self.lane] = value;
  meeting->arrived |= me;
  if (meeting->arrived != meeting->expected) {
    wait(self, call, mask);
  } else {
    warp.open &= ~(1u << (meeting - warp.meetings));
    Fiber* lane0 = &self - self.lane;
    for (unsigned lanes = meeting->expected; lanes != 0; lanes &= lanes - 1) {
      lane0[std::countr_zero(lanes)].status = Status::kReady;
    }
  }
  if (orders) acquire(meeting);
  auto result = answer(static_cast<const Meeting&>(*meeting), self.lane);
  meeting->left |= me;
  if (meeting->left == meeting->expected) warp.used &= ~(1u << (meeting - warp.meetings));
  return result;
}

template <class T, class Source>
T shuffle(const char* name, unsigned mask, T value, std::source_location where, Source source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 32 and 64 bits");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = collective(name, mask, bits, where, [&](const Meeting& meeting, int lane) {
    const int from = source(lane);
    if ((meeting.expected >> from & 1) == 0) {
      fail("%s reads lane %d, which is not there, at %s", current->block->name(*current).c_str(), from,
           text(meeting.call, mask).c_str());
    }
    return meeting.value[from];
  });
  memcpy(&value, &bits, sizeof value);
  return value;
}

struct Vote {
  unsigned ballot, expected;
};
inline Vote vote(const char* name, unsigned mask, int predicate, std::source_location where) {
  return collective(name, mask, predicate != 0, where, [](const Meeting& meeting, int) {
    Vote vote{0, meeting.expected};
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (meeting.expected >> lane & 1) vote.ballot |= static_cast<unsigned>(meeting.value[lane]) << lane;
    }
    return vote;
  });
}

// ---- Launching -----------------------------------------------------------------------------------------------------

inline void check(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const int64_t blocks = launch.blocks(), threads = int64_t{block.x} * block.y * block.z;
  const std::string shape = text("<<<(%u, %u, %u), (%u, %u, %u), %zu>>>", grid.x, grid.y, grid.z, block.x, block.y,
                                 block.z, launch.shared_bytes);
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) fail("%s: no such grid", shape.c_str());
  if (threads == 0 || threads > 1024 || block.z > 64) fail("%s: no such block", shape.c_str());
  if (launch.shared_bytes > kMaxDynamicShared) fail("%s: no such shared memory", shape.c_str());
  if (launch.cooperative && (blocks > kMaxResidentBlocks || blocks * threads > kMaxResidentThreads)) {
    fail("%s: a cooperative grid may have %ld blocks and %ld threads here", shape.c_str(), kMaxResidentBlocks,
         kMaxResidentThreads);
  }
  if (kMaxTsanThreads > 0 && blocks * threads > kMaxTsanThreads) {
    fail("%s: a grid may have %ld threads under ThreadSanitizer", shape.c_str(), kMaxTsanThreads);
  }
}

inline void run(Launch& launch) {
  check(launch);
  std::vector<std::thread> workers;
  if (launch.cooperative || kMaxTsanThreads > 0) {
    // An OS thread for each block: at once if they wait for each other, else in turn, for ThreadSanitizer knows a new
    // thread's shared memory to be new.
    for (int64_t number = 0; number < launch.blocks(); ++number) {
      workers.emplace_back([&launch, number] {
        const Unseen unseen;
        Block(launch).run(number);
      });
      if (!launch.cooperative) workers.back().join();
    }
    if (!launch.cooperative) workers.clear();
  } else {
    std::atomic<int64_t> next = 0;
    const auto work = [&] {
      Block block(launch);
      for (int64_t number; (number = next++) < launch.blocks();) block.run(number);
    };
    const int64_t count = std::min<int64_t>(launch.blocks(), std::max(1u, std::thread::hardware_concurrency()));
    for (int64_t i = 1; i < count; ++i) workers.emplace_back(work);
    work();
    for (std::thread& worker : workers) worker.join();
    workers.clear();
  }
  for (std::thread& worker : workers) worker.join();
#ifdef __SANITIZE_THREAD__
  for (void* fiber : launch.tsan_fibers) __tsan_destroy_fiber(fiber);
#endif
  acquire(&launch.end);  // a launch is over when it returns, as if its stream had been waited for
}

template <bool kCooperative, class... P, class... A>
void launch_kernel(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A&&... arguments) {
  static_assert((std::is_trivially_copyable_v<P> && ...) && (sizeof(P) + ... + 0) <= 4096, "CUDA passes 4 KB by value");
  struct Packed {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } const packed{kernel, {static_cast<P>(arguments)...}};
  const auto call = [](const void* opaque) {
    const Packed& packed = *static_cast<const Packed*>(opaque);
    std::apply(packed.kernel, packed.arguments);
  };
  Launch launch{.grid = grid, .block = block, .shared_bytes = shared_bytes, .cooperative = kCooperative, .run = call,
                .arguments = &packed};
  run(launch);
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A&&... arguments) {
  launch_kernel<false>(kernel, grid, block, shared_bytes, arguments...);
}

// All blocks are resident and may meet at grid_sync.
template <class... P, class... A>
void launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A&&... arguments) {
  launch_kernel<true>(kernel, grid, block, shared_bytes, arguments...);
}

}  // namespace pygen_emulation
