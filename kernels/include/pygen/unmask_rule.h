// The arithmetic of unmask_step, once, for a CPU and a GPU: a key per position, sorted, and what becomes of each rank.
#pragma once

#include "pygen/token_row.h"
#include "pygen/unmask_step.h"

namespace pygen {

// Sorted upwards: candidates from the largest ranking score to the smallest, of equal ones the first position first;
// then the others.
struct UnmaskKey {
  static constexpr uint64_t kOther = 0xffffffffull << 32;
  uint64_t bits;
  PYGEN_INLINE bool candidate() const { return bits < kOther; }
  PYGEN_INLINE int64_t position() const { return static_cast<int64_t>(bits & 0xffffffffull); }
  PYGEN_INLINE uint32_t score() const { return static_cast<uint32_t>(bits >> 32); }
};

PYGEN_INLINE UnmaskKey unmask_key(const UnmaskStepArgs& args, int64_t sample, int64_t position) {
  const uint64_t place = static_cast<uint64_t>(position);
  if ((args.fixed.data != nullptr && args.fixed.at(sample, position)) ||
      (args.mask_token.data != nullptr && args.sample.at(sample, position) != args.mask_token.at(sample, 0))) {
    return {UnmaskKey::kOther | place};
  }
  float score = args.score.at(sample, position);
  const float temperature = args.temperature.at(sample, 1.0f);
  if (args.noise.data != nullptr && temperature != 0.0f) {
    const int64_t offset = sample * args.noise.stride[0] + position * args.noise.stride[1];
    const char* at = static_cast<const char*>(args.noise.data) + offset * size_of(args.noise.dtype);
    score += temperature * gumbel_one(load_one(at, args.noise.dtype));
  } else if (args.philox.seed != nullptr && temperature != 0.0f) {
    const double u = position_uniform(position, philox_key(args.philox, sample, kDrawUnmask));
    score += temperature * gumbel_one(static_cast<float>(u));
  }
  const uint32_t upwards = score == score ? ordered_from_bits(bits_of(score)) : ordered_from_bits(bits_of(-kInfinity));
  return {static_cast<uint64_t>(~upwards) << 32 | place};
}

// How many of the candidates are accepted by their rank.
PYGEN_INLINE int64_t unmask_count(const UnmaskStepArgs& args, int64_t sample, int64_t candidates) {
  int64_t count = args.count.at(sample, 0);
  if (args.remain.data != nullptr) {
    const int64_t remain = args.remain.at(sample, 0), most = candidates - count, least = remain < 1 ? remain : 1;
    const int64_t left = remain < most ? remain : most;
    count = candidates - (left > least ? left : least);
  }
  return count < 0 ? 0 : count < candidates ? count : candidates;
}

// How many are accepted because the scores before them add up to no less than -budget.
template <class KeyAt>
PYGEN_INLINE int64_t unmask_within_budget(const UnmaskStepArgs& args, int64_t sample, int64_t candidates,
                                          KeyAt key_at) {
  if (args.budget.data == nullptr) return 0;
  const double budget = args.budget.at(sample, 0.0f);
  double spent = 0.0;
  for (int64_t rank = 0; rank < candidates; ++rank) {
    const float score = args.score.at(sample, UnmaskKey{key_at(rank)}.position());
    if (!(spent <= budget) || !(score > -kInfinity)) return rank;
    spent += score < 0.0f ? -static_cast<double>(score) : 0.0;
  }
  return candidates;
}

// What becomes of the position of a rank. `last` is the key of the last one accepted by rank; of `limit` there are.
PYGEN_INLINE void unmask_write(const UnmaskStepArgs& args, int64_t sample, int64_t rank, UnmaskKey key, int64_t limit,
                               UnmaskKey last) {
  const int64_t position = key.position();
  const int64_t held = args.sample.at(sample, position), token = args.token.at(sample, position);
  const float score = args.score.at(sample, position);
  bool accepted = false, edited = false;
  if (key.candidate()) {
    accepted = rank < limit || (args.ties && limit > 0 && key.score() == last.score()) ||
               (args.threshold.data != nullptr && score > args.threshold.at(sample, 0.0f));
  } else {
    edited = args.edit_threshold.data != nullptr && token != held && score > args.edit_threshold.at(sample, 0.0f) &&
             !(args.shielded.data != nullptr && args.shielded.at(sample, position));
  }
  const bool left = key.candidate() && !accepted && args.fill.data != nullptr;
  args.next.put(sample, position, accepted || edited ? token : left ? args.fill.at(sample, position) : held);
  args.accepted.put(sample, position, accepted);
  args.edited.put(sample, position, edited);
  args.settled.put(sample, position, !key.candidate() || accepted);
  args.order.put(sample, rank, position);
}

}  // namespace pygen
