// The product of two tiles for who has no library's.
#pragma once

#include <algorithm>

#include "pygen/simd.h"

namespace pygen {
namespace {

// c (m, n) = a (m, k) b (k, n), plus c where `add`; strides between rows.
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

}  // namespace
}  // namespace pygen
