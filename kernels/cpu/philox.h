// Philox normals by vectors, for the CPU kernels that draw noise.
#pragma once

#include "pygen/philox.h"
#include "pygen/simd.h"

namespace pygen {
namespace {

inline constexpr int64_t kBlockElements = 4 * kLanes;  // what a vector of counters makes
// So many vectors of counters at once hide the latency of a round, and fit the registers.
inline constexpr int kWays = kLanes == 16 ? 4 : 2;

// The normals of elements 4 block .. 4 block + kCount * kBlockElements - 1. The rounds' keys are made once by the
// caller, to be broadcast from memory.
template <int kCount>
PYGEN_INLINE void normal_blocks(uint64_t block, const PhiloxKey& key, const PhiloxRound (&rounds)[kPhiloxRounds],
                                float* to) {
  U64 even, words[kCount][2][4];
  for (int lane = 0; lane < kLanes / 2; ++lane) even[lane] = 2 * lane;
  for (int i = 0; i < kCount; ++i) {
    for (int odd = 0; odd < 2; ++odd) philox_counter(even + (block + i * kLanes + odd), key, words[i][odd]);
  }
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < kCount; ++i) {
      for (int odd = 0; odd < 2; ++odd) philox_round(words[i][odd], rounds[round]);
    }
  }
  for (int i = 0; i < kCount; ++i, to += kBlockElements) {
    U32 word[4];
    for (int w = 0; w < 4; ++w) {
      word[w] = bits<U32>((words[i][0][w] & 0xffffffffull) | (words[i][1][w] << 32));
    }
    F32 z[4];
    box_muller(word[0], word[1], z[0], z[1]);
    box_muller(word[2], word[3], z[2], z[3]);
    const F32 low02 = interleave<0>(z[0], z[2]), high02 = interleave<1>(z[0], z[2]);
    const F32 low13 = interleave<0>(z[1], z[3]), high13 = interleave<1>(z[1], z[3]);
    const F32 ordered[4] = {interleave<0>(low02, low13), interleave<1>(low02, low13), interleave<0>(high02, high13),
                            interleave<1>(high02, high13)};
    std::memcpy(to, ordered, sizeof ordered);
  }
}

// The normals of elements first .. first + count - 1 of a sample. Writes whole blocks: `buffer` holds at least
// count + 2 * kBlockElements floats. Returns where the first element lies in it.
PYGEN_INLINE const float* normals(int64_t first, int64_t count, const PhiloxKey& key, float* buffer) {
  PhiloxRound rounds[kPhiloxRounds];
  for (int round = 0; round < kPhiloxRounds; ++round) rounds[round] = philox_round_key(key.seed, round);
  const int64_t skipped = first % 4, end = skipped + count;
  uint64_t block = static_cast<uint64_t>(first) / 4;
  int64_t made = 0;
  for (; made + kWays * kBlockElements <= end; made += kWays * kBlockElements, block += kWays * kLanes) {
    normal_blocks<kWays>(block, key, rounds, buffer + made);
  }
  for (; made < end; made += kBlockElements, block += kLanes) normal_blocks<1>(block, key, rounds, buffer + made);
  return buffer + skipped;
}

}  // namespace
}  // namespace pygen
