// What attention and its backward pass share: how rows are read, packed for the products of tiles, and multiplied.
#pragma once

#include <algorithm>
#include <cmath>

#include "multiply_tile.h"
#include "philox.h"
#include "pygen/attention.h"
#include "pygen/exp.h"
#include "pygen/philox_normal.h"
#include "rough.h"
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

// What the numbers of a head's weights are drawn by, where some are dropped.
[[maybe_unused]] inline PhiloxKey dropout_key(const AttentionArgs& args, int64_t sample, int64_t head) {
  if (args.dropout.philox.seed == nullptr) return {};
  return philox_key(args.dropout.philox, sample, kDrawDropout | static_cast<uint32_t>(head));
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

// Has a row that is read soon on its way: rows of several heads lie apart, further than processors look ahead.
[[maybe_unused]] inline void fetch_row(const AttentionArgs& args, const Operand& operand, int64_t offset) {
  if (operand.stride[3] != 1) return;
  const int64_t size = size_of(operand.dtype);
  const char* const row = static_cast<const char*>(operand.data) + offset * size;
  for (int64_t i = 0; i < args.head_dim * size; i += 64) __builtin_prefetch(row + i);
}

// The product of tiles, as of TileProduct. One adds up a row's terms one after the other, which loses as many of
// float's last bits as there are terms: there it is made of parts. And one takes 64 columns at a time, then what is
// left over, at little more than half the speed if that is 16: then the last 80 are taken as 48 and 32.
struct Multiply {
  decltype(TileProduct::float32) product;
  int64_t part, size;

  Multiply(const AttentionArgs& args, const Layout& layout, int64_t part)
      : product(layout.halves                     ? args.product.bfloat16
                : args.product.float32 != nullptr ? args.product.float32
                                                  : multiply),
        part(layout.halves ? kMostHeadDim : part),
        size(layout.halves ? 2 : 4) {}

  void operator()(int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride, int64_t c_stride, bool add,
                  const void* a, const void* b, float* c) const {
    const int64_t first = n % 64 == 16 && n > 64 ? n - 32 : n;
    for (int64_t from = 0; from < k; from += part, add = true) {
      const char *const rows = static_cast<const char*>(a) + from * size, *const columns = static_cast<const char*>(b) +
                                                                                           from * b_stride * size;
      const int64_t terms = std::min(part, k - from);
      product(m, first, terms, a_stride, b_stride, c_stride, add, rows, columns, c);
      if (first < n) {
        product(m, n - first, terms, a_stride, b_stride, c_stride, add, rows, columns + first * 4, c + first);
      }
    }
  }
};

// What a rough weight's exponent is counted in: octaves where that is cheaper.
[[maybe_unused]] inline float exponent_unit([[maybe_unused]] bool rough) {
#if defined(__AVX512F__)
  if (rough) return 1.44269502f;  // log2 e
#endif
  return 1.0f;
}

// e^(x / exponent_unit) of a weight: within 2 ulp, and 0 where it would be subnormal; or rough, which is within 2^-13,
// for weights that become halves and whose sums do not leave the kernel.
template <bool kRough>
PYGEN_INLINE F32 weight_of(F32 x) {
#if defined(__AVX512F__)
  if constexpr (kRough) return rough_exp2(x);
  const F32 log2e = splat(1.44269502f, x), y = x * log2e;
  const F32 f = above_floor(y) + fma(x, splat(1.92596299e-8f, x), fma(x, log2e, -y));  // and what y lacks
  F32 p = splat(0.00187757669f, f);
  p = fma(p, f, splat(0.00898934063f, f));
  p = fma(p, f, splat(0.0558263175f, f));
  p = fma(p, f, splat(0.240153611f, f));
  p = fma(p, f, splat(0.693153083f, f));
  p = fma(p, f, splat(0.99999994f, f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(y, splat(-126.0f, y), _CMP_NLT_UQ), p, y);
#else
  return exp(x);
#endif
}

// Packs a block of at most kKeys rows of an operand from `offset` on, of which `live` are there: as what is multiplied
// from the right, across (depth, panel) or along (rows, width), or both. A few rows at a time, so that lines are
// written whole; what is behind the last 32 with a live one is not read, and not written.
template <class T>
void pack_panels(const AttentionArgs& args, const Layout& layout, const Operand& operand, int64_t offset, int64_t live,
                 int64_t panel, void* across_data, void* along_data) {
  constexpr int64_t kTogether = 16, kPair = 4 / sizeof(T);
  uint32_t *across = static_cast<uint32_t*>(across_data), *along = static_cast<uint32_t*>(along_data);
  alignas(64) T rows[kTogether][kRowFloats];
  const auto clear = [&](int64_t row, int64_t from) { std::fill(rows[row] + from, rows[row] + layout.width, T{}); };
  const int64_t end = std::min(kKeys, (live + 31) / 32 * 32);
  for (int64_t first = 0; first < end; first += kTogether) {
    const int64_t count = std::clamp<int64_t>(live - first, 0, kTogether);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t row = offset + (first + n) * operand.stride[2];
      if (first + n + kTogether < live) fetch_row(args, operand, row + kTogether * operand.stride[2]);
      read_row(rows[n], args, operand, row);
      clear(n, args.head_dim);
    }
    for (int64_t n = count; n < kTogether; ++n) clear(n, 0);
    const int64_t lines = layout.depth / kPair;
    for (int64_t n = 0; across != nullptr && n < kTogether; n += kLanes) {
      for (int64_t line = 0; line < lines; line += kLanes) {
        F32 v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = load_bytes<F32>(rows[n + i] + line * kPair);
        transpose(v);
        for (int i = 0; i < std::min<int64_t>(kLanes, lines - line); ++i) {
          std::memcpy(across + (line + i) * panel + first + n, &v[i], sizeof v[i]);
        }
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
