// From tensors to what kernels see: operands over one iteration space, and ranges of it shared among threads.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cmath>

#include "pygen/operand.h"

namespace pygen {

inline DType kernel_dtype(const char* op, const char* name, const at::Tensor& tensor, bool allow_bool = false,
                          bool allow_int8 = false) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBool:
      if (allow_bool) return DType::kBool;
      break;
    case at::kChar:
      if (allow_int8) return DType::kInt8;
      break;
    default:
      break;
  }
  TORCH_CHECK_TYPE(false, op, ": ", name, " must be float32, bfloat16 or float16", allow_bool ? " or bool" : "",
                   allow_int8 ? " or int8" : "", ", got ", tensor.scalar_type(),
                   "; pygen.backend(\"reference\") takes float64");
}

inline void check_device(const char* op, const char* name, const at::Tensor& tensor, at::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, op, ": ", name, " lies on ", tensor.device(), ", the others on ",
                    device);
}

// A tensor of numbers that a kernel reads through a pointer: seeds, steps, rows, tables.
inline void check_index(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type,
                        at::Device device) {
  check_device(op, name, tensor, device);
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, op, ": ", name, " must be ", type, ", got ", tensor.scalar_type());
}

// The same, one for all samples or one for each: the stride between those of two samples.
inline int64_t sample_stride(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  check_index(op, name, tensor, at::kLong, like.device());
  if (tensor.numel() == 1) return 0;
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == like.size(0), op, ": ", name,
                    " must hold one number, or one per sample (", like.size(0), "), got shape ", tensor.sizes());
  return tensor.stride(0);
}

// What a norm adds to a mean square.
inline void check_eps(const char* op, double eps) {
  TORCH_CHECK_VALUE(eps >= 0.0 && std::isfinite(eps), op, ": eps must be finite and not negative, got ", eps);
}

inline void check_no_grad(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(!(at::GradMode::is_enabled() && tensor.requires_grad()), op, " is not differentiable, and ", name,
              " requires grad: call it under torch.no_grad()");
}

// The dimensions that operands are walked over. `leading` of them stay as they are; the rest are put in the memory
// order of the first operand, unless `keep_order`, and merged where every operand allows it.
class IterationSpace {
 public:
  // `dims[i]` is the tensors' dimension behind dimension i of the space, or -1 for one of size 1.
  IterationSpace(at::IntArrayRef tensor_size, c10::SmallVector<int64_t, kMaxDims> dims, size_t leading, bool keep_order)
      : tensor_size_(tensor_size), dims_(std::move(dims)), leading_(leading), keep_order_(keep_order) {}

  void add(Operand& operand, DType dtype, const at::Tensor& tensor) {
    operand.data = tensor.data_ptr();
    operand.dtype = dtype;
    entries_.push_back({&operand, tensor.strides()});
  }

  // An input that may broadcast to the space's tensors.
  void add_input(const char* op, const char* name, Operand& operand, const at::Tensor& tensor, at::Device device,
                 bool allow_bool = false) {
    check_no_grad(op, name, tensor);
    check_device(op, name, tensor, device);
    const DType dtype = kernel_dtype(op, name, tensor, allow_bool);
    if (tensor.sizes() == tensor_size_) return add(operand, dtype, tensor);
    TORCH_CHECK_VALUE(at::is_expandable_to(tensor.sizes(), tensor_size_), op, ": ", name, " of shape ", tensor.sizes(),
                      " does not broadcast to x of shape ", tensor_size_);
    expanded_.push_back(tensor.expand(tensor_size_));
    add(operand, dtype, expanded_.back());
  }

  // Writes every operand's strides, and the sizes; returns the number of dimensions.
  int32_t finish(const char* op, int64_t* size) {
    const auto stride = [&](const Entry& entry, int64_t dim) { return dim < 0 ? 0 : entry.stride[dim]; };
    if (!keep_order_) {
      std::stable_sort(dims_.begin() + leading_, dims_.end(),
                       [&](int64_t a, int64_t b) { return entries_[0].stride[a] > entries_[0].stride[b]; });
    }
    size_t n = 0;
    int64_t last[kMaxDims];  // the innermost tensor dimension merged into each
    for (size_t i = 0; i < dims_.size(); ++i) {
      const int64_t extent = dims_[i] < 0 ? 1 : tensor_size_[dims_[i]];
      if (i >= leading_ && extent == 1) continue;
      const bool merges = n > leading_ && std::all_of(entries_.begin(), entries_.end(), [&](const Entry& entry) {
                            return stride(entry, last[n - 1]) == stride(entry, dims_[i]) * extent;
                          });
      if (!merges) {
        TORCH_CHECK_VALUE(n < kMaxDims, op, ": the tensors need more than ", kMaxDims, " strided dimensions");
        size[n++] = 1;
      }
      size[n - 1] *= extent;
      last[n - 1] = dims_[i];
    }
    if (n == leading_) {  // a kernel always has an innermost dimension
      size[n] = 1;
      last[n++] = -1;
    }
    for (const Entry& entry : entries_) {
      for (size_t i = 0; i < n; ++i) entry.operand->stride[i] = stride(entry, last[i]);
      if (size[n - 1] == 1) entry.operand->stride[n - 1] = 1;
    }
    return static_cast<int32_t>(n);
  }

 private:
  struct Entry {
    Operand* operand;
    at::IntArrayRef stride;
  };
  at::IntArrayRef tensor_size_;
  c10::SmallVector<int64_t, kMaxDims> dims_;
  size_t leading_;
  bool keep_order_;
  c10::SmallVector<Entry, 24> entries_;
  c10::SmallVector<at::Tensor, 4> expanded_;  // keeps the views alive whose strides the entries refer to
};

// Elements a thread takes at the least: below twice this, waking another costs more than it brings. Those that only
// move memory, and those that draw noise.
inline constexpr int64_t kMoveGrain = 32768;
inline constexpr int64_t kNoiseGrain = 8192;

}  // namespace pygen
