// group_norm_silu_backward: with n = (x - mean) / deviation, z = n weight + bias and dz = grad silu'(z),
//
//     grad_x = (dz weight - mean(dz weight) - n mean(dz weight n)) / deviation,
//
// means over a group; and the gradients of weight and bias are the sums of dz n and of dz over samples and pixels.
#pragma once

#include "pygen/group_norm_silu.h"

namespace pygen {

// The kernel's range is that of group_norm_silu.
struct GroupNormSiluBackwardArgs {
  GroupNormSiluArgs forward;  // without `out`
  Operand grad, grad_x;       // as `x`
  float* channel_sums;        // (samples, channels, 2): of dz n, and of dz, over pixels
};

PYGEN_CPU_KERNEL(group_norm_silu_backward, GroupNormSiluBackwardArgs)

}  // namespace pygen
