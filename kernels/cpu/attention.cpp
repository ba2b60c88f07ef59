#include "attention_tile.h"
#include "pygen/philox.h"

namespace pygen::PYGEN_ISA {
namespace {

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
    product_of(args, layout)(rows, n, k, a_stride, b_stride, c_stride, add, a, b, c);
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

  // Makes a row's scores weights, relative to its largest score so far. NaN is none of
  // them, and passes through exp.
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
    const auto run = [&](auto halves) __attribute__((always_inline)) {
      for (int64_t j = 0; j < here; j += 2 * kLanes) {
        for (int t = 0; t < 2; ++t) {
          const int64_t place = r * kKeys + j + t * kLanes;
          const F32 weight = weight_of<halves.value>(fma(load_bytes<F32>(scores + place), scale, base));
          sum[t] += weight;
          if constexpr (halves.value) {
            store_halves(weights + place, weight);
          } else {
            std::memcpy(scores + place, &weight, sizeof weight);
          }
        }
      }
    };
    layout.halves ? run(std::true_type{}) : run(std::false_type{});
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
    if (args.logsumexp == nullptr) return;
    float* const to = args.logsumexp + (sample * args.heads + head) * args.queries + first;
    for (int64_t r = 0; r < rows; r += kLanes) {
      const F32 sum = load_bytes<F32>(total + r);
      F32 y = load_bytes<F32>(largest + r) + log(sum, U32{}) + (sum - sum);  // NaN if the sum is
      y = select(sum == F32{}, splat(-kInfinity, F32{}), y);
      std::memcpy(to + r, &y, std::min<int64_t>(kLanes, count - r) * sizeof(float));
      if (count - r <= kLanes) break;
    }
  }
};

}  // namespace

void attention_pack(const AttentionArgs& args, int64_t begin, int64_t end) {
  const Layout layout(args);
  const auto pack = layout.halves ? pack_panels<uint16_t> : pack_panels<float>;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t key = unit % layout.blocks * kKeys, head = unit / layout.blocks % args.kv_heads;
    const int64_t sample = unit / layout.blocks / args.kv_heads, live = length_of(args, sample) - key;
    char* const block = args.packed + unit * layout.block_bytes;
    pack(args, layout, args.k, at(args.k, sample, head, key), live, block, nullptr);
    pack(args, layout, args.v, at(args.v, sample, head, key), live, nullptr, block + layout.key_bytes);
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
