// The part of CUDA that the kernels use, for the host compiler: names and meanings as in CUDA C++, run by
// emulation_scheduler.h. Compiled with -DPYGEN_EMULATION and -I tests/emulation; a kernel includes pygen/device.h,
// which takes this header in place of CUDA's.
//
// Stricter than a GPU where a GPU would let a mistake pass: a barrier wants every thread of the block, exited ones too,
// at one place in the source; a warp collective wants every lane of its mask (those that the block has) at one place; a
// shuffle reads only lanes that take part; shuffles and votes order no memory; fresh shared memory is all ones.
// Not here: a thread that spins on memory until another thread of its block writes it never ends, for fibres only
// change at barriers and collectives; blocks may wait for each other only in a cooperative launch, by grid_sync.
#pragma once

#include <math.h>

#include <concepts>
#include <limits>

#include "emulation_scheduler.h"

// ---- Qualifiers, types and indices ---------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ PYGEN_EMULATION_SHARED
// What every CUDA thread sees as `extern __shared__ type name[]`.
#define PYGEN_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(pygen_emulation::dynamic_shared())

using cudaStream_t = struct CUstream_st*;

#define PYGEN_EMULATION_VECTORS(T, name)                                        \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                 \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
PYGEN_EMULATION_VECTORS(signed char, char)
PYGEN_EMULATION_VECTORS(unsigned char, uchar)
PYGEN_EMULATION_VECTORS(short, short)
PYGEN_EMULATION_VECTORS(unsigned short, ushort)
PYGEN_EMULATION_VECTORS(int, int)
PYGEN_EMULATION_VECTORS(unsigned, uint)
PYGEN_EMULATION_VECTORS(long long, longlong)
PYGEN_EMULATION_VECTORS(unsigned long long, ulonglong)
PYGEN_EMULATION_VECTORS(float, float)
PYGEN_EMULATION_VECTORS(double, double)
struct int3 {
  int x, y, z;
};
struct float3 {
  float x, y, z;
};
constexpr int3 make_int3(int x, int y, int z) { return {x, y, z}; }
constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
constexpr float3 make_float3(float x, float y, float z) { return {x, y, z}; }

namespace pygen_emulation {
inline const uint3& thread_index() { return current->index; }
inline const uint3& block_index() { return current->block->index; }
inline const dim3& block_shape() { return current->block->launch.block; }
inline const dim3& grid_shape() { return current->block->launch.grid; }
inline void* dynamic_shared() { return current->block->dynamic_shared; }
}  // namespace pygen_emulation

#define threadIdx (pygen_emulation::thread_index())
#define blockIdx (pygen_emulation::block_index())
#define blockDim (pygen_emulation::block_shape())
#define gridDim (pygen_emulation::grid_shape())
inline constexpr int warpSize = pygen_emulation::kWarpSize;

// ---- Barriers, votes, shuffles -------------------------------------------------------------------------------------

#define PYGEN_EMULATION_HERE std::source_location where = std::source_location::current()

inline void __syncthreads(PYGEN_EMULATION_HERE) { pygen_emulation::barrier("__syncthreads", 0, where); }
inline int __syncthreads_count(int predicate, PYGEN_EMULATION_HERE) {
  return pygen_emulation::barrier("__syncthreads_count", predicate, where);
}
inline int __syncthreads_and(int predicate, PYGEN_EMULATION_HERE) {
  return pygen_emulation::barrier("__syncthreads_and", predicate == 0, where) == 0;
}
inline int __syncthreads_or(int predicate, PYGEN_EMULATION_HERE) {
  return pygen_emulation::barrier("__syncthreads_or", predicate, where) > 0;
}
inline void grid_sync(PYGEN_EMULATION_HERE) { pygen_emulation::grid_barrier(where); }

inline void __syncwarp(unsigned mask = 0xffffffff, PYGEN_EMULATION_HERE) {
  pygen_emulation::collective(pygen_emulation::kSyncWarp, mask, 0, where, [](const auto&, int) { return 0; });
}
inline unsigned __activemask(PYGEN_EMULATION_HERE) { return pygen_emulation::active_mask(where); }
inline unsigned __ballot_sync(unsigned mask, int predicate, PYGEN_EMULATION_HERE) {
  return pygen_emulation::vote("__ballot_sync", mask, predicate, where).ballot;
}
inline int __any_sync(unsigned mask, int predicate, PYGEN_EMULATION_HERE) {
  return pygen_emulation::vote("__any_sync", mask, predicate, where).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, PYGEN_EMULATION_HERE) {
  const pygen_emulation::Vote vote = pygen_emulation::vote("__all_sync", mask, predicate, where);
  return vote.ballot == vote.expected;
}

