// exp and what is made of it, written once over a lane type: vectors on a CPU, scalars on a GPU.
#pragma once

#include "pygen/pack.h"

namespace pygen {
namespace {

template <class T, int N>
PYGEN_INLINE Pack<T, N> power_of_two(const Pack<T, N>& shifted) {
  Pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = power_of_two(shifted.v[i]);
  return r;
}

// 2^(n + f) for |f| <= 1/2, where n is in the last bits of `shifted`: see power_of_two.
template <class F>
PYGEN_INLINE F exp2_of_parts(F f, F shifted) {
  F p = splat(0.000153533620f, f);
  p = fma(p, f, splat(0.00133988750f, f));
  p = fma(p, f, splat(0.00961843692f, f));
  p = fma(p, f, splat(0.0555033237f, f));
  p = fma(p, f, splat(0.240226477f, f));
  p = fma(p, f, splat(0.693147182f, f));
  p = fma(p, f, splat(1.0f, f));
  return p * power_of_two(shifted);
}

inline constexpr float kToInteger = 0x1.8p23f;  // added to n, it leaves n in the last bits

// e^x within 1.2 ulp = 2^(n + f), where n + f = x log2(e); 0 below 2^-126.5, infinite above 2^127.5.
template <class F>
PYGEN_INLINE F exp(F x) {
  x = max(splat(-88.0f, x), min(splat(88.8f, x), x));
  const F to_integer = splat(kToInteger, x), shifted = fma(x, splat(1.44269502f, x), to_integer);
  const F n = shifted - to_integer;
  F f = fma(x, splat(1.44269502f, x), -n);
  f = fma(x, splat(1.92596299e-8f, x), f);
  return exp2_of_parts(f, shifted);
}

// 2^x, likewise.
template <class F>
PYGEN_INLINE F exp2(F x) {
  x = max(splat(-127.0f, x), min(splat(128.0f, x), x));
  const F to_integer = splat(kToInteger, x), shifted = x + to_integer;
  return exp2_of_parts(x - (shifted - to_integer), shifted);
}

// Within 3 ulp: an odd polynomial (Cephes' tanhf) where 1 - 2 / (e^2x + 1) would cancel.
template <class F>
PYGEN_INLINE F tanh(F x) {
  const F square = x * x, one = splat(1.0f, x);
  F p = splat(-5.70498872745e-3f, x);
  p = fma(p, square, splat(2.06390887954e-2f, x));
  p = fma(p, square, splat(-5.37397155531e-2f, x));
  p = fma(p, square, splat(1.33314422036e-1f, x));
  p = fma(p, square, splat(-3.33332819422e-1f, x));
  const F far = one - (one + one) / (exp(x + x) + one);
  return select(square < splat(0.390625f, x), fma(p * square, x, x), far);
}

// Close to x where it is small, and never beyond +-cap.
template <class F>
PYGEN_INLINE F soft_capped(F x, float cap) {
  return tanh(x / splat(cap, x)) * splat(cap, x);
}

template <class F>
PYGEN_INLINE F silu(F x) {
  return x / (exp(-x) + splat(1.0f, x));
}

}  // namespace
}  // namespace pygen
