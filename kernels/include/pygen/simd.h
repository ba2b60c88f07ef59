// The CPU's vector types and the few operations that GCC's vector extension does not write by itself.
//
// Everything lies in an anonymous namespace: a translation unit compiled for one instruction set must leave no
// weak symbol behind that the linker could pick for another. Results are bit-equal on all of them: one rounding
// per operation (-ffp-contract=off), fma explicit and, on the baseline, emulated exactly.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "pygen/operand.h"

namespace pygen {
namespace {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint64_t U64 __attribute__((vector_size(4 * kLanes)));  // half as many lanes
typedef double F64 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));
typedef uint8_t U8 __attribute__((vector_size(kLanes)));
typedef int8_t I8 __attribute__((vector_size(kLanes)));

template <class To, class From>
PYGEN_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
PYGEN_INLINE V load_bytes(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

PYGEN_INLINE F32 splat(float value, F32) { return value - F32{}; }
PYGEN_INLINE F32 to_float(U32 v) { return __builtin_convertvector(v, F32); }
PYGEN_INLINE F32 to_float(I32 v) { return __builtin_convertvector(v, F32); }
PYGEN_INLINE U32 to_unsigned(F32 v) { return bits<U32>(v); }
PYGEN_INLINE F32 from_unsigned(U32 v) { return bits<F32>(v); }
PYGEN_INLINE I32 to_signed(U32 v) { return bits<I32>(v); }
PYGEN_INLINE U32 select(I32 condition, U32 yes, U32 no) { return condition ? yes : no; }
PYGEN_INLINE F32 select(I32 condition, F32 yes, F32 no) { return condition ? yes : no; }

// Which lanes a condition holds in, as bits.
PYGEN_INLINE uint32_t lanes_of(I32 condition) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(bits<__m512i>(condition));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(bits<__m256>(condition));
#else
  return _mm_movemask_ps(bits<__m128>(condition));
#endif
}

// Stores the lanes named by bits one after the other; writes up to a whole vector.
PYGEN_INLINE void compress(void* to, F32 value, uint32_t lanes) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), value));
#else
  for (auto* next = static_cast<float*>(to); lanes != 0; lanes &= lanes - 1) *next++ = value[__builtin_ctz(lanes)];
#endif
}

// The two halves of a vector, widened.
PYGEN_INLINE void to_double(F32 v, F64 (&half)[2]) {
#if defined(__AVX512F__)
  half[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(v)), half[1] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#elif defined(__AVX2__)
  half[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), half[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#else
  half[0] = _mm_cvtps_pd(v), half[1] = _mm_cvtps_pd(_mm_movehl_ps(v, v));
#endif
}

// The second operand where either is NaN.
#if defined(__AVX512F__)
PYGEN_INLINE F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
PYGEN_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
PYGEN_INLINE F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
PYGEN_INLINE F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
#else
PYGEN_INLINE F32 min(F32 a, F32 b) { return _mm_min_ps(a, b); }
PYGEN_INLINE F32 max(F32 a, F32 b) { return _mm_max_ps(a, b); }
#endif

// 2^n from 1.5 * 2^23 + n, for n in [-127, 128]: 0 and infinity at the ends.
PYGEN_INLINE F32 power_of_two(F32 shifted) { return from_unsigned((to_unsigned(shifted) << 23) + 0x3f800000u); }

// gcc 12 takes three shuffles for what each instruction set has in one or two.
#if defined(__AVX512F__)
PYGEN_INLINE U32 widen(U16 v) { return bits<U32>(_mm512_cvtepu16_epi32(bits<__m256i>(v))); }
PYGEN_INLINE I32 widen(I8 v) { return bits<I32>(_mm512_cvtepi8_epi32(bits<__m128i>(v))); }
PYGEN_INLINE U16 narrow(U32 v) { return bits<U16>(_mm512_cvtepi32_epi16(bits<__m512i>(v))); }
PYGEN_INLINE U8 narrow_bytes(U32 v) { return bits<U8>(_mm512_cvtepi32_epi8(bits<__m512i>(v))); }
#elif defined(__AVX2__)
PYGEN_INLINE U32 widen(U16 v) { return bits<U32>(_mm256_cvtepu16_epi32(bits<__m128i>(v))); }
PYGEN_INLINE I32 widen(I8 v) { return bits<I32>(_mm256_cvtepi8_epi32(_mm_set1_epi64x(bits<int64_t>(v)))); }
PYGEN_INLINE U16 narrow(U32 v) {  // values that fit 16 bits
  const __m256i packed = _mm256_packus_epi32(bits<__m256i>(v), bits<__m256i>(v));
  return bits<U16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
PYGEN_INLINE U8 narrow_bytes(U32 v) { return __builtin_convertvector(v, U8); }
#else
PYGEN_INLINE U32 widen(U16 v) { return __builtin_convertvector(v, U32); }
PYGEN_INLINE I32 widen(I8 v) { return __builtin_convertvector(v, I32); }
PYGEN_INLINE U16 narrow(U32 v) { return __builtin_convertvector(v, U16); }
PYGEN_INLINE U8 narrow_bytes(U32 v) { return __builtin_convertvector(v, U8); }
#endif

// The same of single numbers, which cost less than the first of a vector's.
PYGEN_INLINE float splat(float value, float) { return value; }
PYGEN_INLINE float sqrt(float a) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(a))); }

