// The arithmetic of gated_unit, once, for any lanes: activations, and with them their derivatives.
#pragma once

#include "pygen/exp.h"
#include "pygen/gated_unit.h"

namespace pygen {
namespace {

// What a standard normal gives to all below x: within 6e-8, and in the lower tail, as far as -7, within 2e-5 of itself.
// The logarithm of a tail is close to a parabola.
template <class F>
PYGEN_INLINE F normal_cdf(F x) {
  const F away = max(-x, x);
  F p = splat(-1.54158464e-08f, x);
  p = fma(p, away, splat(5.24615245e-07f, x));
  p = fma(p, away, splat(-7.52715641e-06f, x));
  p = fma(p, away, splat(5.75010927e-05f, x));
  p = fma(p, away, splat(-0.000219017864f, x));
  p = fma(p, away, splat(-0.0001145719f, x));
  p = fma(p, away, splat(0.00707166689f, x));
  p = fma(p, away, splat(-0.0525144748f, x));
  p = fma(p, away, splat(-0.45920077f, x));
  p = fma(p, away, splat(-1.151106f, x));
  const F tail = exp2(fma(p, away, splat(-1.0f, x)));
  return select(x < splat(0.0f, x), tail, splat(1.0f, x) - tail);
}

// 1 / (1 + e^-x) and 1 / (1 + e^x), neither of which loses digits to the other.
template <class F>
PYGEN_INLINE void sigmoids(F x, F& below, F& above) {
  const F small = exp(min(-x, x)), most = splat(1.0f, x) / (small + splat(1.0f, x)), least = small * most;
  const auto negative = x < splat(0.0f, x);
  below = select(negative, least, most);
  above = select(negative, most, least);
}

// gelu's logistic takes 2 sqrt(2 / pi) x (1 + 0.044715 x^2); where x^2 is too large to matter it is kept finite.
template <class F>
PYGEN_INLINE F gelu_tanh_square(F x) {
  return min(splat(0x1p40f, x), x * x);
}
template <class F>
PYGEN_INLINE F gelu_tanh_argument(F x, F square) {
  return x * fma(splat(0.0713548163f, x), square, splat(1.59576912f, x));
}

template <Activation kActivation, class F>
PYGEN_INLINE F activate(F x) {
  if constexpr (kActivation == Activation::kSilu) {
    return silu(x);
  } else if constexpr (kActivation == Activation::kGelu) {
    return x * normal_cdf(x);
  } else {
    return x / (exp(-gelu_tanh_argument(x, gelu_tanh_square(x))) + splat(1.0f, x));
  }
}

// And the derivative.
template <Activation kActivation, class F>
PYGEN_INLINE void activate(F x, F& value, F& slope) {
  if constexpr (kActivation == Activation::kSilu) {
    F below, above;
    sigmoids(x, below, above);
    value = x * below;
    slope = fma(value, above, below);
  } else if constexpr (kActivation == Activation::kGelu) {
    const F below = normal_cdf(x), density = splat(0.398942280f, x) * exp(splat(-0.5f, x) * x * x);
    value = x * below;
    slope = fma(x, density, below);
  } else {
    F below, above;
    const F square = gelu_tanh_square(x);
    sigmoids(gelu_tanh_argument(x, square), below, above);
    value = x * below;
    slope = fma(value * above, fma(splat(0.214064449f, x), square, splat(1.59576912f, x)), below);
  }
}

}  // namespace
}  // namespace pygen
