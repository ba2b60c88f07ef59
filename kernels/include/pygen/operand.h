// What every kernel argument is made of: plain data, strides counted in elements, no torch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PYGEN_INLINE __device__ __forceinline__
#else
#define PYGEN_INLINE inline __attribute__((always_inline))
#endif

namespace pygen {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kBool, kInt8 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kBool || dtype == DType::kInt8 ? 1 : 2;
}

inline constexpr int kMaxDims = 8;

// One tensor seen through the kernel's iteration space. `data == nullptr` says that it is absent.
struct Operand {
  void* data;
  int64_t stride[kMaxDims];
  DType dtype;
};

}  // namespace pygen
