// row_norm: y = (h - mean) / deviation * (offset + weight) + bias over rows h = x + residual, where the mean and the
// deviation are a row's own (centred, LayerNorm), or 0 and the root of its mean square (RMSNorm); and its gradients.
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"

namespace pygen {

// The rows are those of an iteration space, whose strides operands have; a row's elements are neighbours.
struct RowNormRows {
  bool centred;
  int32_t ndim;
  int64_t size[kMaxDims];
  int64_t elements;  // of a row
  double eps;        // added to the variance or the mean square
  float offset;
  Operand weight;  // contiguous; may be absent: 1 instead of offset + weight
};

// The kernel's range runs over rows. x, residual, out and residual_out are of one dtype.
struct RowNormArgs {
  RowNormRows rows;
  Operand x, residual, out, residual_out;  // the last receives h; residuals are both there or both absent
  Operand bias;                            // contiguous; may be absent
  bool stream;                             // whether out is too large for a cache to keep
};

// An output of so many bytes is written past the caches.
inline constexpr int64_t kStreamBytes = int64_t{64} << 20;

// Rows whose shares of the parameters' gradients are added in float, row by row.
inline constexpr int64_t kRowNormChunk = 32;

// row_norm_backward's range runs over chunks of rows, row_norm_gradients' over the elements of a row, in pieces that
// begin at multiples of 1024. What is absent is not computed.
struct RowNormBackwardArgs {
  RowNormRows rows;
  Operand x, grad, residual_grad, grad_x;  // of one dtype; x is h, and residual_grad is added to its gradient
  Operand grad_weight, grad_bias;          // contiguous
  int64_t row_count, chunks;
  float *weight_sums, *bias_sums;  // (chunks, elements), where the gradients are wanted
};

PYGEN_CPU_KERNEL(row_norm, RowNormArgs)
PYGEN_CPU_KERNEL(row_norm_backward, RowNormBackwardArgs)
PYGEN_CPU_KERNEL(row_norm_gradients, RowNormBackwardArgs)

}  // namespace pygen
