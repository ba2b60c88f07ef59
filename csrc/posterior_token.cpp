#include "pygen/posterior_token.h"

#include <ATen/ops/empty.h>

#include "backend.h"
#include "planes.h"

namespace pygen {
namespace {

constexpr std::string_view kPosteriorKinds[] = {"largest", "current", "margin"};
constexpr const char* kOp = "posterior_token";

[[maybe_unused]] void launch(const Cpu& cpu, PosteriorTokenArgs& args, const at::Tensor&) {
  cpu.run(posterior_token, args, args.samples * args.rows, std::max<int64_t>(1, kNoiseGrain / args.vocabulary));
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, PosteriorTokenArgs& args, const at::Tensor& logits) {
  const int64_t bytes = cuda::posterior_token_workspace(args.samples * args.rows, args.vocabulary);
  const at::Tensor workspace = at::empty({bytes}, logits.options().dtype(at::kByte));
  args.workspace = workspace.data_ptr();
  gpu.run(cuda::posterior_token, args);
}
#endif

using Optional = std::optional<at::Tensor>;

template <class Backend>
void posterior_token_op(const at::Tensor& logits, const at::Tensor& current, const at::Tensor& coefficients,
                        bool has_mask, const Optional& index, const Optional& noise, bool uniform, const Optional& seed,
                        const Optional& step, const Optional& sample_ids, std::string_view kind, const Optional& token,
                        const Optional& prob, const Optional& confidence, const Optional& out) {
  // Check and describe.
  TORCH_CHECK_VALUE(logits.dim() == 3, kOp, ": logits must have shape (batch, positions, vocabulary), got ",
                    logits.sizes());
  const int64_t vocabulary = logits.size(2);
  TORCH_CHECK_VALUE(vocabulary >= 1 && vocabulary <= kRowBlock * kMaxRowBlocks, kOp, ": the vocabulary must hold 1 to ",
                    kRowBlock * kMaxRowBlocks, " tokens, got ", vocabulary);
  TORCH_CHECK_VALUE(!(noise.has_value() && seed.has_value()), kOp, ": give noise or seed, not both");
  const auto* const known = std::find(std::begin(kPosteriorKinds), std::end(kPosteriorKinds), kind);
  TORCH_CHECK_VALUE(known != std::end(kPosteriorKinds), kOp, ": kind must be largest, current or margin, got ", kind);
  TORCH_CHECK_VALUE(!index.has_value() || (index->dim() == 2 && index->size(0) == logits.size(0)), kOp,
                    ": index must have shape (", logits.size(0), ", rows), got ", index->sizes());
  const at::Device device = logits.device();
  const int64_t samples = logits.size(0), rows = index.has_value() ? index->size(1) : logits.size(1);
  const at::IntArrayRef positions = logits.sizes().slice(0, 2);
  const int64_t size[] = {samples, rows}, classes[] = {samples, rows, vocabulary + has_mask};
  PosteriorTokenArgs args{};
  args.samples = samples, args.rows = rows, args.positions = positions[1], args.vocabulary = vocabulary;
  args.has_mask = has_mask, args.uniform = uniform,
  args.kind = static_cast<PosteriorConfidence>(known - std::begin(kPosteriorKinds));
  args.logits = row_operand(kOp, "logits", logits, logits.sizes(), device);
  if (noise.has_value()) args.noise = row_operand(kOp, "noise", *noise, classes, device);
  args.current = plane<const int64_t>(kOp, "current", current, positions, device);
  args.index = plane<const int64_t>(kOp, "index", index, size, device);
  check_index(kOp, "coefficients", coefficients, at::kFloat, device);
  TORCH_CHECK_VALUE(coefficients.dim() >= 1 && coefficients.dim() <= 2 && coefficients.size(-1) == kPosteriorColumns &&
                        coefficients.stride(-1) == 1 && (coefficients.dim() == 1 || coefficients.size(0) == samples),
                    kOp, ": coefficients must have shape (", kPosteriorColumns, ",) or (", samples, ", ",
                    kPosteriorColumns, "), got ", coefficients.sizes());
  args.coefficients = {coefficients.const_data_ptr<float>(), coefficients.dim() == 1 ? 0 : coefficients.stride(0)};
  args.philox = philox_settings(kOp, seed, step, sample_ids, samples, device);
  args.token = plane<int64_t>(kOp, "token", token, size, device);
  args.prob = plane<float>(kOp, "prob", prob, size, device);
  args.confidence = plane<float>(kOp, "confidence", confidence, size, device);
  args.next = plane<int64_t>(kOp, "out", out, positions, device);
  if (logits.numel() == 0 || rows == 0) return;
  if (Backend::host_can_read() && index.has_value()) {
    for (int64_t b = 0; b < samples; ++b) {
      for (int64_t j = 0; j < rows; ++j) {
        const int64_t at = args.index.at(b, j);
        TORCH_CHECK_INDEX(at >= 0 && at < positions[1], kOp, ": index holds ", at, ", but there are ", positions[1],
                          " positions");
      }
    }
  }

  // Launch.
  launch(Backend(logits), args, logits);
}

PYGEN_OP("posterior_token", posterior_token_op,
         "(Tensor logits, Tensor current, Tensor coefficients, bool has_mask, Tensor? index, Tensor? noise, "
         "bool uniform, Tensor? seed, Tensor? step, Tensor? sample_ids, str kind, Tensor(a!)? token, Tensor(b!)? prob, "
         "Tensor(c!)? confidence, Tensor(d!)? out) -> ()")

}  // namespace
}  // namespace pygen
