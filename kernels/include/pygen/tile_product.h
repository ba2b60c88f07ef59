// The product of two tiles, which a library does better than we: handed to kernels as function pointers.
#pragma once

#include <cstdint>

namespace pygen {

// c (m, n) = a (m, k) b (k, n), plus c where `add`; strides between rows, in elements. Of b in bfloat16, rows lie two
// by two: (k / 2, n, 2).
struct TileProduct {
  void (*float32)(int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride, int64_t c_stride, bool add,
                  const void* a, const void* b, float* c);
  void (*bfloat16)(int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride, int64_t c_stride, bool add,
                   const void* a, const void* b, float* c);
  void (*finish)();  // for each thread that has multiplied
  bool matrix_unit;  // has bfloat16 multiplied faster than vectors can
};

}  // namespace pygen
