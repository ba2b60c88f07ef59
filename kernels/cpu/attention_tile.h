// What attention and its backward pass share: how rows are read, packed for the products of tiles, and multiplied.
#pragma once

#include <algorithm>
#include <cmath>

#include "pygen/attention.h"
#include "pygen/exp.h"
#include "rows.h"

namespace pygen {
namespace {

using Layout = AttentionLayout;
inline constexpr int64_t kQueries = Layout::kQueries, kKeys = Layout::kKeys;
inline constexpr float kInfinity = __builtin_inff();

[[maybe_unused]] inline int64_t length_of(const AttentionArgs& args, int64_t sample) {
  if (args.lengths == nullptr) return args.keys;
  return std::clamp<int64_t>(args.lengths[sample * args.lengths_stride], 0, args.keys);
}

inline constexpr int64_t kRowFloats = kMostHeadDim + 16;

[[maybe_unused]] inline int64_t at(const Operand& operand, int64_t sample, int64_t head, int64_t position) {
  return sample * operand.stride[0] + head * operand.stride[1] + position * operand.stride[2];
}

// A row of an operand, as the products take it.
[[maybe_unused]] inline void read_row(uint16_t* to, const AttentionArgs& args, const Operand& operand, int64_t offset) {
  copy_elements(reinterpret_cast<char*>(to), 1, static_cast<const char*>(operand.data) + offset * 2, operand.stride[3],
                args.head_dim, 2);
}
[[maybe_unused]] inline void read_row(float* to, const AttentionArgs& args, const Operand& operand, int64_t offset) {
  widen<kMostHeadDim>(to, operand, offset, operand.stride[3], args.head_dim);
}

// c = a b, plus c where `add`: for who has no library's.
[[maybe_unused]] inline void multiply(int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride,
                                      int64_t c_stride, bool add, const void* a_data, const void* b_data, float* c) {
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

// What multiplies tiles.
[[maybe_unused]] inline auto product_of(const AttentionArgs& args, const Layout& layout) {
  if (layout.halves) return args.product.bfloat16;
  return args.product.float32 != nullptr ? args.product.float32 : multiply;
}

// e^x of a weight: within 2 ulp, or 1 + |x| if it is to be a half; 0 where it would be subnormal.
template <bool kHalves>
PYGEN_INLINE F32 weight_of(F32 x) {
#if defined(__AVX512F__)
  const F32 log2e = splat(1.44269502f, x), y = x * log2e;
  F32 f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);            // y - floor(y)
  if constexpr (!kHalves) f += fma(x, splat(1.92596299e-8f, x), fma(x, log2e, -y));  // and what y lacks
  F32 p = splat(0.00187757669f, f);
  p = fma(p, f, splat(0.00898934063f, f));
  p = fma(p, f, splat(0.0558263175f, f));
  p = fma(p, f, splat(0.240153611f, f));
  p = fma(p, f, splat(0.693153083f, f));
  p = fma(p, f, splat(0.99999994f, f));
  // times 2^floor(y); of NaN too
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(y, splat(-126.0f, y), _CMP_NLT_UQ), p, y);
#else
  return exp(x);
#endif
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

// Packs a block of kKeys rows of an operand from `offset` on, of which `live` are there: as what is multiplied from the
// right, across (depth, kKeys) or along (kKeys, width), or both. A few rows at a time, so that lines are written whole.
template <class T>
void pack_panels(const AttentionArgs& args, const Layout& layout, const Operand& operand, int64_t offset, int64_t live,
                 void* across_data, void* along_data) {
  constexpr int64_t kTogether = 16, kPair = 4 / sizeof(T);
  uint32_t *across = static_cast<uint32_t*>(across_data), *along = static_cast<uint32_t*>(along_data);
  alignas(64) T rows[kTogether][kRowFloats] = {};
  for (int64_t first = 0; first < kKeys; first += kTogether) {
    const int64_t count = std::clamp<int64_t>(live - first, 0, kTogether);
    for (int64_t n = 0; n < count; ++n) read_row(rows[n], args, operand, offset + (first + n) * operand.stride[2]);
    if (count < kTogether) std::memset(rows[count], 0, sizeof rows[0] * (kTogether - count));
    for (int64_t line = 0; across != nullptr && line < layout.depth / kPair; ++line) {
      for (int64_t n = 0; n < kTogether; ++n) {
        std::memcpy(across + line * kKeys + first + n, rows[n] + line * kPair, 4);
      }
    }
    for (int64_t n = 0; along != nullptr && n < kTogether; n += kPair) {
      uint32_t* const to = along + (first + n) / kPair * layout.width;
      if constexpr (kPair == 2) {
        for (int64_t d = 0; d < layout.width; ++d) to[d] = rows[n][d] | uint32_t{rows[n + 1][d]} << 16;
      } else {
        std::memcpy(to, rows[n], layout.width * 4);
      }
    }
  }
}

}  // namespace
}  // namespace pygen
