// group_norm_silu: y = silu((x - mean) / sqrt(variance + eps) * weight + bias), with the mean and the variance of each
// group of neighbouring channels of a sample.
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"

namespace pygen {

// Channels that are walked together, where they are neighbours in memory.
inline constexpr int64_t kChannelTile = 512;

// The kernel's range runs over samples x (groups / unit). A group is walked channel by channel (pixels 1 apart,
// channels `pixels` apart), or `unit` groups are walked pixel by pixel (channels 1 apart).
struct GroupNormSiluArgs {
  bool by_channel;
  int64_t channels, pixels, groups;
  int64_t unit;  // divides groups; 1 where by_channel; above 1, these groups hold at most kChannelTile channels
  double eps;
  Operand x, out;        // strides of samples, channels, pixels; of one dtype
  Operand weight, bias;  // strides of samples, channels; may be absent
};

PYGEN_CPU_KERNEL(group_norm_silu, GroupNormSiluArgs)

}  // namespace pygen
