// Rows of elements of any dtype and stride, as whole vectors of floats.
#pragma once

#include "strips.h"

namespace pygen {
namespace {

// Widens `count` elements, at most kMost less a vector, from `offset` on; 0 up to a whole vector.
template <int64_t kMost>
void widen(float* to, const Operand& operand, int64_t offset, int64_t stride, int64_t count) {
  const int64_t size = size_of(operand.dtype);
  const char* from = static_cast<const char*>(operand.data) + offset * size;
  alignas(64) char copy[(kMost + kLanes) * sizeof(float)];
  if (stride != 1 || count % kLanes != 0) {
    copy_elements(copy, 1, from, stride, count, size);
    std::memset(copy + count * size, 0, kLanes * size);
    from = copy;
  }
  const auto run = [&](auto dtype) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const F32 v = load<dtype.value>(from + i * size_of(dtype.value));
      std::memcpy(to + i, &v, sizeof v);
    }
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
