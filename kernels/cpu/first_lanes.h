// What is left of a row behind its last whole vector, and dtypes as constants.
#pragma once

#include <algorithm>

#include "pygen/lanes.h"

namespace pygen {
namespace {

// The first `count` of kLanes neighbours; the others are 0.
template <DType kDType>
PYGEN_INLINE F32 load_first(const char* from, int count) {
  if (count >= kLanes) [[likely]]
    return load<kDType>(from);
  char copy[kLanes * size_of(kDType)] = {};
  std::memcpy(copy, from, std::max(count, 0) * size_of(kDType));
  return load<kDType>(copy);
}
template <DType kDType>
PYGEN_INLINE void store_first(char* to, F32 value, int count) {
  if (count >= kLanes) [[likely]]
    return store<kDType>(to, value);
  char copy[kLanes * size_of(kDType)];
  store<kDType>(copy, value);
  std::memcpy(to, copy, std::max(count, 0) * size_of(kDType));
}

// Calls visit with a dtype of floats as a constant.
template <class Visit>
PYGEN_INLINE void with_dtype(DType dtype, Visit visit) {
  if (dtype == DType::kFloat32) return visit(std::integral_constant<DType, DType::kFloat32>{});
  if (dtype == DType::kBFloat16) return visit(std::integral_constant<DType, DType::kBFloat16>{});
  return visit(std::integral_constant<DType, DType::kFloat16>{});
}

}  // namespace
}  // namespace pygen
