// What becomes bfloat16 needs no more than that of an exponential. The bits differ from one instruction set to another.
#pragma once

#include <algorithm>

#include "pygen/exp.h"
#include "pygen/half.h"

namespace pygen {
namespace {

#if defined(__AVX512F__)
PYGEN_INLINE F32 above_floor(F32 x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

// 2^x within 2^-13; of NaN too.
PYGEN_INLINE F32 rough_exp2(F32 x) {
  const F32 f = above_floor(x);
  F32 p = splat(0.0780245215f, f);
  p = fma(p, f, splat(0.226067156f, f));
  p = fma(p, f, splat(0.695833564f, f));
  p = fma(p, f, splat(0.999925196f, f));
  return _mm512_scalef_ps(p, x);
}
#endif

// silu within 2^-12.
PYGEN_INLINE F32 rough_silu(F32 x) {
#if defined(__AVX512F__)
  const F32 small = rough_exp2(x * splat(-1.44269502f, x));
  return x * F32(_mm512_rcp14_ps(small + splat(1.0f, x)));
#else
  return silu(x);
#endif
}
template <int N>
PYGEN_INLINE Pack<F32, N> rough_silu(Pack<F32, N> x) {
  for (F32& v : x.v) v = rough_silu(v);
  return x;
}

// Rounds to bfloat16; subnormal numbers may become 0.
PYGEN_INLINE U16 rough_halves(F32 v) {
#if defined(__AVX512BF16__)
  return bits<U16>(_mm512_cvtneps_pbh(v));
#else
  return narrow(float_to_bfloat16(v));
#endif
}
template <int N>
PYGEN_INLINE void store_halves(uint16_t* to, const F32 (&v)[N]) {
#if defined(__AVX512BF16__)
  if constexpr (N == 2) {
    const __m512bh both = _mm512_cvtne2ps_pbh(v[1], v[0]);
    std::memcpy(to, &both, sizeof both);
    return;
  }
#endif
  for (int t = 0; t < N; ++t) {
    const U16 half = rough_halves(v[t]);
    std::memcpy(to + t * kLanes, &half, sizeof half);
  }
}
PYGEN_INLINE void store_halves(uint16_t* to, F32 v) { store_halves<1>(to, {v}); }
// The first `count`, where there are less than a vector's.
PYGEN_INLINE void store_halves(uint16_t* to, F32 v, int64_t count) {
  const U16 half = rough_halves(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t first = count < kLanes ? (1u << count) - 1 : 0xffff;
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(first), bits<__m256i>(half));
#else
  std::memcpy(to, &half, std::min<int64_t>(count, kLanes) * sizeof(uint16_t));
#endif
}

}  // namespace
}  // namespace pygen
