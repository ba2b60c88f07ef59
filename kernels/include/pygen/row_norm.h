// row_norm: y = (h - mean) / deviation * (offset + weight) + bias over rows h = gate * x + residual, where the mean and
// the deviation are a row's own (centred, LayerNorm), or 0 and the root of its mean square (RMSNorm); and its
// gradients. Parameters are those of all rows, or of each sample, which has as many rows as another.
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"

namespace pygen {

// The rows are those of an iteration space, whose strides operands have; a row's elements are neighbours. A parameter's
// stride[0] is that of samples: 0 where they share it.
struct RowNormRows {
  bool centred;
  int32_t ndim;
  int64_t size[kMaxDims];
  int64_t elements;    // of a row
  int64_t per_sample;  // rows
  double eps;          // added to the variance or the mean square
  float offset;
  Operand weight;  // may be absent: 1 instead of offset + weight
};

// The kernel's range runs over rows. x, residual, out and residual_out are of one dtype.
struct RowNormArgs {
  RowNormRows rows;
  Operand x, residual, out, residual_out;  // the last receives h; residuals are both there or both absent
  Operand gate, bias;                      // parameters; may be absent, and gate is where residual is
  bool stream;                             // whether out is too large for a cache to keep
};

// An output of so many bytes is written past the caches.
inline constexpr int64_t kStreamBytes = int64_t{64} << 20;

// Rows whose shares of the parameters' gradients are added in float, row by row.
inline constexpr int64_t kRowNormChunk = 32;

// row_norm_backward's range runs over chunks of a sample's rows, row_norm_gradients' over the elements of the rows of
// all samples, in pieces that begin at multiples of 1024. What is absent is not computed.
struct RowNormBackwardArgs {
  RowNormRows rows;
  Operand x, grad, residual_grad, grad_x;  // of one dtype; x is h, and residual_grad is added to its gradient
  Operand grad_weight, grad_bias;          // of one row, or of each sample's
  int64_t samples, chunks;                 // chunks of a sample
  float *weight_sums, *bias_sums;          // (samples, chunks, elements), where the gradients are wanted
};

PYGEN_CPU_KERNEL(row_norm, RowNormArgs)
PYGEN_CPU_KERNEL(row_norm_backward, RowNormBackwardArgs)
PYGEN_CPU_KERNEL(row_norm_gradients, RowNormBackwardArgs)

}  // namespace pygen
