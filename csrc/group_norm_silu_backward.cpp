#include "pygen/group_norm_silu_backward.h"

#include <array>

#include "group_norm_call.h"

namespace pygen {
namespace {

[[maybe_unused]] void group_norm_silu_backward_cpu(const at::Tensor& x, const at::Tensor& grad,
                                                   const std::optional<at::Tensor>& weight,
                                                   const std::optional<at::Tensor>& bias, int64_t groups, double eps,
                                                   const at::Tensor& grad_x, const at::Tensor& channel_sums) {
  // Check and describe.
  const char* op = "group_norm_silu's backward pass";
  GroupNormCall call(op, x, weight, bias, groups, eps);
  call.like("grad", grad);
  call.like("grad_x", grad_x);
  const std::array<int64_t, 3> size{x.size(0), x.size(1), 2};
  TORCH_CHECK_TYPE(channel_sums.scalar_type() == at::kFloat, op, ": channel_sums must be float32, got ",
                   channel_sums.scalar_type());
  TORCH_CHECK_VALUE(channel_sums.sizes() == at::IntArrayRef(size) && channel_sums.is_contiguous(), op,
                    ": channel_sums must be contiguous, of shape ", at::IntArrayRef(size), ", got ",
                    channel_sums.sizes());
  at::assert_no_internal_overlap(grad_x);
  for (const at::Tensor& tensor : {x, grad, channel_sums}) at::assert_no_overlap(grad_x, tensor);
  if (x.numel() == 0) return Cpu(x).fill(channel_sums, 0.0);
  GroupNormSiluBackwardArgs args{};
  call.walk({{"grad", &args.grad, grad}, {"grad_x", &args.grad_x, grad_x}});
  args.forward = call.args;
  args.channel_sums = channel_sums.data_ptr<float>();

  // Launch.
  Cpu(x).run(group_norm_silu_backward, args, call.units(), call.grain());
}

PYGEN_CPU_OP("group_norm_silu_backward", group_norm_silu_backward_cpu,
             "(Tensor x, Tensor grad, Tensor? weight, Tensor? bias, SymInt groups, float eps, Tensor(a!) grad_x, "
             "Tensor(b!) channel_sums) -> ()")

}  // namespace
}  // namespace pygen
