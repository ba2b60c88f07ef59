#include "pygen/winograd_conv2d.h"

#include "first_lanes.h"
#include "multiply_tile.h"

namespace pygen::PYGEN_ISA {
namespace {

using Args = WinogradConv2dArgs;
constexpr int64_t kChannels = Args::kChannels, kPanel = Args::kPanel;

// The transforms of F(m x m, 3x3) in one of its two directions, of pixels (B^T), taps (G) and products (A^T), m = 2 at
// the points 0, 1, -1 and infinity, m = 4 at 0, a, -a, b, -b and infinity. With 2/3 and 3/2 the errors are a half, and
// the largest a quarter of those of the usual 1 and 2.
constexpr float kA = 2.0f / 3, kB = 1.5f, kA2 = 4.0f / 9, kB2 = 2.25f, kBoth = 97.0f / 36;  // kA2 + kB2

struct OfPixels {
  static PYGEN_INLINE void apply(const F32 (&d)[4], F32 (&y)[4]) {
    y[0] = d[0] - d[2], y[1] = d[1] + d[2], y[2] = d[2] - d[1], y[3] = d[1] - d[3];
  }
  static PYGEN_INLINE void apply(const F32 (&d)[6], F32 (&y)[6]) {
    const F32 even_a = d[4] - kB2 * d[2], odd_a = kA * (d[3] - kB2 * d[1]);
    const F32 even_b = d[4] - kA2 * d[2], odd_b = kB * (d[3] - kA2 * d[1]);
    y[0] = d[0] + d[4] - kBoth * d[2], y[5] = d[1] + d[5] - kBoth * d[3];
    y[1] = even_a + odd_a, y[2] = even_a - odd_a, y[3] = even_b + odd_b, y[4] = even_b - odd_b;
  }
};
struct OfTaps {
  static PYGEN_INLINE void apply(const F32 (&g)[3], F32 (&y)[4]) {
    const F32 sides = g[0] + g[2];
    y[0] = g[0], y[1] = 0.5f * (sides + g[1]), y[2] = 0.5f * (sides - g[1]), y[3] = g[2];
  }
  static PYGEN_INLINE void apply(const F32 (&g)[3], F32 (&y)[6]) {
    constexpr float kScaleA = -81.0f / 130, kScaleB = 8.0f / 65;  // 1 / (2 a^2 (a^2 - b^2)), and likewise
    const F32 even_a = kScaleA * (g[0] + kA2 * g[2]), odd_a = kScaleA * kA * g[1];
    const F32 even_b = kScaleB * (g[0] + kB2 * g[2]), odd_b = kScaleB * kB * g[1];
    y[0] = g[0], y[5] = g[2];
    y[1] = even_a + odd_a, y[2] = even_a - odd_a, y[3] = even_b + odd_b, y[4] = even_b - odd_b;
  }
};
struct OfProducts {
  static PYGEN_INLINE void apply(const F32 (&m)[4], F32 (&y)[2]) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
  }
  static PYGEN_INLINE void apply(const F32 (&m)[6], F32 (&y)[4]) {
    const F32 even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b, y[1] = kA * odd_a + kB * odd_b;
    y[2] = kA2 * even_a + kB2 * even_b, y[3] = kA2 * kA * odd_a + kB2 * kB * odd_b + m[5];
  }
};

// A transform in both directions, from read(row, column) to write(row, column, value).
template <class Transform, int kFrom, int kTo, class Read, class Write>
PYGEN_INLINE void both_ways(Read read, Write write) {
  F32 half[kTo][kFrom];
  for (int j = 0; j < kFrom; ++j) {
    F32 column[kFrom], y[kTo];
    for (int i = 0; i < kFrom; ++i) column[i] = read(i, j);
    Transform::apply(column, y);
    for (int i = 0; i < kTo; ++i) half[i][j] = y[i];
  }
  for (int i = 0; i < kTo; ++i) {
    F32 y[kTo];
    Transform::apply(half[i], y);
    for (int j = 0; j < kTo; ++j) write(i, j, y[j]);
  }
}

// A block of tiles, in a worker's memory.
template <DType kDType, int kSide>
struct Block {
  static constexpr int kSeen = kSide + 2, kPlanes = kSeen * kSeen;
  static constexpr int64_t kSize = size_of(kDType);

