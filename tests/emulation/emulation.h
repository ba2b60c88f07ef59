// The part of CUDA that the kernels use, for the host compiler: names and meanings as in CUDA C++, run by
// emulation_scheduler.h. Compiled with -DPYGEN_EMULATION and -I tests/emulation; a kernel includes pygen/device.h, which
// takes this header in place of CUDA's.
//
// Stricter than a GPU where a GPU would let a mistake pass: a barrier wants every thread of the block, exited ones too, at
// one place in the source; a warp collective wants every lane of its mask (those that the block has) at one place; a
// shuffle reads only lanes that take part; shuffles and votes order no memory; fresh shared memory is all ones.
// Not here: a thread that spins on memory until another thread of its block writes it never ends, for fibres only change
// at barriers and collectives; blocks may wait for each other only in a cooperative launch, by grid_sync.
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

#define PYGEN_EMULATION_VECTORS(T, name)                                                                 \
  struct alignas(2 * sizeof(T)) name##2 {                                                                \
    T x, y;                                                                                              \
  };                                                                                                     \
  struct name##3 {                                                                                       \
    T x, y, z;                                                                                           \
  };                                                                                                     \
  struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name##4 {                                           \
    T x, y, z, w;                                                                                        \
  };                                                                                                     \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                                          \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                  \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
