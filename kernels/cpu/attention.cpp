#include "pygen/attention.h"

#include <algorithm>
#include <cmath>

#include "pygen/exp.h"
#include "rows.h"

namespace pygen::PYGEN_ISA {
namespace {

using Layout = AttentionLayout;
inline constexpr int64_t kQueries = Layout::kQueries, kKeys = Layout::kKeys;
inline constexpr float kInfinity = __builtin_inff();

int64_t length_of(const AttentionArgs& args, int64_t sample) {
  if (args.lengths == nullptr) return args.keys;
  return std::clamp<int64_t>(args.lengths[sample * args.lengths_stride], 0, args.keys);
}

inline constexpr int64_t kRowFloats = kMostHeadDim + 16;

int64_t at(const Operand& operand, int64_t sample, int64_t head, int64_t position) {
  return sample * operand.stride[0] + head * operand.stride[1] + position * operand.stride[2];
}

// A row of an operand, as the products take it.
void read_row(uint16_t* to, const AttentionArgs& args, const Operand& operand, int64_t offset) {
  copy_elements(reinterpret_cast<char*>(to), 1, static_cast<const char*>(operand.data) + offset * 2, operand.stride[3],
                args.head_dim, 2);
}
void read_row(float* to, const AttentionArgs& args, const Operand& operand, int64_t offset) {
  widen<kMostHeadDim>(to, operand, offset, operand.stride[3], args.head_dim);
}

// c = a b, plus c where `add`: for who has no library's.
void multiply(int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride, int64_t c_stride, bool add,
              const void* a_data, const void* b_data, float* c) {
  const float *const a = static_cast<const float*>(a_data), *const b = static_cast<const float*>(b_data);
  constexpr int kRows = 4, kColumns = 2;
  for (int64_t j = 0; j < n; j += kColumns * kLanes) {  // n is a multiple of 16
    const int columns = static_cast<int>(std::min<int64_t>(kColumns, (n - j) / kLanes));
    for (int64_t i = 0; i < m; i += kRows) {  // and m of 4
      F32 sums[kRows][kColumns] = {};
      for (int64_t d = 0; d < k; ++d) {
        for (int t = 0; t < columns; ++t) {
          const F32 w = load_bytes<F32>(b + d * b_stride + j + t * kLanes);
          for (int r = 0; r < kRows; ++r) sums[r][t] = fma(splat(a[(i + r) * a_stride + d], w), w, sums[r][t]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int t = 0; t < columns; ++t) {
          float* const to = c + (i + r) * c_stride + j + t * kLanes;
          const F32 sum = add ? sums[r][t] + load_bytes<F32>(to) : sums[r][t];
          std::memcpy(to, &sum, sizeof sum);
        }
      }
    }
  }
}

// Rounds weights to bfloat16; subnormal ones may become 0.
PYGEN_INLINE void store_halves(uint16_t* to, F32 v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(v);
#else
  const U16 half = narrow(float_to_bfloat16(v));
#endif
  std::memcpy(to, &half, sizeof half);
}

// A tile of queries of one head, on its way through the keys.
struct Tile {
  const AttentionArgs& args;
  const Layout& layout;
  int64_t sample, head, first, count, rows;  // rows: count, rounded up to what the products take
  alignas(64) float scores[kQueries * kKeys];
  alignas(64) uint16_t weights[kQueries * kKeys];  // where they are halves; else in the place of the scores
  alignas(64) float sums[kQueries * kMostHeadDim];
  alignas(64) float q[kQueries * kMostHeadDim];
  float largest[kQueries], total[kQueries];

  Tile(const AttentionArgs& args, const Layout& layout, int64_t unit) : args(args), layout(layout) {
    const int64_t tiles = (args.queries + kQueries - 1) / kQueries;
    first = unit % tiles * kQueries;
    head = unit / tiles % args.heads;
    sample = unit / tiles / args.heads;
    count = std::min(kQueries, args.queries - first);
    rows = (count + 15) / 16 * 16;
    std::fill_n(largest, rows, -kInfinity);
    std::fill_n(total, rows, 0.0f);
    layout.halves ? read(reinterpret_cast<uint16_t*>(q)) : read(q);
  }

  template <class T>
  void read(T* to) {
    for (int64_t r = 0; r < rows; ++r) {
      alignas(64) T row[kRowFloats] = {};
      if (r < count) read_row(row, args, args.q, at(args.q, sample, head, first + r));
      std::memcpy(to + r * layout.depth, row, layout.depth * sizeof(T));
    }
  }

  void product(int64_t n, int64_t k, int64_t a_stride, int64_t b_stride, int64_t c_stride, bool add, const void* a,
               const void* b, float* c) const {
    const auto run = layout.halves                     ? args.product.bfloat16
                     : args.product.float32 != nullptr ? args.product.float32
                                                       : multiply;
    run(rows, n, k, a_stride, b_stride, c_stride, add, a, b, c);
  }

  // Keys from one to another, both within a block whose first has the number `begin`.
  void meet(const char* block, int64_t begin, int64_t from, int64_t to, bool first_block) {
    const int64_t here = (to - begin + 31) / 32 * 32;
    product(here, layout.depth, layout.depth, kKeys, kKeys, false, q, block, scores);
    for (int64_t r = 0; r < rows; ++r) weigh(r, begin, from, to, here, first_block);
    const void* const a = layout.halves ? static_cast<const void*>(weights) : scores;
    product(layout.width, here, kKeys, layout.width, layout.width, !first_block, a, block + layout.key_bytes, sums);
  }

  // Scales a row's scores, and makes those -inf that are not seen.
  void restrict_to(int64_t r, int64_t begin, int64_t here, int32_t low, int32_t high) {
    float* const row = scores + r * kKeys;
    alignas(64) float added[kKeys + 16] = {};
    const bool masked = args.mask.data != nullptr && r < count;
    if (masked) {
      const int64_t stride = args.mask.stride[3], offset = at(args.mask, sample, head, first + r);
      widen<kKeys>(added, args.mask, offset + begin * stride, stride, std::min(here, args.keys - begin));
    }
    I32 lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const F32 unseen = splat(-kInfinity, F32{});
    for (int64_t j = 0; j < here; j += kLanes) {
      F32 s = load_bytes<F32>(row + j) * splat(args.scale, F32{});
      if (masked) {
        const F32 mask = load_bytes<F32>(added + j);
        s = args.mask.dtype == DType::kBool ? select(mask != F32{}, s, unseen) : s + mask;
      }
      const I32 key = lane + static_cast<int32_t>(j);
      s = select((key >= low) & (key < high), s, unseen);
      std::memcpy(row + j, &s, sizeof s);
    }
  }

  // Makes a row's scores weights, relative to its largest score so far. NaN is none of them, and passes through exp.
  void weigh(int64_t r, int64_t begin, int64_t from, int64_t to, int64_t here, bool first_block) {
    float* const row = scores + r * kKeys;
    const int64_t query = first + r;
    if (r < count) {
      from = std::max(from, query - args.before), to = std::min(to, query + std::min(args.after, args.keys) + 1);
    }
    const int32_t low = static_cast<int32_t>(std::clamp<int64_t>(from - begin, 0, here));
    const int32_t high = static_cast<int32_t>(std::clamp<int64_t>(to - begin, 0, here));
    const bool restricted = args.mask.data != nullptr || low > 0 || high < here;
    if (restricted) restrict_to(r, begin, here, low, high);
    const F32 scale = splat(restricted ? 1.0f : args.scale, F32{});
    const auto larger = [](F32 a, F32 b) __attribute__((always_inline)) { return max(a, b); };
    F32 most[2] = {splat(largest[r], F32{}), splat(largest[r], F32{})};
    for (int64_t j = 0; j < here; j += 2 * kLanes) {
      for (int t = 0; t < 2; ++t) most[t] = max(load_bytes<F32>(row + j + t * kLanes) * scale, most[t]);
    }
    const float highest = join_lanes(max(most[0], most[1]), larger)[0];
    const bool nothing = highest == -kInfinity;
    const float kept = nothing || first_block ? 1.0f : exp(splat(largest[r] - highest, F32{}))[0];
    const F32 base = splat(nothing ? 0.0f : -highest, F32{});
    F32 sum[2] = {};
    const auto run = [&](auto put) __attribute__((always_inline)) {
      for (int64_t j = 0; j < here; j += 2 * kLanes) {
        for (int t = 0; t < 2; ++t) {
          const F32 weight = exp(fma(load_bytes<F32>(row + j + t * kLanes), scale, base));
          sum[t] += weight;
          put(j + t * kLanes, weight);
        }
      }
    };
    if (layout.halves) {
      run([to = weights + r * kKeys](int64_t j, F32 weight)
              __attribute__((always_inline)) { store_halves(to + j, weight); });
    } else {
      run([row](int64_t j, F32 weight)
              __attribute__((always_inline)) { std::memcpy(row + j, &weight, sizeof weight); });
    }
    const auto plus = [](F32 a, F32 b) __attribute__((always_inline)) { return a + b; };
    total[r] = total[r] * kept + join_lanes(sum[0] + sum[1], plus)[0];
    largest[r] = highest;
    if (kept == 1.0f) return;
    float* const to_scale = sums + r * layout.width;
    for (int64_t j = 0; j < layout.width; j += kLanes) {
      const F32 scaled = load_bytes<F32>(to_scale + j) * splat(kept, F32{});
      std::memcpy(to_scale + j, &scaled, sizeof scaled);
    }
  }

  void finish(bool met) const {
    for (int64_t r = 0; r < count; ++r) {
      const bool nothing = !met || total[r] == 0.0f;
      const F32 inverse = splat(nothing ? 0.0f : 1.0f / total[r], F32{});
      alignas(64) float row[kMostHeadDim];
      for (int64_t j = 0; j < layout.width; j += kLanes) {
        const F32 y = nothing ? F32{} : load_bytes<F32>(sums + r * layout.width + j) * inverse;
        std::memcpy(row + j, &y, sizeof y);
      }
      narrow_to<kMostHeadDim>(args.out, at(args.out, sample, head, first + r), args.out.stride[3], row, args.head_dim);
    }
  }
};

// Packs a block, of which `live` keys are there, from `key` on; a few rows at a time, so that lines are written whole.
template <class T>
void pack_block(const AttentionArgs& args, const Layout& layout, char* block, int64_t sample, int64_t head, int64_t key,
                int64_t live) {
  constexpr int64_t kTogether = 16;
  constexpr bool kHalves = sizeof(T) == 2;
  uint32_t *keys = reinterpret_cast<uint32_t*>(block), *values = reinterpret_cast<uint32_t*>(block + layout.key_bytes);
  alignas(64) T rows[kTogether][kRowFloats] = {};
  const auto read = [&](const Operand& operand, int64_t first) {
    const int64_t count = std::clamp<int64_t>(live - first, 0, kTogether);
    for (int64_t n = 0; n < count; ++n) read_row(rows[n], args, operand, at(operand, sample, head, key + first + n));
    if (count < kTogether) std::memset(rows[count], 0, sizeof rows[0] * (kTogether - count));
  };
  for (int64_t first = 0; first < kKeys; first += kTogether) {
    read(args.k, first);
    for (int64_t line = 0; line < layout.depth / (kHalves ? 2 : 1); ++line) {
      for (int64_t n = 0; n < kTogether; ++n) {
        std::memcpy(keys + line * kKeys + first + n, rows[n] + line * (kHalves ? 2 : 1), 4);
      }
    }
    read(args.v, first);
    for (int64_t n = 0; n < kTogether; n += kHalves ? 2 : 1) {
      uint32_t* const to = values + (first + n) / (kHalves ? 2 : 1) * layout.width;
      if constexpr (kHalves) {
        for (int64_t d = 0; d < layout.width; ++d) to[d] = rows[n][d] | uint32_t{rows[n + 1][d]} << 16;
      } else {
        std::memcpy(to, rows[n], layout.width * 4);
      }
    }
  }
}

}  // namespace

void attention_pack(const AttentionArgs& args, int64_t begin, int64_t end) {
  const Layout layout(args);
  const auto pack = layout.halves ? pack_block<uint16_t> : pack_block<float>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t key = unit % layout.blocks * kKeys, head = unit / layout.blocks % args.kv_heads;
    const int64_t sample = unit / layout.blocks / args.kv_heads;
    pack(args, layout, args.packed + unit * layout.block_bytes, sample, head, key, length_of(args, sample) - key);
  }
}

void attention(const AttentionArgs& args, int64_t begin, int64_t end) {
  const Layout layout(args);
  for (int64_t unit = begin; unit < end; ++unit) {
    Tile tile(args, layout, unit);
    const int64_t length = length_of(args, tile.sample), last = tile.first + tile.count - 1;
    const int64_t from = std::max<int64_t>(0, tile.first - args.before);
    const int64_t to = std::min(length, last + std::min(args.after, args.keys) + 1);
    const int64_t head = tile.sample * args.kv_heads + tile.head / (args.heads / args.kv_heads);
    bool met = false;
    for (int64_t block = from / kKeys; block * kKeys < to; ++block) {
      const char* const packed = args.packed + (head * layout.blocks + block) * layout.block_bytes;
      const int64_t first = block * kKeys;
      tile.meet(packed, first, std::max(from, first), std::min(to, first + kKeys), !met);
      met = true;
    }
    tile.finish(met);
  }
  if (args.product.finish != nullptr) args.product.finish();
}

}  // namespace pygen::PYGEN_ISA
