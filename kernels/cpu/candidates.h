// Elements of a row that may stay under its filters: a list in the order of the row, which every filter shortens.
#pragma once

#include "token_row.h"

namespace pygen {
namespace {

PYGEN_INLINE I32 lane_numbers() {
  I32 numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

// fixed_weight of a vector of weights in [0, 1].
PYGEN_INLINE void fixed_weights(F32 weight, U64 (&half)[2]) {
  F64 wide[2];
  to_double(weight, wide);
  for (int h = 0; h < 2; ++h) half[h] = bits<U64>(wide[h] + kFixedOne) - kFixedZero;
}
PYGEN_INLINE uint64_t add_lanes(U64 v) {
  uint64_t sum = 0;
  for (int lane = 0; lane < kLanes / 2; ++lane) sum += v[lane];
  return sum;
}

// Of finite logits. Behind the last lies a vector of -inf, which no filter keeps and which weighs nothing.
struct Candidates {
  float* logit;
  int32_t* index;
  int64_t count;

  F32 logits(int64_t i) const { return load_bytes<F32>(logit + i); }
  I32 indices(int64_t i) const { return load_bytes<I32>(index + i); }

  PYGEN_INLINE void append(F32 logits, I32 indices, I32 condition) {
    const uint32_t lanes = lanes_of(condition);
    compress(logit + count, logits, lanes);
    compress(index + count, bits<F32>(indices), lanes);
    count += __builtin_popcount(lanes);
  }
  PYGEN_INLINE void close() { std::fill(logit + count, logit + count + kLanes, -kInfinity); }

  // Those of `from` for which holds(logits, indices); `from` may be the list itself or lie behind it.
  template <class Holds>
  PYGEN_INLINE void append(const Candidates& from, Holds holds) {
    for (int64_t i = 0; i < from.count; i += kLanes) {
      const F32 x = from.logits(i);
      const I32 at = from.indices(i);
      append(x, at, holds(x, at));
    }
  }
  template <class Holds>
  PYGEN_INLINE void keep(Holds holds) {
    const Candidates all = *this;
    count = 0;
    append(all, holds);
    close();
  }
  // The fixed weights of [begin, end), which begins with a vector and ends with one or the list.
  template <class Weight>
  PYGEN_INLINE uint64_t sum(int64_t begin, int64_t end, Weight weight) const {
    U64 sums = {};
    for (int64_t i = begin; i < end; i += kLanes) {
      U64 half[2];
      fixed_weights(weight(logits(i)), half);
      sums += half[0] + half[1];
    }
    return add_lanes(sums);
  }
};

struct Selected {
  float value;
  uint64_t above;  // the weight of all larger ones
};

// The smallest value(logit) of the list of which all larger ones weigh at most `target`. Four pivots at a time cut the
// range of values, and only the piece that holds the result is looked at again, from `scratch`.
template <class Value, class Weight>
inline Selected select_largest(const Candidates& list, float* scratch, uint64_t target, Value value, Weight weight) {
  constexpr int kPivots = 4;
  Candidates rest = list;
  Selected result{-kInfinity, 0};
  F32 lows = splat(kInfinity, F32{}), highs = -lows;
  for (int64_t i = 0; i < rest.count; i += kLanes) {
    const F32 x = rest.logits(i), v = value(x);
    lows = min(select(x > splat(-kInfinity, x), v, lows), lows);
    highs = max(v, highs);
  }
  while (true) {
    float low = kInfinity, high = -kInfinity;
    for (int lane = 0; lane < kLanes; ++lane) {
      low = lows[lane] < low ? lows[lane] : low;
      high = highs[lane] > high ? highs[lane] : high;
    }
    result.value = low;
    if (!(low < high)) return result;
    float pivot[kPivots];
    for (int j = 0; j < kPivots; ++j) {
      const float part = static_cast<float>(j) / kPivots;
      pivot[j] = low * (1.0f - part) + high * part;
    }
    U64 sums[kPivots] = {};
    for (int64_t i = 0; i < rest.count; i += kLanes) {
      const F32 x = rest.logits(i);
      U64 half[2];
      F64 v[2];
      fixed_weights(weight(x), half);
      to_double(value(x), v);
      for (int j = 0; j < kPivots; ++j) {
        for (int h = 0; h < 2; ++h) sums[j] += v[h] > static_cast<double>(pivot[j]) ? half[h] : U64{};
      }
    }
    uint64_t above[kPivots + 1];
    for (int j = 0; j < kPivots; ++j) above[j] = result.above + add_lanes(sums[j]);
    above[kPivots] = result.above;
    int j = 0;
    while (above[j] > target) ++j;
    result.above = above[j];
    if (j == 0) return result;
    const F32 after = splat(pivot[j - 1], F32{}), until = splat(j < kPivots ? pivot[j] : high, F32{});
    Candidates piece{scratch, nullptr, 0};
    lows = splat(kInfinity, F32{}), highs = -lows;
    for (int64_t i = 0; i < rest.count; i += kLanes) {
      const F32 x = rest.logits(i), v = value(x);
      const I32 inside = (v > after) & (v <= until) & (x > splat(-kInfinity, x));
      const uint32_t lanes = lanes_of(inside);
      compress(scratch + piece.count, x, lanes);
      piece.count += __builtin_popcount(lanes);
      lows = min(select(inside, v, lows), lows);
      highs = max(select(inside, v, highs), highs);
    }
    piece.close();
    rest = piece;
  }
}

}  // namespace
}  // namespace pygen
