// The cache of keys and values of autoregressive attention, as decode_attention reads it and cache_append writes it.
// Pages of slots hold the tokens of a sequence: one page of its own where the cache is contiguous, else those that the
// block table names. Position p lies in slot p of the sequence, or, in a ring, in slot p % capacity.
#pragma once

#include "pygen/operand.h"

namespace pygen {

// The keys or the values: (pages, kv_heads, page_size, head_dim), head_dim contiguous. float32, bfloat16, float16, or
// int8 with a scale per slot and head: value = scale * int8.
struct KvTensor {
  void* data;
  float* scale;  // of int8, else null
  int64_t stride[3], scale_stride[3];
  DType dtype;
};

struct KvCache {
  KvTensor k, v;
  int64_t batch, kv_heads, head_dim;
  int64_t pages, page_size;
  int64_t max_pages;           // of one sequence; 1 where the cache is contiguous
  const int32_t* block_table;  // (batch, max_pages), or null: page b is sequence b's
  int64_t block_table_stride[2];
  const int64_t* lengths;  // (batch,): how many tokens each sequence holds, those of this call included
  int64_t lengths_stride;
  bool ring;
};

// Where a token lies; page < 0 where it lies nowhere: beyond the capacity, or in a page that does not exist. Slots from
// here to the end of the page hold the positions that follow.
struct KvSlot {
  int64_t page, slot;
};

PYGEN_INLINE int64_t kv_length(const KvCache& cache, int64_t sequence) {
  return cache.lengths[sequence * cache.lengths_stride];
}

PYGEN_INLINE KvSlot kv_slot(const KvCache& cache, int64_t sequence, int64_t position) {
  if (position < 0) return {-1, 0};
  if (cache.ring) position %= cache.max_pages * cache.page_size;
  if (cache.block_table == nullptr) return {position < cache.page_size ? sequence : -1, position};
  const int64_t index = position / cache.page_size;
  if (index >= cache.max_pages) return {-1, 0};
  const int64_t page = cache.block_table[sequence * cache.block_table_stride[0] + index * cache.block_table_stride[1]];
  return {page < cache.pages ? page : -1, position - index * cache.page_size};
}

// The head_dim numbers of a token that lies somewhere, and, of int8, their scale.
PYGEN_INLINE char* kv_row(const KvTensor& tensor, KvSlot at, int64_t head) {
  const int64_t offset = at.page * tensor.stride[0] + head * tensor.stride[1] + at.slot * tensor.stride[2];
  return static_cast<char*>(tensor.data) + offset * size_of(tensor.dtype);
}
PYGEN_INLINE float* kv_scale(const KvTensor& tensor, KvSlot at, int64_t head) {
  return tensor.scale + at.page * tensor.scale_stride[0] + head * tensor.scale_stride[1] +
         at.slot * tensor.scale_stride[2];
}

}  // namespace pygen
