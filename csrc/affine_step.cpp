#include "pygen/affine_step.h"

#include <ATen/MemoryOverlap.h>

#include "affine_rows.h"
#include "backend.h"
#include "operands.h"

namespace pygen {
namespace {

constexpr const char* kOp = "affine_step";

NoiseScale parse_noise_scale(c10::string_view name) {
  for (const NoiseScale kind : {NoiseScale::kFactor, NoiseScale::kVariance, NoiseScale::kLogVariance}) {
    if (name == kNoiseScaleNames[static_cast<int>(kind)]) return kind;
  }
  TORCH_CHECK_VALUE(false, kOp, ": noise_scale_kind must be factor, variance or log_variance, got ", name);
}

// What a row reads must be there: said here, by name, before anything runs.
void check_row(const AffineStepArgs& args, const double* row, int64_t index) {
  const bool second = affine_reads_second(args);
  const auto read = [&](Column first, Column other) { return row[first] != 0.0 || (second && row[other] != 0.0); };
  const bool pred = args.pred.data != nullptr || read(kPred0, kPred1);
  const bool reads_out = read(kOut0, kOut1) || (pred && row[kPredOut] != 0.0);
  TORCH_CHECK_VALUE(args.term[kTermCond].data != nullptr || !reads_out, kOp, ": row ", index,
                    " reads the model output, and model_output is None");
  TORCH_CHECK_VALUE(args.term[kTermUncond].data == nullptr || args.term[kTermNegative].data != nullptr || !reads_out ||
                        row[kNegative] == 0.0,
                    kOp, ": row ", index, " reads negative, and negative is None");
  TORCH_CHECK_VALUE(args.seed != nullptr || args.term[kTermNoise].data != nullptr || !read(kNoise0, kNoise1), kOp,
                    ": row ", index, " adds noise: give seed or noise");
}

[[maybe_unused]] void launch(const Cpu& cpu, const AffineStepArgs& args, int64_t count) {
  cpu.run_elements(affine_step, args, count, args.seed == nullptr ? kMoveGrain : kNoiseGrain);
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, const AffineStepArgs& args, int64_t) { gpu.run(cuda::affine_step, args); }
#endif

template <class Backend>
void affine_step_op(const at::Tensor& x, const std::optional<at::Tensor>& model_output, const at::Tensor& table,
                    const at::Tensor& rows, const std::optional<at::Tensor>& uncond,
                    const std::optional<at::Tensor>& negative, at::TensorList history,
                    const std::optional<at::Tensor>& noise, const std::optional<at::Tensor>& noise_scale,
                    std::optional<c10::string_view> noise_scale_kind, const std::optional<at::Tensor>& mask,
                    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& seed,
                    const std::optional<at::Tensor>& sample_ids, const at::Tensor& out,
                    const std::optional<at::Tensor>& pred, const std::optional<at::Tensor>& second) {
  // Check.
  const int64_t n_history = static_cast<int64_t>(history.size());
  TORCH_CHECK_VALUE(x.dim() >= 1, kOp, ": x must begin with the batch, got a scalar");
  TORCH_CHECK_VALUE(n_history <= kMaxHistory, kOp, ": history holds ", n_history, " tensors, more than ", kMaxHistory);
  AffineStepArgs args{};
  read_rows(kOp, x, table, rows, n_history, /*most_dims=*/2, args);
  const bool one_row = rows.numel() == 1;
  TORCH_CHECK_VALUE(!uncond.has_value() || model_output.has_value(), kOp, ": uncond needs model_output");
  TORCH_CHECK_VALUE(!negative.has_value() || uncond.has_value(), kOp, ": negative needs uncond");
  TORCH_CHECK_VALUE(!(noise.has_value() && seed.has_value()), kOp, ": give noise or seed, not both");
  if (noise_scale_kind.has_value()) args.noise_scale = parse_noise_scale(*noise_scale_kind);
  if (seed.has_value()) args.seed_stride = sample_stride(kOp, "seed", *seed, x);
  if (sample_ids.has_value()) {
    check_index(kOp, "sample_ids", *sample_ids, at::kLong, x.device());
    TORCH_CHECK_VALUE(sample_ids->dim() == 1 && sample_ids->size(0) == x.size(0), kOp, ": sample_ids must have shape (",
                      x.size(0), ",), got ", sample_ids->sizes());
  }
  if (scale.has_value()) {
    check_index(kOp, "scale", *scale, at::kFloat, x.device());
    TORCH_CHECK_VALUE(scale->dim() == 2 && scale->size(0) == x.size(0) && scale->size(1) == table.size(1), kOp,
                      ": scale must have shape (", x.size(0), ", ", table.size(1), "), got ", scale->sizes());
  }

  // Describe. A single row without anything per sample lets the batch merge with the rest.
  const bool per_sample = !one_row || seed.has_value() || scale.has_value();
  const int64_t leading = per_sample ? std::max<int64_t>(1, one_row ? 1 : rows.dim()) : 0;
  c10::SmallVector<int64_t, kMaxDims> dims;
  for (int64_t d = 0; d < 2; ++d) dims.push_back(d < leading ? d : -1);
  for (int64_t d = leading; d < x.dim(); ++d) dims.push_back(d);
  IterationSpace space(x.sizes(), dims, /*leading=*/2, /*keep_order=*/seed.has_value());

  const auto add_input = [&](int term, const char* name, const at::Tensor& tensor, bool allow_bool = false) {
    space.add_input(kOp, name, args.term[term], tensor, x.device(), allow_bool);
  };
  const auto add_output = [&](Operand& operand, const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.sizes() == x.sizes(), kOp, ": ", name, " must have x's shape ", x.sizes(), ", got ",
                      tensor.sizes());
    check_no_grad(kOp, name, tensor);
    check_device(kOp, name, tensor, x.device());
    at::assert_no_internal_overlap(tensor);
    space.add(operand, kernel_dtype(kOp, name, tensor), tensor);
  };
  add_output(args.next, "out", out);
  add_input(kTermX, "x", x);
  if (model_output.has_value()) add_input(kTermCond, "model_output", *model_output);
  if (uncond.has_value()) add_input(kTermUncond, "uncond", *uncond);
  if (negative.has_value()) add_input(kTermNegative, "negative", *negative);
  if (noise.has_value()) add_input(kTermNoise, "noise", *noise);
  if (noise_scale.has_value()) add_input(kTermNoiseScale, "noise_scale", *noise_scale);
  if (mask.has_value()) add_input(kTermMask, "mask", *mask, /*allow_bool=*/true);
  for (int64_t j = 0; j < n_history; ++j) add_input(kTermHistory + j, "history", history[j]);
  if (pred.has_value()) add_output(args.pred, "pred", *pred);
  if (second.has_value()) add_output(args.second, "second", *second);

