// The green list of a watermark (Kirchenbauer et al. 2023, "A watermark for large language models"): whether a token is
// green, given a secret key and the tokens before it. A Philox block whose counter holds the hash of those tokens
// colours four of the vocabulary, so that nothing of its size is ever stored, and a detector asks for one token as
// cheaply as a sampler for all.
#pragma once

#include "pygen/philox_normal.h"
#include "pygen/plane.h"
#include "pygen/scalars.h"

namespace pygen {

struct GreenList {
  PhiloxKey key;       // the secret; the hash of the context stands in the places of a step and a sample
  uint32_t threshold;  // a token is green where its word lies below
};

// Of the token behind the first `known` of a sample. The hash chains Philox blocks, the eldest token of the context
// first. Where the context is not full, or lies outside of the tokens, nothing is green.
PYGEN_INLINE GreenList green_list(const GreenSettings& settings, int64_t sample, int64_t known) {
  GreenList list{{static_cast<uint64_t>(*settings.key), kDrawWatermark, 0, 0}, 0};
  if (known < settings.context || known > settings.capacity) return list;
  PhiloxKey chain = list.key;
  chain.draw |= 1u;
  for (int64_t i = known - settings.context; i < known; ++i) {
    uint32_t words[4];
    philox_words(static_cast<uint64_t>(settings.tokens.at(sample, i)), chain, words);
    chain.step = words[0], chain.sample = words[1];
  }
  list.key.step = chain.step, list.key.sample = chain.sample;
  const float gamma = settings.gamma.at(sample, 0.0f);
  list.threshold = gamma >= 1.0f ? UINT32_MAX : gamma > 0.0f ? static_cast<uint32_t>(gamma * 0x1p32f) : 0;
  return list;
}

PYGEN_INLINE bool is_green(const GreenList& list, int64_t token) {
  uint32_t words[4];
  philox_words(static_cast<uint64_t>(token) / 4, list.key, words);
  const uint32_t low = (token & 1) != 0 ? words[1] : words[0], high = (token & 1) != 0 ? words[3] : words[2];
  return ((token & 2) != 0 ? high : low) < list.threshold;
}

}  // namespace pygen
