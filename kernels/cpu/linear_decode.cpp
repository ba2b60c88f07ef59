#include "pygen/linear_decode.h"

#include <algorithm>

#include "norm_row.h"
#include "pygen/gated_unit_rule.h"
#include "rows.h"

namespace pygen::PYGEN_ISA {
namespace {

// ---- Rows ----------------------------------------------------------------------------------------------------------

inline constexpr int64_t kBlock = LinearRow::kChunk;

template <bool kCentred>
void normalise(const LinearDecodeArgs& args, float* x) {
  using NormRow = Row<DType::kFloat32, kCentred>;
  const Elements<DType::kFloat32> elements(x);
  const int64_t count = args.weight.inputs;
  NormRow row(elements, count);
  double moments[NormRow::kMoments];
  sum_row<NormRow::kMoments>(count, moments, [&](int64_t i, int64_t n, Strip* sums) __attribute__((always_inline)) {
    row.add_moments(row.away(i, n), sums);
  });
  row.finish(moments, args.eps);
  for (int64_t i = 0; i < count; i += kBlock) {
    alignas(64) float weight[kBlock], bias[kBlock];
    const int64_t here = std::min(kBlock, count - i);
    const auto parameters = [&](float* to, const Operand& operand) {
      if (operand.data != nullptr) widen<kBlock>(to, operand, i * operand.stride[0], operand.stride[0], here);
    };
    parameters(weight, args.norm_weight);
    parameters(bias, args.norm_bias);
    for_strips(here, [&](int64_t j, int64_t n) {
      const auto of = [&](const float* from) {
        return load_strip<DType::kFloat32>(reinterpret_cast<const char*>(from + j));
      };
      Strip v = row.normalised(i + j, n);
      if (args.norm_weight.data != nullptr) v = v * of(weight);
      if (args.norm_bias.data != nullptr) v = v + of(bias);
      elements.store(i + j, n, v);
    });
  }
}

// The order of a word's inputs in which (word >> 8 i) & 0x00ff00ff holds neighbours.
template <int... kLane>
PYGEN_INLINE U16 swap_middle(U16 v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, ((kLane & ~3) | (kLane & 1) << 1 | (kLane >> 1 & 1))...);
}

// To the nearest whole number, |v| < 2^22.
PYGEN_INLINE F32 round(F32 v) { return (v + 0x1.8p23f) - 0x1.8p23f; }

void to_words(const LinearDecodeArgs& args, const LinearRow& layout, const float* x, int64_t count, uint16_t* words,
              LinearChunk& chunk) {
  const auto infinity = [](F32 v) { return (to_unsigned(v) & 0x7fffffffu) >= 0x7f800000u; };
  F32 most = {};
  I32 special = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const F32 v = load_bytes<F32>(x + i);
    special |= infinity(v);
    most = max(select(infinity(v), F32{}, from_unsigned(to_unsigned(v) & 0x7fffffffu)), most);
  }
  const float largest = join_lanes(most, [](F32 a, F32 b) __attribute__((always_inline)) { return max(a, b); })[0];
  const uint32_t exponent = std::max(bits<uint32_t>(largest) >> 23, 30u);  // biased; below 2^-97 nothing is told apart
  const F32 up = from_unsigned(U32{} + ((268 - exponent) << 23));
  chunk.scale = from_unsigned(U32{} + ((exponent - (layout.words == 2 ? 29 : 14)) << 23))[0];
  chunk.special = lanes_of(special) != 0;
  I32 sum[2] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    F32 v = load_bytes<F32>(x + i);
    v = select(infinity(v), F32{}, v) * up;
    for (int word = 0; word < layout.words; ++word) {
      const F32 whole = min(max(round(v), splat(-32767.0f, v)), splat(32767.0f, v));
      const I32 number = __builtin_convertvector(whole, I32);
      sum[word] += number;
      U16 half = narrow(bits<U32>(number) & 0xffffu);
      if (args.weight.format == WeightFormat::kInt8) {
        half = swap_middle(half, std::make_integer_sequence<int, kLanes>{});
      }
      std::memcpy(words + word * layout.inputs + i, &half, sizeof half);
      v = (v - whole) * 0x1p15f;
    }
  }
  for (int word = 0; word < 2; ++word) {
    const I32 all = join_lanes(sum[word], [](I32 a, I32 b) __attribute__((always_inline)) { return a + b; });
    chunk.start[word] = -all[0] * args.weight.middle();
  }
}

