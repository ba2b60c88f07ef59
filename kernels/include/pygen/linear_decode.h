// linear_decode: y = activation(norm(x) W^T + bias) + residual for a few rows of x, with a packed W; of a gated layer
// y = activation(gate) * up + residual. A soft cap makes cap tanh(y / cap) of y before the residual.
//
// The rows are first made into what the products take, and each is computed as if it were alone:
//   - float32 weights, and bfloat16 ones unless x is bfloat16: floats.
//   - bfloat16 weights and x: bfloat16, after the norm. Of each two products the second is added first, each with one
//     rounding, as the CPU's BF16 dot product does it.
//   - codes: whole numbers times a power of two, which a chunk of up to 128 inputs has in common; of 16 bits where x is
//     a half, which leaves it off by at most 2^-15 of the chunk's largest, of 31 where x is float32. Their products
//     with the codes add up without rounding, so that a chunk is rounded once. What is not finite is left out and
//     multiplied as floats.
#pragma once

#include "pygen/gated_unit.h"
#include "pygen/isa.h"
#include "pygen/packed_linear.h"

namespace pygen {

enum class LinearNorm : int32_t { kNone, kRms, kLayer };

struct LinearDecodeArgs {
  PackedLinear weight;
  int64_t rows;
  Operand x;                       // strides of rows, inputs
  Operand residual, out;           // strides of rows, outputs; of x's dtype
  Operand bias;                    // stride of outputs: those of a gate, then those of its up projection
  Operand norm_weight, norm_bias;  // stride of inputs
  LinearNorm norm;
  bool activated;  // whether there is an activation
  Activation activation;
  float soft_cap;  // 0: none
  double eps;
  char* scratch;  // 64-byte aligned: rows * LinearRow(args).bytes; on a GPU, linear_decode_workspace(args)
};

// A chunk of a row against codes: x = scale * (2^15 upper + lower), or scale * upper.
struct LinearChunk {
  float scale;
  int32_t start[2];  // the upper words' sum times minus the codes' middle, and the lower ones'
  int32_t special;   // whether the chunk holds numbers that are not finite
};

// A row in the scratch memory: floats; then the upper words of all inputs, and the lower ones; then chunks.
struct LinearRow {
  static constexpr int64_t kChunk = 128;
  int words;                    // of 16 bits, per input
  int64_t chunk, chunks;        // inputs of a chunk, and how many chunks
  int64_t inputs;               // padded
  int64_t words_at, chunks_at;  // bytes before them
  int64_t bytes;

  constexpr explicit LinearRow(const LinearDecodeArgs& args) {
    const PackedLinear& weight = args.weight;
    const bool pairs = weight.format == WeightFormat::kBFloat16 && args.x.dtype == DType::kBFloat16;
    words = weight.quantised() ? (args.x.dtype == DType::kFloat32 ? 2 : 1) : pairs;
    chunk = weight.quantised() && weight.group < kChunk ? weight.group : kChunk;
    chunks = (weight.padded_inputs() + chunk - 1) / chunk;
    inputs = (weight.padded_inputs() + kChunk - 1) / kChunk * kChunk;
    words_at = inputs * 4;
    chunks_at = words_at + inputs * 2 * words;
    bytes = chunks_at + (chunks * int64_t{sizeof(LinearChunk)} + 63) / 64 * 64;
  }
};

// Over rows: what the products take of them, into the scratch memory.
PYGEN_CPU_KERNEL(linear_decode_rows, LinearDecodeArgs)
// Over panels.
PYGEN_CPU_KERNEL(linear_decode, LinearDecodeArgs)

namespace cuda {
int64_t linear_decode_workspace(const LinearDecodeArgs& args);
void linear_decode(const LinearDecodeArgs& args, void* stream);  // a cudaStream_t
}  // namespace cuda

}  // namespace pygen
