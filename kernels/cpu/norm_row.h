// The mean and the deviation of a row on a CPU: what row_norm divides by, and linear_decode where it begins with a
// norm.
#pragma once

#include <algorithm>

#include "strips.h"

namespace pygen {
namespace {

// ---- A row, strip by strip: the last one may have fewer elements in memory, and is padded with zeros ---------------

template <class Visit>
PYGEN_INLINE void for_strips(int64_t count, Visit visit) {
  int64_t i = 0;
  for (; i + kStrip <= count; i += kStrip) visit(i, kStrip);
  if (i < count) visit(i, count - i);
}

template <DType kDType>
struct Elements {
  static constexpr int64_t kSize = size_of(kDType);
  char* data;

  Elements(const Operand& operand, const Cursor& row)
      : data(static_cast<char*>(operand.data) + row.offset(operand) * kSize) {}
  explicit Elements(float* sums) : data(reinterpret_cast<char*>(sums)) {}

  PYGEN_INLINE Strip load(int64_t i, int64_t count) const {
    if (count == kStrip) return load_strip<kDType>(data + i * kSize);
    char padded[kStrip * kSize] = {};
    std::memcpy(padded, data + i * kSize, count * kSize);
    return load_strip<kDType>(padded);
  }
  // The last pass over a row computes and the first waits for memory, so that one asks for the row behind.
  PYGEN_INLINE void fetch_next(int64_t i, int64_t row) const {
    constexpr int64_t kLine = 64;
    for (int64_t at = 0; at < kStrip * kSize; at += kLine) __builtin_prefetch(data + (row + i) * kSize + at);
  }
  PYGEN_INLINE void store(int64_t i, int64_t count, const Strip& value) const {
    if (count == kStrip) return store_strip<kDType>(data + i * kSize, value);
    char padded[kStrip * kSize];
    store_strip<kDType>(padded, value);
    std::memcpy(data + i * kSize, padded, count * kSize);
  }
  // Past the caches, which else would read what is about to be overwritten.
  PYGEN_INLINE void stream(int64_t i, const Strip& value) const {
    alignas(64) char strip[kStrip * kSize];
    store_strip<kDType>(strip, value);
    for (int64_t at = 0; at < kStrip * kSize; at += sizeof(__m128i)) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(data + i * kSize + at),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(strip + at)));
    }
  }
  bool may_stream() const { return reinterpret_cast<uintptr_t>(data) % 64 == 0; }
};

// ---- Sums over a row, in one order whatever the width of a vector --------------------------------------------------

inline constexpr int64_t kPartials = 64;
inline constexpr int kBlockStrips = kPartials / kStrip;

// The sum of the first lanes, a power of two.
template <int kCount = kLanes>
PYGEN_INLINE float by_halves(F32 v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    return by_halves<kCount / 2>(v + rotate<kCount / 2>(v));
  }
}

// 64 partial sums, each made of shorter ones, at the end added by halves. add(i, count, sums) adds the terms of the
// strip at i to kSums sums.
template <int kSums, class Add>
PYGEN_INLINE void sum_row(int64_t count, double* result, Add add) {
  constexpr int64_t kShort = 8 * kPartials;
  Strip sums[kBlockStrips][kSums] = {};
  for (int64_t i = 0; i < count; i += kShort) {
    const int64_t end = std::min(count, i + kShort);
    Strip shorter[kBlockStrips][kSums] = {};
    int64_t j = i;
    for (; j + kPartials <= end; j += kPartials) {
#pragma GCC unroll 4
      for (int s = 0; s < kBlockStrips; ++s) add(j + s * kStrip, kStrip, shorter[s]);
    }
#pragma GCC unroll 4
    for (int s = 0; s < kBlockStrips; ++s, j += kStrip) {
      if (j < end) add(j, std::min(end - j, kStrip), shorter[s]);
    }
#pragma GCC unroll 4
    for (int s = 0; s < kBlockStrips; ++s) {
#pragma GCC unroll 4
      for (int k = 0; k < kSums; ++k) sums[s][k] = sums[s][k] + shorter[s][k];
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kSums; ++k) {
    Strip sum = sums[0][k];
    if constexpr (kBlockStrips == 2) sum = sum + sums[1][k];
    if constexpr (kBlockStrips == 4) sum = (sum + sums[2][k]) + (sums[1][k] + sums[3][k]);
    result[k] = by_halves((sum.v[0] + sum.v[2]) + (sum.v[1] + sum.v[3]));
  }
}

// A row less what is near its mean, which tells what the rounding of that mean left: no mean, however large, costs
// more than a few units in the last place. Not centred, the row itself.
template <DType kDType, bool kCentred>
struct Row {
  Elements<kDType> h;
  int64_t count;
  double share;                                         // of an element in a mean
  float center = 0.0f, reciprocal = 0.0f, rest = 0.0f;  // of the deviation; of the mean, in deviations

  Row(const Elements<kDType>& h, int64_t count) : h(h), count(count), share(1.0 / static_cast<double>(count)) {
    if constexpr (kCentred) {
      double sum;
      sum_row<1>(count, &sum, [&](int64_t i, int64_t n, Strip* sums) __attribute__((always_inline)) {
        sums[0] = sums[0] + h.load(i, n);
      });
      center = static_cast<float>(sum * share);
    }
  }

  PYGEN_INLINE Strip away(int64_t i, int64_t n) const {
    const Strip x = h.load(i, n);
    if (!kCentred) return x;
    return n == kStrip ? x - splat(center, x) : first_of(x - splat(center, x), n);
  }

  // Adds the squares, and where centred what was left of the mean, to sums that begin with these.
  static constexpr int kMoments = kCentred ? 2 : 1;
  PYGEN_INLINE void add_moments(const Strip& away, Strip* sums) const {
    sums[0] = fma(away, away, sums[0]);
    if constexpr (kCentred) sums[1] = sums[1] + away;
  }
  PYGEN_INLINE void finish(const double* sums, double eps) {
    const double left = kCentred ? sums[1] * share : 0.0;
    double square = kCentred ? (sums[0] - sums[1] * left) * share : sums[0] * share;
    square = square < 0.0 ? 0.0 : square;                              // by rounding; NaN stays
    const __m128d deviation = _mm_sqrt_pd(_mm_set1_pd(square + eps));  // std::sqrt may call the library
    const double exact = 1.0 / _mm_cvtsd_f64(deviation);
    reciprocal = static_cast<float>(exact);
    rest = static_cast<float>(-left * exact);
  }

  PYGEN_INLINE Strip normalised(int64_t i, int64_t n) const {
    const Strip x = away(i, n), r = splat(reciprocal, x);
    return kCentred ? fma(x, r, splat(rest, x)) : x * r;
  }
};

}  // namespace
}  // namespace pygen
