#include "pygen/verify_draft.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "backend.h"
#include "planes.h"

namespace pygen {
namespace {

constexpr const char* kOp = "verify_draft";

[[maybe_unused]] void launch(const Cpu& cpu, VerifyDraftArgs& args, const at::Tensor&) {
  cpu.run(verify_draft, args, args.samples, std::max<int64_t>(1, kNoiseGrain / (args.vocabulary * (args.drafted + 1))));
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, VerifyDraftArgs& args, const at::Tensor& logits) {
  const at::Tensor workspace = at::empty({cuda::verify_draft_workspace(args)}, logits.options().dtype(at::kByte));
  args.workspace = workspace.data_ptr();
  gpu.run(cuda::verify_draft, args);
}
#endif

using Optional = std::optional<at::Tensor>;

template <class Backend>
void verify_draft_op(const at::Tensor& draft, const Optional& draft_logits, const at::Tensor& logits,
                     const Optional& lengths, const Optional& temperature, const Optional& seed, const Optional& step,
                     const Optional& sample_ids, const at::Tensor& token, const Optional& accepted,
                     const Optional& ok) {
  // Check and describe.
  TORCH_CHECK_VALUE(draft.dim() == 2, kOp, ": draft must have shape (batch, drafted), got ", draft.sizes());
  const int64_t samples = draft.size(0), drafted = draft.size(1);
  TORCH_CHECK_VALUE(logits.dim() == 3 && logits.size(0) == samples && logits.size(1) == drafted + 1, kOp,
                    ": logits must have shape (", samples, ", ", drafted + 1, ", vocabulary), got ", logits.sizes());
  const int64_t vocabulary = logits.size(2);
  TORCH_CHECK_VALUE(vocabulary >= 1 && vocabulary <= kRowBlock * kMaxRowBlocks, kOp, ": the vocabulary must hold 1 to ",
                    kRowBlock * kMaxRowBlocks, " tokens, got ", vocabulary);
  const at::Device device = logits.device();
  const int64_t drafts[] = {samples, drafted, vocabulary}, tokens[] = {samples, drafted + 1};
  VerifyDraftArgs args{};
  args.samples = samples, args.drafted = drafted, args.vocabulary = vocabulary;
  args.draft = plane<const int64_t>(kOp, "draft", draft, draft.sizes(), device);
  args.logits = row_operand(kOp, "logits", logits, logits.sizes(), device);
  if (draft_logits.has_value()) args.draft_logits = row_operand(kOp, "draft_logits", *draft_logits, drafts, device);
  args.lengths = setting<int64_t>(kOp, "lengths", lengths, samples, device);
  check_setting<Backend>(kOp, "lengths", args.lengths, samples, int64_t{0}, drafted);
  args.temperature = setting<float>(kOp, "temperature", temperature, samples, device);
  check_setting<Backend>(kOp, "temperature", args.temperature, samples, 0.0f, std::numeric_limits<float>::infinity());
  args.philox = philox_settings(kOp, seed, step, sample_ids, samples, device);
  args.token = plane<int64_t>(kOp, "token", token, tokens, device);
  args.accepted = column<int64_t>(kOp, "accepted", accepted, samples, device);
  args.ok = column<bool>(kOp, "ok", ok, samples, device);
  if (samples == 0) return;

  // Launch.
  launch(Backend(logits), args, logits);
}

PYGEN_OP("verify_draft", verify_draft_op,
         "(Tensor draft, Tensor? draft_logits, Tensor logits, Tensor? lengths, Tensor? temperature, Tensor? seed, "
         "Tensor? step, Tensor? sample_ids, Tensor(a!) token, Tensor(b!)? accepted, Tensor(c!)? ok) -> ()")

}  // namespace
}  // namespace pygen
