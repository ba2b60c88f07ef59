// From tensors to what norms and turns heads: weights, the table of angles, and the positions that choose its rows.
#pragma once

#include "operands.h"
#include "pygen/rope.h"

namespace pygen {

// A tensor of shape (batch, heads, length, head_dim), contiguous in head_dim.
inline Operand head_operand(const char* op, const char* name, const at::Tensor& tensor, at::Device device) {
  check_no_grad(op, name, tensor);
  check_device(op, name, tensor, device);
  TORCH_CHECK_VALUE(tensor.dim() == 4, op, ": ", name, " must have shape (batch, heads, length, head_dim), got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.stride(3) == 1 || tensor.size(3) <= 1, op, ": ", name,
                    " must be contiguous in head_dim, got strides ", tensor.strides());
  TORCH_CHECK_VALUE(tensor.size(3) >= 1 && tensor.size(3) <= kMaxHeadDim, op, ": the head_dim of ", name,
                    " must be 1 to ", kMaxHeadDim, ", got ", tensor.size(3));
  return {tensor.data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}, kernel_dtype(op, name, tensor)};
}

// The weights of an RMSNorm over heads, where there is one.
inline HeadNorm head_norm(const char* op, const char* name, const std::optional<at::Tensor>& weight, int64_t head_dim,
                          at::Device device) {
  if (!weight.has_value()) return {};
  check_no_grad(op, name, *weight);
  check_device(op, name, *weight, device);
  TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == head_dim && weight->stride(0) == 1, op, ": ", name,
                    " must have shape (", head_dim, ",) and be contiguous, got ", weight->sizes());
  return {weight->const_data_ptr(), kernel_dtype(op, name, *weight)};
}

inline RopeTable rope_table(const char* op, const char* name, const at::Tensor& table, int64_t head_dim,
                            bool interleaved, at::Device device) {
  check_index(op, name, table, at::kFloat, device);
  check_no_grad(op, name, table);
  TORCH_CHECK_VALUE(table.dim() == 3 && table.size(1) == 2 && table.size(2) >= 1 && 2 * table.size(2) <= head_dim, op,
                    ": ", name, " must have shape (positions, 2, pairs) with at most ", head_dim / 2, " pairs, got ",
                    table.sizes());
  TORCH_CHECK_VALUE(table.stride(2) == 1 && table.stride(1) == table.size(2), op, ": ", name,
                    " must be contiguous but for its positions, got strides ", table.strides());
  return {table.const_data_ptr<float>(), table.stride(0), table.size(0), static_cast<int32_t>(table.size(2)),
          interleaved};
}

inline RopePositions rope_positions(const char* op, const at::Tensor& positions, int64_t batch, int64_t length,
                                    at::Device device) {
  check_index(op, "positions", positions, at::kLong, device);
  const int64_t columns = positions.dim() == 0 ? 1 : positions.size(-1);
  const int64_t rows = positions.dim() == 2 ? positions.size(0) : 1;
  TORCH_CHECK_VALUE(positions.dim() <= 2 && (columns == length || columns == 1) && (rows == batch || rows == 1), op,
                    ": positions must have shape (length,) or (batch, length), or hold a single column of first "
                    "positions, for a batch of ",
                    batch, " of length ", length, "; got ", positions.sizes());
  return {positions.const_data_ptr<int64_t>(),
          {rows == 1 ? 0 : positions.stride(0), columns == 1 ? 0 : positions.stride(-1)},
          columns == 1};
}

inline void check_position(const char* op, const RopeTable& table, int64_t position) {
  TORCH_CHECK_INDEX(position >= 0 && position < table.positions, op, ": position ", position,
                    " lies outside the table, which holds ", table.positions);
}

}  // namespace pygen
