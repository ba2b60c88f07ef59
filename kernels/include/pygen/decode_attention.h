// decode_attention: one or a few query tokens of every sequence against its cache of keys and values.
//
// A sequence's keys are cut into splits at fixed multiples of positions; each split is reduced by itself to a maximum,
// a sum of weights and a weighted sum of values (online softmax, Milakov & Gimelshein 2018), and the splits are merged
// in their order. So a row's result depends on what it attends to alone: not on the batch, on the other queries, on
// where the cache lies, on threads, instruction set or device.
//
//     score    16 partial sums of q k, added by halves; times scale. Element i of head_dim goes to sum i % 16, of a
//              bfloat16 cache to sum i / 2 % 16, the second of a pair first, as vdpbf16ps takes them
//     weights  exp(score - max), 16 partial sums (key i of the split to sum i % 16), added by halves
//     values   one chain of fma over each run of 32 keys; the runs are added in order
#pragma once

#include "pygen/isa.h"
#include "pygen/kv_cache.h"

namespace pygen {

inline constexpr int kSplitKeys = 256;
inline constexpr int kRunKeys = 32;
inline constexpr int kPartialSums = 16;
inline constexpr int kMaxHeadDim = 512;
inline constexpr int kMaxQueries = 16;
inline constexpr int64_t kNoWindow = int64_t{1} << 62;

// Operands have the strides of batch, heads, queries and head_dim.
struct DecodeAttentionArgs {
  KvCache cache;
  int64_t group;  // query heads of a kv head
  int64_t q_len;
  Operand q, out;
  float* lse;  // (batch, heads, q_len), or null: receives the logarithm of what the weights are divided by
  int64_t lse_stride[3];
  float scale;
  float soft_cap;             // scores become cap tanh(score / cap); 0: they stay
  int64_t window;             // how many positions a query sees, its own included
  const float* alibi_slopes;  // (heads,), or null: slope (position of key - of query) is added to a score
  const float* sinks;         // (heads,), or null: a score that takes its share of the weights, and has no value
  int64_t alibi_stride, sinks_stride;
  int64_t splits;     // the most that a sequence needs
  float* partials;    // of every (sequence, kv head, split) the sums of values, query by query, padded_dim() apart
  float* statistics;  // and their maxima and sums of weights
};

// A row of partial sums; of bfloat16, two sums are filled at a time.
PYGEN_INLINE int64_t padded_dim(const DecodeAttentionArgs& args) {
  return (args.cache.head_dim + 2 * kPartialSums - 1) / (2 * kPartialSums) * (2 * kPartialSums);
}

// Positions [begin, end) of keys.
struct KeyRange {
  int64_t begin, end;
  PYGEN_INLINE KeyRange within(int64_t first, int64_t last) const {
    const int64_t from = begin > first ? begin : first, to = end < last ? end : last;
    return {from, to > from ? to : from};
  }
};

// What a query sees of a sequence that holds `length` tokens.
PYGEN_INLINE KeyRange keys_of(const DecodeAttentionArgs& args, int64_t length, int64_t query) {
  const int64_t capacity = args.cache.max_pages * args.cache.page_size;
  const int64_t end = length - args.q_len + query + 1;
  const int64_t oldest = args.cache.ring && length > capacity ? length - capacity : 0;
  return KeyRange{end - args.window, end}.within(oldest, length);
}

// The splits [first, first + count) that a sequence's queries see.
struct Splits {
  int64_t first, count;
};
PYGEN_INLINE Splits splits_of(const DecodeAttentionArgs& args, int64_t length) {
  if (length <= 0) return {0, 0};
  const int64_t first = keys_of(args, length, 0).begin / kSplitKeys;
  const int64_t count = (length + kSplitKeys - 1) / kSplitKeys - first;
  return {first, count < args.splits ? count : args.splits};
}

// A piece of work: one split of one kv head of one sequence. They are numbered through, sequence by sequence, head by
// head, without those that nobody sees.
struct WorkItem {
  int64_t sequence, index;  // index among the sequence's
  Splits splits;

  PYGEN_INLINE explicit WorkItem(const DecodeAttentionArgs& args)
      : sequence(0), index(0), splits(splits_of(args, kv_length(args.cache, 0))) {}

  // Moves on by `items`; false where no more are left.
  PYGEN_INLINE bool move(const DecodeAttentionArgs& args, int64_t items) {
    index += items;
    while (index >= splits.count * args.cache.kv_heads) {
      index -= splits.count * args.cache.kv_heads;
      if (++sequence == args.cache.batch) return false;
      splits = splits_of(args, kv_length(args.cache, sequence));
    }
    return true;
  }
  PYGEN_INLINE int64_t head() const { return index / splits.count; }
  PYGEN_INLINE int64_t split() const { return index % splits.count; }  // counted from the sequence's first
};

// How many there are.
PYGEN_INLINE int64_t work_items(const DecodeAttentionArgs& args) {
  int64_t items = 0;
  for (int64_t b = 0; b < args.cache.batch; ++b) {
    items += splits_of(args, kv_length(args.cache, b)).count * args.cache.kv_heads;
  }
  return items;
}

// The number of a split's first query row among all partial results; those of one split lie together, the query heads
// of the group running fastest.
PYGEN_INLINE int64_t partial_row(const DecodeAttentionArgs& args, int64_t sequence, int64_t head, int64_t split) {
  return ((sequence * args.cache.kv_heads + head) * args.splits + split) * args.q_len * args.group;
}

// decode_attention takes a range of work items, decode_attention_merge one of (sequence, head, query).
PYGEN_CPU_KERNEL(decode_attention, DecodeAttentionArgs)
PYGEN_CPU_KERNEL(decode_attention_merge, DecodeAttentionArgs)

namespace cuda {
void decode_attention(const DecodeAttentionArgs& args, void* stream);  // a cudaStream_t
}  // namespace cuda

}  // namespace pygen
