#include "pygen/diffusion_loss.h"

#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include <limits>

#include "backend.h"
#include "operands.h"

namespace pygen {
namespace {

constexpr const char* kOp = "diffusion_loss";

// What a row reads must be there: said here, by name, before anything runs.
void check_rows(const DiffusionLossArgs& args) {
  const bool has_noise = args.seed != nullptr || args.term[kLossTermNoise].data != nullptr;
  for (int64_t b = 0; b < args.size[0]; ++b) {
    for (int64_t t = 0; t < args.size[1]; ++t) {
      const int64_t index = args.rows[b * args.rows_stride[0] + t * args.rows_stride[1]];
      TORCH_CHECK_INDEX(index >= 0 && index < args.n_rows, kOp, ": rows holds ", index, ", but the table has ",
                        args.n_rows, " rows");
      TORCH_CHECK_VALUE(has_noise || args.table[index * args.table_stride + kLossNoise] == 0.0, kOp, ": row ", index,
                        " reads the noise: give seed or noise");
      TORCH_CHECK_VALUE(
          args.term[kLossTermVariance].data != nullptr || args.table[index * args.table_stride + kLossBound] == 0.0,
          kOp, ": row ", index, " reads the variance, and variance is None");
    }
  }
}

[[maybe_unused]] void launch(const Cpu& cpu, const DiffusionLossArgs& args) {
  const int64_t units = args.size[0] * args.size[1] * args.segments;
  const int64_t elements = std::min(args.place_elements, kLossSegment);
  const int64_t grain = args.seed == nullptr ? kMoveGrain : kNoiseGrain;
  cpu.run(diffusion_loss, args, units, (grain + elements - 1) / elements);
  if (args.loss != nullptr) cpu.run(diffusion_loss_mean, args, args.size[0], args.size[0]);
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, const DiffusionLossArgs& args) { gpu.run(cuda::diffusion_loss, args); }
#endif

template <class Backend>
void diffusion_loss_op(const at::Tensor& model_output, const at::Tensor& x0, const at::Tensor& table,
                       const at::Tensor& rows, const std::optional<at::Tensor>& noise,
                       const std::optional<at::Tensor>& variance, const std::optional<at::Tensor>& mask,
                       const std::optional<at::Tensor>& seed, const std::optional<at::Tensor>& sample_ids,
                       const std::optional<at::Tensor>& grad, const std::optional<at::Tensor>& out,
                       const std::optional<at::Tensor>& grad_output, const std::optional<at::Tensor>& grad_x0,
                       const std::optional<at::Tensor>& grad_noise, const std::optional<at::Tensor>& grad_variance) {
  // Check.
  const at::Tensor& like = model_output;
  TORCH_CHECK_VALUE(like.dim() >= 1, kOp, ": model_output must begin with the batch, got a scalar");
  TORCH_CHECK_VALUE(x0.sizes() == like.sizes(), kOp, ": x0 must have model_output's shape ", like.sizes(), ", got ",
                    x0.sizes());
  check_index(kOp, "table", table, at::kDouble, like.device());
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == kLossColumns && (table.stride(1) == 1 || table.size(0) == 0),
                    kOp, ": table must have shape (rows, ", static_cast<int>(kLossColumns), "), got ", table.sizes());
  check_index(kOp, "rows", rows, at::kLong, like.device());
  const bool one_row = rows.numel() == 1;
  TORCH_CHECK_VALUE(
      one_row || (rows.dim() <= 2 && rows.dim() <= like.dim() && rows.sizes() == like.sizes().slice(0, rows.dim())),
      kOp, ": rows must hold one index, one per sample or one per (sample, token); got shape ", rows.sizes(),
      " for model_output of shape ", like.sizes());
  TORCH_CHECK_VALUE(!(noise.has_value() && seed.has_value()), kOp, ": give noise or seed, not both");
  DiffusionLossArgs args{};
  if (seed.has_value()) args.seed_stride = sample_stride(kOp, "seed", *seed, like);
  if (sample_ids.has_value()) {
    check_index(kOp, "sample_ids", *sample_ids, at::kLong, like.device());
    TORCH_CHECK_VALUE(sample_ids->dim() == 1 && sample_ids->size(0) == like.size(0), kOp,
                      ": sample_ids must have shape (", like.size(0), ",), got ", sample_ids->sizes());
  }

  // Describe.
  const int64_t leading = one_row ? 1 : rows.dim();
  c10::SmallVector<int64_t, kMaxDims> dims;
  for (int64_t d = 0; d < 2; ++d) dims.push_back(d < leading ? d : -1);
  for (int64_t d = leading; d < like.dim(); ++d) dims.push_back(d);
  IterationSpace space(like.sizes(), dims, /*leading=*/2, /*keep_order=*/seed.has_value());

