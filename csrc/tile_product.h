// torch's blocked matrix product (oneDNN's micro-kernels), as kernels take it.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <cpuid.h>

#include <algorithm>

#include "pygen/isa.h"
#include "pygen/tile_product.h"

namespace pygen {

template <class T>
void multiply_tile(int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride, int64_t c_stride, bool add,
                   const void* a, const void* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, c_stride, add, static_cast<const T*>(a),
                              static_cast<const T*>(b), c);
}

// Whether torch can do it on this machine, which it tells by an error.
template <class T>
bool torch_multiplies() {
  static const bool can = [] {
    const T ones[4] = {T(1.0f), T(1.0f), T(1.0f), T(1.0f)};
    float sums[4] = {};
    try {
      multiply_tile<T>(2, 2, 2, 2, 2, 2, false, ones, ones, sums);
    } catch (const c10::Error&) {
      return false;
    }
    at::native::cpublas::brgemm_release();
    return std::all_of(std::begin(sums), std::end(sums), [](float sum) { return sum == 2.0f; });
  }();
  return can;
}

// Asked once: where machines are virtual, the question leaves them.
inline bool has_amx_bf16() {
  static const bool has = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22 & 1) != 0;
  }();
  return has;
}

// What of it there is: nothing below the instruction sets that it is made for, so that those in use are the ones named.
inline TileProduct torch_tile_product() {
  TileProduct product{};
  if (isa() >= Isa::kAvx512 && torch_multiplies<float>()) product.float32 = multiply_tile<float>;
  if (isa() >= Isa::kAvx512Bf16 && torch_multiplies<c10::BFloat16>()) product.bfloat16 = multiply_tile<c10::BFloat16>;
  if (product.float32 != nullptr || product.bfloat16 != nullptr) {
    product.finish = [] { at::native::cpublas::brgemm_release(); };
    product.matrix_unit = has_amx_bf16();
  }
  return product;
}

}  // namespace pygen
