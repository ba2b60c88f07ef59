// Runs a grid on the host. A block has an OS thread to itself while it runs, and each of its CUDA threads is a fibre
// that runs until it waits at a barrier, a warp collective or grid_sync; when no fibre of a block can go on, the kernel
// is wrong, and `explain` says who waits for whom. emulation.h gives these things the names that they have in CUDA.
//
// The sanitizers see each CUDA thread as a thread of its own. ThreadSanitizer learns an order between two of them only
// where CUDA promises one, so a missing barrier is a data race even though nothing here runs at the same time.
#pragma once

#include <algorithm>
#include <bit>
#include <condition_variable>
#include <source_location>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulation_machine.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace pygen_emulation {

inline constexpr int kWarpSize = 32;
inline constexpr size_t kMaxDynamicShared = 227 << 10;  // of an sm_90 block
inline constexpr int64_t kMaxResidentBlocks = 256;      // a cooperative launch holds an OS thread for each
inline constexpr int64_t kMaxResidentThreads = 16384;   // and a stack for each of their threads

// ---- A launch, a block, a warp, a thread ---------------------------------------------------------------------------

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;
  void (*run)(const void* arguments);
  const void* arguments;

  std::mutex mutex{};
  std::condition_variable changed{};
  int64_t arrived = 0, finished = 0, generation = 0;  // blocks at grid_sync
  char order[2] = {}, end = 0;                        // what `release` and `acquire` meet at
  std::vector<Strand> used_strands{};

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
  void finish(const std::vector<Strand>& strands) {
    std::lock_guard lock(mutex);
    used_strands.insert(used_strands.end(), strands.begin(), strands.end());
    ++finished;
    changed.notify_all();
  }
};

struct Call {
  const char* name;
  std::source_location where;
};
inline constexpr char kSyncWarp[] = "__syncwarp";
// Threads meet only if they came to one call at one place, as those that diverged did not; __syncwarp lets them.
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
  Strand strand;
  struct Block* block;
  Warp* warp;
  uint3 index;
  int lane;
  Status status;
  Call call;        // while it waits: where
  unsigned mask;    // and for which lanes; 0 is for the whole block
  unsigned active;  // what __activemask answers
  void* asan_stack;
};

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

// ---- Running a block -----------------------------------------------------------------------------------------------

inline void fiber_main();

struct Block {
  Launch& launch;
  uint3 index{};
  int threads, arrived = 0, trues = 0, result = 0, at_grid = 0;
  unsigned barriers = 0, grid_barriers = 0;
  char order[2] = {}, begin = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  void* dynamic_shared = nullptr;
  std::vector<Strand> strands, free_strands;
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
    release(&begin);
  }
  ~Block() {
    remove_red_zones();
    free(dynamic_shared);
  }
  Block(const Block&) = delete;

  void run(int64_t number) {
    const int64_t x = launch.grid.x, y = launch.grid.y;
    index = {unsigned(number % x), unsigned(number / x % y), unsigned(number / x / y)};
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
    if (free_strands.empty()) {
      strands.push_back(strand_pool.take());
      free_strands.push_back(strands.back());
    }
    fiber.strand = free_strands.back();
    free_strands.pop_back();
    char* stack = fiber.strand.stack;
    // Tops at one place of every page would all fall into the same lines of the cache.
    const size_t color = reinterpret_cast<size_t>(stack) / kStackBytes % 16 * 256;
    prepare_context(fiber.context, stack, stack + kStackBytes - color, fiber_main);
#ifdef __SANITIZE_THREAD__
    __tsan_set_fiber_name(fiber.strand.tsan_fiber, name(fiber).c_str());
#endif
  }

  void resume(Fiber& fiber) {
    if (fiber.status == Status::kNew) {
      start(fiber);
      fiber.status = Status::kReady;
    }
    current = &fiber;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&asan_stack, fiber.strand.stack, kStackBytes);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(fiber.strand.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    switch_context(context, fiber.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(asan_stack, nullptr, nullptr);
#endif
    // Hot in the cache for the next thread; but ThreadSanitizer would take the two for one.
    if (fiber.status == Status::kDone && kMaxTsanThreads == 0) free_strands.push_back(fiber.strand);
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
      other = name(fiber) + (fiber.status == Status::kDone      ? ", which has exited"
                             : fiber.status == Status::kWaiting ? ", which waits at " + text(fiber.call, fiber.mask)
                                                                : ", which has gone elsewhere");
      break;
    }
    fail("%s waits at %s for %s", name(waiting).c_str(), text(waiting.call, waiting.mask).c_str(), other.c_str());
  }
};

inline Fiber& begin_fiber() {
  const Unseen unseen;
  acquire(&current->block->begin);
  return *current;
}

inline void fiber_main() {
  Fiber& self = begin_fiber();
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
  if (++block.arrived < block.threads) {
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

// The lanes of `mask` each bring a value; each leaves with answer(the meeting, its lane). Only __syncwarp orders
// memory: CUDA promises nothing of the kind for shuffles and votes.
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
      fail("%s reads lane %d, which takes no part, at %s", current->block->name(*current).c_str(), from,
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
  std::atomic<int64_t> next = 0;
  // Runs `count` blocks, or as many as are left.
  const auto work = [&](int64_t count) {
    const Unseen unseen;
    Block block(launch);
    for (int64_t number; count > 0 && (number = next++) < launch.blocks(); --count) block.run(number);
    launch.finish(block.strands);
  };
  std::vector<std::thread> workers;
  if (launch.cooperative) {
    for (int64_t i = 0; i < launch.blocks(); ++i) workers.emplace_back(work, 1);
  } else if (kMaxTsanThreads > 0) {
    // To ThreadSanitizer a new OS thread's shared memory is new, so a block's is in no race with another's.
    for (int64_t i = 0; i < launch.blocks(); ++i) std::thread(work, 1).join();
  } else {
    const int64_t count = std::min<int64_t>(launch.blocks(), std::max(1u, std::thread::hardware_concurrency()));
    for (int64_t i = 1; i < count; ++i) workers.emplace_back(work, launch.blocks());
    work(launch.blocks());
  }
  for (std::thread& worker : workers) worker.join();
  strand_pool.give(launch.used_strands);
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
    [&]<size_t... i>(std::index_sequence<i...>) {
      packed.kernel(std::get<i>(packed.arguments)...);
    }(std::index_sequence_for<P...>{});
  };
  Launch launch{grid, block, shared_bytes, kCooperative, call, &packed};
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
