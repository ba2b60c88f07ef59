// attention: softmax(scale q k^T + mask) v of many queries, a block of keys at a time with a running maximum (Milakov &
// Gimelshein 2018; FlashAttention, Dao et al. 2022): scores are never stored but for a block's.
//
// Keys and values are first packed into what the products of tiles take, once for all queries. Operands, sums and
// weights are bfloat16, float32 and bfloat16 where all of q, k and v are bfloat16, else float32.
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"
#include "pygen/plane.h"
#include "pygen/tile_product.h"

namespace pygen {

inline constexpr int64_t kMostHeadDim = 512;
inline constexpr int64_t kNoBand = int64_t{1} << 62;

// Dropout of the weights (Srivastava et al. 2014), once they are a softmax. A weight has 16 bits of Philox: of head h,
// query i and key j the (j % 8)-th, a word's low ones first, of block i << 24 | j / 8 of draw kDrawDropout | h. What
// is kept is divided by the share that is, to 1/65536; logsumexp knows nothing of it.
struct Dropout {
  static constexpr int64_t kMostHeads = 1 << 12, kMostQueries = 1 << 24, kMostKeys = 8 << 24;
  PhiloxSettings philox;  // without a seed nothing is dropped
  uint16_t last;          // the largest number that drops a weight
  float scale = 1.0f;     // of the weights that are kept; 0 where none is

  static constexpr int64_t block(int64_t query, int64_t key) { return query << 24 | key / 8; }
};

struct AttentionArgs {
  int64_t batch, heads, kv_heads, queries, keys, head_dim;
  Operand q, k, v, out;    // strides of batch, heads, positions, head_dim
  Operand mask;            // likewise, of (batch, heads, queries, keys): added to the scores, or bool: what is seen
  const int64_t* lengths;  // of the keys of each sample; null: all
  int64_t lengths_stride;
  int64_t before, after;  // query i sees keys i - before to i + after
  float scale;
  Dropout dropout;
  float* logsumexp;     // (batch, heads, queries), of each query's scores; null: not wanted
  TileProduct product;  // what it lacks is done here
  char* packed;         // 64-byte aligned: AttentionLayout(args).bytes
};

// The packed keys and values.
struct AttentionLayout {
  static constexpr int64_t kQueries = 256, kKeys = 256;  // of a tile
  bool halves;                                           // bfloat16
  int64_t depth, width;                                  // padded head_dim: of keys, of values
  int64_t blocks, panel;                                 // of keys; of how many columns one has room for
  int64_t key_bytes, block_bytes, bytes;

  constexpr explicit AttentionLayout(const AttentionArgs& args) {
    halves = args.product.bfloat16 != nullptr && args.q.dtype == DType::kBFloat16 && args.k.dtype == DType::kBFloat16 &&
             args.v.dtype == DType::kBFloat16;
    depth = (args.head_dim + 1) / 2 * 2;
    width = (args.head_dim + 15) / 16 * 16;
    blocks = (args.keys + kKeys - 1) / kKeys;
    panel = args.keys < kKeys ? (args.keys + 31) / 32 * 32 : kKeys;
    const int64_t size = halves ? 2 : 4;
    key_bytes = depth * panel * size;  // (depth, panel), and behind it (panel, width)
    block_bytes = key_bytes + width * panel * size;
    bytes = args.batch * args.kv_heads * blocks * block_bytes;
  }
};

// Over blocks of keys, of all samples and heads of keys.
PYGEN_CPU_KERNEL(attention_pack, AttentionArgs)
// Over tiles of queries, of all samples and heads.
PYGEN_CPU_KERNEL(attention, AttentionArgs)

}  // namespace pygen
