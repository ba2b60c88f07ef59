// Half precision by integers, for lanes that have no instruction for it. U holds the 16 bits in 32.
#pragma once

#include <cstdint>

#include "pygen/operand.h"

namespace pygen {
namespace {

// Shift into place, then rescale the exponent by an exact product.
template <class U>
PYGEN_INLINE auto half_to_float(U half) {
  const U magnitude = (half & 0x7fffu) << 13;
  const U finite = to_unsigned(from_unsigned(magnitude) * 0x1p112f);
  const U value = select(magnitude >= 0x7c00u << 13, magnitude | 0x7f800000u, finite);
  return from_unsigned(value | (half & 0x8000u) << 16);
}

// To nearest even: subnormal halves by adding 1/2, whose last bit is theirs; the others by integers.
template <class F>
PYGEN_INLINE auto float_to_half(F value) {
  const auto all = to_unsigned(value);
  const auto magnitude = all & 0x7fffffffu;
  const auto zero = all ^ all;
  const auto tiny = to_unsigned(from_unsigned(magnitude) + 0.5f) - 0x3f000000u;
  const auto rounded = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  auto half = select(magnitude < 0x38800000u, tiny, rounded);
  half = select(magnitude >= 0x47800000u, zero + 0x7c00u, half);
  half = select(magnitude > 0x7f800000u, zero + 0x7e00u, half);
  return half | (all >> 16 & 0x8000u);
}

// To nearest even; NaN becomes the quiet one.
template <class F>
PYGEN_INLINE auto float_to_bfloat16(F value) {
  const auto all = to_unsigned(value);
  const auto rounded = (all + 0x7fffu + (all >> 16 & 1u)) >> 16;
  return select(value != value, (all ^ all) + 0x7fc0u, rounded);
}

}  // namespace
}  // namespace pygen
