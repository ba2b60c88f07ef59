// What group_norm_silu and its backward pass are given, checked and described.
#pragma once

#include <ATen/MemoryOverlap.h>

#include "backend.h"
#include "operands.h"
#include "pygen/group_norm_silu.h"

namespace pygen {
namespace {

// How a tensor's samples may be walked; sizes of 1 have no stride to obey.
struct ImageLayout {
  bool by_channel, by_pixel;
  int64_t stride[3];  // of samples, channels, pixels

  explicit ImageLayout(const at::Tensor& tensor) {
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
[[maybe_unused]] inline int64_t groups_together(int64_t samples, int64_t groups, int64_t channels) {
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

class GroupNormCall {
 public:
  GroupNormCall(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                const std::optional<at::Tensor>& bias, int64_t groups, double eps)
      : op_(op), x_(x) {
    TORCH_CHECK_VALUE(x.dim() >= 2, op, ": x must have shape (samples, channels, ...), got ", x.sizes());
    args.channels = x.size(1), args.groups = groups, args.eps = eps;
    TORCH_CHECK_VALUE(groups >= 1 && args.channels % groups == 0, op, ": groups must divide x's ", args.channels,
                      " channels, got ", groups);
    args.x.dtype = kernel_dtype(op, "x", x);
    parameter(args.weight, "weight", weight);
    parameter(args.bias, "bias", bias);
    check_no_grad(op, "x", x);
  }

  // One more tensor like x.
  void like(const char* name, const at::Tensor& tensor) const {
    TORCH_CHECK_VALUE(tensor.sizes() == x_.sizes(), op_, ": ", name, " must have x's shape ", x_.sizes(), ", got ",
                      tensor.sizes());
    TORCH_CHECK_TYPE(tensor.scalar_type() == x_.scalar_type(), op_, ": ", name, " must have x's dtype ",
                     x_.scalar_type(), ", got ", tensor.scalar_type());
    check_no_grad(op_, name, tensor);
  }

  // Walks x, which is not empty, and others alike.
  void walk(std::initializer_list<std::tuple<const char*, Operand*, at::Tensor>> others) {
    const ImageLayout from(x_);
    TORCH_CHECK_VALUE(from.by_channel || from.by_pixel, op_,
                      ": x's samples must be contiguous or channels-last, call contiguous() on it; got shape ",
                      x_.sizes(), " and strides ", x_.strides());
    bool by_channel = from.by_channel, by_pixel = from.by_pixel;
    for (const auto& [name, operand, tensor] : others) {
      const ImageLayout to(tensor);
      by_channel &= to.by_channel, by_pixel &= to.by_pixel;
      TORCH_CHECK_VALUE(by_channel || by_pixel, op_, ": ", name, " must have x's memory format; got strides ",
                        tensor.strides(), " for x's ", x_.strides());
    }
    args.pixels = x_.numel() / (x_.size(0) * args.channels);
    args.by_channel = by_channel && !(args.pixels == 1 && by_pixel);
    args.unit = args.by_channel ? 1 : groups_together(x_.size(0), args.groups, args.channels / args.groups);
    place(args.x, x_);
    for (const auto& [name, operand, tensor] : others) place(*operand, tensor);
  }

  int64_t units() const { return x_.size(0) * (args.groups / args.unit); }
  int64_t grain() const { return std::max<int64_t>(1, kMoveGrain / (x_.numel() / units())); }

  GroupNormSiluArgs args{};

 private:
  void parameter(Operand& operand, const char* name, const std::optional<at::Tensor>& tensor) const {
    if (!tensor.has_value()) return;
    const bool of_sample = tensor->dim() == 2 && tensor->size(0) == x_.size(0);
    TORCH_CHECK_VALUE((tensor->dim() == 1 || of_sample) && tensor->size(-1) == args.channels, op_, ": ", name,
                      " must have shape (", args.channels, ",) or (", x_.size(0), ", ", args.channels, "), got ",
                      tensor->sizes());
    TORCH_CHECK_TYPE(tensor->scalar_type() == x_.scalar_type() || tensor->scalar_type() == at::kFloat, op_, ": ", name,
                     " must have x's dtype ", x_.scalar_type(), " or be float32, got ", tensor->scalar_type());
    check_no_grad(op_, name, *tensor);
    operand.data = tensor->data_ptr();
    operand.dtype = kernel_dtype(op_, name, *tensor);
    operand.stride[0] = of_sample ? tensor->stride(0) : 0;
    operand.stride[1] = tensor->stride(-1);
  }

  void place(Operand& operand, const at::Tensor& tensor) const {
    operand.data = tensor.data_ptr();
    operand.dtype = args.x.dtype;
    std::copy_n(ImageLayout(tensor).stride, 3, operand.stride);
  }

  const char* op_;
  const at::Tensor& x_;
};

}  // namespace
}  // namespace pygen
