#include "program.h"

#include <c10/util/Exception.h>
#include <immintrin.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

namespace pygen {
namespace {

thread_local Program* g_recording = nullptr;

using Launches = std::vector<std::unique_ptr<const Launch>>;

// Threads that replay programs. Nobody waits for a thread that holds no work: a launch's chunks are claimed one by one,
// and whoever ends the last one opens the next launch. A thread that the system has put aside is missed, not awaited.
class Pool {
 public:
  // The process's own: a forked child has no threads but the one that called fork, and begins anew.
  static Pool& get() {
    static std::mutex mutex;
    static Pool* pool = nullptr;
    const std::lock_guard lock(mutex);
    if (pool == nullptr || pool->process_ != getpid()) pool = new Pool;
    return *pool;
  }

  void replay(const Launches& launches, int threads) {
    const std::lock_guard lock(turn_);
    threads = std::clamp(threads, 1, kMostThreads);
    for (; workers_ < threads - 1; ++workers_) std::thread([this, id = workers_] { work(id); }).detach();
    launches_ = &launches, next_ = 0, threads_ = threads;
    finished_.store(false, std::memory_order_relaxed);
    if (threads > 1) {
      wanted_.store(threads - 1, std::memory_order_relaxed);
      calls_.fetch_add(1, std::memory_order_seq_cst);
      if (asleep_.load(std::memory_order_seq_cst) > 0) calls_.notify_all();
    }
    open_next();
    take_chunks();
    wanted_.store(0, std::memory_order_relaxed);
  }

 private:
  static constexpr auto kAwake = std::chrono::microseconds(500);  // between a program and the next
  static constexpr int kShares = 4;                               // chunks per thread, so that none waits long
  static constexpr int kBits = 12;                                // of a ticket's numbers of chunks
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
  static constexpr int kMostThreads = kMask / kShares;

  // Opens the next launch that is worth sharing. What is one chunk is run at once: to hand it to another thread would
  // cost more than it brings. Called by one thread at a time, when no chunk is left.
  void open_next() {
    for (; next_ < launches_->size(); ++next_) {
      launch_ = (*launches_)[next_].get();
      count_ = launch_->count();
      const int64_t most = std::min<int64_t>(threads_ * kShares, (count_ + launch_->grain - 1) / launch_->grain);
      if (threads_ == 1 || most <= 1) {
        if (count_ > 0) launch_->run(0, count_);
        continue;
      }
      ++next_;
      size_ = (count_ + most - 1) / most;
      const uint64_t chunks = (count_ + size_ - 1) / size_;
      left_.store(static_cast<int64_t>(chunks), std::memory_order_relaxed);
      const uint64_t number = ticket_.load(std::memory_order_relaxed) >> 2 * kBits;
      ticket_.store((number + 1) << 2 * kBits | chunks << kBits, std::memory_order_release);
      return;
    }
    finished_.store(true, std::memory_order_release);
  }

  // Until the program ends.
  void take_chunks() {
    for (int idle = 0; !finished_.load(std::memory_order_acquire);) {
      uint64_t ticket = ticket_.load(std::memory_order_relaxed);
      const uint64_t chunk = ticket & kMask, chunks = ticket >> kBits & kMask;
      if (chunk == chunks || !ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acquire)) {
        _mm_pause();
        if (++idle % 4096 == 0) std::this_thread::yield();  // whoever holds the last chunk may want this core
        continue;
      }
      const int64_t begin = static_cast<int64_t>(chunk) * size_;
      launch_->run(begin, std::min(begin + size_, count_));
      if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) open_next();
    }
  }

  void work(int id) {
    for (uint32_t seen = 0;;) {
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 1; calls_.load(std::memory_order_acquire) == seen; ++i) {
        _mm_pause();
        if (i % 64 != 0 || std::chrono::steady_clock::now() - begin < kAwake) continue;
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        calls_.wait(seen, std::memory_order_seq_cst);
        asleep_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = calls_.load(std::memory_order_acquire);
      if (id < wanted_.load(std::memory_order_relaxed)) take_chunks();
    }
  }

  const pid_t process_ = getpid();
  std::mutex turn_;
  int workers_ = 0;

  // Of the program, for who opens launches.
  const Launches* launches_ = nullptr;
  size_t next_ = 0;
  int threads_ = 1;

  // Of the launch: written by who opens it, read by who holds a chunk.
  const Launch* launch_ = nullptr;
  int64_t count_ = 0, size_ = 1;
  alignas(64) std::atomic<uint64_t> ticket_{0};  // its number, how many chunks it has, how many are claimed
  alignas(64) std::atomic<int64_t> left_{0};     // chunks that have not ended

  alignas(64) std::atomic<bool> finished_{true};
  std::atomic<uint32_t> calls_{0};  // of replay, for which workers wait
  std::atomic<int> asleep_{0}, wanted_{0};
};

}  // namespace

Program* Program::recording() { return g_recording; }

void Program::start() {
  TORCH_CHECK(g_recording == nullptr, "this thread is recording a program already");
  g_recording = this;
}

void Program::stop() { g_recording = nullptr; }

void Program::replay(int threads) const { Pool::get().replay(launches_, threads); }

}  // namespace pygen