void make_row(const LinearDecodeArgs& args, const LinearRow& layout, int64_t row) {
  char* const scratch = args.scratch + row * layout.bytes;
  if (row >= args.rows / args.choices) {
    std::memset(scratch, 0, layout.bytes);
    return;
  }
  float* const x = reinterpret_cast<float*>(scratch);
  const int64_t inputs = args.weight.inputs;
  for (int64_t i = 0; i < inputs; i += kBlock) {
    widen<kBlock>(x + i, args.x, row * args.x.stride[0] + i * args.x.stride[1], args.x.stride[1],
                  std::min(kBlock, inputs - i));
  }
  if (args.norm == LinearNorm::kRms) normalise<false>(args, x);
  if (args.norm == LinearNorm::kLayer) normalise<true>(args, x);
  std::fill(x + inputs, x + layout.inputs, 0.0f);
  uint16_t* const words = reinterpret_cast<uint16_t*>(scratch + layout.words_at);
  if (args.weight.quantised()) {
    LinearChunk* const chunks = reinterpret_cast<LinearChunk*>(scratch + layout.chunks_at);
    for (int64_t c = 0; c < layout.chunks; ++c) {
      const int64_t first = c * layout.chunk;
      to_words(args, layout, x + first, std::min(layout.chunk, layout.inputs - first), words + first, chunks[c]);
    }
  } else if (layout.words == 1) {
    for (int64_t i = 0; i < layout.inputs; i += kLanes) {
      const U32 half = float_to_bfloat16(load_bytes<F32>(x + i));
      const U16 word = narrow(half);
      const F32 rounded = from_unsigned(half << 16);
      std::memcpy(words + i, &word, sizeof word);
      std::memcpy(x + i, &rounded, sizeof rounded);
    }
  }
}

// ---- Products ------------------------------------------------------------------------------------------------------

inline constexpr int kTile = 2;                           // vectors of outputs that are computed together,
inline constexpr int kRowsInside = kLanes == 16 ? 8 : 4;  // and rows: what the registers hold
inline constexpr int kLine = kPanel * 4;                  // bytes of a panel that one vector of each output fills
inline constexpr int kRowsTogether = 64;                  // rows that meet a panel before the next one
inline constexpr int64_t kFetchAhead = 4096;              // bytes

// The rows that meet a panel: their numbers in out, and where the scratch memory has what they are made of.
struct PanelRows {
  int count;
  int64_t number[kRowsTogether];
  const char* x[kRowsTogether];
};

// What a tile is made of: the panel from its column on, its rows, inputs or chunks [begin, end), sums.
struct Tile {
  const LinearDecodeArgs& args;
  const LinearRow& layout;
  const char* panel;
  int column;
  const char* const* x;
  int64_t begin, end;
  float* sum;  // kPanel apart

  template <class T>
  PYGEN_INLINE const T* row(int r, int64_t offset) const {
    return reinterpret_cast<const T*>(x[r] + offset);
  }
};

// Sums of a few products at a time are added to those of all, so that rounding errors do not grow with the inputs.
template <int kRows>
struct Sums {
  F32 v[kRows][kTile] = {};
  PYGEN_INLINE void add_to(const Tile& tile) const {
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTile; ++t) {
        float* const at = tile.sum + r * kPanel + t * kLanes;
        const F32 sum = load_bytes<F32>(at) + v[r][t];
        std::memcpy(at, &sum, sizeof sum);
      }
    }
  }
};

PYGEN_INLINE void fetch(const char* line) { __builtin_prefetch(line + kFetchAhead); }

struct Float32Weights {
  static constexpr int64_t kUnits = 64;  // inputs
  static constexpr int kMostRows = kRowsInside;

  template <int kRows>
  static void multiply(const Tile& tile) {
    Sums<kRows> sums;
    const float* x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = tile.row<float>(r, 0);
    const char* line = tile.panel + tile.begin * kLine + tile.column * 4;
#pragma GCC unroll 4
    for (int64_t k = tile.begin; k < tile.end; ++k, line += kLine) {
      F32 w[kTile];
      for (int t = 0; t < kTile; ++t) {
        w[t] = load_bytes<F32>(line + t * sizeof(F32));
        fetch(line + t * sizeof(F32));
      }
      for (int r = 0; r < kRows; ++r) {
        const F32 v = splat(x[r][k], F32{});
        for (int t = 0; t < kTile; ++t) sums.v[r][t] = fma(w[t], v, sums.v[r][t]);
      }
    }
    sums.add_to(tile);
  }
};

