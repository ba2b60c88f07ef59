#include "pygen/winograd_conv2d.h"

#include "first_lanes.h"
#include "multiply_tile.h"

namespace pygen::PYGEN_ISA {
namespace {

using Args = WinogradConv2dArgs;
constexpr int64_t kTiles = Args::kTiles, kPanel = Args::kPanel;

// A block of tiles, in a worker's memory.
template <DType kDType>
struct Block {
  const Args& args;
  const WinogradLayout layout;
  float *const tiles, *const products;
  const char* const zeros;
  int64_t first = 0, count = 0, rows = 0;  // of tiles; rows: count, rounded up to what the products take

  Block(const Args& args, char* memory)
      : args(args),
        layout(args),
        tiles(reinterpret_cast<float*>(memory)),
        products(tiles + layout.products),
        zeros(reinterpret_cast<char*>(tiles + layout.zeros)) {
    std::fill_n(tiles + layout.zeros, layout.width, 0.0f);
  }

  // The pixel at a row and a column, counted from that of a tile's first output; null outside.
  PYGEN_INLINE char* pixel(const Operand& operand, int64_t tile, int row, int column) const {
    const int64_t columns = args.columns_of_tiles(), rows_of_tiles = args.rows_of_tiles();
    const int64_t y = tile / columns % rows_of_tiles * 2 + row, x = tile % columns * 2 + column;
    if (y < 0 || y >= args.height || x < 0 || x >= args.width) return nullptr;
    const int64_t sample = tile / columns / rows_of_tiles;
    const int64_t offset = sample * operand.stride[0] + y * operand.stride[1] + x * operand.stride[2];
    return static_cast<char*>(operand.data) + offset * size_of(kDType);
  }

  // Transforms the tiles from `begin` on: B^T d B.
  void load(int64_t begin) {
    first = begin, count = std::min(kTiles, args.tiles() - begin), rows = (count + 15) / 16 * 16;
    for (int64_t t = 0; t < count; ++t) {
      const char* from[4][4];
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
          const char* const at = pixel(args.x, first + t, i - 1, j - 1);
          from[i][j] = at == nullptr ? zeros : at;
        }
      }
      for (int64_t c = 0; c < args.channels; c += kLanes) {
        const int live = static_cast<int>(std::min<int64_t>(kLanes, args.channels - c));
        F32 half[4][4];
        for (int j = 0; j < 4; ++j) {
          F32 d[4];
          for (int i = 0; i < 4; ++i) d[i] = load_first<kDType>(from[i][j] + c * size_of(kDType), live);
          half[0][j] = d[0] - d[2], half[1][j] = d[1] + d[2], half[2][j] = d[2] - d[1], half[3][j] = d[1] - d[3];
        }
        float* const to = tiles + t * layout.width + c;
        for (int i = 0; i < 4; ++i) {
          const F32 whole[4] = {half[i][0] - half[i][2], half[i][1] + half[i][2], half[i][2] - half[i][1],
                                half[i][1] - half[i][3]};
          for (int j = 0; j < 4; ++j) std::memcpy(to + (i * 4 + j) * layout.plane, &whole[j], sizeof(F32));
        }
      }
    }
    for (int plane = 0; plane < 16; ++plane) {
      std::fill_n(tiles + plane * layout.plane + count * layout.width, (rows - count) * layout.width, 0.0f);
    }
  }

  const float* weights(int plane, int64_t panel) const {
    return args.weight + (plane * args.panels() + panel) * args.channels * kPanel;
  }

