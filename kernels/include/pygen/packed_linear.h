// The weight (N, K) of a linear layer, packed once for y = x W^T: panels of 32 outputs one behind the other, each read
// from its first byte to its last. A lane (of a vector, of a warp) is an output, so nothing is summed across lanes, and
// neighbouring outputs are neighbours in memory. N and K are padded; what the padding of K holds is multiplied by 0.
//
//   format     a panel
//   float32    [K][32] float
//   bfloat16   [K/2][32][2] bfloat16: VNNI blocks, as a blocked bf16 product takes them
//   int8       [K/group] of: scales, zeros if any, [group/4][32][4] uint8, the codes
//   int4       [K/group] of: scales, zeros if any, [group/8][32] uint32, of each eight codes: code 2i in bits 4i to
//              4i + 3, code 2i + 1 in bits 16 + 4i to 19 + 4i, so that (word >> 4i) & 0x000f000f is a pair of 16 bits
//
// Scales, and likewise zeros, are [16][2] bfloat16: those of outputs j and j + 16. A weight is scale * (code - zero);
// where zeros are left out, zero is 128 (int8) or 8 (int4). A gate and an up projection are packed together: of a
// panel's outputs the first 16 are the gate's, the others the up projection's, 16 of each per panel.
#pragma once

#include <cstdint>

#include "pygen/operand.h"

namespace pygen {

inline constexpr int kPanel = 32;

enum class WeightFormat : int32_t { kFloat32, kBFloat16, kInt8, kInt4 };

struct PackedLinear {
  const void* data;  // 64-byte aligned
  int64_t outputs;   // of the layer: of a gated one, half of what the panels hold
  int64_t inputs;
  WeightFormat format;
  bool gated;
  bool zeros;     // whether the codes' zeros are stored
  int64_t group;  // inputs that share a scale: 32, 64, 128, or all of them (a multiple of 8); 0 unless quantised

  constexpr bool quantised() const { return format == WeightFormat::kInt8 || format == WeightFormat::kInt4; }
  // Outputs that a panel makes.
  constexpr int width() const { return gated ? kPanel / 2 : kPanel; }
  constexpr int64_t panels() const { return (outputs + width() - 1) / width(); }
  // K as it is stored.
  constexpr int64_t padded_inputs() const {
    const int64_t unit = quantised() ? group : 2;
    return format == WeightFormat::kFloat32 ? inputs : (inputs + unit - 1) / unit * unit;
  }
  // The codes' zero where none is stored.
  constexpr int middle() const { return format == WeightFormat::kInt8 ? 128 : 8; }
  // Of a group: its scales, and zeros; its codes.
  constexpr int64_t header_bytes() const { return zeros ? 128 : 64; }
  constexpr int64_t code_bytes() const { return group * kPanel / (format == WeightFormat::kInt8 ? 1 : 2); }
  constexpr int64_t panel_bytes() const {
    if (quantised()) return padded_inputs() / group * (header_bytes() + code_bytes());
    return padded_inputs() * kPanel * (format == WeightFormat::kFloat32 ? 4 : 2);
  }
};

}  // namespace pygen
