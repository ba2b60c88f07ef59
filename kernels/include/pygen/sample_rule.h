// The arithmetic of sample_token, once, for a CPU and a GPU: what a row asks for, its penalties and its filters.
#pragma once

#include "pygen/sample_token.h"
#include "pygen/token_row.h"

namespace pygen {

// A filter that sorts stops where a running sum of weights, largest first, reaches `share` of `total`: an element stays
// if the sum before it is at most this. The first always does.
PYGEN_INLINE uint64_t mass_target(float share, double total) {
  const double wanted = share * total;
  const uint64_t whole = wanted > 0.0 ? static_cast<uint64_t>(wanted) : 0;
  return whole > 0 && static_cast<double>(whole) == wanted ? whole - 1 : whole;
}

inline constexpr float kLeastFinite = -0x1.fffffep127f;

// What the settings say of one row. Values that no number may have act as the nearest that one may.
struct SampleRow {
  int64_t row, top_k;
  float temperature, rate, top_p, min_p, typical_p;
  double exact_rate;
  bool drawn;
  float repetition, presence, frequency;
  int64_t history;

  PYGEN_INLINE SampleRow(const SampleTokenArgs& args, int64_t row) : row(row) {
    constexpr float kLeast = 0x1p-126f, kMost = -kLeastFinite;
    temperature = args.temperature.at(row, 1.0f);
    drawn = args.philox.seed != nullptr && temperature > 0.0f;
    if (!drawn) temperature = 1.0f;
    temperature = temperature < kMost ? temperature : kMost;
    rate = 1.0f / temperature;
    rate = rate < kMost ? rate : kMost;
    exact_rate = 1.0 / temperature;
    top_k = args.top_k.at(row, 0);
    if (!drawn || top_k < 0 || top_k >= args.vocabulary) top_k = 0;
    top_p = drawn ? args.top_p.at(row, 1.0f) : 1.0f;
    typical_p = drawn ? args.typical_p.at(row, 1.0f) : 1.0f;
    min_p = drawn ? args.min_p.at(row, 0.0f) : 0.0f;
    min_p = min_p < 1.0f ? min_p : 1.0f;
    if (min_p > 0.0f && min_p < kLeast) min_p = kLeast;
    repetition = args.repetition.at(row, 1.0f);
    presence = args.presence.at(row, 0.0f);
    frequency = args.frequency.at(row, 0.0f);
    history = args.previous.data == nullptr ? 0 : args.previous_lengths.at(row, args.history);
    history = history < args.history ? history : args.history;
  }

  PYGEN_INLINE bool filtered() const { return top_k > 0 || top_p < 1.0f || min_p > 0.0f || typical_p < 1.0f; }
  // Whether the logits are not those that the model gave.
  static bool processed(const SampleTokenArgs& args) {
    return args.bias.data != nullptr || args.previous.data != nullptr || args.bitmask.data != nullptr;
  }
  // Whether the sum over the whole row is wanted: it is not where a filter by rank or by the maximum comes first.
  PYGEN_INLINE bool sums(const SampleTokenArgs& args) const {
    if (!drawn) return args.log_prob.data != nullptr;
    return !filtered() || (top_k == 0 && top_p < 1.0f);
  }

  // No logit below this is kept, whatever follows blocks of which `most` is the maximum and `sum` the sum.
  PYGEN_INLINE float bound(float most, double sum, int64_t vocabulary) const {
    double exponent = -1e30;
    if (top_k == 0 && top_p < 1.0f) {  // all at or below weigh no more than half of what top-p removes
      exponent = log_double(0.5 * (1.0 - top_p) * sum / static_cast<double>(vocabulary));
    }
    if (min_p > 0.0f && !(top_k > 0 && top_p < 1.0f)) {  // whose shares are of all that top-k keeps
      const double least = least_exponent() - 0.01;
      exponent = least > exponent ? least : exponent;
    }
    const double logit = most + exponent * temperature;
    return static_cast<float>(logit > kLeastFinite ? logit : kLeastFinite);
  }

  // A token that was met `count` times: Keskar et al. 2019, then the penalties of OpenAI's interface.
  PYGEN_INLINE float penalised(float logit, int32_t count) const {
    logit = logit < 0.0f ? logit * repetition : logit / repetition;
    logit = logit - frequency * static_cast<float>(count);
    return logit - presence;
  }

  // Of which the largest is kept by min-p.
  PYGEN_INLINE float least_exponent() const { return static_cast<float>(log_double(min_p)); }
  PYGEN_INLINE double uniform(const SampleTokenArgs& args) const {
    return position_uniform(0, philox_key(args.philox, row, kDrawSample));
  }
};

// The share of an expected surprise, p (-log p) less the normaliser, that typical-p sums: at most 1 / e.
template <class F>
PYGEN_INLINE F surprise(F exponent, F weight) {
  return weight * min(splat(200.0f, exponent), -exponent);
}

// What typical-p sorts by: how near an exponent lies to the expected one. Finite.
template <class F>
PYGEN_INLINE F nearness_to(float mean, F exponent) {
  const F distance = max(splat(-1e30f, exponent), exponent) - mean;
  return min(distance, -distance);
}

// A uniform number as the place in a sum of integer weights.
PYGEN_INLINE uint64_t place_in(double uniform, uint64_t total) {
  const uint64_t place = static_cast<uint64_t>(uniform * static_cast<double>(total));
  return place < total ? place : total - 1;
}

}  // namespace pygen