#if defined(__AVX512BF16__)
inline constexpr bool kAddsPairs = true;
PYGEN_INLINE F32 add_pair(F32 sum, U32 a, U32 b) { return _mm512_dpbf16_ps(sum, bits<__m512bh>(a), bits<__m512bh>(b)); }
#else
inline constexpr bool kAddsPairs = false;
#endif

// Inputs two by two: the second's product first.
template <bool kPairs>
struct BFloat16Weights {
  static constexpr int64_t kUnits = 64;  // pairs of inputs
  static constexpr int kMostRows = kRowsInside;

  template <int kRows>
  static void multiply(const Tile& tile) {
    Sums<kRows> sums;
    const std::conditional_t<kPairs, uint32_t, float>* x[kRows];
    for (int r = 0; r < kRows; ++r)
      x[r] = tile.row<std::decay_t<decltype(*x[r])>>(r, kPairs ? tile.layout.words_at : 0);
    const char* line = tile.panel + tile.begin * kLine + tile.column * 4;
#pragma GCC unroll 4
    for (int64_t k = tile.begin; k < tile.end; ++k, line += kLine) {
      U32 w[kTile];
      for (int t = 0; t < kTile; ++t) {
        w[t] = load_bytes<U32>(line + t * sizeof(U32));
        fetch(line + t * sizeof(U32));
      }
      for (int r = 0; r < kRows; ++r) {
        for (int t = 0; t < kTile; ++t) {
          F32& sum = sums.v[r][t];
          if constexpr (kPairs) {
            sum = add_pair(sum, w[t], U32{} + x[r][k]);
          } else {
            sum = fma(from_unsigned(w[t] & 0xffff0000u), splat(x[r][2 * k + 1], sum), sum);
            sum = fma(from_unsigned(w[t] << 16), splat(x[r][2 * k], sum), sum);
          }
        }
      }
    }
    sums.add_to(tile);
  }
};

typedef uint16_t Words __attribute__((vector_size(4 * kLanes)));

