// From tensors to planes and settings: numbers per (sample, position), and per sample.
#pragma once

#include <ATen/MemoryOverlap.h>

#include "operands.h"
#include "pygen/plane.h"

namespace pygen {

template <class T>
constexpr at::ScalarType kPlaneType = std::is_same_v<std::remove_const_t<T>, bool>      ? at::kBool
                                      : std::is_same_v<std::remove_const_t<T>, float>   ? at::kFloat
                                      : std::is_same_v<std::remove_const_t<T>, int32_t> ? at::kInt
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

// A tensor of shape (samples,), written: a plane of one position.
template <class T>
Plane<T> column(const char* op, const char* name, const std::optional<at::Tensor>& tensor, int64_t samples,
                at::Device device) {
  if (!tensor.has_value()) return {};
  check_index(op, name, *tensor, kPlaneType<T>, device);
  TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == samples, op, ": ", name, " must have shape (", samples,
                    ",), got ", tensor->sizes());
  check_no_grad(op, name, *tensor);
  at::assert_no_internal_overlap(*tensor);
  return {static_cast<T*>(tensor->data_ptr()), {tensor->stride(0), 0}};
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
  const Setting<int64_t> seeds = setting<int64_t>(op, "seed", seed, samples, device);
  return {seeds.data, setting<int64_t>(op, "step", step, samples, device),
          setting<int64_t>(op, "sample_ids", sample_ids, samples, device), seeds.stride};
}

// The samples' numbers of a setting lie in [least, most], where the host can read them.
template <class Backend, class T>
void check_setting(const char* op, const char* name, const Setting<T>& setting, int64_t samples, T least, T most) {
  if (!Backend::host_can_read() || setting.data == nullptr) return;
  for (int64_t b = 0; b < (setting.stride == 0 ? 1 : samples); ++b) {
    const T value = setting.at(b, least);
    TORCH_CHECK_VALUE(value >= least && value <= most, op, ": ", name, " must lie in [", least, ", ", most, "], got ",
                      value);
  }
}

template <class Backend>
GreenSettings green_settings(const char* op, const at::Tensor& tokens, const at::Tensor& key, const at::Tensor& gamma,
                             int64_t context, int64_t samples, at::Device device) {
  TORCH_CHECK_VALUE(tokens.dim() == 2 && tokens.size(0) == samples, op, ": tokens must have shape (", samples,
                    ", capacity), got ", tokens.sizes());
  check_index(op, "key", key, at::kLong, device);
  TORCH_CHECK_VALUE(key.numel() == 1, op, ": key must hold one number, got shape ", key.sizes());
  TORCH_CHECK_VALUE(context >= 0, op, ": context must not be negative, got ", context);
  const GreenSettings green{key.const_data_ptr<int64_t>(), setting<float>(op, "gamma", gamma, samples, device),
                            plane<const int64_t>(op, "tokens", tokens, tokens.sizes(), device), tokens.size(1),
                            context};
  check_setting<Backend>(op, "gamma", green.gamma, samples, 0.0f, 1.0f);
  return green;
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
