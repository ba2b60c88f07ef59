// A program: what a function of ops launches on the CPU, recorded once, and replayed without Python, checks or
// allocations by threads that stay warm. (On a GPU a program is a CUDA graph.)
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace pygen {

// Work that threads share: whatever the parts it is cut into, the results are the same.
struct Launch {
  explicit Launch(int64_t grain) : grain(grain) {}
  virtual ~Launch() = default;
  virtual int64_t count() const = 0;  // of units; asked at each replay, since it may depend on what lies in memory
  virtual void run(int64_t begin, int64_t end) const = 0;
  const int64_t grain;  // the units that are worth a thread
};

template <class Body, class Count>
struct LaunchOf final : Launch {
  LaunchOf(Body body, Count counted, int64_t grain) : Launch(grain), body(std::move(body)), counted(counted) {}
  int64_t count() const override {
    if constexpr (std::is_invocable_v<Count>) {
      return counted();
    } else {
      return counted;
    }
  }
  void run(int64_t begin, int64_t end) const override { body(begin, end); }
  const Body body;
  const Count counted;
};

class Program {
 public:
  // The program that takes this thread's launches, or null.
  static Program* recording();

  // Between these, this thread's ops launch nothing, but add to the program.
  void start();
  void stop();
  void add(std::unique_ptr<const Launch> launch) { launches_.push_back(std::move(launch)); }
  void keep(at::Tensor tensor) { kept_.push_back(std::move(tensor)); }

  size_t size() const { return launches_.size(); }

  // Runs the launches in their order, each on up to so many threads. Programs that several threads replay take turns.
  void replay(int threads) const;

 private:
  std::vector<std::unique_ptr<const Launch>> launches_;
  std::vector<at::Tensor> kept_;  // memory that launches use and nobody else holds
};

}  // namespace pygen