// Adds the products of two 16-bit numbers in each lane.
PYGEN_INLINE I32 add_products(I32 sum, U32 a, U32 b) {
#if defined(__AVX512VNNI__)
  return bits<I32>(_mm512_dpwssd_epi32(bits<__m512i>(sum), bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX512F__)
  return sum + bits<I32>(_mm512_madd_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
  return sum + bits<I32>(_mm256_madd_epi16(bits<__m256i>(a), bits<__m256i>(b)));
#else
  return sum + bits<I32>(_mm_madd_epi16(bits<__m128i>(a), bits<__m128i>(b)));
#endif
}

template <int kBits, int kWords>
struct Codes {
  static constexpr int64_t kUnits = 4;  // chunks
  static constexpr int kMostRows = kRowsInside / kWords;
  static constexpr int kPairs = 16 / kBits;  // in a word of the weight
  static constexpr uint32_t kMask = kBits == 8 ? 0x00ff00ffu : 0x000f000fu;

  PYGEN_INLINE static U32 pair(U32 word, int index) {
    if (index == kPairs - 1) return bits<U32>(bits<Words>(word) >> (16 - kBits));
    return (word >> (index * kBits)) & kMask;
  }

  template <int kRows>
  static void multiply(const Tile& tile) {
    const PackedLinear weight = tile.args.weight;  // copies, which no store of a sum can change
    const LinearRow layout = tile.layout;
    const bool one_group = weight.group > LinearRow::kChunk;
    const int64_t header_bytes = weight.header_bytes(), group_bytes = header_bytes + weight.code_bytes();
    const int64_t chunk_bytes = one_group ? layout.chunk * kPanel * kBits / 8 : group_bytes;
    const char* header = tile.panel + (one_group ? 0 : tile.begin * group_bytes) + tile.column % (kPanel / 2) * 4;
    const char* codes = tile.panel + header_bytes + tile.begin * chunk_bytes + tile.column * 4;
    const int32_t* x[kRows][kWords];
    const LinearChunk* chunks[kRows];
    for (int r = 0; r < kRows; ++r) {
      for (int word = 0; word < kWords; ++word) {
        x[r][word] = tile.row<int32_t>(r, layout.words_at + word * layout.inputs * 2);
      }
      chunks[r] = tile.row<LinearChunk>(r, layout.chunks_at);
    }
    float* const sums = tile.sum;
    for (int64_t c = tile.begin; c < tile.end; ++c, codes += chunk_bytes, header += one_group ? 0 : group_bytes) {
      fetch(header);
      I32 dot[kRows][kWords][kTile];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        for (int word = 0; word < kWords; ++word) {
          for (int t = 0; t < kTile; ++t) dot[r][word][t] = I32{} + chunks[r][c].start[word];
        }
      }
      const int64_t first = c * layout.chunk, end = std::min(first + layout.chunk, weight.padded_inputs()) / 2;
      const char* line = codes;
      for (int64_t k = first / 2; k < end; k += kPairs, line += kLine) {
        U32 w[kTile];
        for (int t = 0; t < kTile; ++t) {
          w[t] = load_bytes<U32>(line + t * sizeof(U32));
          fetch(line + t * sizeof(U32));
        }
#pragma GCC unroll 4
        for (int p = 0; p < kPairs; ++p) {
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            for (int word = 0; word < kWords; ++word) {
              const U32 v = U32{} + static_cast<uint32_t>(x[r][word][k + p]);
              for (int t = 0; t < kTile; ++t) {
                dot[r][word][t] = add_products(dot[r][word][t], pair(w[t], p), v);
              }
            }
          }
        }
      }
#pragma GCC unroll 2
      for (int t = 0; t < kTile; ++t) {
        const bool second = tile.column + t * kLanes >= kPanel / 2;
        const auto numbers = [&](int64_t offset) __attribute__((always_inline)) {
          const U32 both = load_bytes<U32>(header + offset + t * kLanes % (kPanel / 2) * 4);
          return from_unsigned(second ? both & 0xffff0000u : both << 16);
        };
        const F32 scale = numbers(0);
        const float middle = static_cast<float>(weight.middle());
        const F32 zero = weight.zeros ? (numbers(64) - middle) * (1.0f / middle) : F32{};
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          F32 value[kWords];
          for (int word = 0; word < kWords; ++word) {
            value[word] = to_float(dot[r][word][t]);
            const float start = static_cast<float>(chunks[r][c].start[word]);
            if (weight.zeros) value[word] = fma(zero, splat(start, zero), value[word]);
          }
          if constexpr (kWords == 2) value[0] = fma(value[0], splat(0x1p15f, scale), value[1]);
          float* const at = sums + r * kPanel + t * kLanes;
          const F32 sum = fma(value[0], scale * chunks[r][c].scale, load_bytes<F32>(at));
          std::memcpy(at, &sum, sizeof sum);
        }
      }
    }
  }
};

template <class Weights, int kRows>
void multiply_rows(const Tile& tile, int rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<Weights, kRows - 1>(tile, rows);
  }
  Weights::template multiply<kRows>(tile);
}

// Adds the products of a panel's `units` units to the sums of the rows.
template <class Weights>
void multiply_panel(const LinearDecodeArgs& args, const LinearRow& layout, const char* panel, int64_t units,
                    const PanelRows& rows, float* sums) {
  constexpr int kColumns = kTile * kLanes;
  for (int64_t begin = 0; begin < units; begin += Weights::kUnits) {
    for (int column = 0; column < kPanel; column += kColumns) {
      for (int r = 0; r < rows.count; r += Weights::kMostRows) {
        const Tile tile{args,
                        layout,
                        panel,
                        column,
                        rows.x + r,
                        begin,
                        std::min(units, begin + Weights::kUnits),
                        sums + r * kPanel + column};
        multiply_rows<Weights, Weights::kMostRows>(tile, std::min(Weights::kMostRows, rows.count - r));
      }
    }
  }
}

