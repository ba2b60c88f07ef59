#include "pygen/timestep_embedding.h"

#include <ATen/MemoryOverlap.h>

#include <cmath>

#include "backend.h"
#include "operands.h"

namespace pygen {
namespace {

constexpr const char* kOp = "timestep_embedding";

[[maybe_unused]] void timestep_embedding_cpu(const at::Tensor& t, double max_period, bool cosines_first, double shift,
                                             const at::Tensor& out) {
  // Check and describe.
  TimestepEmbeddingArgs args{};
  check_index(kOp, "t", t, at::kFloat, out.device());
  check_no_grad(kOp, "t", t);
  check_no_grad(kOp, "out", out);
  TORCH_CHECK_VALUE(t.dim() == 1, kOp, ": t must have shape (batch,), got ", t.sizes());
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == t.size(0) && (out.stride(1) == 1 || out.size(1) <= 1), kOp,
                    ": out must have shape (", t.size(0), ", width) and contiguous rows, got ", out.sizes(),
                    " with strides ", out.strides());
  args.width = out.size(1), args.half = args.width / 2;
  TORCH_CHECK_VALUE(args.width >= 2 && static_cast<double>(args.half) > shift, kOp,
                    ": width must be at least 2, and shift below half of it; got ", args.width, " and ", shift);
  TORCH_CHECK_VALUE(max_period > 0 && std::isfinite(max_period), kOp, ": max_period must be above 0, got ", max_period);
  at::assert_no_internal_overlap(out);
  at::assert_no_overlap(out, t);
  args.t = t.const_data_ptr<float>(), args.t_stride = t.stride(0);
  args.decay = -std::log(max_period) / (static_cast<double>(args.half) - shift);
  args.cosines_first = cosines_first;
  args.out = {out.data_ptr(), {out.stride(0)}, kernel_dtype(kOp, "out", out)};
  if (t.numel() == 0) return;

  // Launch.
  Cpu(out).run(timestep_embedding, args, t.numel(), std::max<int64_t>(1, kMoveGrain / (8 * args.width)));
}

PYGEN_CPU_OP("timestep_embedding", timestep_embedding_cpu,
             "(Tensor t, float max_period, bool cosines_first, float shift, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace pygen