  const Args& args;
  const WinogradLayout layout;
  float *const tiles, *const weight, *const products;
  int64_t first = 0, count = 0, rows = 0;  // of tiles; rows: count, rounded up to what the products take

  Block(const Args& args, char* memory)
      : args(args),
        layout(args),
        tiles(reinterpret_cast<float*>(memory)),
        weight(tiles + layout.weight),
        products(tiles + layout.products) {}

  // The outputs of a block of tiles, of panels from one to another.
  void run(int64_t block, int64_t begin, int64_t end) {
    const auto product = args.product.float32 != nullptr ? args.product.float32 : multiply;
    first = block * args.block, count = std::min(args.block, args.tiles() - first), rows = (count + 3) / 4 * 4;
    for (int64_t channel = 0; channel < args.channels; channel += kChannels) {
      const int64_t channels = std::min(kChannels, args.channels - channel);
      transform_tiles(channel, channels);
      for (int64_t panel = begin; panel < end; ++panel) {
        transform_weight(panel, channel, channels);
        for (int plane = 0; plane < kPlanes; ++plane) {
          product(rows, kPanel, channels, kChannels, kPanel, kPanel, channel > 0, tiles + plane * layout.tile_plane,
                  weight + plane * layout.weight_plane, products_of(panel - begin, plane));
        }
      }
    }
    for (int64_t panel = begin; panel < end; ++panel) finish(panel, products_of(panel - begin, 0));
  }

  float* products_of(int64_t place, int plane) const {
    return products + (place * kPlanes + plane) * layout.product_plane;
  }

  // The pixel at a row and a column, counted from that of a tile's first output; null outside.
  PYGEN_INLINE char* pixel(const Operand& operand, int64_t tile, int row, int column) const {
    const int64_t columns = args.columns_of_tiles(), rows_of_tiles = args.rows_of_tiles();
    const int64_t y = tile / columns % rows_of_tiles * kSide + row, x = tile % columns * kSide + column;
    if (y < 0 || y >= args.height || x < 0 || x >= args.width) return nullptr;
    const int64_t sample = tile / columns / rows_of_tiles;
    const int64_t offset = sample * operand.stride[0] + y * operand.stride[1] + x * operand.stride[2];
    return static_cast<char*>(operand.data) + offset * kSize;
  }

  void transform_tiles(int64_t channel, int64_t channels) {
    alignas(64) static constexpr char kZeros[kChannels * kSize] = {};
    for (int64_t t = 0; t < count; ++t) {
      const char* from[kSeen][kSeen];
      for (int i = 0; i < kSeen; ++i) {
        for (int j = 0; j < kSeen; ++j) {
          const char* const at = pixel(args.x, first + t, i - 1, j - 1);
          from[i][j] = at == nullptr ? kZeros : at + channel * kSize;
        }
      }
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int live = static_cast<int>(channels - c);
        float* const to = tiles + t * kChannels + c;
        both_ways<OfPixels, kSeen, kSeen>(
            [&](int i, int j) { return load_first<kDType>(from[i][j] + c * kSize, live); },
            [&](int i, int j, F32 v) { std::memcpy(to + (i * kSeen + j) * layout.tile_plane, &v, sizeof v); });
      }
    }
    for (int plane = 0; plane < kPlanes; ++plane) {
      std::fill_n(tiles + plane * layout.tile_plane + count * kChannels, (rows - count) * kChannels, 0.0f);
    }
  }

  const char* taps(int64_t panel, int64_t channel) const {
    return static_cast<const char*>(args.weight) + (panel * args.channels + channel) * 9 * kPanel * kSize;
  }

