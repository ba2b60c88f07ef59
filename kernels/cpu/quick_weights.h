// The weights of bfloat16 keys whose scores never leave the registers. A weight is relative to the largest score that
// its row has met, which can be known before all scores are: while no weight outgrows it by far, it stays (the lazy
// rescaling of FlashAttention-4).
#pragma once

#include "attention_tile.h"

namespace pygen {
namespace {

struct QuickWeights {
  static constexpr int64_t kRows = 4, kVectors = 4, kColumns = kVectors * kLanes;  // of scores at a time
  static constexpr float kFar = 256.0f;

#if defined(__AVX512BF16__)
  // (rows, keys) of a block from its packed keys, where `rows` is a multiple of kLanes and `keys` one of kColumns; and
  // adds them to each row's total. The first block's largest scores are those of its first columns. Returns false where
  // a weight is far above 1 or no number: then only weights, and if first what is largest, are changed.
  static bool run(const Layout& layout, const uint16_t* q, int64_t stride, const char* block, int64_t rows,
                  int64_t keys, float scale, bool first, uint16_t* weights, float* largest, float* total) {
    F32 sums[kQueries] = {};
    for (int64_t column = 0; column < keys; column += kColumns) {
      const uint32_t* const panel = reinterpret_cast<const uint32_t*>(block) + column;
      const auto weigh = first && column == 0 ? weigh_some<true> : weigh_some<false>;
      for (int64_t r = 0; r < rows; r += kRows) {
        weigh(layout, q + r * stride, stride, panel, scale, weights + r * kKeys + column, largest + r, sums + r);
      }
    }
    const auto add = [](F32 a, F32 b) __attribute__((always_inline)) { return a + b; };
    for (int64_t r = 0; r < rows; ++r) {
      if (_mm512_cmp_ps_mask(sums[r], splat(kFar, sums[r]), _CMP_NLT_UQ) != 0) return false;
    }
    for (int64_t r = 0; r < rows; r += kLanes) {
      F32 of_rows[kLanes];
      std::copy_n(sums + r, kLanes, of_rows);
      const F32 sum = load_bytes<F32>(total + r) + join_each(of_rows, add);
      std::memcpy(total + r, &sum, sizeof sum);
    }
    return true;
  }

 private:
  template <bool kFirst>
  static void weigh_some(const Layout& layout, const uint16_t* q, int64_t stride, const uint32_t* panel, float scale,
                         uint16_t* weights, float* largest, F32* sums) {
    F32 s[kRows][kVectors] = {};
    int64_t line = 0;
    do {  // at least once, or the sums would be set to 0 in memory
      __m512bh keys[kVectors];
      for (int v = 0; v < kVectors; ++v)
        std::memcpy(&keys[v], panel + line * layout.panel + v * kLanes, sizeof keys[v]);
      for (int r = 0; r < kRows; ++r) {
        int pair;
        std::memcpy(&pair, q + r * stride + line * 2, sizeof pair);
        const __m512bh pairs = bits<__m512bh>(_mm512_set1_epi32(pair));
        for (int v = 0; v < kVectors; ++v) s[r][v] = F32(_mm512_dpbf16_ps(s[r][v], keys[v], pairs));
      }
    } while (++line < layout.depth / 2);
    const float unit = exponent_unit(true);
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kFirst) {
        largest[r] = scale * _mm512_reduce_max_ps(max(max(s[r][0], s[r][1]), max(s[r][2], s[r][3])));
      }
      const F32 factor = splat(scale * unit, F32{}), base = splat(-largest[r] * unit, F32{});
      for (int v = 0; v < kVectors; ++v) {
        s[r][v] = rough_exp2(fma(s[r][v], factor, base));
        sums[r] += s[r][v];
      }
      for (int v = 0; v < kVectors; v += 2) store_halves(weights + r * kKeys + v * kLanes, {s[r][v], s[r][v + 1]});
    }
  }
#else
  static bool run(const Layout&, const uint16_t*, int64_t, const char*, int64_t, int64_t, float, bool, uint16_t*,
                  float*, float*) {
    return false;
  }
#endif
};

}  // namespace
}  // namespace pygen
