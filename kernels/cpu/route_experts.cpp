#include "pygen/route_experts_rule.h"

namespace pygen::PYGEN_ISA {
namespace {

// A vector of a row's logits; behind the last there are -inf, which add nothing.
PYGEN_INLINE F32 logits_from(const RouteExpertsArgs& args, int64_t row, int64_t first) {
  float some[kLanes];
  const char* const logits = static_cast<const char*>(args.logits.data);
  const int64_t size = size_of(args.logits.dtype);
  for (int64_t i = 0; i < kLanes; ++i) {
    const int64_t at = row * args.logits.stride[0] + (first + i) * args.logits.stride[1];
    some[i] = first + i < args.count ? load_one(logits + at * size, args.logits.dtype) : -__builtin_inff();
  }
  return load_bytes<F32>(some);
}

// Puts expert `i` among the choices so far, in their order, if it belongs there.
PYGEN_INLINE void choose(const RouteExpertsArgs& args, int64_t row, float logit, int64_t i) {
  int64_t place = i < args.choices ? i : args.choices;
  while (place > 0) {
    const float other = args.weights.at(row, place - 1);
    if (!chosen_before(logit, i, other, args.experts.at(row, place - 1))) break;
    if (place < args.choices) {
      args.weights.at(row, place) = other;
      args.experts.at(row, place) = args.experts.at(row, place - 1);
    }
    --place;
  }
  if (place == args.choices) return;
  args.weights.at(row, place) = logit;
  args.experts.at(row, place) = i;
}

}  // namespace

void route_experts(const RouteExpertsArgs& args, int64_t begin, int64_t end) {
  constexpr int kSums = kRouteSums / kLanes;
  for (int64_t row = begin; row < end; ++row) {
    F32 most = splat(-__builtin_inff(), F32{});
    for (int64_t first = 0; first < args.count; first += kLanes) {
      const F32 logits = logits_from(args, row, first);
      most = max(logits, most);
      for (int64_t i = 0; i < kLanes && first + i < args.count; ++i) choose(args, row, logits[i], first + i);
    }
    const float largest = join_lanes(most, [](F32 a, F32 b) { return max(a, b); })[0];
    F32 sums[kSums] = {};
    for (int64_t first = 0; first < args.count; first += kLanes) {
      sums[first / kLanes % kSums] += exp(logits_from(args, row, first) - largest);
    }
    for (int width = kSums / 2; width > 0; width /= 2) {
      for (int part = 0; part < width; ++part) sums[part] += sums[part + width];
    }
    route_weights(args, row, largest, join_lanes(sums[0], [](F32 a, F32 b) { return a + b; })[0]);
  }
}

}  // namespace pygen::PYGEN_ISA
