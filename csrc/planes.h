// From tensors to planes and settings: numbers per (sample, position), and per sample.
#pragma once

#include <ATen/MemoryOverlap.h>

#include "operands.h"
#include "pygen/plane.h"

namespace pygen {

template <class T>
constexpr at::ScalarType kPlaneType = std::is_same_v<std::remove_const_t<T>, bool>    ? at::kBool
                                      : std::is_same_v<std::remove_const_t<T>, float> ? at::kFloat
                                                                                      : at::kLong;

// A tensor of shape (samples, positions); `const T` is read, T is written.
template <class T>
Plane<T> plane(const char* op, const char* name, const std::optional<at::Tensor>& tensor, at::IntArrayRef size,
               at::Device device) {
  if (!tensor.has_value()) return {};
  check_index(op, name, *tensor, kPlaneType<T>, device);
  TORCH_CHECK_VALUE(tensor->sizes() == size, op, ": ", name, " must have shape ", size, ", got ", tensor->sizes());
  if constexpr (!std::is_const_v<T>) {
    check_no_grad(op, name, *tensor);
    at::assert_no_internal_overlap(*tensor);
  }
  return {static_cast<T*>(tensor->data_ptr()), {tensor->stride(0), tensor->stride(1)}};
}

// One number, or one per sample.
template <class T>
Setting<T> setting(const char* op, const char* name, const std::optional<at::Tensor>& tensor, int64_t samples,
                   at::Device device) {
  if (!tensor.has_value()) return {};
  check_index(op, name, *tensor, kPlaneType<T>, device);
  TORCH_CHECK_VALUE(tensor->numel() == 1 || (tensor->dim() == 1 && tensor->size(0) == samples), op, ": ", name,
                    " must hold one number, or one per sample (", samples, "), got shape ", tensor->sizes());
  return {tensor->const_data_ptr<T>(), tensor->numel() == 1 ? 0 : tensor->stride(0)};
}

inline PhiloxSettings philox_settings(const char* op, const std::optional<at::Tensor>& seed,
                                      const std::optional<at::Tensor>& step,
                                      const std::optional<at::Tensor>& sample_ids, int64_t samples, at::Device device) {
  if (!seed.has_value()) return {};
  check_index(op, "seed", *seed, at::kLong, device);
  TORCH_CHECK_VALUE(seed->numel() == 1, op, ": seed must hold one number, got shape ", seed->sizes());
  return {seed->const_data_ptr<int64_t>(), setting<int64_t>(op, "step", step, samples, device),
          setting<int64_t>(op, "sample_ids", sample_ids, samples, device)};
}

// A tensor of shape (samples, positions, vocabulary), of any strides.
inline Operand row_operand(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef size,
                           at::Device device) {
  check_no_grad(op, name, tensor);
  check_device(op, name, tensor, device);
  TORCH_CHECK_VALUE(tensor.sizes() == size, op, ": ", name, " must have shape ", size, ", got ", tensor.sizes());
  return {tensor.data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}, kernel_dtype(op, name, tensor)};
}

}  // namespace pygen
