// dynamic_threshold: per sample s = clamp(quantile(|pred|, ratio), 1, max_value), as factors on a row of affine_step.
//
// The two order statistics around the quantile are exact, and nothing is sorted: floats that are not negative are
// ordered as their bits are, so three passes over the sample each settle one digit of both, the highest first, by
// counting the elements that share the digits settled so far. Counts are integers: they add up in any order. Each pass
// makes pred anew from its terms. A float32 copy would cost as many bytes or more where the terms are halves, spare a
// third of them at best where they are float32, and need memory. order_statistics.h holds the arithmetic.
#pragma once

#include "pygen/affine_step.h"

namespace pygen {

inline constexpr int kPasses = 3;
inline constexpr int kBins = 2048;

// The search for two order statistics of one sample; all zeros at first.
struct Selection {
  uint32_t counts[2][kBins];  // of each one's digit, or, as long as both share their digits, two parts of one count
  uint32_t prefix[2];         // the digits settled so far
  uint32_t rank[2];           // among the elements that share them
  uint32_t arrived;           // how much of the sample has been counted in this pass
};

struct DynamicThresholdArgs {
  AffineStepArgs step;      // what pred is made of; its `pred` says that it is wanted, and is not written
  int64_t sample_elements;  // below 2^32
  uint32_t rank[2];         // the order statistics on both sides of the quantile,
  float weight;             // and how far it lies from the first to the second
  float max_value;
  float* factors;  // (samples, columns)
  int64_t factors_stride[2];
  int64_t columns;
  Selection* selection;  // CPU: that of the sample at hand. GPU: one per sample, or null where none is needed
  int32_t pass;          // CPU: in [0, kPasses)
};

// Counts a part [begin, end) of one sample; the last part of a pass to arrive settles the digit, and after the last
// pass writes the factors.
PYGEN_CPU_KERNEL(dynamic_threshold, DynamicThresholdArgs)

namespace cuda {
bool dynamic_threshold_needs_selections(const DynamicThresholdArgs& args);
void dynamic_threshold(const DynamicThresholdArgs& args, void* stream);  // a cudaStream_t
}  // namespace cuda

}  // namespace pygen
