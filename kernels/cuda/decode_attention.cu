#include "pygen/decode_attention.h"

#include "pygen/device.h"
#include "pygen/token_row.h"

namespace pygen::cuda {
namespace {

inline constexpr unsigned kWholeWarp = 0xffffffffu;
inline constexpr int kThreads = 256;
inline constexpr int kQuad = 4;     // threads to a key, four of the sixteen partial sums each
inline constexpr int kColumns = 4;  // of the values, to a thread
inline constexpr int kMaxRows = 4;  // of a group's queries, that a block takes at once
inline constexpr int64_t kMaxBlocks = 2048;
static_assert(kPartialSums == 4 * kQuad && kMaxRows * kPartialSums <= kThreads);

// N elements that lie together: by one access where the whole row allows it, else those that are there, one by one.
template <DType kDType, int N>
PYGEN_INLINE void load_some(const char* row, int64_t first, int64_t count, bool aligned, float (&to)[N]) {
  constexpr int kBytes = N * size_of(kDType);
  const char* from = row + first * size_of(kDType);
  if (aligned && first + N <= count) {
    uint32_t words[kBytes / 4];
    if constexpr (kBytes == 16) {
      const uint4 all = *reinterpret_cast<const uint4*>(from);
      words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    } else if constexpr (kBytes == 8) {
      const uint2 all = *reinterpret_cast<const uint2*>(from);
      words[0] = all.x, words[1] = all.y;
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (kDType == DType::kFloat32) {
        to[i] = from_unsigned(words[i]);
      } else if constexpr (kDType == DType::kInt8) {
        to[i] = to_float(static_cast<int32_t>(words[i / 4] << (24 - i % 4 * 8)) >> 24);
      } else {
        to[i] = widen(words[i / 2] >> i % 2 * 16 & 0xffffu, kDType);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = first + i < count ? load_one(from + i * size_of(kDType), kDType) : 0.0f;
}

// What the threads of a block share while they take a split, for up to kRows queries.
template <int kRows>
struct Shared {
  alignas(16) float q[kRows][kMaxHeadDim];
  float weights[kRows][kSplitKeys];
  float runs[kRows][kThreads * kColumns];  // sums of values, of as many runs as there are groups of threads
  float k_scale[kSplitKeys], v_scale[kSplitKeys];
  int32_t page[kSplitKeys], slot[kSplitKeys];
  int32_t begin[kRows], end[kRows];  // keys that a row sees, counted from the split's first
};

template <DType kDType, int kRows>
struct Split {
  const DecodeAttentionArgs& args;
  Shared<kRows>& shared;
  bool aligned;                           // whether 16 bytes of a row can be read at once
  int64_t sequence, head, length, first;  // first: the split's first position
  int begin, end;                         // keys that any query sees, counted from it
  int64_t row = 0;  // of the group's queries, the first at hand; row i * group + g is query i of head g
  int rows = 0;

  PYGEN_INLINE Split(const DecodeAttentionArgs& args, Shared<kRows>& shared, const WorkItem& item, bool aligned)
      : args(args),
        shared(shared),
        aligned(aligned),
        sequence(item.sequence),
        head(item.head()),
        length(kv_length(args.cache, sequence)),
        first((item.splits.first + item.split()) * kSplitKeys) {
    const KeyRange keys{keys_of(args, length, 0).begin - first, length - first};
    begin = static_cast<int>(keys.within(0, kSplitKeys).begin);
    end = static_cast<int>(keys.within(0, kSplitKeys).end);
  }

  PYGEN_INLINE const char* row_of(const KvTensor& tensor, int key) const {
    return kv_row(tensor, {shared.page[key], shared.slot[key]}, head);
  }
  PYGEN_INLINE int64_t query(int r) const { return (row + r) / args.group; }
  PYGEN_INLINE int64_t query_head(int r) const { return head * args.group + (row + r) % args.group; }

  PYGEN_INLINE void locate() const {
    for (int key = begin + static_cast<int>(threadIdx.x); key < end; key += kThreads) {
      const KvSlot at = kv_slot(args.cache, sequence, first + key);
      shared.page[key] = static_cast<int32_t>(at.page);
      shared.slot[key] = static_cast<int32_t>(at.slot);
      if (kDType == DType::kInt8) {
        shared.k_scale[key] = at.page < 0 ? 0.0f : *kv_scale(args.cache.k, at, head);
        shared.v_scale[key] = at.page < 0 ? 0.0f : *kv_scale(args.cache.v, at, head);
      }
    }
  }

  PYGEN_INLINE void load_queries() const {
    const int padded = static_cast<int>(padded_dim(args));
    for (int i = threadIdx.x; i < kRows * padded; i += kThreads) {
      const int r = i / padded, d = i % padded;
      const int64_t offset = sequence * args.q.stride[0] + query_head(r) * args.q.stride[1] +
                             query(r) * args.q.stride[2] + d * args.q.stride[3];
      const char* from = static_cast<const char*>(args.q.data) + offset * size_of(args.q.dtype);
      shared.q[r][d] = r < rows && d < args.cache.head_dim ? load_one(from, args.q.dtype) : 0.0f;
    }
    if (threadIdx.x < kRows) {
      const KeyRange keys = keys_of(args, length, query(threadIdx.x));
      const KeyRange seen = KeyRange{keys.begin - first, keys.end - first}.within(0, kSplitKeys);
      shared.begin[threadIdx.x] = static_cast<int32_t>(seen.begin);
      shared.end[threadIdx.x] = static_cast<int32_t>(seen.end);
    }
  }

  // q k: a quad of threads to every key.
  PYGEN_INLINE void score() const {
    constexpr int kParts = kDType == DType::kBFloat16 ? 2 : 1;  // a partial sum takes pairs, the second of each first
    constexpr int kStep = kParts * kPartialSums, kOwn = kStep / kQuad;
    const int lane = threadIdx.x % kQuad;
    const int64_t head_dim = args.cache.head_dim;
    for (int base = begin; base < end; base += kThreads / kQuad) {
      const int key = base + static_cast<int>(threadIdx.x) / kQuad;
      const bool here = key < end && shared.page[key] >= 0;
      const char* k = here ? row_of(args.cache.k, key) : nullptr;
      float sums[kRows][kQuad] = {};
      if (here) {
#pragma unroll 2
        for (int d = lane * kOwn; d < head_dim; d += kStep) {
          float x[kOwn];
          load_some<kDType>(k, d, head_dim, aligned, x);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int i = 0; i < kOwn; i += 4) {
              const float4 q = *reinterpret_cast<const float4*>(&shared.q[r][d + i]);
              const float four[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
              for (int j = 0; j < 4 / kParts; ++j) {
                float& sum = sums[r][i / kParts + j];
#pragma unroll
                for (int p = kParts - 1; p >= 0; --p) sum = fma(four[j * kParts + p], x[i + j * kParts + p], sum);
              }
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int step = kQuad / 2; step > 0; step /= 2) {
#pragma unroll
          for (int i = 0; i < kQuad; ++i) sums[r][i] += __shfl_xor_sync(kWholeWarp, sums[r][i], step);
        }
        if (lane == 0 && key < end) {
          shared.weights[r][key] = (sums[r][0] + sums[r][2]) + (sums[r][1] + sums[r][3]);
        }
      }
    }
  }

  // From scores to weights, their maximum and their sum: sixteen threads to every row.
  PYGEN_INLINE void weigh(int64_t partial) const {
    const int r = static_cast<int>(threadIdx.x) / kPartialSums, lane = static_cast<int>(threadIdx.x) % kPartialSums;
    const bool here = r < rows;
    const int from = begin / kPartialSums * kPartialSums + lane;
    float* weights = shared.weights[here ? r : 0];
    float most = -kInfinity;
    if (here) {
      const float slope = args.alibi_slopes == nullptr ? 0.0f : args.alibi_slopes[query_head(r) * args.alibi_stride];
      const int64_t position = length - args.q_len + query(r) - first;
      for (int key = from; key < end; key += kPartialSums) {
        if (key < begin) continue;
        float s = weights[key] * args.scale;
        if (kDType == DType::kInt8) s *= shared.k_scale[key];
        if (args.soft_cap != 0.0f) s = soft_capped(s, args.soft_cap);
        if (args.alibi_slopes != nullptr) s = fma(slope, to_float(static_cast<int32_t>(key - position)), s);
        if (key < shared.begin[r] || key >= shared.end[r] || shared.page[key] < 0) s = -kInfinity;
        weights[key] = s;
        most = s > most ? s : most;
      }
    }
#pragma unroll
    for (int step = kPartialSums / 2; step > 0; step /= 2) {
      most = max(__shfl_xor_sync(kWholeWarp, most, step), most);
    }
    const float base = most == -kInfinity ? 0.0f : most;
    float total = 0.0f;
    if (here) {
      for (int key = from; key < end; key += kPartialSums) {
        if (key < begin) continue;
        float p = exp(weights[key] - base);
        total += p;
        if (kDType == DType::kInt8) p *= shared.v_scale[key];
        weights[key] = p;
      }
    }
#pragma unroll
    for (int step = kPartialSums / 2; step > 0; step /= 2) total += __shfl_xor_sync(kWholeWarp, total, step);
    if (here && lane == 0) {
      args.statistics[2 * (partial + r)] = most;
      args.statistics[2 * (partial + r) + 1] = total;
    }
  }

  // Every run of keys is summed by a group of threads, four columns to each; then the runs are added in their order.
  PYGEN_INLINE void add_values(int64_t partial) const {
    constexpr int kAhead = kRows == 1 ? 8 : 4;  // keys whose values are on their way at once
    static_assert(kRunKeys % kAhead == 0);
    const int64_t head_dim = args.cache.head_dim, padded = padded_dim(args);
    int threads = 1;  // of a group
    while (threads < 32 && threads * kColumns < head_dim) threads *= 2;
    const int columns = threads * kColumns, groups = kThreads / threads;
    const int group = static_cast<int>(threadIdx.x) / threads, lane = static_cast<int>(threadIdx.x) % threads;
    const bool alike = args.q_len == 1;
    for (int64_t first_column = 0; first_column < head_dim; first_column += columns) {
      const int64_t column = first_column + lane * kColumns;
      float total[kRows] = {};  // of entries threadIdx.x + i * kThreads of rows x columns
      for (int first_run = 0; first_run < kSplitKeys / kRunKeys; first_run += groups) {
        const int from = (first_run + group) * kRunKeys, to = from + kRunKeys;
        float sums[kRows][kColumns] = {};
        if (column < head_dim) {
          for (int next = from; next < to && next < end; next += kAhead) {
            float v[kAhead][kColumns];
            bool there[kAhead];
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
              const int key = next + j;
              there[j] = key >= begin && key < end && shared.page[key] >= 0;
              if (there[j]) load_some<kDType>(row_of(args.cache.v, key), column, head_dim, aligned, v[j]);
            }
#pragma unroll
            for (int j = 0; j < kAhead; ++j) {
              const int key = next + j;
              if (!there[j]) continue;
#pragma unroll
              for (int r = 0; r < kRows; ++r) {
                if (!alike && (key < shared.begin[r] || key >= shared.end[r])) continue;
                const float p = shared.weights[r][key];
#pragma unroll
                for (int i = 0; i < kColumns; ++i) sums[r][i] = fma(p, v[j][i], sums[r][i]);
              }
            }
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float* run = &shared.runs[r][threadIdx.x * kColumns];
#pragma unroll
          for (int i = 0; i < kColumns; ++i) run[i] = sums[r][i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int entry = static_cast<int>(threadIdx.x) + i * kThreads, r = entry / columns;
          if (r >= rows) break;
          for (int g = 0; g < groups && first_run + g < kSplitKeys / kRunKeys; ++g) {
            total[i] += shared.runs[r][g * columns + entry % columns];
          }
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int entry = static_cast<int>(threadIdx.x) + i * kThreads, r = entry / columns;
        const int64_t d = first_column + entry % columns;
        if (r < rows && d < head_dim) args.partials[(partial + r) * padded + d] = total[i];
      }
    }
  }
};

template <DType kDType, int kRows>
__global__ void __launch_bounds__(kThreads, 2)
    split_kernel(const __grid_constant__ DecodeAttentionArgs args, bool aligned) {
  __shared__ Shared<kRows> shared;
  WorkItem item(args);
  for (bool more = item.move(args, blockIdx.x); more; more = item.move(args, gridDim.x)) {
    Split<kDType, kRows> split(args, shared, item, aligned);
    split.locate();
    const int64_t partial = partial_row(args, split.sequence, split.head, item.split());
    const int64_t rows = args.q_len * args.group;
    for (split.row = blockIdx.y * kRows; split.row < rows; split.row += gridDim.y * kRows) {
      split.rows = rows - split.row < kRows ? static_cast<int>(rows - split.row) : kRows;
      split.load_queries();
      __syncthreads();
      split.score();
      __syncthreads();
      split.weigh(partial + split.row);
      __syncthreads();
      split.add_values(partial + split.row);
      __syncthreads();
    }
  }
}

// A block to every row: (sequence, head, query).
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ DecodeAttentionArgs args) {
  const int64_t heads = args.cache.kv_heads * args.group, padded = padded_dim(args), head_dim = args.cache.head_dim;
  const int64_t query = blockIdx.x % args.q_len, head = blockIdx.x / args.q_len % heads;
  const int64_t sequence = blockIdx.x / args.q_len / heads;
  const int64_t splits = splits_of(args, kv_length(args.cache, sequence)).count, stride = args.q_len * args.group;
  const int64_t first = partial_row(args, sequence, head / args.group, 0) + query * args.group + head % args.group;

  const float sink = args.sinks == nullptr ? -kInfinity : args.sinks[head * args.sinks_stride];
  float most = sink;
  for (int64_t s = 0; s < splits; ++s) most = max(args.statistics[2 * (first + s * stride)], most);
  const float base = most == -kInfinity ? 0.0f : most;
  float total = exp(sink - base), sums[kMaxHeadDim / kThreads] = {};
  for (int64_t s = 0; s < splits; ++s) {
    const float* statistics = args.statistics + 2 * (first + s * stride);
    const float* partial = args.partials + (first + s * stride) * padded;
    const float factor = exp(statistics[0] - base);
    total += factor * statistics[1];
#pragma unroll
    for (int i = 0; i < kMaxHeadDim / kThreads; ++i) {
      const int64_t d = threadIdx.x + i * kThreads;
      if (d < head_dim) sums[i] = fma(factor, partial[d], sums[i]);
    }
  }

#pragma unroll
  for (int i = 0; i < kMaxHeadDim / kThreads; ++i) {
    const int64_t d = threadIdx.x + i * kThreads;
    if (d >= head_dim) break;
    const Operand& out = args.out;
    const int64_t offset = sequence * out.stride[0] + head * out.stride[1] + query * out.stride[2] + d * out.stride[3];
    store_one(static_cast<char*>(out.data) + offset * size_of(out.dtype), out.dtype,
              total == 0.0f ? 0.0f : sums[i] / total);
  }
  if (threadIdx.x == 0 && args.lse != nullptr) {
    args.lse[sequence * args.lse_stride[0] + head * args.lse_stride[1] + query * args.lse_stride[2]] =
        total == 0.0f ? -kInfinity : static_cast<float>(base + log_double(total));
  }
}

template <DType kDType>
void launch(const DecodeAttentionArgs& args, void* stream) {
  bool aligned = true;
  for (const KvTensor* tensor : {&args.cache.k, &args.cache.v}) {
    aligned = aligned && reinterpret_cast<uintptr_t>(tensor->data) % 16 == 0;
    for (const int64_t stride : tensor->stride) aligned = aligned && stride * size_of(kDType) % 16 == 0;
  }
  const int64_t items = args.cache.batch * args.cache.kv_heads * args.splits, rows = args.q_len * args.group;
  const auto kernel = rows == 1 ? split_kernel<kDType, 1> : split_kernel<kDType, kMaxRows>;
  // Blocks that take other rows over the same keys find these in the second-level cache.
  const int64_t keys = items < kMaxBlocks ? items : kMaxBlocks, shares = (rows + kMaxRows - 1) / kMaxRows;
  PYGEN_LAUNCH(kernel, dim3(static_cast<unsigned>(keys), static_cast<unsigned>(shares)), dim3(kThreads), 0, stream,
               args, aligned);
}

}  // namespace

void decode_attention(const DecodeAttentionArgs& args, void* stream) {
  if (args.cache.k.dtype == DType::kFloat32) launch<DType::kFloat32>(args, stream);
  if (args.cache.k.dtype == DType::kBFloat16) launch<DType::kBFloat16>(args, stream);
  if (args.cache.k.dtype == DType::kFloat16) launch<DType::kFloat16>(args, stream);
  if (args.cache.k.dtype == DType::kInt8) launch<DType::kInt8>(args, stream);
  const int64_t rows = args.cache.batch * args.cache.kv_heads * args.group * args.q_len;
  PYGEN_LAUNCH(merge_kernel, dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0, stream, args);
}

}  // namespace pygen::cuda
