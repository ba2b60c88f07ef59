// A row of logits, as every op sees it that turns one into a token. A row is cut into blocks of 1024; each is summed up
// by itself, and what is wanted of the row is joined from the summaries: every sum in one fixed order, so that
// results are bit-equal on any number of threads, instruction set and device. A token is then found in the one block
// that holds it, so that drawing it costs no second pass.
#pragma once

#include "pygen/philox_normal.h"
#include "pygen/plane.h"
#include "pygen/scalars.h"

namespace pygen {

inline constexpr int kRowPartials = 256;  // element i of a block is added to partial sum i % 256, then they by halves
inline constexpr int kRowGroup = 32;      // cumulative sums run over groups of so many, then inside one
inline constexpr int kHistogramBins = 2048;  // the digits of a radix selection: 11, 11 and 10 bits
inline constexpr float kInfinity = __builtin_inff();

// Of a row, joined from its blocks.
struct RowSummary {
  float max, others;
  double sum, raw, moment;
  // A row without a finite maximum, or that holds NaN, is no distribution.
  PYGEN_INLINE bool ok() const { return max > -kInfinity && max < kInfinity && sum == sum; }
};

// How far a block's maximum lies below the row's; a block of -inf alone adds nothing wherever it lies.
PYGEN_INLINE double block_below(const BlockSummary& block, float row_max) {
  return block.max == -kInfinity ? 0.0 : static_cast<double>(block.max) - row_max;
}

PYGEN_INLINE double double_from_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// e^x for x <= 600 within a few units in the last place of double; 0 where it is below 2^-1000.
PYGEN_INLINE double exp_double(double x) {
  if (!(x > -690.0)) return x == x ? 0.0 : x;
  const double n = (x * 1.4426950408889634 + 0x1.8p52) - 0x1.8p52;
  const double f = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 479001600.0;
  const double inverse_factorial[] = {
      1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0,
      1.0 / 120.0,      1.0 / 24.0,      1.0 / 6.0,      0.5,           1.0,          1.0};
  for (const double coefficient : inverse_factorial) p = p * f + coefficient;
  return p * double_from_bits(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}

// ln x by a Newton step from float's.
PYGEN_INLINE double log_double(double x) {
  const float close = log_one(static_cast<float>(x));
  return close + (x * exp_double(-close) - 1.0);
}

// What a filter keeps: logits above `least`, and those equal to it up to index `last_tie`. Comparing keeps NaN.
struct Kept {
  float least;
  int32_t last_tie;
  PYGEN_INLINE bool drops(float logit, int32_t index) const {
    return logit < least || (logit == least && index > last_tie);
  }
};
inline constexpr Kept kKeepAll{-kInfinity, INT32_MAX};

// In (0, 1), of 53 bits.
PYGEN_INLINE double uniform_double(uint32_t high, uint32_t low) {
  const uint64_t word = (static_cast<uint64_t>(high) << 32 | low) >> 11;
  return (static_cast<double>(word) + 0.5) * 0x1p-53;
}

// The first of [begin, end) at which the running sum exceeds `target`, else the last of positive weight. `before` is
// the sum before `begin`, then that before the result.
template <class Weight>
PYGEN_INLINE int pick(int begin, int end, double target, double& before, Weight weight) {
  double sum = before;
  int chosen = begin;
  for (int i = begin; i < end; ++i) {
    const double w = weight(i);
    if (!(w > 0.0)) continue;
    chosen = i;
    before = sum;
    sum += w;
    if (sum > target) break;
  }
  return chosen;
}

// Integers in the order of the numbers, -0 and 0 alike.
PYGEN_INLINE uint32_t ordered_from_bits(uint32_t bits) {
  if (bits == 0x80000000u) bits = 0;
  return bits >> 31 != 0u ? ~bits : bits | 0x80000000u;
}
PYGEN_INLINE uint32_t bits_from_ordered(uint32_t key) { return key >> 31 != 0u ? key & 0x7fffffffu : ~key; }

// A probability relative to the largest as a multiple of 2^-40, the nearest: sums of those depend on no order. At 2^12
// a double's last bit is worth as much.
inline constexpr double kFixedOne = 0x1p12;
inline constexpr uint64_t kFixedZero = 0x40b0000000000000u;  // its bits
inline constexpr int kFixedBits = 40;
PYGEN_INLINE uint64_t fixed_weight(float weight) {
  if (!(weight > 0.0f)) return 0;
  const double shifted = kFixedOne + static_cast<double>(weight);
  uint64_t all;
  memcpy(&all, &shifted, sizeof all);
  return all - kFixedZero;
}

// The radix selection of the element at which a running sum of integer weights, largest logits first, exceeds `target`:
// three histograms of digits, each over the elements that share the digits before.
struct RadixDigit {
  int32_t shift, bits;
  PYGEN_INLINE bool holds(uint32_t prefix, uint32_t key) const {
    return shift + bits == 32 || key >> (shift + bits) == prefix;
  }
  PYGEN_INLINE uint32_t digit(uint32_t key) const { return key >> shift & ((1u << bits) - 1u); }
};
PYGEN_INLINE RadixDigit radix_digit(int level) {
  return level == 0 ? RadixDigit{21, 11} : level == 1 ? RadixDigit{10, 11} : RadixDigit{0, 10};
}
// The digit of the element sought; `before` is the weight of all above it.
PYGEN_INLINE uint32_t radix_step(const uint64_t* histogram, int bits, uint64_t target, uint64_t& before) {
  uint32_t digit = (1u << bits) - 1u;
  while (digit > 0 && before + histogram[digit] <= target) before += histogram[digit--];
  return digit;
}

// a / b, below 2^21: how many of equal weights, of which a row holds no more, fit into a rest. Without a
// division, which would be a call on a GPU.
PYGEN_INLINE uint64_t ties_within(uint64_t a, uint64_t b) {
  uint64_t quotient = 0;
  for (uint64_t bit = 1 << 20; bit > 0; bit /= 2) {
    if ((quotient | bit) * b <= a) quotient |= bit;
  }
  return quotient;
}

// Gumbel noise, -log(-log u); u and its logarithm are kept off 0 as diffusers keeps them.
PYGEN_INLINE float gumbel_one(float u) {
  const float least = 1e-20f, first = -log_one(u > least ? u : least);
  return -log_one(first > least ? first : least);
}

// A uniform number of a position, from the first two words of its Philox block.
PYGEN_INLINE double position_uniform(int64_t position, const PhiloxKey& key) {
  uint32_t words[4];
  philox_words(static_cast<uint64_t>(position), key, words);
  return uniform_double(words[0], words[1]);
}

}  // namespace pygen