// Weight (input, output) of a panel of codes.
float weight_at(const PackedLinear& weight, const char* panel, int64_t input, int output) {
  panel += input / weight.group * (weight.header_bytes() + weight.code_bytes());
  const int64_t k = input % weight.group;
  const auto number = [&](int64_t offset) {
    uint16_t half;
    std::memcpy(&half, panel + offset + (output % 16 * 2 + output / 16) * 2, sizeof half);
    return from_unsigned(U32{} + (uint32_t{half} << 16))[0];
  };
  const int per_word = weight.format == WeightFormat::kInt8 ? 4 : 8;
  uint32_t word;
  std::memcpy(&word, panel + weight.header_bytes() + (k / per_word * kPanel + output) * 4, sizeof word);
  const int64_t i = k % per_word;
  const uint32_t code = per_word == 4 ? word >> (8 * i) & 255 : word >> (4 * (i / 2) + 16 * (i % 2)) & 15;
  return number(0) * (static_cast<float>(code) - (weight.zeros ? number(64) : static_cast<float>(weight.middle())));
}

// What to_words left out.
void add_special(const LinearDecodeArgs& args, const LinearRow& layout, const char* panel, const char* scratch,
                 float* sums) {
  const float* const x = reinterpret_cast<const float*>(scratch);
  for (int64_t c = 0; c < layout.chunks; ++c) {
    if (reinterpret_cast<const LinearChunk*>(scratch + layout.chunks_at)[c].special == 0) continue;
    for (int64_t k = c * layout.chunk; k < std::min((c + 1) * layout.chunk, args.weight.inputs); ++k) {
      if (x[k] - x[k] == 0.0f) continue;
      for (int j = 0; j < kPanel; ++j) sums[j] += x[k] * weight_at(args.weight, panel, k, j);
    }
  }
}

PYGEN_INLINE F32 activated(const LinearDecodeArgs& args, F32 x) {
  if (!args.activated) return x;
  switch (args.activation) {
    case Activation::kSilu:
      return activate<Activation::kSilu>(x);
    case Activation::kGelu:
      return activate<Activation::kGelu>(x);
    case Activation::kGeluTanh:
      return activate<Activation::kGeluTanh>(x);
  }
  __builtin_unreachable();
}

void finish_panel(const LinearDecodeArgs& args, int64_t panel, const PanelRows& rows, float* sums) {
  const int width = args.weight.width();
  const int64_t first = panel * width, outputs = std::min<int64_t>(width, args.weight.outputs - first);
  alignas(64) float bias[kPanel] = {};
  if (args.bias.data != nullptr) {
    const int64_t stride = args.bias.stride[0];
    widen<kBlock>(bias, args.bias, first * stride, stride, outputs);
    if (args.weight.gated)
      widen<kBlock>(bias + width, args.bias, (args.weight.outputs + first) * stride, stride, outputs);
  }
  for (int r = 0; r < rows.count; ++r) {
    const int64_t row = rows.number[r];
    float* const sum = sums + r * kPanel;
    alignas(64) float residual[kPanel] = {};
    if (args.residual.data != nullptr) {
      const int64_t stride = args.residual.stride[1];
      widen<kBlock>(residual, args.residual, row * args.residual.stride[0] + first * stride, stride, outputs);
    }
    for (int j = 0; j < width; j += kLanes) {
      F32 y = activated(args, load_bytes<F32>(sum + j) + load_bytes<F32>(bias + j));
      if (args.weight.gated) y *= load_bytes<F32>(sum + width + j) + load_bytes<F32>(bias + width + j);
      if (args.soft_cap != 0.0f) y = soft_capped(y, args.soft_cap);
      if (args.residual.data != nullptr) y += load_bytes<F32>(residual + j);
      std::memcpy(sum + j, &y, sizeof y);
    }
    const int64_t stride = args.out.stride[1];
    narrow_to<kPanel>(args.out, row * args.out.stride[0] + first * stride, stride, sum, outputs);
  }
}

// A library's product, a few panels at a time: they stay in the cache while all rows pass.
void multiply_tiles(const LinearDecodeArgs& args, const LinearRow& layout, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = 512 << 10;
  const PackedLinear& weight = args.weight;
  const int64_t together = std::max<int64_t>(1, kBytes / weight.panel_bytes());
  for (int64_t first = begin; first < end; first += together) {
    for (int64_t row = 0; row < args.rows; row += kTileRows) {
      PanelRows rows;
      rows.count = static_cast<int>(std::min(kTileRows, args.rows - row));
      for (int r = 0; r < rows.count; ++r) rows.number[r] = row + r;
      const char* const words = args.scratch + row * layout.bytes + layout.words_at;
      for (int64_t panel = first; panel < std::min(end, first + together); ++panel) {
        alignas(64) float sums[kTileRows * kPanel];
        args.product.bfloat16(kTileRows, kPanel, weight.padded_inputs(), layout.bytes / 2, kPanel, kPanel,
                              /*add=*/false, words,
                              static_cast<const char*>(weight.data) + panel * weight.panel_bytes(), sums);
        finish_panel(args, panel, rows, sums);
      }
    }
  }
  args.product.finish();
}

}  // namespace

