// The sine and the cosine of small angles, once, for a CPU's vectors and for a GPU thread's numbers.
#pragma once

#include "pygen/lanes.h"

namespace pygen {

// Of +- pi/4 at most.
template <class F>
PYGEN_INLINE void sine_cosine(F angle, F& sine, F& cosine) {
  const F one = splat(1.0f, F{});
  const F a2 = angle * angle;
  F s = fma(splat(-0.000195152839f, one), a2, splat(0.0083321603f, one));
  s = fma(s, a2, splat(-0.166666552f, one));
  sine = fma(s, a2 * angle, angle);
  F c = fma(splat(2.44331568e-05f, one), a2, splat(-0.00138873165f, one));
  c = fma(c, a2, splat(0.0416666456f, one));
  cosine = fma(c, a2 * a2, fma(a2, splat(-0.5f, one), one));
}

// Turned on by so many quarters.
template <class F, class U>
PYGEN_INLINE void turn_quarters(U quadrant, F& sine, F& cosine) {
  const auto odd = (quadrant & 1u) != 0u;
  const U cosine_sign = ((quadrant + 1u) & 2u) << 30, sine_sign = (quadrant & 2u) << 30;
  const F s = from_unsigned(to_unsigned(select(odd, cosine, sine)) ^ sine_sign);
  cosine = from_unsigned(to_unsigned(select(odd, sine, cosine)) ^ cosine_sign);
  sine = s;
}

}  // namespace pygen
