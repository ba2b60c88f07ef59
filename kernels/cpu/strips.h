// How an elementwise CPU kernel walks strided operands of mixed dtypes: runs of the innermost dimension are cut into
// chunks that fit the first-level cache, chunks into strips of four vectors. Whatever is not contiguous, and the last
// partial strip, goes through a small buffer, so that a strip is always four whole vectors at a known place.
#pragma once

#include <algorithm>

#include "pygen/pack.h"

namespace pygen {
namespace {

inline constexpr int kStripVectors = 4;
inline constexpr int64_t kStrip = kStripVectors * kLanes;
inline constexpr int64_t kChunk = 1024;
static_assert(kChunk % kStrip == 0);

using Strip = Pack<F32, kStripVectors>;

template <DType kDType>
PYGEN_INLINE Strip load_strip(const char* from) {
  Strip strip;
  for (int i = 0; i < kStripVectors; ++i) strip.v[i] = load<kDType>(from + i * kLanes * size_of(kDType));
  return strip;
}
PYGEN_INLINE Strip load_strip(const char* from, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return load_strip<DType::kFloat32>(from);
    case DType::kBFloat16:
      return load_strip<DType::kBFloat16>(from);
    case DType::kFloat16:
      return load_strip<DType::kFloat16>(from);
    case DType::kBool:
      return load_strip<DType::kBool>(from);
  }
  __builtin_unreachable();
}

template <DType kDType>
PYGEN_INLINE void store_strip(char* to, const Strip& strip) {
  for (int i = 0; i < kStripVectors; ++i) store<kDType>(to + i * kLanes * size_of(kDType), strip.v[i]);
}
PYGEN_INLINE void store_strip(char* to, DType dtype, const Strip& strip) {
  switch (dtype) {
    case DType::kFloat32:
      return store_strip<DType::kFloat32>(to, strip);
    case DType::kBFloat16:
      return store_strip<DType::kBFloat16>(to, strip);
    case DType::kFloat16:
      return store_strip<DType::kFloat16>(to, strip);
    case DType::kBool:
      break;
  }
  __builtin_unreachable();
}

// Copies `count` elements of `size` bytes between places with strides in elements.
[[maybe_unused]] inline void copy_elements(char* to, int64_t to_stride, const char* from, int64_t from_stride,
                                           int64_t count, int64_t size) {
  const auto copy = [&](auto example) {
    using T = decltype(example);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * to_stride * size, from + i * from_stride * size, sizeof(T));
  };
  if (to_stride == 1 && from_stride == 1) {
    std::memcpy(to, from, count * size);
  } else if (size == 4) {
    copy(uint32_t{});
  } else if (size == 2) {
    copy(uint16_t{});
  } else {
    copy(uint8_t{});
  }
}

// One operand's chunk: where its elements lie contiguously, in place or in `buffer`.
struct ChunkView {
  char* place;
  int64_t stride;
  int64_t size;
  char* data;

  PYGEN_INLINE void open(const Operand& operand, int64_t offset, int inner, bool whole, char* buffer) {
    stride = operand.stride[inner];
    size = size_of(operand.dtype);
    place = static_cast<char*>(operand.data) + offset * size;
    data = stride == 1 && whole ? place : buffer;
  }
  PYGEN_INLINE void gather(int64_t count) const {
    if (data != place) copy_elements(data, 1, place, stride, count, size);
  }
  PYGEN_INLINE void scatter(int64_t count) const {
    if (data != place) copy_elements(place, stride, data, 1, count, size);
  }
};

// A position in a row-major iteration space.
struct Cursor {
  int64_t index[kMaxDims];
  int64_t position;

  Cursor(const int64_t* size, int ndim, int64_t at) : position(at) {
    for (int d = ndim - 1; d >= 0; --d) {
      index[d] = at % size[d];
      at /= size[d];
    }
  }
  // Moves on by `count`, which does not pass the end of the innermost dimension.
  void advance(const int64_t* size, int ndim, int64_t count) {
    position += count;
    index[ndim - 1] += count;
    for (int d = ndim - 1; d > 0 && index[d] == size[d]; --d) {
      index[d] = 0;
      ++index[d - 1];
    }
  }
  int64_t offset(const Operand& operand, int ndim) const {
    int64_t offset = 0;
    for (int d = 0; d < ndim; ++d) offset += index[d] * operand.stride[d];
    return offset;
  }
};

}  // namespace
}  // namespace pygen
