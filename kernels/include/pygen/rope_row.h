// The arithmetic of rope and cache_append, once, for a CPU's vectors and for a GPU thread's numbers.
#pragma once

#include "pygen/lanes.h"

namespace pygen {
namespace {

// (x, y) turned by an angle.
template <class F>
PYGEN_INLINE void rope_pair(F& x, F& y, F cosine, F sine) {
  const F turned = fma(x, cosine, -(y * sine));
  y = fma(x, sine, y * cosine);
  x = turned;
}

// The square of element i is added to sum i % kNormSums, then they by halves.
inline constexpr int kNormSums = 32;

// What an RMSNorm multiplies `count` numbers by, from the sum of their squares.
template <class F>
PYGEN_INLINE F rms_factor(F squares, int count, float eps) {
  const F mean = squares / splat(static_cast<float>(count), squares);
  return splat(1.0f, squares) / sqrt(mean + splat(eps, squares));
}

// How a head is quantised whose largest magnitude is `most`: value = scale * int8. It becomes zeros (`inverse` = 0)
// where it is too small for 1 / scale, or not finite: then the scale makes NaN of them.
struct Int8Scale {
  float scale, inverse;
  PYGEN_INLINE explicit Int8Scale(float most)
      : scale(most < 0x1p-120f ? 0.0f : most / 127.0f),
        inverse(most >= 0x1p-120f && most < __builtin_inff() ? 127.0f / most : 0.0f) {}
};

// The nearest int8, to even, in the last byte.
template <class F>
PYGEN_INLINE auto int8_bits(F value, float inverse) {
  return to_unsigned(value * splat(inverse, value) + splat(0x1.8p23f, value));
}

}  // namespace
}  // namespace pygen
