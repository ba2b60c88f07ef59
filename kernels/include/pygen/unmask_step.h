// unmask_step: which positions of a sample take their new token, by confidence. unmask_rule.h holds the arithmetic.
#pragma once

#include "pygen/isa.h"
#include "pygen/plane.h"

namespace pygen {

// The kernel's range runs over samples.
struct UnmaskStepArgs {
  int64_t samples, positions;
  Plane<const int64_t> sample, token;
  Plane<const float> score;
  Plane<const bool> fixed, shielded;  // what is no candidate; what no edit may touch
  Setting<int64_t> mask_token;        // candidates hold it, where given
  Operand noise;                      // uniform numbers; strides of samples, positions
  PhiloxSettings philox;
  Setting<float> temperature;  // of the Gumbel noise on the scores
  Setting<int64_t> count, remain;
  Setting<float> threshold, budget, edit_threshold;
  bool ties;
  Plane<const int64_t> fill;
  Plane<int64_t> next, order;
  Plane<bool> accepted, edited, settled;
  uint64_t* workspace;  // CPU: positions. GPU: unmask_step_workspace()
};

PYGEN_CPU_KERNEL(unmask_step, UnmaskStepArgs)

namespace cuda {
int64_t unmask_step_workspace(int64_t samples, int64_t positions);
void unmask_step(const UnmaskStepArgs& args, void* stream);  // a cudaStream_t
}  // namespace cuda

}  // namespace pygen
