#include "pygen/winograd_conv2d.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "backend.h"
#include "operands.h"
#include "tile_product.h"

namespace pygen {
namespace {

constexpr const char* kOp = "winograd_conv2d";

Operand image(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.size(1) == 1 || tensor.stride(1) == 1, kOp, ": ", name,
                    " must be channels-last, with its channels side by side");
  return {tensor.data_ptr(), {tensor.stride(0), tensor.stride(2), tensor.stride(3)}, kernel_dtype(kOp, name, tensor)};
}

void winograd_conv2d_op(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        int64_t out_channels, const at::Tensor& out) {
  // Check and describe.
  WinogradConv2dArgs args{};
  for (const auto& [name, tensor] : {std::pair{"x", x}, {"out", out}}) {
    TORCH_CHECK_VALUE(tensor.dim() == 4, kOp, ": ", name, " must have shape (batch, channels, height, width), got ",
                      tensor.sizes());
    check_no_grad(kOp, name, tensor);
  }
  args.batch = x.size(0), args.channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
  args.outputs = out_channels;
  args.x = image("x", x), args.out = image("out", out);
  check_device(kOp, "out", out, x.device());
  TORCH_CHECK_TYPE(out.scalar_type() == x.scalar_type(), kOp, ": out must have x's dtype ", x.scalar_type(), ", got ",
                   out.scalar_type());
  const std::array<int64_t, 4> size = {args.batch, args.outputs, args.height, args.width};
  TORCH_CHECK_VALUE(args.channels > 0, kOp, ": x must have channels, got ", x.sizes());
  TORCH_CHECK_VALUE(args.outputs > 0, kOp, ": out_channels must be positive, got ", args.outputs);
  TORCH_CHECK_VALUE(out.sizes() == at::IntArrayRef(size), kOp, ": out must have shape ", at::IntArrayRef(size),
                    ", got ", out.sizes());
  check_no_grad(kOp, "weight", weight);
  check_device(kOp, "weight", weight, x.device());
  const std::array<int64_t, 4> packed = {args.panels(), args.channels, 9, WinogradConv2dArgs::kPanel};
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), kOp, ": weight must have x's dtype ", x.scalar_type(),
                   ", got ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.sizes() == at::IntArrayRef(packed) && weight.is_contiguous(), kOp,
                    ": weight must be contiguous, of shape ", at::IntArrayRef(packed),
                    " for these channels (see winograd_weight), got ", weight.sizes());
  args.weight = weight.const_data_ptr();
  if (bias.has_value()) {
    check_no_grad(kOp, "bias", *bias);
    check_device(kOp, "bias", *bias, x.device());
    TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), kOp, ": bias must have x's dtype ", x.scalar_type(),
                     ", got ", bias->scalar_type());
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == args.outputs && bias->is_contiguous(), kOp,
                      ": bias must be contiguous, of shape ", args.outputs, ", got ", bias->sizes());
    args.bias = bias->const_data_ptr();
    at::assert_no_overlap(out, *bias);
  }
  at::assert_no_internal_overlap(out);
  at::assert_no_overlap(out, x), at::assert_no_overlap(out, weight);
  if (out.numel() == 0) return;

  // Choose: blocks alike, and as many groups of panels as leave the least to the worker who has most.
  const int64_t threads = at::get_num_threads();
  args.block = WinogradConv2dArgs::kMostTiles;
  args.block = ((args.tiles() + args.blocks() - 1) / args.blocks() + 3) / 4 * 4;
  const auto most = [&](int64_t groups) {
    return (args.blocks() * groups + threads - 1) / threads * ((args.panels() + groups - 1) / groups);
  };
  args.groups = 1;
  for (int64_t groups = 2; groups <= std::min(args.panels(), threads); ++groups) {
    if (most(groups) < most(args.groups)) args.groups = groups;
  }
  args.workers = std::min(threads, args.blocks() * args.groups);
  args.product = torch_tile_product();

  // Launch.
  const Cpu cpu(x);
  const at::Tensor memory = at::empty({args.workers * WinogradLayout(args).bytes}, x.options().dtype(at::kByte));
  cpu.keep(memory);
  args.memory = static_cast<char*>(memory.data_ptr());
  cpu.run(winograd_conv2d, args, args.workers, 1);
}

PYGEN_CPU_OP("winograd_conv2d", winograd_conv2d_op,
             "(Tensor x, Tensor weight, Tensor? bias, SymInt out_channels, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace pygen
