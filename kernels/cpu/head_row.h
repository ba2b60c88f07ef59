// A head of one token on a CPU: read, scaled, turned and stored vector by vector.
#pragma once

#include <algorithm>

#include "pygen/rope.h"
#include "pygen/rope_row.h"

namespace pygen {
namespace {

// The first `count` of kLanes neighbours; the others are 0.
template <DType kDType>
PYGEN_INLINE F32 load_first(const char* from, int count) {
  if (count >= kLanes) [[likely]]
    return load<kDType>(from);
  char copy[kLanes * size_of(kDType)] = {};
  std::memcpy(copy, from, std::max(count, 0) * size_of(kDType));
  return load<kDType>(copy);
}
template <DType kDType>
PYGEN_INLINE void store_first(char* to, F32 value, int count) {
  if (count >= kLanes) [[likely]]
    return store<kDType>(to, value);
  char copy[kLanes * size_of(kDType)];
  store<kDType>(copy, value);
  std::memcpy(to, copy, std::max(count, 0) * size_of(kDType));
}

// The angles of a unit's tokens, in whole vectors.
struct HeadAngles {
  int pairs, padded;
  bool interleaved;
  alignas(64) float at[kRopeTokens * (kMaxHeadDim + 2 * kLanes)];

  explicit HeadAngles(const RopeTable& table)
      : pairs(table.pairs), padded((pairs + kLanes - 1) / kLanes * kLanes), interleaved(table.interleaved) {}

  PYGEN_INLINE float* cosines(int64_t token) { return at + token * 2 * padded; }

  void read(int64_t token, const float* from, bool inverse) {
    float *cosine = cosines(token), *sine = cosine + padded;
    if (from == nullptr) {
      std::fill_n(cosine, 2 * padded, __builtin_nanf(""));
      return;
    }
    std::fill_n(cosine, 2 * padded, 0.0f);
    std::copy_n(from, pairs, cosine);
    std::copy_n(from + pairs, pairs, sine);
    for (int i = 0; inverse && i < pairs; ++i) sine[i] = -sine[i];
  }
};

// Calls store(i, vector, how many) for the elements of a head of `count`, as load(i, how many) gives them, turned.
template <class Load, class Store>
PYGEN_INLINE void turn_head(HeadAngles& angles, int64_t token, int count, Load load, Store store) {
  const float *cosine = angles.cosines(token), *sine = cosine + angles.padded;
  const int pairs = angles.pairs;
  if (angles.interleaved) {
    for (int i = 0; i < pairs; i += kLanes) {
      const int here = 2 * (pairs - i);
      const F32 low = load(2 * i, here), high = load(2 * i + kLanes, here - kLanes);
      F32 x = every_other<0>(low, high), y = every_other<1>(low, high);
      rope_pair(x, y, load_bytes<F32>(cosine + i), load_bytes<F32>(sine + i));
      store(2 * i, interleave<0>(x, y), here);
      store(2 * i + kLanes, interleave<1>(x, y), here - kLanes);
    }
  } else {
    for (int i = 0; i < pairs; i += kLanes) {
      F32 x = load(i, pairs - i), y = load(pairs + i, pairs - i);
      rope_pair(x, y, load_bytes<F32>(cosine + i), load_bytes<F32>(sine + i));
      store(i, x, pairs - i);
      store(pairs + i, y, pairs - i);
    }
  }
  for (int i = 2 * pairs; i < count; i += kLanes) store(i, load(i, count - i), count - i);
}

// Calls visit(head, token) for heads of tokens [0, tokens), in the order in which they lie in memory.
template <class Visit>
PYGEN_INLINE void each_head(const Operand& operand, int64_t heads, int64_t tokens, Visit visit) {
  const bool by_token = operand.stride[1] < operand.stride[2];
  const int64_t outer = by_token ? tokens : heads, inner = by_token ? heads : tokens;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j) visit(by_token ? j : i, by_token ? i : j);
  }
}

PYGEN_INLINE char* head_place(const Operand& operand, int64_t sequence, int64_t head, int64_t token) {
  const int64_t offset = sequence * operand.stride[0] + head * operand.stride[1] + token * operand.stride[2];
  return static_cast<char*>(operand.data) + offset * size_of(operand.dtype);
}

}  // namespace
}  // namespace pygen