#if defined(__AVX512F__)
PYGEN_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
PYGEN_INLINE F32 sqrt(F32 a) { return _mm512_sqrt_ps(a); }
PYGEN_INLINE U64 mul_low(U64 a, uint32_t b) {
  return bits<U64>(_mm512_mul_epu32(bits<__m512i>(a), _mm512_set1_epi64(b)));
}
#elif defined(__AVX2__)
PYGEN_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
PYGEN_INLINE F32 sqrt(F32 a) { return _mm256_sqrt_ps(a); }
PYGEN_INLINE U64 mul_low(U64 a, uint32_t b) {
  return bits<U64>(_mm256_mul_epu32(bits<__m256i>(a), _mm256_set1_epi64x(b)));
}
#else
// A float product is exact in double. The sum is rounded to odd (Boldo & Melquiond 2008): where it is inexact and
// its last bit even, it moves to the neighbour on the side of the error, so that the second rounding, to float,
// cannot go wrong.
PYGEN_INLINE F32 fma(F32 a, F32 b, F32 c) {
  typedef double F64 __attribute__((vector_size(8 * kLanes)));
  typedef int64_t I64 __attribute__((vector_size(8 * kLanes)));
  const F64 product = __builtin_convertvector(a, F64) * __builtin_convertvector(b, F64);
  const F64 addend = __builtin_convertvector(c, F64);
  const F64 sum = product + addend;
  const F64 other = sum - product;
  const F64 error = (product - (sum - other)) + (addend - other);
  const I64 inexact = (error > 0.0) | (error < 0.0);  // false where the sum is infinite or NaN
  const I64 even = (bits<I64>(sum) & 1) - 1;
  const I64 outwards = ((error > 0.0) ^ (sum > 0.0)) * 2 + 1;  // +1 away from zero, -1 towards it
  return __builtin_convertvector(bits<F64>(bits<I64>(sum) + (outwards & inexact & even)), F32);
}
PYGEN_INLINE F32 sqrt(F32 a) { return _mm_sqrt_ps(a); }
PYGEN_INLINE U64 mul_low(U64 a, uint32_t b) { return bits<U64>(_mm_mul_epu32(bits<__m128i>(a), _mm_set1_epi64x(b))); }
#endif

// a0 b0 a1 b1 ... from the first (half = 0) or second (half = 1) halves of a and b.
template <int kHalf, int... kLane>
PYGEN_INLINE F32 interleave(F32 a, F32 b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kHalf * kLanes / 2 + kLane / 2 + (kLane % 2) * kLanes)...);
}
template <int kHalf>
PYGEN_INLINE F32 interleave(F32 a, F32 b) {
  return interleave<kHalf>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// Lane i + kBy in lane i, round the end.
template <int kBy, class V, int... kLane>
PYGEN_INLINE V rotate(V v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, ((kLane + kBy) % kLanes)...);
}
template <int kBy, class V>
PYGEN_INLINE V rotate(V v) {
  return rotate<kBy>(v, std::make_integer_sequence<int, kLanes>{});
}

