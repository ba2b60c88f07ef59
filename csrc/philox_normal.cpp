#include "pygen/philox_normal.h"

#include <ATen/MemoryOverlap.h>

#include "backend.h"
#include "operands.h"

namespace pygen {
namespace {

constexpr const char* kOp = "philox_normal";

[[maybe_unused]] void launch(const Cpu& cpu, const PhiloxNormalArgs& args, int64_t count) {
  cpu.run_elements(philox_normal, args, count, kNoiseGrain);
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, const PhiloxNormalArgs& args, int64_t) { gpu.run(cuda::philox_normal, args); }
#endif

template <class Backend>
void philox_normal_op(const at::Tensor& out, const at::Tensor& seed, const at::Tensor& step,
                      const std::optional<at::Tensor>& sample_ids, int64_t draw) {
  // Check.
  TORCH_CHECK_VALUE(out.dim() >= 1, kOp, ": the shape must begin with the batch, got a scalar");
  PhiloxNormalArgs args{};
  args.seed_stride = sample_stride(kOp, "seed", seed, out);
  args.step_stride = sample_stride(kOp, "step", step, out);
  TORCH_CHECK_VALUE(draw >= 0 && draw < 1 << 16, kOp, ": draw must lie in [0, 65536), got ", draw);
  if (sample_ids.has_value()) {
    check_index(kOp, "sample_ids", *sample_ids, at::kLong, out.device());
    TORCH_CHECK_VALUE(sample_ids->dim() == 1 && sample_ids->size(0) == out.size(0), kOp,
                      ": sample_ids must have shape (", out.size(0), ",), got ", sample_ids->sizes());
  }
  check_no_grad(kOp, "out", out);
  at::assert_no_internal_overlap(out);
  if (out.numel() == 0) return;

  // Describe.
  c10::SmallVector<int64_t, kMaxDims> dims;
  for (int64_t d = 0; d < out.dim(); ++d) dims.push_back(d);
  IterationSpace space(out.sizes(), dims, /*leading=*/1, /*keep_order=*/true);
  space.add(args.out, kernel_dtype(kOp, "out", out), out);
  args.ndim = space.finish(kOp, args.size);
  args.draw = static_cast<uint32_t>(draw);
  args.seed = seed.const_data_ptr<int64_t>();
  args.step = step.const_data_ptr<int64_t>();
  if (sample_ids.has_value()) {
    args.sample_ids = sample_ids->const_data_ptr<int64_t>();
    args.sample_ids_stride = sample_ids->stride(0);
  }

  // Launch.
  launch(Backend(out), args, out.numel());
}

PYGEN_OP("philox_normal", philox_normal_op,
         "(Tensor(a!) out, Tensor seed, Tensor step, Tensor? sample_ids=None, *, int draw=0) -> ()")

}  // namespace
}  // namespace pygen
