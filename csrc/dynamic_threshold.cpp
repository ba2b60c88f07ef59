#include "pygen/dynamic_threshold.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>

#include "affine_rows.h"
#include "backend.h"
#include "operands.h"

namespace pygen {
namespace {

constexpr const char* kOp = "dynamic_threshold";

// The order statistics around the quantile, in float32 as torch.quantile has them.
void find_ranks(DynamicThresholdArgs& args, double ratio) {
  const int64_t last = args.sample_elements - 1;
  const float rank = static_cast<float>(ratio) * static_cast<float>(last);
  const int64_t below = std::min(static_cast<int64_t>(rank), last);
  args.rank[0] = static_cast<uint32_t>(below);
  args.rank[1] = static_cast<uint32_t>(std::min(static_cast<int64_t>(std::ceil(rank)), last));
  args.weight = rank - static_cast<float>(below);
}

// Threads share the samples where there are enough of them, else each sample's elements.
[[maybe_unused]] void launch(const Cpu& cpu, DynamicThresholdArgs args, at::Device) {
  constexpr int64_t kUnit = 1024;
  const int64_t elements = args.sample_elements, samples = args.step.size[0];
  if (samples >= at::get_num_threads()) {
    const auto select = [args, elements](int64_t begin, int64_t end) {
      DynamicThresholdArgs own = args;
      for (int64_t sample = begin; sample < end; ++sample) {
        Selection selection{};
        own.selection = &selection;
        for (own.pass = 0; own.pass < kPasses; ++own.pass) {
          dynamic_threshold(own, sample * elements, (sample + 1) * elements);
        }
      }
    };
    return cpu.run(select, samples, std::max<int64_t>(1, kNoiseGrain / elements));
  }
  const at::Tensor selections = at::empty({samples * static_cast<int64_t>(sizeof(Selection))}, at::kByte);
  cpu.keep(selections);
  for (int64_t sample = 0; sample < samples; ++sample) {
    args.selection = static_cast<Selection*>(selections.data_ptr()) + sample;
    cpu.run([args](int64_t, int64_t) { *args.selection = {}; }, 1, 1);
    for (args.pass = 0; args.pass < kPasses; ++args.pass) {
      const auto count = [args, elements, sample](int64_t begin, int64_t end) {
        dynamic_threshold(args, sample * elements + begin * kUnit, sample * elements + std::min(end * kUnit, elements));
      };
      cpu.run(count, (elements + kUnit - 1) / kUnit, kNoiseGrain / kUnit);
    }
  }
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, DynamicThresholdArgs args, at::Device device) {
  at::Tensor selections;
  if (cuda::dynamic_threshold_needs_selections(args)) {
    const int64_t bytes = args.step.size[0] * static_cast<int64_t>(sizeof(Selection));
    selections = at::zeros({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
    args.selection = static_cast<Selection*>(selections.data_ptr());
  }
  gpu.run(cuda::dynamic_threshold, args);
}
#endif

template <class Backend>
void dynamic_threshold_op(const at::Tensor& x, const std::optional<at::Tensor>& model_output, const at::Tensor& table,
                          const at::Tensor& rows, const std::optional<at::Tensor>& uncond,
                          const std::optional<at::Tensor>& negative, double ratio, double max_value,
                          const at::Tensor& out) {
  // Check.
  TORCH_CHECK_VALUE(x.dim() >= 1, kOp, ": x must begin with the batch, got a scalar");
  TORCH_CHECK_VALUE(ratio >= 0.0 && ratio <= 1.0, kOp, ": ratio must lie in [0, 1], got ", ratio);
  TORCH_CHECK_VALUE(max_value > 0.0, kOp, ": max_value must be positive, got ", max_value);
  TORCH_CHECK_VALUE(!uncond.has_value() || model_output.has_value(), kOp, ": uncond needs model_output");
  kernel_dtype(kOp, "x", x);
  TORCH_CHECK_VALUE(!negative.has_value() || uncond.has_value(), kOp, ": negative needs uncond");
  DynamicThresholdArgs args{};
  const int64_t width = table.dim() == 2 ? table.size(1) : 0;
  read_rows(kOp, x, table, rows, std::max<int64_t>(0, width - kHistory) / 2, /*most_dims=*/1, args.step);
  check_index(kOp, "out", out, at::kFloat, x.device());
  const int64_t samples = x.size(0);
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == samples && out.size(1) == width, kOp, ": out must have shape (",
                    samples, ", ", width, "), got ", out.sizes());
  at::assert_no_internal_overlap(out);
  at::assert_no_overlap(out, x);
  for (const auto* tensor : {&model_output, &uncond, &negative}) {
    if (tensor->has_value()) at::assert_no_overlap(out, **tensor);
  }
  if (samples == 0) return;
  args.sample_elements = x.numel() / samples;
  TORCH_CHECK_VALUE(args.sample_elements > 0, kOp, ": a sample of x has no elements, and no quantile; x's shape is ",
                    x.sizes());
  TORCH_CHECK_VALUE(args.sample_elements <= std::numeric_limits<uint32_t>::max(), kOp,
                    ": a sample of x has more than 2^32 elements; x's shape is ", x.sizes());

  // Describe.
  c10::SmallVector<int64_t, kMaxDims> dims;
  for (int64_t d = 0; d < x.dim(); ++d) dims.push_back(d);
  IterationSpace space(x.sizes(), dims, /*leading=*/1, /*keep_order=*/false);
  space.add_input(kOp, "x", args.step.term[kTermX], x, x.device());
  if (model_output.has_value()) {
    space.add_input(kOp, "model_output", args.step.term[kTermCond], *model_output, x.device());
  }
  if (uncond.has_value()) space.add_input(kOp, "uncond", args.step.term[kTermUncond], *uncond, x.device());
  if (negative.has_value()) space.add_input(kOp, "negative", args.step.term[kTermNegative], *negative, x.device());
  args.step.ndim = space.finish(kOp, args.step.size);
  args.step.n_history = 0;  // none is read
  args.step.pred.data = args.factors = out.mutable_data_ptr<float>();
  for (int d = 0; d < 2; ++d) args.factors_stride[d] = out.stride(d);
  args.columns = width;
  args.max_value = static_cast<float>(max_value);
  find_ranks(args, ratio);
  if (Backend::host_can_read()) {
    check_rows(kOp, args.step, samples, 1, [&](const double* row, int64_t index) {
      TORCH_CHECK_VALUE(row[kPredOut] == 0.0 || model_output.has_value(), kOp, ": row ", index,
                        " reads the model output, and model_output is None");
      TORCH_CHECK_VALUE(row[kPredOut] == 0.0 || row[kNegative] == 0.0 || !uncond.has_value() || negative.has_value(),
                        kOp, ": row ", index, " reads negative, and negative is None");
    });
  }

  // Launch.
  launch(Backend(x), args, x.device());
}

PYGEN_OP("dynamic_threshold", dynamic_threshold_op,
         "(Tensor x, Tensor? model_output, Tensor table, Tensor rows, Tensor? uncond, Tensor? negative, float ratio, "
         "float max_value, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace pygen
