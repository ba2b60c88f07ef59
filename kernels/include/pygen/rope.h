// rope: rotary position embedding (Su et al. 2021) of heads, by a table of cosines and sines; after an RMSNorm over
// each.
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"

namespace pygen {

inline constexpr int kMaxHeadDim = 1024;

// What turns the first 2 * pairs elements of a head: row p of the table holds the cosines of position p's angles, then
// their sines.
struct RopeTable {
  const float* data;  // null where nothing is turned
  int64_t stride;     // between the rows of two positions
  int64_t positions;
  int32_t pairs;
  bool interleaved;  // pair i is elements 2 i and 2 i + 1; else i and pairs + i
};

// One per (sequence, token), or one per sequence, from which its tokens count on.
struct RopePositions {
  const int64_t* data;
  int64_t stride[2];
  bool count_on;
  PYGEN_INLINE int64_t at(int64_t sequence, int64_t token) const {
    return data[sequence * stride[0] + token * stride[1]] + (count_on ? token : 0);
  }
};

// The cosines of a position, or null where the table does not reach: what is turned then becomes NaN.
PYGEN_INLINE const float* rope_angles(const RopeTable& table, int64_t position) {
  return position >= 0 && position < table.positions ? table.data + position * table.stride : nullptr;
}

// The weights of an RMSNorm over a head, contiguous; null where there is none.
struct HeadNorm {
  const void* weight;
  DType dtype;
};

// Strides of x and out: sequence, head, token; head_dim is contiguous.
struct RopeArgs {
  int64_t batch, heads, length;
  int32_t head_dim;
  bool inverse;  // by the negative angles
  HeadNorm norm;
  float eps;
  Operand x, out;
  RopePositions positions;
  RopeTable table;
};

// Tokens that a unit of the CPU kernel's range has at most: the range runs over batch * rope_units(length).
inline constexpr int64_t kRopeTokens = 16;
constexpr int64_t rope_units(int64_t length) { return (length + kRopeTokens - 1) / kRopeTokens; }

PYGEN_CPU_KERNEL(rope, RopeArgs)

namespace cuda {
void rope(const RopeArgs& args, void* stream);  // a cudaStream_t
}

}  // namespace pygen
