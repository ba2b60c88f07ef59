#include "pygen/cache_append.h"

#include "head_row.h"

namespace pygen::cuda {
namespace {

PYGEN_INLINE int head_dim_of(const CacheAppendArgs& args) { return static_cast<int>(args.cache.head_dim); }

template <class Load>
PYGEN_INLINE void append(const CacheAppendArgs& args, const HeadNorm& norm, const HeadTurn& turn, Load load,
                         const KvTensor& cache, KvSlot slot, int64_t head) {
  char* const to = kv_row(cache, slot, head);
  if (cache.dtype != DType::kInt8) {
    return convert(norm, args.eps, turn, head_dim_of(args), load,
                   [&](int i, float value) { store_one(to + i * size_of(cache.dtype), cache.dtype, value); });
  }
  uint32_t most = 0;  // by their bits, of which those of NaN are the largest
  convert(norm, args.eps, turn, head_dim_of(args), load, [&](int, float value) {
    const uint32_t magnitude = to_unsigned(value) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  });
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kWholeWarp, most, step);
    most = other > most ? other : most;
  }
  const Int8Scale chosen(from_unsigned(most));
  if (threadIdx.x % kWarp == 0) *kv_scale(cache, slot, head) = chosen.scale;
  convert(norm, args.eps, turn, head_dim_of(args), load, [&](int i, float value) {
    to[i] = static_cast<char>(chosen.inverse == 0.0f ? 0u : int8_bits(value, chosen.inverse));
  });
}

// A block to a token; a warp to every head of its query, key and value.
template <DType kDType>
__global__ void __launch_bounds__(kWarp* kMostWarps, 3)
    cache_append_kernel(const __grid_constant__ CacheAppendArgs args) {
  const int64_t sequence = blockIdx.x / args.length, token = blockIdx.x % args.length;
  const KvCache& cache = args.cache;
  const int64_t position = kv_length(cache, sequence) - args.length + token;
  const KvSlot slot = append_slot(args, sequence, position);
  HeadTurn turn{};
  if (args.rope.data != nullptr) {
    const int64_t at = args.positions.data == nullptr ? position : args.positions.at(sequence, token);
    turn = {rope_angles(args.rope, at), args.rope.pairs, args.rope.interleaved, false};
  }
  const int64_t heads = args.q_heads + 2 * cache.kv_heads;
  for (int64_t head = threadIdx.x / kWarp; head < heads; head += blockDim.x / kWarp) {
    if (head < args.q_heads) {
      const HeadRow<kDType> q(args.q, sequence, head, token), out(args.out, sequence, head, token);
      const auto store = [&](int i, float value) { out.store(i, value); };
      if (position < 0) {
        turn_head(HeadTurn{}, static_cast<int>(cache.head_dim), [](int) { return 0.0f; }, store);
      } else {
        convert(args.q_norm, args.eps, turn, head_dim_of(args), [&](int i) { return q.load(i); }, store);
      }
    } else if (slot.page >= 0) {
      const bool is_k = head < args.q_heads + cache.kv_heads;
      const int64_t kv_head = head - args.q_heads - (is_k ? 0 : cache.kv_heads);
      const HeadRow<kDType> from(is_k ? args.k : args.v, sequence, kv_head, token);
      append(
          args, is_k ? args.k_norm : HeadNorm{}, is_k ? turn : HeadTurn{}, [&](int i) { return from.load(i); },
          is_k ? cache.k : cache.v, slot, kv_head);
    }
  }
}

}  // namespace

void cache_append(const CacheAppendArgs& args, void* stream) {
  const auto kernel = of_dtype(args.k.dtype, cache_append_kernel<DType::kFloat32>,
                               cache_append_kernel<DType::kBFloat16>, cache_append_kernel<DType::kFloat16>);
  const int64_t heads = args.q_heads + 2 * args.cache.kv_heads;
  PYGEN_LAUNCH(kernel, dim3(static_cast<unsigned>(args.cache.batch * args.length)), head_threads(heads), 0, stream,
               args);
}

}  // namespace pygen::cuda
