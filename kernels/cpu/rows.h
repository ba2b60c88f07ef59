// Rows of elements of any dtype and stride, as whole vectors of floats.
#pragma once

#include "strips.h"

namespace pygen {
namespace {

// The first `count` elements, fewer than a vector's, and 0 behind.
template <DType kDType>
PYGEN_INLINE F32 load_first(const char* from, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (kDType == DType::kFloat32) {  // what was written piece by piece would be waited for to be read whole
    return bits<F32>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
  }
#endif
  alignas(64) char padded[kLanes * size_of(kDType)] = {};
  std::memcpy(padded, from, count * size_of(kDType));
  return load<kDType>(padded);
}

// Widens `count` elements, at most kMost less a vector, from `offset` on; 0 up to a whole vector.
template <int64_t kMost>
void widen(float* to, const Operand& operand, int64_t offset, int64_t stride, int64_t count) {
  const int64_t size = size_of(operand.dtype);
  const char* from = static_cast<const char*>(operand.data) + offset * size;
  alignas(64) char copy[kMost * sizeof(float)];
  if (stride != 1) {
    copy_elements(copy, 1, from, stride, count, size);
    from = copy;
  }
  const auto run = [&](auto dtype) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const F32 v = load<dtype.value>(from + i * size_of(dtype.value));
      std::memcpy(to + i, &v, sizeof v);
    }
    if (i == count) return;
    const F32 v = load_first<dtype.value>(from + i * size_of(dtype.value), count - i);
    std::memcpy(to + i, &v, sizeof v);
  };
  switch (operand.dtype) {
    case DType::kFloat32:
      return run(std::integral_constant<DType, DType::kFloat32>{});
    case DType::kBFloat16:
      return run(std::integral_constant<DType, DType::kBFloat16>{});
    case DType::kFloat16:
      return run(std::integral_constant<DType, DType::kFloat16>{});
    default:
      return run(std::integral_constant<DType, DType::kBool>{});
  }
}

// Rounds `count` floats, up to a whole vector, at most kMost, to `dtype`, and stores `count` elements.
template <int64_t kMost>
void narrow_to(const Operand& operand, int64_t offset, int64_t stride, const float* from, int64_t count) {
  const int64_t size = size_of(operand.dtype), whole = stride == 1 ? count / kLanes * kLanes : 0;
  char* const to = static_cast<char*>(operand.data) + offset * size;
  alignas(64) char copy[(kMost + kLanes) * sizeof(float)];
  const auto run = [&](auto dtype) {
    for (int64_t i = 0; i < count; i += kLanes) {
      store<dtype.value>((i < whole ? to : copy) + i * size_of(dtype.value), load_bytes<F32>(from + i));
    }
  };
  switch (operand.dtype) {
    case DType::kFloat32:
      run(std::integral_constant<DType, DType::kFloat32>{});
      break;
    case DType::kBFloat16:
      run(std::integral_constant<DType, DType::kBFloat16>{});
      break;
    default:
      run(std::integral_constant<DType, DType::kFloat16>{});
  }
  copy_elements(to + whole * stride * size, stride, copy + whole * size, 1, count - whole, size);
}

}  // namespace
}  // namespace pygen
