// How an elementwise GPU kernel walks strided operands of mixed dtypes: a thread takes eight elements at a time, by
// 16-byte accesses where an operand's layout allows them, else one by one.
#pragma once

#include "pygen/device.h"
#include "pygen/philox.h"

namespace pygen {
namespace {

inline constexpr int kEight = 8;
inline constexpr int kThreads = 256;

// The dimensions of the iteration space below the first `leading`, as one row of `count` elements.
struct InnerSpace {
  int32_t leading, ndim;
  int64_t size[kMaxDims];
  int64_t count;

  InnerSpace(const int64_t* all, int32_t ndim, int32_t leading) : leading(leading), ndim(ndim), count(1) {
    for (int32_t d = 0; d < kMaxDims; ++d) size[d] = d < ndim ? all[d] : 1;
    for (int32_t d = leading; d < ndim; ++d) count *= size[d];
  }

  // Whether eight elements from a multiple of eight lie together, 16-byte aligned, wherever in the space they are.
  bool in_eights(const Operand& operand) const {
    if (operand.stride[ndim - 1] != 1 || size[ndim - 1] % kEight != 0) return false;
    if (reinterpret_cast<uintptr_t>(operand.data) % (kEight * size_of(operand.dtype) < 16 ? 8 : 16) != 0) return false;
    for (int32_t d = 0; d < ndim - 1; ++d) {
      if (operand.stride[d] % kEight != 0) return false;
    }
    return true;
  }

  __device__ int64_t offset(const Operand& operand, int64_t element) const {
    if (ndim == leading + 1) return element * operand.stride[leading];
    int64_t offset = 0;
    for (int32_t d = ndim - 1; d >= leading; --d) {
      offset += element % size[d] * operand.stride[d];
      element /= size[d];
    }
    return offset;
  }

  // The `valid` first of the eight elements from `element` on; `base` is where the row begins in the operand.
  PYGEN_INLINE void load(const Operand& operand, bool eights, int64_t base, int64_t element, int valid,
                         float (&to)[kEight]) const {
    const char* data = static_cast<const char*>(operand.data);
    const int64_t size = size_of(operand.dtype);
    if (eights) {
      load_eight(data + (base + offset(operand, element)) * size, operand.dtype, to);
      return;
    }
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      to[i] = i < valid ? load_one(data + (base + offset(operand, element + i)) * size, operand.dtype) : 0.0f;
    }
  }
  PYGEN_INLINE void store(const Operand& operand, bool eights, int64_t base, int64_t element, int valid,
                          const float (&from)[kEight]) const {
    char* data = static_cast<char*>(operand.data);
    const int64_t size = size_of(operand.dtype);
    if (eights) {
      store_eight(data + (base + offset(operand, element)) * size, operand.dtype, from);
      return;
    }
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < valid) store_one(data + (base + offset(operand, element + i)) * size, operand.dtype, from[i]);
    }
  }
};

// The `count` first of eight neighbours; all of them by 16-byte accesses where `eights`.
PYGEN_INLINE void load_neighbours(const char* from, DType dtype, bool eights, int count, float (&to)[kEight]) {
  if (eights) return load_eight(from, dtype, to);
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (i < count) to[i] = load_one(from + i * size_of(dtype), dtype);
  }
}
PYGEN_INLINE void store_neighbours(char* to, DType dtype, bool eights, int count, const float (&from)[kEight]) {
  if (eights) return store_eight(to, dtype, from);
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (i < count) store_one(to + i * size_of(dtype), dtype, from[i]);
  }
}

// Whether rows of `width` neighbours, those strides apart, allow it.
inline bool rows_in_eights(const void* data, int64_t width, int64_t stride, int64_t other_stride = 0) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (width | stride | other_stride) % kEight == 0;
}

// How many threads a block has, and how many elements of a row it takes, so that small work fills the machine and
// large work does not pay for a block again and again.
struct Blocks {
  int32_t threads;
  int64_t per_block, per_row, count;

  Blocks(int64_t rows, int64_t row_elements) {
    threads = kThreads;
    while (threads > 32 && threads / 2 * kEight >= row_elements) threads /= 2;
    int64_t rounds = 8;
    while (rounds > 1 && rows * (row_elements / (rounds * threads * kEight)) < 2048) rounds /= 2;
    per_block = rounds * threads * kEight;
    per_row = (row_elements + per_block - 1) / per_block;
    count = rows * per_row;
  }
};

// The normals of the eight elements from `first` on. A block of Philox makes four; where `first` is not a multiple of
// four, a third one is needed.
PYGEN_INLINE void normal_eight(int64_t first, const PhiloxKey& key, float (&to)[kEight]) {
  const uint64_t block = static_cast<uint64_t>(first) / 4;
  const int skipped = static_cast<int>(first % 4);
  float z[12];
#pragma unroll
  for (int b = 0; b < 3; ++b) {
    if (b == 2 && skipped == 0) break;
    uint64_t words[4];
    philox_block(block + b, key, words);
    box_muller(static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1]), z[4 * b], z[4 * b + 1]);
    box_muller(static_cast<uint32_t>(words[2]), static_cast<uint32_t>(words[3]), z[4 * b + 2], z[4 * b + 3]);
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    to[i] = z[i];
    if (skipped == 1) to[i] = z[i + 1];
    if (skipped == 2) to[i] = z[i + 2];
    if (skipped == 3) to[i] = z[i + 3];
  }
}

}  // namespace
}  // namespace pygen
