#include "pygen/attention_backward.h"

#include "attention_tile.h"

namespace pygen::PYGEN_ISA {
namespace {

using Backward = AttentionBackwardLayout;
inline constexpr int64_t kTileKeys = Backward::kKeys;
static_assert(Backward::kQueries == kQueries && kQueries == kKeys);  // that of a packed panel

// Writes a tile's part of grad_q, which is transposed and not yet scaled.
void write_grad_q(const AttentionBackwardArgs& args, const Backward& layout, int64_t sample, int64_t head, int64_t tile,
                  const float* transposed) {
  const int64_t first = tile * kQueries, count = std::min(kQueries, args.forward.queries - first);
  alignas(64) float rows[kLanes][kRowFloats];
  for (int64_t r = 0; r < count; r += kLanes) {
    for (int64_t d = 0; d < layout.sizes.width; d += kLanes) {
      F32 v[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        v[i] = load_bytes<F32>(transposed + (d + i) * kQueries + r) * splat(args.forward.scale, F32{});
      }
      transpose(v);
      for (int i = 0; i < kLanes; ++i) std::memcpy(rows[i] + d, &v[i], sizeof v[i]);
    }
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - r); ++i) {
      narrow_to<kMostHeadDim>(args.grad_q, at(args.grad_q, sample, head, first + r + i), args.grad_q.stride[3], rows[i],
                              args.forward.head_dim);
    }
  }
}

// Where a unit keeps its share of that, where there are several.
float* partial_of(const AttentionBackwardArgs& args, const Backward& layout, int64_t sample, int64_t head, int64_t unit,
                  int64_t tile) {
  const int64_t place = ((sample * args.forward.heads + head) * layout.units + unit) * layout.tiles + tile;
  return args.partial + place * layout.sizes.width * kQueries;
}

// A tile of keys.
template <class T>
struct KeyTile {
  int64_t first, count, rows, padded;  // count, rounded up to what the products take on either side
  bool met;
  T *k, *v, *k_across;     // (keys, depth), and (width, keys)
  float *grad_k, *grad_v;  // (keys, width)
};

// A unit of keys, on its way through the queries. T: what the products take.
template <class T>
struct Unit {
  static constexpr bool kHalves = sizeof(T) == 2;
  using Keys = KeyTile<T>;
  const AttentionBackwardArgs& args;
  const Backward& layout;
  const AttentionArgs& of;
  const int64_t depth, width;
  int64_t sample, kv_head, unit;
  int tiles = 0;
  Keys keys[Backward::kMostTiles];
  // Of a tile of queries: q and grad as panels (depth, kQueries) and (kQueries, width), and each query's numbers.
  T *q_across, *q_along, *grad_across, *grad_along;
  float* grad_q;
  alignas(64) float logsumexp[kQueries], delta[kQueries];
  // Of both tiles: scores, which become weights, and their gradients.
  alignas(64) float weights[kTileKeys * kQueries], slopes[kTileKeys * kQueries];
  alignas(64) uint16_t numbers[8][kQueries];  // of the weights of eight keys, by which some are dropped
  PhiloxKey dropout;
  PhiloxRounds rounds;
  // The same as halves, and the slopes with rows two by two.
  alignas(64) uint16_t halves[kHalves ? 3 : 1][kHalves ? kTileKeys * kQueries : 1];

  Unit(const AttentionBackwardArgs& args, const Backward& layout, char* memory)
      : args(args), layout(layout), of(args.forward), depth(layout.sizes.depth), width(layout.sizes.width) {
    const auto take = [&](auto*& pointer, int64_t elements) {
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(memory);
      memory += elements * static_cast<int64_t>(sizeof *pointer);
    };
    for (int64_t t = 0; t < layout.unit_tiles; ++t) {
      take(keys[t].k, kTileKeys * depth), take(keys[t].v, kTileKeys * depth), take(keys[t].k_across, kTileKeys * width);
      take(keys[t].grad_k, kTileKeys * width), take(keys[t].grad_v, kTileKeys * width);
    }
    take(q_across, depth * kQueries), take(q_along, kQueries * width);
    take(grad_across, depth * kQueries), take(grad_along, kQueries * width), take(grad_q, width * kQueries);
  }