void linear_decode_rows(const LinearDecodeArgs& args, int64_t begin, int64_t end) {
  const LinearRow layout(args);
  for (int64_t row = begin; row < end; ++row) make_row(args, layout, row);
}

void linear_decode_experts(const LinearDecodeArgs& args, int64_t, int64_t) {
  const ExpertRows by(args);
  const int64_t count = args.expert_count;
  const auto expert_of = [&](int64_t row) {
    const int64_t expert = args.experts[row];
    return expert >= 0 && expert < count ? expert : count;
  };
  std::fill_n(by.first, count + 3, 0);
  for (int64_t row = 0; row < args.rows; ++row) ++by.first[expert_of(row) + 2];
  *by.used = 0;
  for (int64_t e = 0; e <= count; ++e) {
    if (by.first[e + 2] > 0) by.experts[(*by.used)++] = e;
    by.first[e + 2] += by.first[e + 1];
  }
  for (int64_t row = 0; row < args.rows; ++row) by.rows[by.first[expert_of(row) + 1]++] = row;
}

void linear_decode(const LinearDecodeArgs& args, int64_t begin, int64_t end) {
  const LinearRow layout(args);
  if (args.product.bfloat16 != nullptr) return multiply_tiles(args, layout, begin, end);
  const PackedLinear& weight = args.weight;
  const auto bfloat16 = kAddsPairs && layout.words == 1 ? multiply_panel<BFloat16Weights<kAddsPairs>>
                                                        : multiply_panel<BFloat16Weights<false>>;
  const auto multiply = weight.format == WeightFormat::kFloat32    ? multiply_panel<Float32Weights>
                        : weight.format == WeightFormat::kBFloat16 ? bfloat16
                        : weight.format == WeightFormat::kInt8
                            ? layout.words == 1 ? multiply_panel<Codes<8, 1>> : multiply_panel<Codes<8, 2>>
                        : layout.words == 1 ? multiply_panel<Codes<4, 1>>
                                            : multiply_panel<Codes<4, 2>>;
  const int64_t units = weight.quantised()                         ? layout.chunks
                        : weight.format == WeightFormat::kBFloat16 ? weight.padded_inputs() / 2
                                                                   : weight.inputs;
  const int64_t panels = weight.panels();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t index = unit % panels;
    const int64_t* order = nullptr;
    int64_t expert = 0, count = args.rows;
    if (args.experts != nullptr) {
      const ExpertRows by(args);
      expert = by.experts[unit / panels];
      order = by.rows + by.first[expert];
      count = by.first[expert + 1] - by.first[expert];
    }
    const char* const panel = static_cast<const char*>(weight.data) + (expert * panels + index) * weight.panel_bytes();
    for (int64_t row = 0; row < count; row += kRowsTogether) {
      PanelRows rows;
      rows.count = static_cast<int>(std::min<int64_t>(kRowsTogether, count - row));
      for (int r = 0; r < rows.count; ++r) {
        rows.number[r] = order == nullptr ? row + r : order[row + r];
        const int64_t of_x = order == nullptr ? row + r : rows.number[r] / args.choices;
        rows.x[r] = args.scratch + of_x * layout.bytes;
      }
      alignas(64) float sums[kRowsTogether * kPanel];
      std::fill_n(sums, rows.count * kPanel, 0.0f);
      if (args.experts == nullptr || expert < args.expert_count) {
        multiply(args, layout, panel, units, rows, sums);
        for (int r = 0; weight.quantised() && r < rows.count; ++r) {
          add_special(args, layout, panel, rows.x[r], sums + r * kPanel);
        }
      }
      finish_panel(args, index, rows, sums);
    }
  }
}

}  // namespace pygen::PYGEN_ISA
