#include "attention_tile.h"
#include "quick_weights.h"

namespace pygen::PYGEN_ISA {
namespace {

// A tile of queries of one head, on its way through the keys.
struct Tile {
  const AttentionArgs& args;
  const Layout& layout;
  int64_t sample, head, first, count, rows;  // rows: count, rounded up to what the products take
  const void* left;                          // the queries, as they take them
  int64_t left_stride;
  alignas(64) float scores[kQueries * kKeys];
  alignas(64) uint16_t weights[kQueries * kKeys];  // where they are halves; else in the place of the scores
  alignas(64) float sums[kQueries * kMostHeadDim];
  alignas(64) float q[kQueries * kMostHeadDim];
  float largest[kQueries], total[kQueries];
  PhiloxKey key;  // of dropout
  PhiloxRounds rounds;

  Tile(const AttentionArgs& args, const Layout& layout, int64_t unit) : args(args), layout(layout) {
    const int64_t tiles = (args.queries + kQueries - 1) / kQueries;
    first = unit % tiles * kQueries;
    head = unit / tiles % args.heads;
    sample = unit / tiles / args.heads;
    key = dropout_key(args, sample, head), rounds = PhiloxRounds(key.seed);
    count = std::min(kQueries, args.queries - first);
    rows = (count + 15) / 16 * 16;
    std::fill_n(largest, rows, -kInfinity);
    std::fill_n(total, rows, 0.0f);
    layout.halves ? read(reinterpret_cast<uint16_t*>(q)) : read(q);
  }

  template <class T>
  void read(T* to) {
    const bool as_it_lies =
        args.q.stride[3] == 1 && size_of(args.q.dtype) == sizeof(T) && args.head_dim == layout.depth;
    if (as_it_lies && count == rows) {
      left = static_cast<const T*>(args.q.data) + at(args.q, sample, head, first), left_stride = args.q.stride[2];
      return;
    }
    left = to, left_stride = layout.depth;
    alignas(64) T row[kRowFloats] = {};
    for (int64_t r = 0; r < count; ++r) {
      read_row(row, args, args.q, at(args.q, sample, head, first + r));
      std::memcpy(to + r * layout.depth, row, layout.depth * sizeof(T));
    }
    std::fill(to + count * layout.depth, to + rows * layout.depth, T{});
  }

  // Keys from one to another, both within a block whose first has the number `begin`.
  void meet(const char* block, int64_t begin, int64_t from, int64_t to, bool first_block) {
    const int64_t here = (to - begin + 15) / 16 * 16;
    const Multiply product(args, layout, 128);
    if (!weigh_quickly(block, begin, from, to, first_block)) {
      product(rows, here, layout.depth, left_stride, layout.panel, kKeys, false, left, block, scores);
      for (int64_t r = 0; r < rows; r += kLanes) {
        weigh(r, begin, from, to, here, first_block);
        for (int i = 0; args.dropout.philox.seed != nullptr && i < kLanes; ++i) drop(r + i, begin, here);
      }
    }
    const void* const a = layout.halves ? static_cast<const void*>(weights) : scores;
    product(rows, layout.width, here, kKeys, layout.width, layout.width, !first_block, a, block + layout.key_bytes,
            sums);
  }

  // The weights of keys that all rows see, where nothing else is asked about them. Returns whether they are done.
  bool weigh_quickly(const char* block, int64_t begin, int64_t from, int64_t to, bool first_block) {
    const bool all = from == begin && (to - begin) % QuickWeights::kColumns == 0 &&
                     first + count - 1 - args.before <= begin && first + std::min(args.after, args.keys) + 1 >= to;
    const bool plain = layout.halves && !args.product.matrix_unit && args.mask.data == nullptr &&
                       args.dropout.philox.seed == nullptr && args.logsumexp == nullptr && args.scale > 0 &&
                       args.scale < kInfinity;
    if (!all || !plain) return false;
    if (QuickWeights::run(layout, static_cast<const uint16_t*>(left), left_stride, block, rows, to - begin, args.scale,
                          first_block, weights, largest, total)) {
      return true;
    }
    if (first_block) std::fill_n(largest, rows, -kInfinity);
    return false;
  }