  void run(int64_t number) {
    unit = number % layout.units, kv_head = number / layout.units % of.kv_heads;
    sample = number / layout.units / of.kv_heads;
    const int64_t begin = unit * layout.unit_tiles * kTileKeys, length = length_of(of, sample);
    const int64_t end = std::min(of.keys, begin + layout.unit_tiles * kTileKeys);
    tiles = 0;
    for (int64_t first = begin; first < std::min(end, length); first += kTileKeys) {
      read(keys[tiles++], first, std::min({kTileKeys, length - first, end - first}));
    }
    const int64_t group = of.heads / of.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t tile = 0; tile < layout.tiles; ++tile) meet(head, tile);
    }
    for (int t = 0; t < tiles; ++t) write(keys[t]);
    // What lies behind the length has no part in anything.
    for (int64_t key = std::max(begin, length); key < end; ++key) {
      alignas(64) const float zeros[kMostHeadDim] = {};
      write_row(args.grad_k, key, zeros), write_row(args.grad_v, key, zeros);
    }
  }

  void read(Keys& tile, int64_t first, int64_t count) {
    tile.first = first, tile.count = count, tile.met = false;
    tile.rows = (count + 15) / 16 * 16, tile.padded = (count + 31) / 32 * 32;
    alignas(64) T row[2][kRowFloats] = {};
    for (int64_t r = 0; r < count; ++r) {
      read_row(row[0], of, of.k, at(of.k, sample, kv_head, first + r));
      read_row(row[1], of, of.v, at(of.v, sample, kv_head, first + r));
      std::memcpy(tile.k + r * depth, row[0], depth * sizeof(T));
      std::memcpy(tile.v + r * depth, row[1], depth * sizeof(T));
      for (int64_t d = 0; d < of.head_dim; ++d) tile.k_across[d * kTileKeys + r] = row[0][d];
    }
    std::fill(tile.k + count * depth, tile.k + tile.rows * depth, T{});
    std::fill(tile.v + count * depth, tile.v + tile.rows * depth, T{});
    for (int64_t d = 0; d < width; ++d) {
      T* const across = tile.k_across + d * kTileKeys;
      std::fill(across + (d < of.head_dim ? count : 0), across + tile.padded, T{});
    }
  }

  // Whether one of a tile's keys is seen by one of the queries from one to another.
  bool seen(const Keys& tile, int64_t from, int64_t to) const {
    return to > tile.first - std::min(of.after, of.keys) &&
           from < tile.first + tile.count + std::min(of.before, of.queries);
  }

  void meet(int64_t head, int64_t tile) {
    const int64_t begin = tile * kQueries, count = std::min(kQueries, of.queries - begin);
    float* const sums = layout.units > 1 ? partial_of(args, layout, sample, head, unit, tile) : grad_q;
    bool met = false;
    dropout = dropout_key(of, sample, head), rounds = PhiloxRounds(dropout.seed);
    for (int t = 0; t < tiles; ++t) {
      if (!seen(keys[t], begin, begin + count)) continue;
      if (!met) pack(head, begin, count);
      multiply(keys[t], head, begin, (count + 31) / 32 * 32, sums, met);
      met = true;
    }
    if (!met) std::memset(sums, 0, width * kQueries * sizeof(float));
    if (layout.units == 1) write_grad_q(args, layout, sample, head, tile, sums);
  }

  void pack(int64_t head, int64_t begin, int64_t count) {
    const int64_t of_grad = at(args.grad, sample, head, begin);
    pack_panels<T>(of, layout.sizes, of.q, at(of.q, sample, head, begin), count, kQueries, q_across, q_along);
    pack_panels<T>(of, layout.sizes, args.grad, of_grad, count, kQueries, grad_across, grad_along);
    std::fill_n(logsumexp, kQueries, kInfinity), std::fill_n(delta, kQueries, 0.0f);
    for (int64_t r = 0; r < count; ++r) {
      const float sum = of.logsumexp[(sample * of.heads + head) * of.queries + begin + r];
      // A query that sees nothing weighs nothing.
      if (sum != -kInfinity) logsumexp[r] = sum;
      alignas(64) float grad[kRowFloats], out[kRowFloats];
      widen<kMostHeadDim>(grad, args.grad, of_grad + r * args.grad.stride[2], args.grad.stride[3], of.head_dim);
      widen<kMostHeadDim>(out, of.out, at(of.out, sample, head, begin + r), of.out.stride[3], of.head_dim);
      F32 y{};
      for (int64_t d = 0; d < of.head_dim; d += kLanes) y = fma(load_bytes<F32>(grad + d), load_bytes<F32>(out + d), y);
      delta[r] = join_lanes(y, [](F32 a, F32 b) __attribute__((always_inline)) { return a + b; })[0];
    }
  }

  void multiply(Keys& tile, int64_t head, int64_t begin, int64_t here, float* sums, bool add) {
    const Multiply product(of, layout.sizes, 64);
    product(tile.rows, here, depth, depth, kQueries, kQueries, false, tile.k, q_across, weights);
    product(tile.rows, here, depth, depth, kQueries, kQueries, false, tile.v, grad_across, slopes);
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (of.dropout.philox.seed != nullptr && r % 8 == 0) draw(tile.first + r, begin, here);
      weigh(tile, r, head, begin, here);
    }
    if constexpr (kHalves) round(tile.rows, here);
    T* const p = reinterpret_cast<T*>(kHalves ? static_cast<void*>(halves[0]) : weights);
    T* const ds = reinterpret_cast<T*>(kHalves ? static_cast<void*>(halves[kHalves]) : slopes);
    T* const pairs = reinterpret_cast<T*>(kHalves ? static_cast<void*>(halves[2 * kHalves]) : slopes);
    // Rows that there are for the product's sake alone, and meet zeros of k.
    std::memset(pairs + tile.rows * kQueries, 0, (tile.padded - tile.rows) * kQueries * sizeof(T));
    product(tile.rows, width, here, kQueries, width, width, tile.met, p, grad_along, tile.grad_v);
    product(tile.rows, width, here, kQueries, width, width, tile.met, ds, q_along, tile.grad_k);
    tile.met = true;
    product(width, here, tile.padded, kTileKeys, kQueries, kQueries, add, tile.k_across, pairs, sums);
  }

  // The numbers of the weights of eight keys from one on.
  void draw(int64_t key, int64_t begin, int64_t here) {
    for (int64_t j = 0; j < here; j += 2 * kLanes) {
      U32 word[2][4];
      philox_vectors(Dropout::block(begin + j, key), dropout, rounds, word, Dropout::block(1, 0));
      for (int v = 0; v < 2; ++v) {
        for (int i = 0; i < 8; ++i) {
          const U16 number = narrow(i % 2 ? word[v][i / 2] >> 16 : word[v][i / 2] & 0xffffu);
          std::memcpy(numbers[i] + j + v * kLanes, &number, sizeof number);
        }
      }
    }
  }

  // Makes a row's scores weights p, and grad v^T slopes: p * (grad v^T - delta). Of a weight that is dropped only the
  // delta is left in its slope.
  void weigh(const Keys& keys, int64_t r, int64_t head, int64_t begin, int64_t here) {
    float *const p = weights + r * kQueries, *const ds = slopes + r * kQueries;
    const int64_t key = keys.first + r;
    // The queries that see the key.
    const int64_t low = r < keys.count ? std::clamp<int64_t>(key - std::min(of.after, of.keys) - begin, 0, here) : here;
    const int64_t high = std::clamp<int64_t>(key + std::min(of.before, of.queries) + 1 - begin, 0, here);
    const bool masked = of.mask.data != nullptr && r < keys.count;
    alignas(64) float added[kQueries + 16];
    if (masked) {
      const int64_t stride = of.mask.stride[2];
      const int64_t offset = at(of.mask, sample, head, begin) + key * of.mask.stride[3];
      std::memset(added, 0, sizeof added);
      widen<kQueries>(added, of.mask, offset, stride, std::min(here, of.queries - begin));
    }
    I32 lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const F32 unit = splat(exponent_unit(kHalves), F32{}), scale = splat(of.scale, F32{}),
              unseen = splat(-kInfinity, F32{});
    const F32 kept_scale = splat(of.dropout.scale, F32{});
    const auto run = [&](auto restricted, auto drops) __attribute__((always_inline)) {
      for (int64_t j = 0; j < here; j += kLanes) {
        F32 s = load_bytes<F32>(p + j) * scale;
        I32 seen = lane == lane;
        if constexpr (restricted.value) {
          const I32 query = lane + static_cast<int32_t>(j);
          seen = (query >= static_cast<int32_t>(low)) & (query < static_cast<int32_t>(high));
          if (masked) {
            const F32 mask = load_bytes<F32>(added + j);
            if (of.mask.dtype == DType::kBool) {
              seen &= mask != F32{};
            } else {
              s = s + mask;
            }
          }
          s = select(seen, s, unseen);
        }
        F32 weight = weight_of<kHalves>((s - load_bytes<F32>(logsumexp + j)) * unit);
        F32 through = load_bytes<F32>(ds + j);
        I32 kept{};
        if constexpr (drops.value) {
          kept = to_signed(widen(load_bytes<U16>(numbers[r % 8] + j))) > of.dropout.last;
          through = select(kept, through * kept_scale, F32{});
        }
        F32 slope = weight * (through - load_bytes<F32>(delta + j));
        if constexpr (drops.value) weight = select(kept, weight * kept_scale, F32{});
        if constexpr (restricted.value) {  // whatever v holds, or a query's numbers are
          slope = select(seen & (s != unseen), slope, F32{});
          weight = select(seen, weight, F32{});
        }
        std::memcpy(p + j, &weight, sizeof weight);
        std::memcpy(ds + j, &slope, sizeof slope);
      }
    };
    const auto with = [&](auto drops) __attribute__((always_inline)) {
      masked || low > 0 || high < here ? run(std::true_type{}, drops) : run(std::false_type{}, drops);
    };
    of.dropout.philox.seed != nullptr ? with(std::true_type{}) : with(std::false_type{});
  }

  void round(int64_t rows, int64_t here) {
    for (int64_t r = 0; r < rows; r += 2) {
      for (int64_t j = 0; j < here; j += kLanes) {
        uint16_t pair[2][kLanes];
        for (int t = 0; t < 2; ++t) {
          const int64_t place = (r + t) * kQueries + j;
          store_halves(halves[0] + place, load_bytes<F32>(weights + place));
          store_halves(pair[t], load_bytes<F32>(slopes + place));
          std::memcpy(halves[1] + place, pair[t], sizeof pair[t]);
        }
        const U32 both = widen(load_bytes<U16>(pair[0])) | widen(load_bytes<U16>(pair[1])) << 16;
        std::memcpy(halves[2] + r * kQueries + 2 * j, &both, sizeof both);
      }
    }
  }

  // The gradients of a tile's keys; 0 where no query sees one.
  void write(const Keys& tile) const {
    for (int64_t r = 0; r < tile.count; ++r) {
      const auto scaled = [&](const Operand& to, const float* from, float scale) {
        alignas(64) float row[kMostHeadDim];
        for (int64_t d = 0; d < width; d += kLanes) {
          const F32 y = tile.met ? load_bytes<F32>(from + r * width + d) * splat(scale, F32{}) : F32{};
          std::memcpy(row + d, &y, sizeof y);
        }
        write_row(to, tile.first + r, row);
      };
      scaled(args.grad_k, tile.grad_k, of.scale);
      scaled(args.grad_v, tile.grad_v, 1.0f);
    }
  }
  void write_row(const Operand& to, int64_t key, const float* row) const {
    narrow_to<kMostHeadDim>(to, at(to, sample, kv_head, key), to.stride[3], row, of.head_dim);
  }
};