  // An output may be exactly one of the inputs, never a part of one, and never another output.
  const at::Tensor* const outputs[] = {&out, pred.has_value() ? &*pred : nullptr,
                                       second.has_value() ? &*second : nullptr};
  const auto check_inputs = [&](const at::Tensor& tensor) {
    for (const at::Tensor* output : outputs) {
      if (output != nullptr) at::assert_no_partial_overlap(*output, tensor);
    }
  };
  check_inputs(x);
  for (const auto* tensor : {&model_output, &uncond, &negative, &noise, &noise_scale, &mask}) {
    if (tensor->has_value()) check_inputs(**tensor);
  }
  for (const at::Tensor& tensor : history) check_inputs(tensor);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < i; ++j) {
      if (outputs[i] != nullptr && outputs[j] != nullptr) at::assert_no_overlap(*outputs[i], *outputs[j]);
    }
  }
  if (x.numel() == 0) return;

  args.ndim = space.finish(kOp, args.size);
  if (scale.has_value()) {
    args.scale = scale->const_data_ptr<float>();
    args.scale_stride[0] = scale->stride(0);
    args.scale_stride[1] = scale->stride(1);
  }
  if (seed.has_value()) args.seed = seed->const_data_ptr<int64_t>();
  if (sample_ids.has_value()) {
    args.sample_ids = sample_ids->const_data_ptr<int64_t>();
    args.sample_ids_stride = sample_ids->stride(0);
  }
  if (Backend::host_can_read()) {
    const auto check = [&](const double* row, int64_t index) { check_row(args, row, index); };
    check_rows(kOp, args, args.size[0], args.size[1], check);
  }

  // Launch.
  launch(Backend(x), args, x.numel());
}

PYGEN_OP("affine_step", affine_step_op,
         "(Tensor x, Tensor? model_output, Tensor table, Tensor rows, Tensor? uncond, Tensor? negative, "
         "Tensor[] history, Tensor? noise, Tensor? noise_scale, str? noise_scale_kind, Tensor? mask, Tensor? scale, "
         "Tensor? seed, "
         "Tensor? sample_ids, Tensor(a!) out, Tensor(b!)? pred, Tensor(c!)? second) -> ()")

#if !defined(PYGEN_EMULATION)
// check_no_grad says that the op is not differentiable: autograd has nothing to add but the time it takes.
TORCH_LIBRARY_IMPL(pygen, Autograd, library) { library.impl("affine_step", torch::CppFunction::makeFallthrough()); }
#endif

}  // namespace
}  // namespace pygen
