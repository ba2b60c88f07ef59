// embedding: out = scale * weight[token] + position_weight[position], rows of a vocabulary.
#pragma once

#include "pygen/isa.h"
#include "pygen/rope.h"

namespace pygen {

// Rows of `width` neighbours; the stride is that between two of them.
struct EmbeddingTable {
  const void* data;  // null where there is none
  int64_t stride, rows;
};

// The kernel's range runs over batch x length.
struct EmbeddingArgs {
  int64_t batch, length, width;
  const int64_t* tokens;
  int64_t tokens_stride[2];  // sequence, token
  RopePositions positions;
  EmbeddingTable weight, position_weight;
  DType weight_dtype;  // of both
  float scale;
  Operand out;  // strides of sequence, token; width is contiguous
};

// A row of a table, or null where it does not reach: then all of out's row becomes 0.
PYGEN_INLINE const char* embedding_row(const EmbeddingTable& table, int64_t row, DType dtype) {
  if (row < 0 || row >= table.rows) return nullptr;
  return static_cast<const char*>(table.data) + row * table.stride * size_of(dtype);
}

PYGEN_CPU_KERNEL(embedding, EmbeddingArgs)

namespace cuda {
void embedding(const EmbeddingArgs& args, void* stream);  // a cudaStream_t
}

}  // namespace pygen