// A source beyond the lane's segment of `width` lanes is the lane itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, PYGEN_EMULATION_HERE) {
  return pygen_emulation::shuffle("__shfl_sync", mask, value, where,
                                  [=](int lane) { return (lane & -width) | (source & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, PYGEN_EMULATION_HERE) {
  return pygen_emulation::shuffle("__shfl_up_sync", mask, value, where, [=](int lane) {
    const int from = lane - static_cast<int>(delta);
    return from < (lane & -width) ? lane : from;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, PYGEN_EMULATION_HERE) {
  return pygen_emulation::shuffle("__shfl_down_sync", mask, value, where, [=](int lane) {
    const int from = lane + static_cast<int>(delta);
    return from > (lane | (width - 1)) ? lane : from;
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, PYGEN_EMULATION_HERE) {
  return pygen_emulation::shuffle("__shfl_xor_sync", mask, value, where, [=](int lane) {
    const int from = lane ^ lanes;
    return from > (lane | (width - 1)) ? lane : from;
  });
}

// ---- Atomics and fences --------------------------------------------------------------------------------------------

namespace pygen_emulation {

template <class T, class... Allowed>
concept OneOf = (std::same_as<T, Allowed> || ...);

// Relaxed, as CUDA's atomics are; T is compared by its bits, so a NaN does not go round for ever.
template <class T, class F>
T update(T* address, F next_of) {
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  for (;;) {
    T next = next_of(old);
    if (__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return old;
  }
}

}  // namespace pygen_emulation

#define PYGEN_EMULATION_ATOMIC(name, expression, ...)                                \
  template <pygen_emulation::OneOf<__VA_ARGS__> T>                                   \
  T name(T* address, std::type_identity_t<T> value) {                                \
    return pygen_emulation::update(address, [&](T old) -> T { return expression; }); \
  }
PYGEN_EMULATION_ATOMIC(atomicAdd, old + value, int, unsigned, unsigned long long, float, double)
PYGEN_EMULATION_ATOMIC(atomicMax, value > old ? value : old, int, unsigned, long long, unsigned long long)
PYGEN_EMULATION_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, long long, unsigned long long)
PYGEN_EMULATION_ATOMIC(atomicOr, old | value, int, unsigned, unsigned long long)
PYGEN_EMULATION_ATOMIC(atomicAnd, old& value, int, unsigned, unsigned long long)
PYGEN_EMULATION_ATOMIC(atomicExch, (static_cast<void>(old), value), int, unsigned, unsigned long long, float)
template <pygen_emulation::OneOf<int, unsigned, unsigned long long, unsigned short> T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return pygen_emulation::update(address, [&](T old) { return old == compare ? value : old; });
}

inline void __threadfence_block() { pygen_emulation::fence(); }
inline void __threadfence() { pygen_emulation::fence(); }

// ---- Arithmetic ----------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }

inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
// To the nearest, ties to even; what does not fit becomes the nearest that does, and NaN becomes 0.
inline int __float2int_rn(float a) {
  if (isnan(a)) return 0;
  if (a >= 0x1p31f) return std::numeric_limits<int>::max();
  return a < -0x1p31f ? std::numeric_limits<int>::min() : static_cast<int>(__builtin_rintf(a));
}
inline unsigned __float_as_uint(float a) { return std::bit_cast<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return std::bit_cast<float>(a); }
inline int __float_as_int(float a) { return std::bit_cast<int>(a); }
inline float __int_as_float(int a) { return std::bit_cast<float>(a); }
inline long long __double_as_longlong(double a) { return std::bit_cast<long long>(a); }
inline double __longlong_as_double(long long a) { return std::bit_cast<double>(a); }

inline int __popc(unsigned a) { return std::popcount(a); }
inline int __popcll(unsigned long long a) { return std::popcount(a); }
inline int __clz(int a) { return std::countl_zero(static_cast<unsigned>(a)); }
inline int __clzll(long long a) { return std::countl_zero(static_cast<unsigned long long>(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
// The sum of c and four products of signed bytes.
inline int __dp4a(int a, int b, int c) {
  for (int shift = 0; shift < 32; shift += 8) {
    c += static_cast<signed char>(a >> shift) * static_cast<signed char>(b >> shift);
  }
  return c;
}
// The sum of c and the products of two signed 16-bit numbers with two signed bytes: the lower ones, or the upper ones.
inline int __dp2a_lo(int a, int b, int c) {
  for (int i = 0; i < 2; ++i) c += static_cast<short>(a >> 16 * i) * static_cast<signed char>(b >> 8 * i);
  return c;
}
inline int __dp2a_hi(int a, int b, int c) { return __dp2a_lo(a, b >> 16, c); }

template <class T>
  requires std::is_arithmetic_v<T>
constexpr T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return static_cast<T>(fmin(a, b));
  return b < a ? b : a;
}
template <class T>
  requires std::is_arithmetic_v<T>
constexpr T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return static_cast<T>(fmax(a, b));
  return a < b ? b : a;
}
inline float rsqrtf(float a) { return 1.0f / __builtin_sqrtf(a); }