  // Makes the scores of kLanes rows -inf that are not seen. Returns whether they were scaled as well.
  bool restrict_rows(int64_t r, int64_t begin, int64_t from, int64_t to, int64_t here) {
    const bool masked = args.mask.data != nullptr, added = masked && args.mask.dtype != DType::kBool;
    const bool scaled = added || !(args.scale > 0 && args.scale < kInfinity);
    for (int64_t end = r + kLanes; r < end; ++r) {
      int64_t first_seen = from, end_seen = to;
      if (const int64_t query = first + r; r < count) {
        first_seen = std::max(from, query - args.before),
        end_seen = std::min(to, query + std::min(args.after, args.keys) + 1);
      }
      const int64_t high = std::clamp<int64_t>(end_seen - begin, 0, here);
      const int64_t low = std::clamp<int64_t>(first_seen - begin, 0, high);
      float* const row = scores + r * kKeys;
      if (scaled || masked) scale_and_mask(row, r, begin, here, splat(scaled ? args.scale : 1.0f, F32{}));
      std::fill(row, row + low, -kInfinity);
      std::fill(row + high, row + here, -kInfinity);
    }
    return scaled;
  }

  void scale_and_mask(float* row, int64_t r, int64_t begin, int64_t here, F32 scale) {
    alignas(64) float added[kKeys + 16] = {};
    const bool masked = args.mask.data != nullptr && r < count;
    if (masked) {
      const int64_t stride = args.mask.stride[3], offset = at(args.mask, sample, head, first + r);
      widen<kKeys>(added, args.mask, offset + begin * stride, stride, std::min(here, args.keys - begin));
    }
    for (int64_t j = 0; j < here; j += kLanes) {
      F32 s = load_bytes<F32>(row + j) * scale;
      if (masked) {
        const F32 mask = load_bytes<F32>(added + j);
        s = args.mask.dtype == DType::kBool ? select(mask != F32{}, s, splat(-kInfinity, s)) : s + mask;
      }
      std::memcpy(row + j, &s, sizeof s);
    }
  }

  // Makes the scores of kLanes rows weights, relative to the largest score that each row has met.
  void weigh(int64_t r, int64_t begin, int64_t from, int64_t to, int64_t here, bool first_block) {
    const bool scaled = restrict_rows(r, begin, from, to, here);
    const F32 scale = splat(scaled ? 1.0f : args.scale, F32{});
    F32 of_rows[kLanes];
    for (int i = 0; i < kLanes; ++i) of_rows[i] = largest_of(scores + (r + i) * kKeys, here);
    const F32 here_most = join_each(of_rows, [](F32 a, F32 b) __attribute__((always_inline)) { return max(a, b); });
    const F32 before = load_bytes<F32>(largest + r), most = max(here_most * scale, before);
    const F32 kept = select(most == before, splat(1.0f, F32{}), exp(before - most));
    const F32 base = select(most == splat(-kInfinity, F32{}), F32{}, -most);
    const auto run = [&](auto halves, auto rough) {
      for (int i = 0; i < kLanes; ++i) of_rows[i] = weigh_row<halves.value, rough.value>(r + i, here, scale, base[i]);
    };
    if (!layout.halves) {
      run(std::false_type{}, std::false_type{});
    } else {
      args.logsumexp == nullptr ? run(std::true_type{}, std::true_type{}) : run(std::true_type{}, std::false_type{});
    }
    const F32 weights = join_each(of_rows, [](F32 a, F32 b) __attribute__((always_inline)) { return a + b; });
    const F32 sum = fma(load_bytes<F32>(total + r), kept, weights);
    std::memcpy(total + r, &sum, sizeof sum);
    std::memcpy(largest + r, &most, sizeof most);
    for (int i = 0; i < kLanes && !first_block; ++i) {
      if (kept[i] == 1.0f) continue;
      float* const to_scale = sums + (r + i) * layout.width;
      for (int64_t j = 0; j < layout.width; j += kLanes) {
        const F32 scaled = load_bytes<F32>(to_scale + j) * splat(kept[i], F32{});
        std::memcpy(to_scale + j, &scaled, sizeof scaled);
      }
    }
  }

  // Of each lane; NaN is not the largest of anything.
  static F32 largest_of(const float* row, int64_t here) {
    F32 most[2] = {splat(-kInfinity, F32{}), splat(-kInfinity, F32{})};
    by_pairs(here, [&](int64_t j, auto count) __attribute__((always_inline)) {
      for (int t = 0; t < count.value; ++t) most[t] = max(load_bytes<F32>(row + j + t * kLanes), most[t]);
    });
    return max(most[0], most[1]);
  }

