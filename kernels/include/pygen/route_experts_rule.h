// The arithmetic of route_experts, once, for a CPU and a GPU.
#pragma once

#include "pygen/route_experts.h"
#include "pygen/scalars.h"

namespace pygen {
namespace {

// exp(logit - largest) of expert i is added to sum i % kRouteSums, then they by halves.
inline constexpr int kRouteSums = 32;

// Whether expert a is chosen before b: by its logit, of which NaN is the largest, then by its number.
PYGEN_INLINE bool chosen_before(float logit_a, int64_t a, float logit_b, int64_t b) {
  const bool nan_a = logit_a != logit_a, nan_b = logit_b != logit_b;
  if (nan_a != nan_b) return nan_a;
  if (!nan_a && logit_a != logit_b) return logit_a > logit_b;
  return a < b;
}

// From the logits of a row's choices to their weights, in place.
PYGEN_INLINE void route_weights(const RouteExpertsArgs& args, int64_t row, float largest, float sum) {
  double chosen = 0.0;
  for (int64_t i = 0; i < args.choices; ++i) {
    float& weight = args.weights.at(row, i);
    weight = exp_one(weight - largest);
    chosen += weight;
  }
  const float whole = args.normalise ? static_cast<float>(chosen) : sum;  // in which the softmax's own sum is left out
  for (int64_t i = 0; i < args.choices; ++i) args.weights.at(row, i) /= whole;
}

}  // namespace
}  // namespace pygen
