// linear_decode: y = activation(norm(x) W^T + bias) + residual for a few rows of x, with a packed W; of a gated layer
// y = activation(gate) * up + residual. A soft cap makes cap tanh(y / cap) of y before the residual.
//
// The rows are first made into what the products take, and each is computed as if it were alone:
//   - float32 weights, and bfloat16 ones unless x is bfloat16: floats.
//   - bfloat16 weights and x: bfloat16, after the norm. Of each two products the second is added first, each with one
//     rounding, as the CPU's BF16 dot product does it.
//   - codes: whole numbers times a power of two, which a chunk of up to 128 inputs has in common; of 16 bits where x
//     and out are halves, which leaves x off by at most 2^-15 of the chunk's largest, else of 31. Their products with
//     the codes add up without rounding, so that a chunk is rounded once. What is not finite is left out and multiplied
//     as floats.
// Or, of bfloat16 weights and x, by a library's product of tiles, which knows matrix units and an order of its own.
#pragma once

#include "pygen/gated_unit.h"
#include "pygen/isa.h"
#include "pygen/packed_linear.h"
#include "pygen/tile_product.h"

namespace pygen {

enum class LinearNorm : int32_t { kNone, kRms, kLayer };

struct LinearDecodeArgs {
  PackedLinear weight;  // or a stack of expert_count of them, one behind the other
  int64_t rows;         // of out; row r is made of row r / choices of x
  int64_t choices;      // 1 without experts
  int64_t expert_count;
  const int64_t* experts;          // of each row of out; null where there is one layer
  Operand x;                       // strides of rows, inputs
  Operand residual, out;           // strides of rows, outputs; of x's dtype
  Operand bias;                    // stride of outputs: those of a gate, then those of its up projection
  Operand norm_weight, norm_bias;  // stride of inputs
  LinearNorm norm;
  bool activated;  // whether there is an activation
  Activation activation;
  float soft_cap;  // 0: none
  double eps;
  TileProduct product;  // without bfloat16 where the rows are multiplied here; not with experts
  char* scratch;        // 64-byte aligned: linear_decode_scratch(args); on a GPU, linear_decode_workspace(args)
};

// A chunk of a row against codes: x = scale * (2^15 upper + lower), or scale * upper.
struct LinearChunk {
  float scale;
  int32_t start[2];  // the upper words' sum times minus the codes' middle, and the lower ones'
  int32_t special;   // whether the chunk holds numbers that are not finite
};

// How many words of 16 bits an input has against codes.
constexpr int linear_words(const LinearDecodeArgs& args) {
  return args.x.dtype == DType::kFloat32 || args.out.dtype == DType::kFloat32 ? 2 : 1;
}

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
    words = weight.quantised() ? linear_words(args) : pairs;
    chunk = weight.quantised() && weight.group < kChunk ? weight.group : kChunk;
    chunks = (weight.padded_inputs() + chunk - 1) / chunk;
    inputs = (weight.padded_inputs() + kChunk - 1) / kChunk * kChunk;
    words_at = inputs * 4;
    chunks_at = words_at + inputs * 2 * words;
    bytes = chunks_at + (chunks * int64_t{sizeof(LinearChunk)} + 63) / 64 * 64;
    bytes += bytes / 64 % 2 == 0 ? 64 : 0;  // or several rows would meet in few sets of a cache
  }
};

// The rows of out by their expert, so that those of one share the reading of its weight: in the scratch memory, behind
// the rows of x. An expert that there is not has the number expert_count, and weights of 0.
struct ExpertRows {
  int64_t *used, *experts;  // how many experts have rows, and which
  int64_t* first;           // expert e has rows[first[e]] to rows[first[e + 1] - 1]
  int64_t* rows;

  explicit ExpertRows(const LinearDecodeArgs& args)
      : used(reinterpret_cast<int64_t*>(args.scratch + args.rows / args.choices * LinearRow(args).bytes)),
        experts(used + 1),
        first(experts + args.expert_count + 1),
        rows(first + args.expert_count + 3) {}
  static constexpr int64_t bytes(const LinearDecodeArgs& args) {
    return int64_t{sizeof(int64_t)} * (2 * args.expert_count + 5 + args.rows);
  }
};

// Rows that a library's product takes, always so many, so that a row's bits do not depend on their number.
inline constexpr int64_t kTileRows = 32;

// Rows in the scratch memory: those of x, and zeros up to a whole tile.
constexpr int64_t linear_decode_rows_made(const LinearDecodeArgs& args) {
  if (args.product.bfloat16 == nullptr) return args.rows / args.choices;
  return (args.rows + kTileRows - 1) / kTileRows * kTileRows;
}

constexpr int64_t linear_decode_scratch(const LinearDecodeArgs& args) {
  return linear_decode_rows_made(args) * LinearRow(args).bytes +
         (args.experts == nullptr ? 0 : ExpertRows::bytes(args));
}

// Over rows in the scratch memory: what the products take of them.
PYGEN_CPU_KERNEL(linear_decode_rows, LinearDecodeArgs)
// Over [0, 1), where there are experts: the ExpertRows.
PYGEN_CPU_KERNEL(linear_decode_experts, LinearDecodeArgs)
// Over panels; with experts, over those of all that are used.
PYGEN_CPU_KERNEL(linear_decode, LinearDecodeArgs)

namespace cuda {
int64_t linear_decode_workspace(const LinearDecodeArgs& args);
void linear_decode(const LinearDecodeArgs& args, void* stream);  // a cudaStream_t
}  // namespace cuda

}  // namespace pygen
