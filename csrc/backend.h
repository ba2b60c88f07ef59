// Where an op's launch goes. The sources in csrc are compiled for torch's CPU (and, where torch has CUDA and nvcc is
// found, for its GPU); the tests compile them once more as the library `pygen_emulation`, whose ops take CPU tensors
// and run the CUDA kernels on the host.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>

#include "program.h"

#if defined(PYGEN_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace pygen {

struct Cpu {
  explicit Cpu(const at::Tensor&) {}

  // Whether what kernels read through pointers can be checked before. What a program will read is yet to come.
  static bool host_can_read() { return Program::recording() == nullptr; }

  // Shares body(begin, end) over [0, count) among threads, at least `grain` to each; a program that is being recorded
  // takes it instead. `count` is a number, or a function where the number lies in memory.
  template <class Body, class Count>
  void run(Body body, Count count, int64_t grain) const {
    if (program != nullptr) {
      program->add(std::make_unique<LaunchOf<Body, Count>>(std::move(body), std::move(count), grain));
    } else if constexpr (std::is_invocable_v<Count>) {
      at::parallel_for(0, count(), grain, body);
    } else {
      at::parallel_for(0, count, grain, body);
    }
  }
  template <class Args, class Count>
  void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, Count count, int64_t grain) const {
    run([kernel, args](int64_t begin, int64_t end) { kernel(args, begin, end); }, std::move(count), grain);
  }

  // The same, cut at multiples of 1024 elements.
  template <class Args>
  void run_elements(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t count,
                    int64_t grain) const {
    constexpr int64_t unit = 1024;
    const auto body = [kernel, args, count](int64_t begin, int64_t end) {
      kernel(args, begin * unit, std::min(end * unit, count));
    };
    run(body, (count + unit - 1) / unit, grain / unit);
  }

  void fill(const at::Tensor& tensor, double value) const {
    run([tensor, value](int64_t, int64_t) { tensor.fill_(value); }, 1, 1);
  }

  // Memory that the launches use lives as long as they may run.
  void keep(const at::Tensor& tensor) const {
    if (program != nullptr) program->keep(tensor);
  }

  Program* const program = Program::recording();
};

#if defined(PYGEN_CUDA)
struct Gpu {
  static bool host_can_read() { return false; }
  explicit Gpu(const at::Tensor& tensor) : guard(tensor.device()) {}
  void fill(const at::Tensor& tensor, double value) const { tensor.fill_(value); }
  void keep(const at::Tensor&) const {}  // a captured graph owns the memory of its pool
  template <class Args>
  void run(void (*launch)(const Args&, void*), const Args& args) const {
    launch(args, c10::cuda::getCurrentCUDAStream().stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  c10::cuda::CUDAGuard guard;
};
#elif defined(PYGEN_EMULATION)
struct Gpu {
  static bool host_can_read() { return true; }
  explicit Gpu(const at::Tensor&) {}
  void fill(const at::Tensor& tensor, double value) const { tensor.fill_(value); }
  void keep(const at::Tensor&) const {}
  template <class Args>
  void run(void (*launch)(const Args&, void*), const Args& args) const {
    launch(args, nullptr);
  }
};
#endif

}  // namespace pygen

// Declares an op whose implementation is the template `implementation<Backend>`.
#define PYGEN_DEFINE(LIBRARY, schema) \
  TORCH_LIBRARY_FRAGMENT(LIBRARY, library) { library.def(schema, {at::Tag::pt2_compliant_tag}); }
#define PYGEN_IMPLEMENT(LIBRARY, key, name, implementation) \
  TORCH_LIBRARY_IMPL(LIBRARY, key, library) { library.impl(name, &implementation); }
#if defined(PYGEN_EMULATION)
#define PYGEN_OP(name, implementation, schema) \
  PYGEN_DEFINE(pygen_emulation, name schema)   \
  PYGEN_IMPLEMENT(pygen_emulation, CPU, name, implementation<Gpu>)
#elif defined(PYGEN_CUDA)
#define PYGEN_OP(name, implementation, schema)           \
  PYGEN_DEFINE(pygen, name schema)                       \
  PYGEN_IMPLEMENT(pygen, CPU, name, implementation<Cpu>) \
  PYGEN_IMPLEMENT(pygen, CUDA, name, implementation<Gpu>)
#else
#define PYGEN_OP(name, implementation, schema) \
  PYGEN_DEFINE(pygen, name schema)             \
  PYGEN_IMPLEMENT(pygen, CPU, name, implementation<Cpu>)
#endif

// The same for an op without CUDA C++, which the emulation leaves out: its kernel for CUDA, if any, is Triton's.
#if defined(PYGEN_EMULATION)
#define PYGEN_CPU_OP(name, implementation, schema)
#else
#define PYGEN_CPU_OP(name, implementation, schema) \
  PYGEN_DEFINE(pygen, name schema)                 \
  PYGEN_IMPLEMENT(pygen, CPU, name, implementation)
#endif
