// attention_backward: the gradients of attention's q, k and v (Dao 2023, FlashAttention-2). With the weights made
// again,
//
//     p = exp(scale q k^T + mask - logsumexp),   ds = p * (grad v^T - sum(grad * out)),
//     grad_v = p^T grad,   grad_q = scale ds k,   grad_k = scale ds^T q
//
// Tiles are computed transposed, keys by queries: p^T and ds^T are then what the products for grad_v and grad_k take
// as they are. A unit owns the gradients of its keys; where a head has several, each adds to a grad_q of its own, and
// those are summed in the order of the units, so that nothing depends on the threads.
#pragma once

#include "pygen/attention.h"

namespace pygen {

struct AttentionBackwardArgs {
  AttentionArgs forward;  // without `packed`
  Operand grad, grad_q, grad_k, grad_v;
  int64_t workers;  // that share the units; each has `worker_bytes` of
  char* memory;     // 64-byte aligned
  float* partial;   // likewise: partial_bytes
};

struct AttentionBackwardLayout {
  static constexpr int64_t kQueries = AttentionLayout::kQueries, kKeys = 128;  // of a tile
  static constexpr int64_t kMostTiles = 8;                                     // of keys, of a unit
  AttentionLayout sizes;
  int64_t tiles, units;              // of queries; of the keys of a head
  int64_t unit_tiles;                // of keys: what a second-level cache holds with their gradients
  int64_t depth_bytes, width_bytes;  // of a row of so many elements
  int64_t worker_bytes, partial_bytes;

  constexpr explicit AttentionBackwardLayout(const AttentionBackwardArgs& args) : sizes(args.forward) {
    const AttentionArgs& of = args.forward;
    tiles = (of.queries + kQueries - 1) / kQueries;
    const int64_t key_tiles = (of.keys + kKeys - 1) / kKeys, most = 1024 / sizes.width;
    unit_tiles = most < kMostTiles ? most : kMostTiles;
    units = (key_tiles + unit_tiles - 1) / unit_tiles;
    if (key_tiles < unit_tiles) unit_tiles = key_tiles;
    const int64_t size = sizes.halves ? 2 : 4;
    depth_bytes = sizes.depth * size, width_bytes = sizes.width * size;
    worker_bytes =
        unit_tiles * kKeys * (2 * depth_bytes + width_bytes + 2 * sizes.width * 4) +  // k, v, k^T; their gradients
        kQueries * (2 * (depth_bytes + width_bytes) + sizes.width * 4);               // q, grad, twice; grad_q^T
    partial_bytes = units > 1 ? of.batch * of.heads * units * tiles * sizes.width * kQueries * 4 : 0;
  }
};

// Over workers.
PYGEN_CPU_KERNEL(attention_backward, AttentionBackwardArgs)
// Over tiles of queries, of all samples and heads; where a head's keys are not one unit.
PYGEN_CPU_KERNEL(attention_backward_queries, AttentionBackwardArgs)

}  // namespace pygen