  // A panel's outputs of all tiles: A^T m A.
  void run(int64_t panel) const {
    const auto product = args.product.float32 != nullptr ? args.product.float32 : multiply;
    for (int plane = 0; plane < 16; ++plane) {
      product(rows, kPanel, args.channels, layout.width, kPanel, kPanel, false, tiles + plane * layout.plane,
              weights(plane, panel), products + plane * layout.of_products);
    }
    alignas(64) float bias[kPanel] = {};
    const int64_t outputs = std::min(kPanel, args.outputs - panel * kPanel);
    if (args.bias != nullptr) {
      for (int64_t o = 0; o < outputs; o += kLanes) {
        const char* const from = static_cast<const char*>(args.bias) + (panel * kPanel + o) * size_of(kDType);
        const F32 v = load_first<kDType>(from, static_cast<int>(outputs - o));
        std::memcpy(bias + o, &v, sizeof v);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      char* to[2][2];
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
          to[i][j] = pixel(args.out, first + t, i, j);
          if (to[i][j] != nullptr) to[i][j] += panel * kPanel * size_of(kDType);
        }
      }
      F32 odd{};  // NaN where a result is not finite
      for (int64_t o = 0; o < outputs; o += kLanes) {
        const float* const from = products + t * kPanel + o;
        F32 half[2][4];
        for (int j = 0; j < 4; ++j) {
          F32 m[4];
          for (int i = 0; i < 4; ++i) m[i] = load_bytes<F32>(from + (i * 4 + j) * layout.of_products);
          half[0][j] = m[0] + m[1] + m[2], half[1][j] = m[1] - m[2] - m[3];
        }
        const F32 b = load_bytes<F32>(bias + o);
        for (int i = 0; i < 2; ++i) {
          const F32 y[2] = {half[i][0] + half[i][1] + half[i][2] + b, half[i][1] - half[i][2] - half[i][3] + b};
          for (int j = 0; j < 2; ++j) {
            odd += y[j] - y[j];
            if (to[i][j] != nullptr) {
              store_first<kDType>(to[i][j] + o * size_of(kDType), y[j], static_cast<int>(outputs - o));
            }
          }
        }
      }
      bool finite = true;
      for (int i = 0; i < kLanes; ++i) finite &= odd[i] == 0.0f;
      if (!finite) [[unlikely]]
        run_apart(t, panel, bias, outputs, to);
    }
  }

  // A tile's outputs, each of the pixels that it sees and of no others: so that what is not finite stays where it is.
  __attribute__((noinline)) void run_apart(int64_t t, int64_t panel, const float* bias, int64_t outputs,
                                           char* const (&to)[2][2]) const {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        if (to[i][j] == nullptr) continue;
        alignas(64) float sums[kPanel];
        std::copy_n(bias, kPanel, sums);
        for (int tap = 0; tap < 9; ++tap) {
          const char* const at = pixel(args.x, first + t, i + tap / 3 - 1, j + tap % 3 - 1);
          if (at != nullptr) add_tap(sums, at, panel, tap / 3, tap % 3);
        }
        for (int64_t o = 0; o < outputs; o += kLanes) {
          store_first<kDType>(to[i][j] + o * size_of(kDType), load_bytes<F32>(sums + o), static_cast<int>(outputs - o));
        }
      }
    }
  }

  void add_tap(float* sums, const char* pixel, int64_t panel, int row, int column) const {
    // Of the transform's four, a tap is the first, the second less the third, or the last.
    constexpr int kPlus[3] = {0, 1, 3}, kMinus[3] = {-1, 2, -1};
    for (int64_t c = 0; c < args.channels; ++c) {
      const F32 x = splat(load_first<kDType>(pixel + c * size_of(kDType), 1)[0], F32{});
      const auto weight = [&](int i, int j, int64_t o) {
        return i < 0 || j < 0 ? F32{} : load_bytes<F32>(weights(i * 4 + j, panel) + c * kPanel + o);
      };
      for (int64_t o = 0; o < kPanel; o += kLanes) {
        const F32 w = weight(kPlus[row], kPlus[column], o) - weight(kMinus[row], kPlus[column], o) -
                      weight(kPlus[row], kMinus[column], o) + weight(kMinus[row], kMinus[column], o);
        const F32 sum = fma(x, w, load_bytes<F32>(sums + o));
        std::memcpy(sums + o, &sum, sizeof sum);
      }
    }
  }
};

template <DType kDType>
void run_worker(const Args& args, int64_t worker) {
  Block<kDType> block(args, args.memory + worker * WinogradLayout(args).bytes);
  int64_t loaded = -1;
  for (int64_t unit = worker; unit < args.blocks() * args.groups; unit += args.workers) {
    const int64_t group = unit % args.groups;
    if (unit / args.groups != loaded) block.load((loaded = unit / args.groups) * kTiles);
    for (int64_t panel = args.panels() * group / args.groups; panel < args.panels() * (group + 1) / args.groups;
         ++panel) {
      block.run(panel);
    }
  }
}

}  // namespace

void winograd_conv2d(const Args& args, int64_t begin, int64_t end) {
  for (int64_t worker = begin; worker < end; ++worker) {
    with_dtype(args.x.dtype, [&](auto dtype) { run_worker<dtype.value>(args, worker); });
  }
  if (args.product.finish != nullptr) args.product.finish();
}

}  // namespace pygen::PYGEN_ISA
