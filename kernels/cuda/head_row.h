// A head of one token on a GPU: a warp to each, whose lanes take every 32nd pair.
#pragma once

#include "pygen/rope.h"
#include "pygen/rope_row.h"

namespace pygen {
namespace {

inline constexpr int kWarp = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;
inline constexpr int kMostWarps = 8;  // of a block, which has a token

// How many threads the block of a token has, whose heads its warps share.
inline dim3 head_threads(int64_t heads) {
  return dim3(kWarp * static_cast<unsigned>(heads < kMostWarps ? heads : kMostWarps));
}

template <DType kDType>
struct HeadRow {
  char* data;
  PYGEN_INLINE HeadRow(const Operand& operand, int64_t sequence, int64_t head, int64_t token)
      : data(static_cast<char*>(operand.data) +
             (sequence * operand.stride[0] + head * operand.stride[1] + token * operand.stride[2]) * size_of(kDType)) {}
  PYGEN_INLINE float load(int i) const { return load_one(data + i * size_of(kDType), kDType); }
  PYGEN_INLINE void store(int i, float value) const { store_one(data + i * size_of(kDType), kDType, value); }
};

// What turns a head; no pairs, nothing.
struct HeadTurn {
  const float* angles;
  int pairs;
  bool interleaved, inverse;
};

// Calls store(i, value) for the lane's elements of a head, turned.
template <class Load, class Store>
PYGEN_INLINE void turn_head(const HeadTurn& turn, int count, Load load, Store store) {
  const int lane = threadIdx.x % kWarp;
  for (int i = lane; i < turn.pairs; i += kWarp) {
    const int first = turn.interleaved ? 2 * i : i, second = turn.interleaved ? 2 * i + 1 : turn.pairs + i;
    float x = load(first), y = load(second);
    const float cosine = turn.angles == nullptr ? __builtin_nanf("") : turn.angles[i];
    const float sine = turn.angles == nullptr ? __builtin_nanf("") : turn.angles[turn.pairs + i];
    rope_pair(x, y, cosine, turn.inverse ? -sine : sine);
    store(first, x);
    store(second, y);
  }
  for (int i = 2 * turn.pairs + lane; i < count; i += kWarp) store(i, load(i));
}

// The sum of the squares of a head, in every lane.
template <class Load>
PYGEN_INLINE float sum_of_squares(int count, Load load) {
  static_assert(kNormSums == kWarp);
  float sum = 0.0f;
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) sum = fma(load(i), load(i), sum);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  return sum;
}

// Calls `load` for elements, normalised where there is a norm, and turns them into `store`.
template <class Load, class Store>
PYGEN_INLINE void convert(const HeadNorm& norm, float eps, const HeadTurn& turn, int count, Load load, Store store) {
  if (norm.weight == nullptr) return turn_head(turn, count, load, store);
  const float factor = rms_factor(sum_of_squares(count, load), count, eps);
  __syncwarp();  // another lane may store where this one has loaded
  const auto weight = [&](int i) {
    return load_one(static_cast<const char*>(norm.weight) + i * size_of(norm.dtype), norm.dtype);
  };
  turn_head(turn, count, [&](int i) { return load(i) * factor * weight(i); }, store);
}

// The kernel of a dtype.
template <class Kernel>
Kernel of_dtype(DType dtype, Kernel float32, Kernel bfloat16, Kernel float16) {
  return dtype == DType::kFloat32 ? float32 : dtype == DType::kBFloat16 ? bfloat16 : float16;
}

}  // namespace
}  // namespace pygen
