#include "pygen/watermark_logits.h"

#include "backend.h"
#include "planes.h"

namespace pygen {
namespace {

constexpr const char* kOp = "watermark_logits";

[[maybe_unused]] void launch(const Cpu& cpu, const WatermarkLogitsArgs& args) {
  const int64_t blocks = (args.vocabulary + kRowBlock - 1) / kRowBlock;
  cpu.run(watermark_logits, args, args.samples * args.positions * blocks, kNoiseGrain / kRowBlock);
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, const WatermarkLogitsArgs& args) { gpu.run(cuda::watermark_logits, args); }
#endif

template <class Backend>
void watermark_logits_op(const at::Tensor& logits, const at::Tensor& tokens, const at::Tensor& key,
                         const at::Tensor& gamma, const at::Tensor& delta, int64_t context,
                         const std::optional<at::Tensor>& lengths, const at::Tensor& out) {
  // Check and describe.
  TORCH_CHECK_VALUE(logits.dim() == 2 || logits.dim() == 3, kOp,
                    ": logits must have shape (batch, vocabulary) or (batch, positions, vocabulary), got ",
                    logits.sizes());
  TORCH_CHECK_VALUE(out.sizes() == logits.sizes(), kOp, ": out must have shape ", logits.sizes(), ", got ",
                    out.sizes());
  TORCH_CHECK_TYPE(out.scalar_type() == logits.scalar_type(), kOp, ": out must be ", logits.scalar_type(), ", got ",
                   out.scalar_type());
  at::assert_no_internal_overlap(out);
  at::assert_no_partial_overlap(out, logits);
  const at::Tensor from = logits.dim() == 3 ? logits : logits.unsqueeze(1);
  const at::Tensor to = out.dim() == 3 ? out : out.unsqueeze(1);
  const at::Device device = logits.device();
  const int64_t samples = from.size(0);
  WatermarkLogitsArgs args{};
  args.samples = samples, args.positions = from.size(1), args.vocabulary = from.size(2);
  args.logits = row_operand(kOp, "logits", from, from.sizes(), device);
  args.out = row_operand(kOp, "out", to, from.sizes(), device);
  args.green = green_settings<Backend>(kOp, tokens, key, gamma, context, samples, device);
  args.lengths = setting<int64_t>(kOp, "lengths", lengths, samples, device);
  check_setting<Backend>(kOp, "lengths", args.lengths, samples, int64_t{0}, tokens.size(1));
  args.delta = setting<float>(kOp, "delta", delta, samples, device);
  if (logits.numel() == 0) return;

  // Launch.
  launch(Backend(logits), args);
}

PYGEN_OP("watermark_logits", watermark_logits_op,
         "(Tensor logits, Tensor tokens, Tensor key, Tensor gamma, Tensor delta, int context, Tensor? lengths, "
         "Tensor(a!) out) -> ()")

}  // namespace
}  // namespace pygen
