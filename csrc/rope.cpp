#include "pygen/rope.h"

#include <ATen/MemoryOverlap.h>

#include "backend.h"
#include "rope_table.h"

namespace pygen {
namespace {

constexpr const char* kOp = "rope";

[[maybe_unused]] void launch(const Cpu& cpu, const RopeArgs& args) {
  const int64_t elements = std::min(args.length, kRopeTokens) * args.heads * args.head_dim;
  cpu.run(rope, args, args.batch * rope_units(args.length), (kMoveGrain + elements - 1) / elements);
}
#if defined(PYGEN_CUDA) || defined(PYGEN_EMULATION)
void launch(const Gpu& gpu, const RopeArgs& args) { gpu.run(cuda::rope, args); }
#endif

template <class Backend>
void rope_op(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& table, bool interleaved, bool inverse,
             const std::optional<at::Tensor>& norm, double eps, const at::Tensor& out) {
  // Check and describe.
  RopeArgs args{};
  args.x = head_operand(kOp, "x", x, x.device());
  args.out = head_operand(kOp, "out", out, x.device());
  TORCH_CHECK_VALUE(out.sizes() == x.sizes(), kOp, ": out must have x's shape ", x.sizes(), ", got ", out.sizes());
  TORCH_CHECK_TYPE(out.scalar_type() == x.scalar_type(), kOp, ": out must have x's dtype ", x.scalar_type(), ", got ",
                   out.scalar_type());
  at::assert_no_internal_overlap(out);
  at::assert_no_partial_overlap(out, x);
  args.batch = x.size(0), args.heads = x.size(1), args.length = x.size(2);
  args.head_dim = static_cast<int32_t>(x.size(3));
  args.inverse = inverse;
  args.norm = head_norm(kOp, "norm", norm, x.size(3), x.device());
  check_eps(kOp, eps);
  args.eps = static_cast<float>(eps);
  args.table = rope_table(kOp, "table", table, x.size(3), interleaved, x.device());
  args.positions = rope_positions(kOp, positions, args.batch, args.length, x.device());
  if (x.numel() == 0) return;
  if (Backend::host_can_read()) {
    for (int64_t b = 0; b < args.batch; ++b) {
      for (int64_t t = 0; t < args.length; ++t) check_position(kOp, args.table, args.positions.at(b, t));
    }
  }

  // Launch.
  launch(Backend(x), args);
}

PYGEN_OP("rope", rope_op,
         "(Tensor x, Tensor positions, Tensor table, bool interleaved, bool inverse, Tensor? norm, float eps, "
         "Tensor(a!) out) -> ()")

}  // namespace
}  // namespace pygen
