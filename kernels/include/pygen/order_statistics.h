// Radix selection, and what dynamic_threshold makes of the order statistics: the parts that CPU and GPU share.
#pragma once

#include <math.h>

#include "pygen/dynamic_threshold.h"
#include "pygen/lanes.h"

namespace pygen {
namespace {

// Ordered as the magnitudes of float values are; of NaN, the greatest of all.
inline constexpr uint32_t kNanKey = 0x7fffffffu;
template <class V>
PYGEN_INLINE auto magnitude_key(V value) {
  const auto magnitude = to_unsigned(value) & 0x7fffffffu;
  return select(magnitude > 0x7f800000u, (magnitude ^ magnitude) + kNanKey, magnitude);
}

// The digit that a pass settles: 11 bits, then twice 10. No number shares NaN's first.
struct Digit {
  uint32_t settled_shift, shift, mask;
  uint32_t prefix[2];
  bool shared;

  PYGEN_INLINE Digit(int pass, const uint32_t (&prefix)[2])
      : settled_shift(pass == 0 ? 31 : 30 - 10 * pass),
        shift(20 - 10 * pass),
        mask(pass == 0 ? 2047 : 1023),
        prefix{prefix[0], prefix[1]},
        shared(prefix[0] == prefix[1]) {}

  template <class U>
  PYGEN_INLINE U settled(U key) const {
    return key >> settled_shift;
  }
  template <class U>
  PYGEN_INLINE U bin(U key) const {
    return key >> shift & mask;
  }
  // Which of the two counts a key that belongs to the second, or only to the first, adds to. `part` is 0 or 1 in turn:
  // neighbours are often alike, and would have to wait for each other at one counter.
  PYGEN_INLINE uint32_t which(bool second, uint32_t part) const { return shared ? part & 1 : second; }
  PYGEN_INLINE uint32_t counted(const uint32_t (&counts)[2][kBins], int which, int bin) const {
    return shared ? counts[0][bin] + counts[1][bin] : counts[which][bin];
  }
  PYGEN_INLINE uint32_t append(int which, uint32_t bin) const {
    return (which == 0 ? prefix[0] : prefix[1]) << (settled_shift - shift) | bin;
  }
};

// Where the first pass looks: as in torch.quantile, one NaN makes the quantile NaN.
PYGEN_INLINE uint32_t first_rank(const DynamicThresholdArgs& args, const uint32_t (&counts)[2][kBins], int which) {
  const bool any_nan = (counts[0][kNanKey >> 20] | counts[1][kNanKey >> 20]) != 0;
  return any_nan ? static_cast<uint32_t>(args.sample_elements - 1) : args.rank[which];
}

// The threshold of a sample, from the keys of its order statistics; torch.lerp's formula, to the bit.
PYGEN_INLINE float threshold(const DynamicThresholdArgs& args, const uint32_t (&keys)[2]) {
  float value[2];
  memcpy(value, keys, sizeof value);
  const float distance = value[1] - value[0];
  const float s =
      args.weight < 0.5f ? fmaf(args.weight, distance, value[0]) : fmaf(args.weight - 1.0f, distance, value[1]);
  const float raised = s < 1.0f ? 1.0f : s;
  return raised > args.max_value ? args.max_value : raised;
}

PYGEN_INLINE float threshold_factor(float s, int64_t column) {
  return column == kLow || column == kHigh ? s : column == kRescale ? 1.0f / s : 1.0f;
}

}  // namespace
}  // namespace pygen