  c10::SmallVector<at::Tensor, kLossTerms> inputs;  // keeps expanded views alive
  inputs.reserve(kLossTerms);
  const auto add_input = [&](LossTerm term, const char* name, const at::Tensor& tensor, bool allow_bool = false) {
    check_no_grad(kOp, name, tensor);
    check_device(kOp, name, tensor, like.device());
    TORCH_CHECK_VALUE(at::is_expandable_to(tensor.sizes(), like.sizes()), kOp, ": ", name, " of shape ", tensor.sizes(),
                      " does not broadcast to model_output of shape ", like.sizes());
    space.add(args.term[term], kernel_dtype(kOp, name, tensor, allow_bool),
              inputs.emplace_back(tensor.expand(like.sizes())));
  };
  add_input(kLossTermOutput, "model_output", model_output);
  add_input(kLossTermX0, "x0", x0);
  if (noise.has_value()) add_input(kLossTermNoise, "noise", *noise);
  if (variance.has_value()) add_input(kLossTermVariance, "variance", *variance);
  if (mask.has_value()) add_input(kLossTermMask, "mask", *mask, /*allow_bool=*/true);

  const auto check_per_sample = [&](const char* name, const at::Tensor& tensor) {
    check_index(kOp, name, tensor, at::kFloat, like.device());
    TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == like.size(0), kOp, ": ", name, " must have shape (",
                      like.size(0), ",), got ", tensor.sizes());
    check_no_grad(kOp, name, tensor);
  };
  if (grad.has_value()) check_per_sample("grad", *grad);
  if (out.has_value()) {
    check_per_sample("out", *out);
    at::assert_no_internal_overlap(*out);
  }

  // A gradient may be exactly one of the inputs, never a part of one, and never another gradient.
  const at::Tensor* const gradients[] = {
      grad_output.has_value() ? &*grad_output : nullptr, grad_x0.has_value() ? &*grad_x0 : nullptr,
      grad_noise.has_value() ? &*grad_noise : nullptr, grad_variance.has_value() ? &*grad_variance : nullptr};
  const char* const names[] = {"grad_output", "grad_x0", "grad_noise", "grad_variance"};
  for (int g = 0; g < kLossGradients; ++g) {
    if (gradients[g] == nullptr) continue;
    const at::Tensor& gradient = *gradients[g];
    TORCH_CHECK_VALUE(gradient.sizes() == like.sizes(), kOp, ": ", names[g], " must have model_output's shape ",
                      like.sizes(), ", got ", gradient.sizes());
    check_no_grad(kOp, names[g], gradient);
    check_device(kOp, names[g], gradient, like.device());
    at::assert_no_internal_overlap(gradient);
    space.add(args.gradient[g], kernel_dtype(kOp, names[g], gradient), gradient);
    for (const at::Tensor& input : inputs) at::assert_no_partial_overlap(gradient, input);
    for (int other = 0; other < g; ++other) {
      if (gradients[other] != nullptr) at::assert_no_overlap(gradient, *gradients[other]);
    }
  }
  if (like.numel() == 0) {
    if (out.has_value()) Backend(*out).fill(*out, std::numeric_limits<double>::quiet_NaN());  // a mean of nothing
    return;
  }

  args.ndim = space.finish(kOp, args.size);
  args.place_elements = like.numel() / (args.size[0] * args.size[1]);
  args.segments = (args.place_elements + kLossSegment - 1) / kLossSegment;
  args.table = table.const_data_ptr<double>();
  args.table_stride = table.stride(0);
  args.n_rows = table.size(0);
  args.rows = rows.const_data_ptr<int64_t>();
  for (int64_t d = 0; d < 2; ++d) args.rows_stride[d] = one_row || d >= rows.dim() ? 0 : rows.stride(d);
  if (seed.has_value()) args.seed = seed->const_data_ptr<int64_t>();
  if (sample_ids.has_value()) {
    args.sample_ids = sample_ids->const_data_ptr<int64_t>();
    args.sample_ids_stride = sample_ids->stride(0);
  }
  if (grad.has_value()) {
    args.grad = grad->const_data_ptr<float>();
    args.grad_stride = grad->stride(0);
  }
  at::Tensor partial;
  if (out.has_value()) {
    partial = at::empty({args.size[0] * args.size[1] * args.segments}, like.options().dtype(at::kDouble));
    args.partial = partial.mutable_data_ptr<double>();
    args.loss = out->mutable_data_ptr<float>();
    args.loss_stride = out->stride(0);
  }
  if (Backend::host_can_read()) check_rows(args);

  // Launch.
  const Backend backend(like);
  backend.keep(partial);
  launch(backend, args);
}

PYGEN_OP("diffusion_loss", diffusion_loss_op,
         "(Tensor model_output, Tensor x0, Tensor table, Tensor rows, Tensor? noise, Tensor? variance, Tensor? mask, "
         "Tensor? seed, "
         "Tensor? sample_ids, Tensor? grad, Tensor(a!)? out, Tensor(b!)? grad_output, Tensor(c!)? grad_x0, "
         "Tensor(d!)? grad_noise, Tensor(e!)? grad_variance) -> ()")

}  // namespace
}  // namespace pygen