// All lanes joined by halves: lane i with lane i + width, for width = kLanes / 2, ..., 1. The result is in every lane.
template <int kWidth = kLanes / 2, class V, class Join>
PYGEN_INLINE V join_lanes(V v, Join join) {
  v = join(v, rotate<kWidth>(v));
  if constexpr (kWidth > 1) v = join_lanes<kWidth / 2>(v, join);
  return v;
}

// Of runs of 2 kWidth lanes, the first (half = 0) or second (half = 1) halves: a's, then b's.
template <int kWidth, int kHalf, class V, int... kLane>
PYGEN_INLINE V halves_of_runs(V a, V b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(
      a, b, (kLane / (2 * kWidth) * 2 * kWidth + kHalf * kWidth + kLane % kWidth + kLane / kWidth % 2 * kLanes)...);
}
// Lane i is all lanes of v[i], joined. What was in v is gone.
template <int kWidth = kLanes / 2, class V, class Join>
PYGEN_INLINE V join_each(V (&v)[kLanes], Join join) {
  for (int i = 0; i < kWidth; ++i) {
    constexpr auto kAll = std::make_integer_sequence<int, kLanes>{};
    v[i] = join(halves_of_runs<kWidth, 0>(v[i], v[i + kWidth], kAll),
                halves_of_runs<kWidth, 1>(v[i], v[i + kWidth], kAll));
  }
  if constexpr (kWidth > 1) join_each<kWidth / 2>(v, join);
  return v[0];
}

// Rows become columns.
PYGEN_INLINE void transpose(F32 (&v)[kLanes]) {
  for (int runs = 1; runs < kLanes; runs *= 2) {
    F32 next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<0>(v[i], v[i + kLanes / 2]);
      next[2 * i + 1] = interleave<1>(v[i], v[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

// The even (which = 0) or the odd (which = 1) lanes of a, then of b.
template <int kWhich, int... kLane>
PYGEN_INLINE F32 every_other(F32 a, F32 b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (2 * kLane + kWhich)...);
}
template <int kWhich>
PYGEN_INLINE F32 every_other(F32 a, F32 b) {
  return every_other<kWhich>(a, b, std::make_integer_sequence<int, kLanes>{});
}

}  // namespace
}  // namespace pygen

#include "pygen/half.h"

namespace pygen {
namespace {

// kLanes neighbours, widened to float.
template <DType kDType>
PYGEN_INLINE F32 load(const char* from) {
  if constexpr (kDType == DType::kFloat32) {
    return load_bytes<F32>(from);
  } else if constexpr (kDType == DType::kBFloat16) {
    return from_unsigned(widen(load_bytes<U16>(from)) << 16);
  } else if constexpr (kDType == DType::kFloat16) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(load_bytes<__m256i>(from));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(load_bytes<__m128i>(from));
#else
    return half_to_float(widen(load_bytes<U16>(from)));
#endif
  } else if constexpr (kDType == DType::kInt8) {
    return to_float(widen(load_bytes<I8>(from)));
  } else {
    return to_float(__builtin_convertvector(load_bytes<U8>(from), U32));
  }
}

// kLanes neighbours, rounded to nearest even.
template <DType kDType>
PYGEN_INLINE void store(char* to, F32 value) {
  if constexpr (kDType == DType::kFloat32) {
    std::memcpy(to, &value, sizeof value);
  } else if constexpr (kDType == DType::kBFloat16) {
    const U16 half = narrow(float_to_bfloat16(value));
    std::memcpy(to, &half, sizeof half);
  } else {
    static_assert(kDType == DType::kFloat16);
#if defined(__AVX512F__)
    const __m256i half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    const __m128i half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const U16 half = narrow(float_to_half(value));
#endif
    std::memcpy(to, &half, sizeof half);
  }
}

}  // namespace
}  // namespace pygen
