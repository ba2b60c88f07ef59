// verify_draft: how much of a draft is accepted, and the token that follows. verify_rule.h holds the arithmetic.
#pragma once

#include "pygen/isa.h"
#include "pygen/plane.h"

namespace pygen {

// The kernel's range runs over samples.
struct VerifyDraftArgs {
  int64_t samples, drafted, vocabulary;
  Plane<const int64_t> draft;  // over samples x drafted
  Operand logits;              // of the target; strides of samples, drafted + 1 positions, vocabulary
  Operand draft_logits;        // the same over `drafted` positions; none where the draft was not drawn
  Setting<int64_t> lengths;    // of each draft; `drafted` where not given
  Setting<float> temperature;
  PhiloxSettings philox;    // without a seed every sample is greedy
  Plane<int64_t> token;     // over samples x (drafted + 1)
  Plane<int64_t> accepted;  // over samples x 1, as `ok`
  Plane<bool> ok;
  void* workspace;  // for the GPU: verify_draft_workspace() bytes
};

PYGEN_CPU_KERNEL(verify_draft, VerifyDraftArgs)

namespace cuda {
int64_t verify_draft_workspace(const VerifyDraftArgs& args);
void verify_draft(const VerifyDraftArgs& args, void* stream);  // a cudaStream_t
}  // namespace cuda

}  // namespace pygen