template <class T>
void run_worker(const AttentionBackwardArgs& args, const Backward& layout, int64_t worker) {
  Unit<T> unit(args, layout, args.memory + worker * layout.worker_bytes);
  const int64_t units = args.forward.batch * args.forward.kv_heads * layout.units;
  for (int64_t number = worker; number < units; number += args.workers) unit.run(number);
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
  const Backward layout(args);
  const auto run = layout.sizes.halves ? run_worker<uint16_t> : run_worker<float>;
  for (int64_t worker = begin; worker < end; ++worker) run(args, layout, worker);
  if (args.forward.product.finish != nullptr) args.forward.product.finish();
}

void attention_backward_queries(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
  const Backward layout(args);
  const AttentionArgs& of = args.forward;
  for (int64_t number = begin; number < end; ++number) {
    const int64_t tile = number % layout.tiles, head = number / layout.tiles % of.heads;
    const int64_t sample = number / layout.tiles / of.heads;
    alignas(64) float sums[kMostHeadDim * kQueries];
    std::fill_n(sums, layout.sizes.width * kQueries, 0.0f);
    for (int64_t unit = 0; unit < layout.units; ++unit) {
      const float* const from = partial_of(args, layout, sample, head, unit, tile);
      for (int64_t i = 0; i < layout.sizes.width * kQueries; i += kLanes) {
        const F32 sum = load_bytes<F32>(sums + i) + load_bytes<F32>(from + i);
        std::memcpy(sums + i, &sum, sizeof sum);
      }
    }
    write_grad_q(args, layout, sample, head, tile, sums);
  }
}

}  // namespace pygen::PYGEN_ISA
