#include "pygen/combine_experts.h"

#include "backend.h"
#include "planes.h"

namespace pygen {
namespace {

constexpr const char* kOp = "combine_experts";

// A tensor of the given shape, contiguous in width.
Operand rows_operand(const char* name, const at::Tensor& tensor, at::IntArrayRef size, const at::Tensor& x) {
  check_no_grad(kOp, name, tensor);
  check_device(kOp, name, tensor, x.device());
  TORCH_CHECK_VALUE(tensor.sizes() == size && (tensor.stride(-1) == 1 || tensor.size(-1) <= 1), kOp, ": ", name,
                    " must have shape ", size, " and be contiguous in width, got ", tensor.sizes(), " with strides ",
                    tensor.strides());
  return {
      tensor.data_ptr(), {tensor.stride(0), tensor.dim() == 3 ? tensor.stride(1) : 0}, kernel_dtype(kOp, name, tensor)};
}

[[maybe_unused]] void launch(const Cpu& cpu, const CombineExpertsArgs& args) {
  cpu.run(combine_experts, args, args.rows, std::max<int64_t>(1, kMoveGrain / (args.width * args.choices)));
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, const CombineExpertsArgs& args) { gpu.run(cuda::combine_experts, args); }
#endif

template <class Backend>
void combine_experts_op(const at::Tensor& x, const at::Tensor& weights, const std::optional<at::Tensor>& residual,
                        const at::Tensor& out) {
  // Check and describe.
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) >= 1, kOp, ": x must have shape (..., choices, width), got ", x.sizes());
  CombineExpertsArgs args{};
  args.rows = x.size(0), args.choices = x.size(1), args.width = x.size(2);
  const int64_t of_weights[] = {args.rows, args.choices}, of_out[] = {args.rows, args.width};
  args.x = rows_operand("x", x, x.sizes(), x);
  args.weights = plane<const float>(kOp, "weights", weights, of_weights, x.device());
  check_no_grad(kOp, "weights", weights);
  args.out = rows_operand("out", out, of_out, x);
  at::assert_no_internal_overlap(out);
  at::assert_no_overlap(out, x);
  at::assert_no_overlap(out, weights);
  if (residual.has_value()) {
    args.residual = rows_operand("residual", *residual, of_out, x);
    TORCH_CHECK_TYPE(residual->scalar_type() == out.scalar_type(), kOp, ": residual must have out's dtype ",
                     out.scalar_type(), ", got ", residual->scalar_type());
    at::assert_no_partial_overlap(out, *residual);
  }
  if (out.numel() == 0) return;

  // Launch.
  launch(Backend(x), args);
}

PYGEN_OP("combine_experts", combine_experts_op, "(Tensor x, Tensor weights, Tensor? residual, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace pygen
