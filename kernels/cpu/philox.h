// Philox normals by vectors, for the CPU kernels that draw noise.
#pragma once

#include "pygen/philox.h"
#include "pygen/simd.h"

namespace pygen {
namespace {

inline constexpr int64_t kBlockElements = 4 * kLanes;  // the words of a vector of blocks
// So many vectors of blocks at once hide the latency of a round, and fit the registers.
inline constexpr int kWays = kLanes == 16 ? 4 : 2;

// The rounds of a seed, made once for many blocks and broadcast from memory.
struct PhiloxRounds {
  PhiloxRound at[kPhiloxRounds];
  PhiloxRounds() = default;
  explicit PhiloxRounds(uint64_t seed) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (PhiloxRound& round : at) {
      round = {key0, key1};
      key0 += kPhiloxStep0;
      key1 += kPhiloxStep1;
    }
  }
};

// The words of blocks block, block + apart, ...: word[v][i] of a lane is the i-th of block number v * kLanes + lane.
template <int kCount>
PYGEN_INLINE void philox_vectors(uint64_t block, const PhiloxKey& key, const PhiloxRounds& rounds,
                                 U32 (&word)[kCount][4], uint64_t apart = 1) {
  U64 even, words[kCount][2][4];
  for (int lane = 0; lane < kLanes / 2; ++lane) even[lane] = 2 * lane * apart;
  for (int v = 0; v < kCount; ++v) {
    for (int odd = 0; odd < 2; ++odd) philox_counter(even + (block + (v * kLanes + odd) * apart), key, words[v][odd]);
  }
#pragma GCC unroll 10
  for (const PhiloxRound& round : rounds.at) {
    for (int v = 0; v < kCount; ++v) {
      for (int odd = 0; odd < 2; ++odd) philox_round(words[v][odd], round);
    }
  }
  for (int v = 0; v < kCount; ++v) {
    for (int i = 0; i < 4; ++i) word[v][i] = bits<U32>((words[v][0][i] & 0xffffffffull) | (words[v][1][i] << 32));
  }
}

// What was made of each word, in the order of the elements: kBlockElements of them.
PYGEN_INLINE void in_order(F32 (&z)[4]) {
  const F32 low02 = interleave<0>(z[0], z[2]), high02 = interleave<1>(z[0], z[2]);
  const F32 low13 = interleave<0>(z[1], z[3]), high13 = interleave<1>(z[1], z[3]);
  z[0] = interleave<0>(low02, low13), z[1] = interleave<1>(low02, low13);
  z[2] = interleave<0>(high02, high13), z[3] = interleave<1>(high02, high13);
}

// The normals of elements 4 block .. 4 block + kCount * kBlockElements - 1.
template <int kCount>
PYGEN_INLINE void normal_blocks(uint64_t block, const PhiloxKey& key, const PhiloxRounds& rounds, float* to) {
  U32 word[kCount][4];
  philox_vectors(block, key, rounds, word);
  for (int v = 0; v < kCount; ++v) {
    F32 z[4];
    box_muller(word[v][0], word[v][1], z[0], z[1]);
    box_muller(word[v][2], word[v][3], z[2], z[3]);
    in_order(z);
    std::memcpy(to + v * kBlockElements, z, sizeof z);
  }
}

// The normals of elements first .. first + count - 1 of a sample. Writes whole blocks: `buffer` holds at least
// count + 2 * kBlockElements floats. Returns where the first element lies in it.
PYGEN_INLINE const float* normals(int64_t first, int64_t count, const PhiloxKey& key, float* buffer) {
  const PhiloxRounds rounds(key.seed);
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
