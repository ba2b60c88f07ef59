#include "pygen/group_norm_silu.h"

#include <ATen/MemoryOverlap.h>

#include "backend.h"
#include "operands.h"

namespace pygen {
namespace {

constexpr const char* kOp = "group_norm_silu";

// How a tensor's samples may be walked; sizes of 1 have no stride to obey.
struct Layout {
  bool by_channel, by_pixel;
  int64_t stride[3];  // of samples, channels, pixels

  explicit Layout(const at::Tensor& tensor) {
    const int64_t channels = tensor.size(1);
    int64_t pixels = 1, pixel_stride = 1;
    bool merges = true;
    for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
      if (tensor.size(d) == 1) continue;
      if (pixels == 1) pixel_stride = tensor.stride(d);
      merges &= tensor.stride(d) == pixel_stride * pixels;
      pixels *= tensor.size(d);
    }
    by_channel = merges && pixel_stride == 1 && (channels == 1 || tensor.stride(1) == pixels);
    by_pixel = merges && (channels == 1 || tensor.stride(1) == 1);
    stride[0] = tensor.stride(0);
    stride[1] = by_channel ? pixels : 1;
    stride[2] = pixel_stride;
  }
};

// Neighbouring groups that are walked together where a pixel's channels are neighbours: as many as kChannelTile allows,
// but few enough to share the work evenly, as long as they fill a line of the cache.
int64_t groups_together(int64_t samples, int64_t groups, int64_t channels) {
  constexpr int64_t kLineChannels = 32;
  const int64_t threads = at::get_num_threads();
  int64_t unit = std::clamp<int64_t>(kChannelTile / channels, 1, groups);
  const auto uneven = [&] {
    const int64_t units = samples * (groups / unit);
    return units < 4 * threads && units % threads != 0 && unit * channels > kLineChannels;
  };
  while (unit > 1 && (groups % unit != 0 || uneven())) --unit;
  return unit;
}

[[maybe_unused]] void group_norm_silu_cpu(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                          const std::optional<at::Tensor>& bias, int64_t groups, double eps,
                                          const at::Tensor& out) {
  // Check.
  TORCH_CHECK_VALUE(x.dim() >= 2, kOp, ": x must have shape (samples, channels, ...), got ", x.sizes());
  const int64_t samples = x.size(0), channels = x.size(1);
  TORCH_CHECK_VALUE(groups >= 1 && channels % groups == 0, kOp, ": groups must divide x's ", channels,
                    " channels, got ", groups);
  GroupNormSiluArgs args{};
  args.x.dtype = kernel_dtype(kOp, "x", x);
  TORCH_CHECK_VALUE(out.sizes() == x.sizes(), kOp, ": out must have x's shape ", x.sizes(), ", got ", out.sizes());
  TORCH_CHECK_TYPE(out.scalar_type() == x.scalar_type(), kOp, ": out must have x's dtype ", x.scalar_type(), ", got ",
                   out.scalar_type());
  const auto add_parameter = [&](Operand& operand, const char* name, const std::optional<at::Tensor>& tensor) {
    if (!tensor.has_value()) return;
    TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == channels, kOp, ": ", name, " must have shape (",
                      channels, ",), got ", tensor->sizes());
    TORCH_CHECK_TYPE(tensor->scalar_type() == x.scalar_type() || tensor->scalar_type() == at::kFloat, kOp, ": ", name,
                     " must have x's dtype ", x.scalar_type(), " or be float32, got ", tensor->scalar_type());
    check_no_grad(kOp, name, *tensor);
    operand.data = tensor->data_ptr();
    operand.dtype = kernel_dtype(kOp, name, *tensor);
    operand.stride[0] = tensor->stride(0);
  };
  add_parameter(args.weight, "weight", weight);
  add_parameter(args.bias, "bias", bias);
  check_no_grad(kOp, "x", x);
  check_no_grad(kOp, "out", out);
  at::assert_no_internal_overlap(out);
  at::assert_no_partial_overlap(out, x);
  if (weight.has_value()) at::assert_no_overlap(out, *weight);
  if (bias.has_value()) at::assert_no_overlap(out, *bias);
  if (x.numel() == 0) return;
  const Layout from(x), to(out);
  TORCH_CHECK_VALUE(from.by_channel || from.by_pixel, kOp,
                    ": x's samples must be contiguous or channels-last, call contiguous() on it; got shape ", x.sizes(),
                    " and strides ", x.strides());
  TORCH_CHECK_VALUE((from.by_channel && to.by_channel) || (from.by_pixel && to.by_pixel), kOp,
                    ": out must have x's memory format; got strides ", out.strides(), " for x's ", x.strides());

  // Describe.
  args.channels = channels;
  args.pixels = x.numel() / (samples * channels);
  args.groups = groups;
  args.eps = eps;
  args.by_channel = from.by_channel && to.by_channel && !(args.pixels == 1 && from.by_pixel && to.by_pixel);
  args.unit = args.by_channel ? 1 : groups_together(samples, groups, channels / groups);
  args.x.data = x.data_ptr();
  args.out.data = out.data_ptr();
  args.out.dtype = args.x.dtype;
  std::copy_n(from.stride, 3, args.x.stride);
  std::copy_n(to.stride, 3, args.out.stride);

  // Launch.
  const int64_t units = samples * (groups / args.unit);
  Cpu(x).run(group_norm_silu, args, units, std::max<int64_t>(1, kMoveGrain / (x.numel() / units)));
}

PYGEN_CPU_OP("group_norm_silu", group_norm_silu_cpu,
             "(Tensor x, Tensor? weight, Tensor? bias, SymInt groups, float eps, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace pygen
