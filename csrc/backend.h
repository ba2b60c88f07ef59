// Where an op's launch goes. The sources in csrc are compiled for torch's CPU (and, where torch has CUDA and nvcc is
// found, for its GPU); the tests compile them once more as the library `pygen_emulation`, whose ops take CPU tensors
// and run the CUDA kernels on the host.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#if defined(PYGEN_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace pygen {

struct Cpu {
  static constexpr bool kHostCanRead = true;  // what the kernel reads through pointers can be checked before
  explicit Cpu(const at::Tensor&) {}
};

#if defined(PYGEN_CUDA)
struct Gpu {
  static constexpr bool kHostCanRead = false;
  explicit Gpu(const at::Tensor& tensor) : guard(tensor.device()) {}
  template <class Args>
  void run(void (*launch)(const Args&, void*), const Args& args) const {
    launch(args, c10::cuda::getCurrentCUDAStream().stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  c10::cuda::CUDAGuard guard;
};
#elif defined(PYGEN_EMULATION)
struct Gpu {
  static constexpr bool kHostCanRead = true;
  explicit Gpu(const at::Tensor&) {}
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