  // Returns the sum of the weights of a row, in each lane.
  template <bool kHalves, bool kRough>
  F32 weigh_row(int64_t r, int64_t here, F32 scale, float base) {
    const F32 unit = splat(exponent_unit(kRough), scale), least = splat(base, scale) * unit;
    scale *= unit;
    F32 sum[2] = {};
    float* const row = scores + r * kKeys;
    by_pairs(here, [&](int64_t j, auto count) __attribute__((always_inline)) {
      F32 weight[count.value];
      for (int t = 0; t < count.value; ++t) {
        weight[t] = weight_of<kRough>(fma(load_bytes<F32>(row + j + t * kLanes), scale, least));
        sum[t] += weight[t];
        if constexpr (!kHalves) std::memcpy(row + j + t * kLanes, &weight[t], sizeof weight[t]);
      }
      if constexpr (kHalves) store_halves(weights + r * kKeys + j, weight);
    });
    return sum[0] + sum[1];
  }

  // Two vectors of a row at a time, and one where one is left.
  template <class Visit>
  PYGEN_INLINE static void by_pairs(int64_t here, Visit visit) {
    int64_t j = 0;
    for (; j + 2 * kLanes <= here; j += 2 * kLanes) visit(j, std::integral_constant<int, 2>{});
    if (j < here) visit(j, std::integral_constant<int, 1>{});
  }

  // Makes 0 of the weights of a row that are dropped.
  void drop(int64_t r, int64_t begin, int64_t here) {
    constexpr int64_t kTogether = 2 * 8 * kLanes;
    static_assert(kKeys % kTogether == 0);
    alignas(64) uint16_t numbers[kKeys];
    for (int64_t j = 0; j < here; j += kTogether) {
      U32 word[2][4];
      philox_vectors(Dropout::block(first + r, begin + j), key, rounds, word);
      for (int v = 0; v < 2; ++v) {
        F32 words[4];
        for (int i = 0; i < 4; ++i) words[i] = from_unsigned(word[v][i]);
        in_order(words);
        std::memcpy(numbers + j + v * 8 * kLanes, words, sizeof words);
      }
    }
    for (int64_t j = 0; j < here; j += kLanes) {
      const U16 number = load_bytes<U16>(numbers + j);
      if (layout.halves) {
        uint16_t* const at = weights + r * kKeys + j;
        const U16 kept = number > args.dropout.last ? load_bytes<U16>(at) : U16{};
        std::memcpy(at, &kept, sizeof kept);
      } else {
        float* const at = scores + r * kKeys + j;
        const F32 kept = select(to_signed(widen(number)) > args.dropout.last, load_bytes<F32>(at), F32{});
        std::memcpy(at, &kept, sizeof kept);
      }
    }
  }

  void finish(bool met) const {
    for (int64_t r = 0; r < count; ++r) {
      const bool nothing = !met || total[r] == 0.0f;
      const F32 inverse = splat(nothing ? 0.0f : args.dropout.scale / total[r], F32{});
      const float* const sum = sums + r * layout.width;
      const auto y = [&](int64_t j) { return nothing ? F32{} : load_bytes<F32>(sum + j) * inverse; };
      const int64_t to = at(args.out, sample, head, first + r);
      if (layout.halves && args.out.stride[3] == 1) {
        uint16_t* const row = static_cast<uint16_t*>(args.out.data) + to;
        for (int64_t j = 0; j < args.head_dim; j += kLanes) store_halves(row + j, y(j), args.head_dim - j);
        continue;
      }
      alignas(64) float row[kMostHeadDim];
      for (int64_t j = 0; j < layout.width; j += kLanes) {
        const F32 v = y(j);
        std::memcpy(row + j, &v, sizeof v);
      }
      narrow_to<kMostHeadDim>(args.out, to, args.out.stride[3], row, args.head_dim);
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
    pack(args, layout, args.k, at(args.k, sample, head, key), live, layout.panel, block, nullptr);
    pack(args, layout, args.v, at(args.v, sample, head, key), live, layout.panel, nullptr, block + layout.key_bytes);
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
