#include "pygen/group_norm_silu.h"

#include "group_norm_call.h"

namespace pygen {
namespace {

[[maybe_unused]] void group_norm_silu_cpu(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                          const std::optional<at::Tensor>& bias, int64_t groups, double eps,
                                          const at::Tensor& out) {
  // Check and describe.
  GroupNormCall call("group_norm_silu", x, weight, bias, groups, eps);
  call.like("out", out);
  at::assert_no_internal_overlap(out);
  at::assert_no_partial_overlap(out, x);
  if (weight.has_value()) at::assert_no_overlap(out, *weight);
  if (bias.has_value()) at::assert_no_overlap(out, *bias);
  if (x.numel() == 0) return;
  call.walk({{"out", &call.args.out, out}});

  // Launch.
  Cpu(x).run(group_norm_silu, call.args, call.units(), call.grain());
}

PYGEN_CPU_OP("group_norm_silu", group_norm_silu_cpu,
             "(Tensor x, Tensor? weight, Tensor? bias, SymInt groups, float eps, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace pygen
