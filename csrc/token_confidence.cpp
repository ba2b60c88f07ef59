#include "pygen/token_confidence.h"

#include <ATen/ops/empty.h>

#include "backend.h"
#include "planes.h"

namespace pygen {
namespace {

constexpr const char* kOp = "token_confidence";

[[maybe_unused]] void launch(const Cpu& cpu, TokenConfidenceArgs& args, const at::Tensor&) {
  const int64_t rows = args.samples * args.positions;
  cpu.run(token_confidence, args, rows, std::max<int64_t>(1, kNoiseGrain / args.vocabulary));
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, TokenConfidenceArgs& args, const at::Tensor& logits) {
  const int64_t bytes = cuda::token_confidence_workspace(args.samples * args.positions, args.vocabulary);
  const at::Tensor workspace = at::empty({bytes}, logits.options().dtype(at::kByte));
  args.workspace = workspace.data_ptr();
  gpu.run(cuda::token_confidence, args);
}
#endif

template <class Backend>
void token_confidence_op(const at::Tensor& logits, const std::optional<at::Tensor>& temperature,
                         const std::optional<at::Tensor>& top_k, const std::optional<at::Tensor>& top_p,
                         const std::optional<at::Tensor>& noise, const std::optional<at::Tensor>& seed,
                         const std::optional<at::Tensor>& step, const std::optional<at::Tensor>& sample_ids,
                         bool untempered, const at::Tensor& token, const std::optional<at::Tensor>& prob,
                         const std::optional<at::Tensor>& log_prob, const std::optional<at::Tensor>& neg_entropy,
                         const std::optional<at::Tensor>& scaled) {
  // Check and describe.
  TORCH_CHECK_VALUE(logits.dim() == 3, kOp, ": logits must have shape (batch, positions, vocabulary), got ",
                    logits.sizes());
  TORCH_CHECK_VALUE(logits.size(2) >= 1 && logits.size(2) <= kRowBlock * kMaxRowBlocks, kOp,
                    ": the vocabulary must hold 1 to ", kRowBlock * kMaxRowBlocks, " tokens, got ", logits.size(2));
  TORCH_CHECK_VALUE(!(noise.has_value() && seed.has_value()), kOp, ": give noise or seed, not both");
  const at::Device device = logits.device();
  const at::IntArrayRef size = logits.sizes().slice(0, 2);
  TokenConfidenceArgs args{};
  args.samples = size[0], args.positions = size[1], args.vocabulary = logits.size(2);
  args.logits = row_operand(kOp, "logits", logits, logits.sizes(), device);
  if (noise.has_value()) args.noise = row_operand(kOp, "noise", *noise, logits.sizes(), device);
  if (scaled.has_value()) {
    args.scaled = row_operand(kOp, "scaled", *scaled, logits.sizes(), device);
    at::assert_no_internal_overlap(*scaled);
    at::assert_no_overlap(*scaled, logits);
  }
  args.untempered = untempered && temperature.has_value();
  args.temperature = setting<float>(kOp, "temperature", temperature, size[0], device);
  args.top_k = setting<int64_t>(kOp, "top_k", top_k, size[0], device);
  args.top_p = setting<float>(kOp, "top_p", top_p, size[0], device);
  args.philox = philox_settings(kOp, seed, step, sample_ids, size[0], device);
  args.token = plane<int64_t>(kOp, "token", token, size, device);
  args.prob = plane<float>(kOp, "prob", prob, size, device);
  args.log_prob = plane<float>(kOp, "log_prob", log_prob, size, device);
  args.neg_entropy = plane<float>(kOp, "neg_entropy", neg_entropy, size, device);
  if (logits.numel() == 0) return;

  // Launch.
  launch(Backend(logits), args, logits);
}

PYGEN_OP("token_confidence", token_confidence_op,
         "(Tensor logits, Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? noise, Tensor? seed, "
         "Tensor? step, Tensor? sample_ids, bool untempered, Tensor(a!) token, Tensor(b!)? prob, "
         "Tensor(c!)? log_prob, Tensor(d!)? neg_entropy, Tensor(e!)? scaled) -> ()")

}  // namespace
}  // namespace pygen
