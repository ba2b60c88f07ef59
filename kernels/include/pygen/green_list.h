// The green list of a watermark (Kirchenbauer et al. 2023, "A watermark for large language models"): whether a token is
// green, given a secret key and the tokens before it. A Philox block whose counter holds the hash of those tokens
// colours four of the vocabulary, so that nothing of its size is ever stored, and a detector asks for one token as
// cheaply as a sampler for all.
#pragma once

#include "pygen/philox_normal.h"
#include "pygen/scalars.h"

namespace pygen {

struct GreenList {
  PhiloxKey key;       // the secret; the hash of the context stands in the places of a step and a sample
  uint32_t threshold;  // a token is green where its word lies below
};

// `previous(i)` is the i-th token before. The hash chains Philox blocks, the eldest token first. Without `context`
// tokens before it (`known` of them) a token is not coloured: nothing is green.
template <class Previous>
PYGEN_INLINE GreenList green_list(int64_t key, float gamma, int64_t context, int64_t known, Previous previous) {
  GreenList list{{static_cast<uint64_t>(key), kDrawWatermark, 0, 0}, 0};
  if (known < context) return list;
  PhiloxKey chain = list.key;
  chain.draw |= 1u;
  for (int64_t i = context; i > 0; --i) {
    uint32_t words[4];
    philox_words(static_cast<uint64_t>(previous(i)), chain, words);
    chain.step = words[0], chain.sample = words[1];
  }
  list.key.step = chain.step, list.key.sample = chain.sample;
  list.threshold = gamma >= 1.0f ? UINT32_MAX : gamma > 0.0f ? static_cast<uint32_t>(gamma * 0x1p32f) : 0;
  return list;
}

PYGEN_INLINE bool is_green(const GreenList& list, int64_t token) {
  uint32_t words[4];
  philox_words(static_cast<uint64_t>(token) / 4, list.key, words);
  return words[token & 3] < list.threshold;
}

}  // namespace pygen
