#include "pygen/route_experts.h"

#include "backend.h"
#include "planes.h"

namespace pygen {
namespace {

constexpr const char* kOp = "route_experts";

[[maybe_unused]] void launch(const Cpu& cpu, const RouteExpertsArgs& args) {
  cpu.run(route_experts, args, args.rows, std::max<int64_t>(1, kNoiseGrain / args.count));
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, const RouteExpertsArgs& args) { gpu.run(cuda::route_experts, args); }
#endif

template <class Backend>
void route_experts_op(const at::Tensor& logits, bool normalise, const at::Tensor& experts, const at::Tensor& weights) {
  // Check and describe.
  TORCH_CHECK_VALUE(logits.dim() == 2, kOp, ": logits must have shape (..., experts), got ", logits.sizes());
  RouteExpertsArgs args{};
  args.rows = logits.size(0), args.count = logits.size(1);
  check_no_grad(kOp, "logits", logits);
  args.logits = {logits.data_ptr(), {logits.stride(0), logits.stride(1)}, kernel_dtype(kOp, "logits", logits)};
  args.normalise = normalise;
  TORCH_CHECK_VALUE(experts.dim() == 2 && experts.size(0) == args.rows, kOp, ": experts must have shape (", args.rows,
                    ", top_k), got ", experts.sizes());
  args.choices = experts.size(1);
  TORCH_CHECK_VALUE(args.choices >= 1 && args.choices <= args.count, kOp, ": top_k must be 1 to ", args.count, ", got ",
                    args.choices);
  args.experts = plane<int64_t>(kOp, "experts", experts, experts.sizes(), logits.device());
  args.weights = plane<float>(kOp, "weights", weights, experts.sizes(), logits.device());
  at::assert_no_overlap(weights, logits);
  at::assert_no_overlap(weights, experts);
  at::assert_no_overlap(experts, logits);
  if (args.rows == 0) return;

  // Launch.
  launch(Backend(logits), args);
}

PYGEN_OP("route_experts", route_experts_op,
         "(Tensor logits, bool normalise, Tensor(a!) experts, Tensor(b!) weights) -> ()")

}  // namespace
}  // namespace pygen
