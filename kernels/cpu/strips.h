// How an elementwise CPU kernel walks strided operands of mixed dtypes: the space is cut into chunks that fit the
// first-level cache, of a long run of the innermost dimension or of several short ones, and those into strips of four
// vectors. Whatever is not contiguous, and the last
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
    case DType::kInt8:
      break;
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
    case DType::kInt8:
      break;
  }
  __builtin_unreachable();
}

// The first elements, and 0 behind.
PYGEN_INLINE Strip first_of(const Strip& strip, int64_t count) {
  float elements[kStrip] = {};
  std::memcpy(elements, &strip, count * sizeof(float));
  return load_strip<DType::kFloat32>(reinterpret_cast<const char*>(elements));
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

// A position in a row-major iteration space.
struct Cursor {
  const int64_t* size;
  int ndim;
  int64_t index[kMaxDims];
  int64_t position;

  Cursor(const int64_t* size, int ndim, int64_t at) : size(size), ndim(ndim), position(at) {
    for (int d = ndim - 1; d >= 0; --d) {
      index[d] = at % size[d];
      at /= size[d];
    }
  }
  void advance(int64_t count) {
    position += count;
    index[ndim - 1] += count;
    for (int d = ndim - 1; d > 0 && index[d] >= size[d]; --d) {
      const int64_t passed = index[d] == size[d] ? 1 : index[d] / size[d];
      index[d] -= passed * size[d];
      index[d - 1] += passed;
    }
  }
  // What is left of the innermost dimension.
  int64_t run() const { return size[ndim - 1] - index[ndim - 1]; }
  int64_t offset(const Operand& operand) const {
    int64_t offset = 0;
    for (int d = 0; d < ndim; ++d) offset += index[d] * operand.stride[d];
    return offset;
  }
  // Whether an operand's next `count` elements are neighbours.
  bool together(const Operand& operand, int64_t count) const {
    int d = ndim - 1;
    if (operand.stride[d] != 1) return false;
    for (int64_t left = run(), extent = size[d]; left < count; extent *= size[d]) {
      if (--d < 0 || operand.stride[d] != extent) return false;
      left += (size[d] - 1 - index[d]) * extent;
    }
    return true;
  }
};

// One operand's chunk: where `count` elements from a cursor on lie together, in place or in `buffer`.
struct ChunkView {
  const Operand* operand;
  int64_t size;
  char *place, *data;

  PYGEN_INLINE void open(const Operand& of, const Cursor& at, int64_t count, char* buffer) {
    operand = &of;
    size = size_of(of.dtype);
    place = static_cast<char*>(of.data) + at.offset(of) * size;
    data = count % kStrip == 0 && at.together(of, count) ? place : buffer;
  }
  // To where a chunk that lies in place goes on.
  PYGEN_INLINE void move(int64_t elements) {
    place += elements * size;
    data += elements * size;
  }
  PYGEN_INLINE void gather(const Cursor& at, int64_t count) const {
    if (data == place) return;
    each_run(at, count, [&](char* run, int64_t stride, char* packed, int64_t n) {
      copy_elements(packed, 1, run, stride, n, size);
    });
  }
  PYGEN_INLINE void scatter(const Cursor& at, int64_t count) const {
    if (data == place) return;
    each_run(at, count, [&](char* run, int64_t stride, char* packed, int64_t n) {
      copy_elements(run, stride, packed, 1, n, size);
    });
  }

 private:
  // Calls visit(run, stride, packed, n) for every run of the innermost dimension in the chunk.
  template <class Visit>
  PYGEN_INLINE void each_run(Cursor at, int64_t count, Visit visit) const {
    char* packed = data;
    for (const int64_t end = at.position + count; at.position < end;) {
      const int64_t n = std::min(at.run(), end - at.position);
      visit(static_cast<char*>(operand->data) + at.offset(*operand) * size, operand->stride[at.ndim - 1], packed, n);
      packed += n * size;
      at.advance(n);
    }
  }
};

}  // namespace
}  // namespace pygen
