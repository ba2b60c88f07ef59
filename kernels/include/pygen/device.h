// A GPU thread's own numbers: the operations that shared arithmetic is written in, 16-byte accesses, and launches.
// Inline PTX stands here and nowhere else, each with the host's way to the same bits. Under PYGEN_EMULATION the host
// compiler takes it, with tests/emulation in the place of CUDA's headers.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef PYGEN_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include "pygen/operand.h"

// Dynamic shared memory, of which a kernel has one array: the emulation defines it for itself.
#ifndef PYGEN_EMULATION
#define PYGEN_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

// The only way to launch a kernel.
#ifdef PYGEN_EMULATION
#define PYGEN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  pygen_emulation::launch(kernel, grid, block, shared_bytes, __VA_ARGS__)
#else
#define PYGEN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace pygen {
namespace {

PYGEN_INLINE float splat(float value, float) { return value; }
PYGEN_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
PYGEN_INLINE uint32_t select(bool condition, uint32_t yes, uint32_t no) { return condition ? yes : no; }
PYGEN_INLINE int32_t to_signed(uint32_t v) { return static_cast<int32_t>(v); }
PYGEN_INLINE uint64_t mul_low(uint64_t a, uint32_t b) { return static_cast<uint64_t>(static_cast<uint32_t>(a)) * b; }

PYGEN_INLINE float to_float(uint32_t v) { return __uint2float_rn(v); }
PYGEN_INLINE float to_float(int32_t v) { return __int2float_rn(v); }
PYGEN_INLINE uint32_t to_unsigned(float v) { return __float_as_uint(v); }
PYGEN_INLINE float from_unsigned(uint32_t v) { return __uint_as_float(v); }
PYGEN_INLINE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PYGEN_INLINE float sqrt(float a) { return __fsqrt_rn(a); }
PYGEN_INLINE float min(float a, float b) { return a < b ? a : b; }  // the second where either is NaN
PYGEN_INLINE float max(float a, float b) { return a > b ? a : b; }
PYGEN_INLINE float power_of_two(float shifted) { return from_unsigned((to_unsigned(shifted) << 23) + 0x3f800000u); }

}  // namespace
}  // namespace pygen

#include "pygen/half.h"

namespace pygen {
namespace {

// The 16 bits of a value of `dtype`, widened; and back, to nearest even.
PYGEN_INLINE float widen(uint32_t bits, DType dtype) {
  if (dtype == DType::kBFloat16) return from_unsigned(bits << 16);
#ifdef PYGEN_EMULATION
  return half_to_float(bits);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
#endif
}
PYGEN_INLINE uint32_t narrow(float value, DType dtype) {
  if (dtype == DType::kBFloat16) return float_to_bfloat16(value);
#ifdef PYGEN_EMULATION
  return float_to_half(value);
#else
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#endif
}

// One value anywhere.
PYGEN_INLINE float load_one(const char* from, DType dtype) {
  if (dtype == DType::kFloat32) return *reinterpret_cast<const float*>(from);
  if (dtype == DType::kBool) return *reinterpret_cast<const uint8_t*>(from) != 0 ? 1.0f : 0.0f;
  if (dtype == DType::kInt8) return to_float(int32_t{*reinterpret_cast<const int8_t*>(from)});
  return widen(*reinterpret_cast<const uint16_t*>(from), dtype);
}
PYGEN_INLINE void store_one(char* to, DType dtype, float value) {
  if (dtype == DType::kFloat32) {
    *reinterpret_cast<float*>(to) = value;
  } else {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(narrow(value, dtype));
  }
}

// 16 bytes that nobody reads again, past the first-level cache.
PYGEN_INLINE uint4 load_streamed(const char* from) {
#ifdef PYGEN_EMULATION
  return *reinterpret_cast<const uint4*>(from);
#else
  uint4 all;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(all.x), "=r"(all.y), "=r"(all.z), "=r"(all.w)
      : "l"(from));
  return all;
#endif
}

// Eight neighbours, of which the first lies at a multiple of eight elements: accesses of 16 bytes (8 for bool).
PYGEN_INLINE void load_eight(const char* from, DType dtype, float (&to)[8]) {
  if (dtype == DType::kFloat32) {
    const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  } else if (dtype == DType::kBool) {
    const uint2 all = *reinterpret_cast<const uint2*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[i] = (all.x >> 8 * i & 0xffu) != 0 ? 1.0f : 0.0f;
      to[4 + i] = (all.y >> 8 * i & 0xffu) != 0 ? 1.0f : 0.0f;
    }
  } else {
    const uint4 all = *reinterpret_cast<const uint4*>(from);
    const uint32_t pairs[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = widen(pairs[i] & 0xffffu, dtype);
      to[2 * i + 1] = widen(pairs[i] >> 16, dtype);
    }
  }
}
PYGEN_INLINE void store_eight(char* to, DType dtype, const float (&from)[8]) {
  if (dtype == DType::kFloat32) {
    reinterpret_cast<float4*>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
  } else {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = narrow(from[2 * i], dtype) | narrow(from[2 * i + 1], dtype) << 16;
    *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

}  // namespace
}  // namespace pygen
