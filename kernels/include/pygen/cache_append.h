// cache_append: the keys and values of new tokens, normalised, turned and quantised on their way into the cache, and
// their queries, normalised and turned.
#pragma once

#include "pygen/isa.h"
#include "pygen/kv_cache.h"
#include "pygen/rope.h"

namespace pygen {

// Token i of a sequence lies at position kv_length - length + i; before 0 it is padding: nothing is written, and its
// queries become zeros. Strides of q, out, k and v, which have one dtype: sequence, head, token.
struct CacheAppendArgs {
  KvCache cache;
  int64_t q_heads, length;
  Operand q, out, k, v;
  HeadNorm q_norm, k_norm;
  float eps;
  RopeTable rope;
  RopePositions positions;  // by which heads are turned; null: those in the sequence
};

// Where a token is written: nowhere if a later one of this call takes its slot in the ring.
PYGEN_INLINE KvSlot append_slot(const CacheAppendArgs& args, int64_t sequence, int64_t position) {
  const KvCache& cache = args.cache;
  if (cache.ring && position < kv_length(cache, sequence) - cache.max_pages * cache.page_size) return {-1, 0};
  return kv_slot(cache, sequence, position);
}

// The range runs over batch * rope_units(length).
PYGEN_CPU_KERNEL(cache_append, CacheAppendArgs)

namespace cuda {
void cache_append(const CacheAppendArgs& args, void* stream);  // a cudaStream_t
}

}  // namespace pygen