  void transform_weight(int64_t panel, int64_t channel, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) {
      const char* const from = taps(panel, channel + c);
      for (int64_t o = 0; o < kPanel; o += kLanes) {
        float* const to = weight + c * kPanel + o;
        both_ways<OfTaps, 3, kSeen>(
            [&](int i, int j) { return load<kDType>(from + ((i * 3 + j) * kPanel + o) * kSize); },
            [&](int i, int j, F32 v) { std::memcpy(to + (i * kSeen + j) * layout.weight_plane, &v, sizeof v); });
      }
    }
  }

  // A panel's outputs.
  void finish(int64_t panel, const float* of_panel) const {
    alignas(64) float bias[kPanel] = {};
    const int64_t outputs = std::min(kPanel, args.outputs - panel * kPanel);
    if (args.bias != nullptr) {
      for (int64_t o = 0; o < outputs; o += kLanes) {
        const char* const from = static_cast<const char*>(args.bias) + (panel * kPanel + o) * kSize;
        const F32 v = load_first<kDType>(from, static_cast<int>(outputs - o));
        std::memcpy(bias + o, &v, sizeof v);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      char* to[kSide][kSide];
      for (int i = 0; i < kSide; ++i) {
        for (int j = 0; j < kSide; ++j) {
          to[i][j] = pixel(args.out, first + t, i, j);
          if (to[i][j] != nullptr) to[i][j] += panel * kPanel * kSize;
        }
      }
      F32 odd{};  // NaN where a result is not finite
      for (int64_t o = 0; o < outputs; o += kLanes) {
        const float* const from = of_panel + t * kPanel + o;
        const F32 b = load_bytes<F32>(bias + o);
        both_ways<OfProducts, kSeen, kSide>(
            [&](int i, int j) { return load_bytes<F32>(from + (i * kSeen + j) * layout.product_plane); },
            [&](int i, int j, F32 v) {
              const F32 y = v + b;
              odd += y - y;
              if (to[i][j] != nullptr) store_first<kDType>(to[i][j] + o * kSize, y, static_cast<int>(outputs - o));
            });
      }
      bool finite = true;
      for (int i = 0; i < kLanes; ++i) finite &= odd[i] == 0.0f;
      if (!finite) [[unlikely]]
        run_apart(t, panel, bias, outputs, to);
    }
  }

  // A tile's outputs, each of the pixels that it sees and of no others: so that what is not finite stays where it is.
  __attribute__((noinline)) void run_apart(int64_t t, int64_t panel, const float* bias, int64_t outputs,
                                           char* const (&to)[kSide][kSide]) const {
    for (int i = 0; i < kSide; ++i) {
      for (int j = 0; j < kSide; ++j) {
        if (to[i][j] == nullptr) continue;
        alignas(64) float sums[kPanel];
        std::copy_n(bias, kPanel, sums);
        for (int tap = 0; tap < 9; ++tap) {
          const char* const at = pixel(args.x, first + t, i + tap / 3 - 1, j + tap % 3 - 1);
          if (at != nullptr) add_tap(sums, at, panel, tap);
        }
        for (int64_t o = 0; o < outputs; o += kLanes) {
          store_first<kDType>(to[i][j] + o * kSize, load_bytes<F32>(sums + o), static_cast<int>(outputs - o));
        }
      }
    }
  }

  void add_tap(float* sums, const char* pixel, int64_t panel, int tap) const {
    for (int64_t c = 0; c < args.channels; ++c) {
      const F32 x = splat(load_first<kDType>(pixel + c * kSize, 1)[0], F32{});
      for (int64_t o = 0; o < kPanel; o += kLanes) {
        const F32 w = load<kDType>(taps(panel, c) + (tap * kPanel + o) * kSize);
        const F32 sum = fma(x, w, load_bytes<F32>(sums + o));
        std::memcpy(sums + o, &sum, sizeof sum);
      }
    }
  }
};

template <DType kDType, int kSide>
void run_worker(const Args& args, int64_t worker) {
  Block<kDType, kSide> block(args, args.memory + worker * WinogradLayout(args).bytes);
  for (int64_t unit = worker; unit < args.blocks() * args.groups; unit += args.workers) {
    const int64_t group = unit % args.groups, panels = args.panels();
    block.run(unit / args.groups, panels * group / args.groups, panels * (group + 1) / args.groups);
  }
}

}  // namespace

void winograd_conv2d(const Args& args, int64_t begin, int64_t end) {
  for (int64_t worker = begin; worker < end; ++worker) {
    if (args.side() == 2) {
      run_worker<DType::kFloat32, 2>(args, worker);
    } else {
      with_dtype(args.x.dtype, [&](auto dtype) { run_worker<dtype.value, 4>(args, worker); });
    }
  }
  if (args.product.finish != nullptr) args.product.finish();
}

}  // namespace pygen::PYGEN_ISA
