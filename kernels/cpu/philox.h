// Philox normals by vectors, for the CPU kernels that draw noise.
#pragma once

#include "pygen/philox.h"
#include "pygen/simd.h"

namespace pygen {
namespace {

inline constexpr int64_t kBlockElements = 4 * kLanes;  // what one call of `normal_blocks` makes

// The normals of elements 4 block .. 4 block + kBlockElements - 1.
PYGEN_INLINE void normal_blocks(uint64_t block, const PhiloxKey& key, float* to) {
  U64 even, words[2][4];
  for (int lane = 0; lane < kLanes / 2; ++lane) even[lane] = block + 2 * lane;
  philox_block(even, key, words[0]);
  philox_block(even + 1, key, words[1]);
  U32 word[4];
  for (int i = 0; i < 4; ++i) word[i] = bits<U32>((words[0][i] & 0xffffffffull) | (words[1][i] << 32));
  F32 z[4];
  box_muller(word[0], word[1], z[0], z[1]);
  box_muller(word[2], word[3], z[2], z[3]);
  const F32 low02 = interleave<0>(z[0], z[2]), high02 = interleave<1>(z[0], z[2]);
  const F32 low13 = interleave<0>(z[1], z[3]), high13 = interleave<1>(z[1], z[3]);
  const F32 ordered[4] = {interleave<0>(low02, low13), interleave<1>(low02, low13), interleave<0>(high02, high13),
                          interleave<1>(high02, high13)};
  std::memcpy(to, ordered, sizeof ordered);
}

// The normals of elements first .. first + count - 1 of a sample. Writes whole blocks: `buffer` holds at least
// count + 2 * kBlockElements floats. Returns where the first element lies in it.
PYGEN_INLINE const float* normals(int64_t first, int64_t count, const PhiloxKey& key, float* buffer) {
  const int64_t skipped = first % 4;
  uint64_t block = static_cast<uint64_t>(first) / 4;
  for (int64_t made = 0; made < skipped + count; made += kBlockElements, block += kLanes) {
    normal_blocks(block, key, buffer + made);
  }
  return buffer + skipped;
}

}  // namespace
}  // namespace pygen
