// A row of logits on a GPU: a warp to every block of it, then a warp to the row.
#pragma once

#include "pygen/device.h"
#include "pygen/green_list.h"
#include "pygen/token_row.h"

namespace pygen {
namespace {

inline constexpr unsigned kWholeWarp = 0xffffffffu;
inline constexpr int kWarp = 32;
inline constexpr int kRowThreads = 256;
inline constexpr int kWarps = kRowThreads / kWarp;
inline constexpr int kRounds = kRowBlock / kRowPartials;  // a lane holds eight neighbours of each 256 in a block

struct OperandRow {
  char* data;
  DType dtype;
  int64_t stride, count;

  PYGEN_INLINE OperandRow(const Operand& operand, int64_t sample, int64_t position, int64_t count)
      : data(static_cast<char*>(operand.data) +
             (sample * operand.stride[0] + position * operand.stride[1]) * size_of(operand.dtype)),
        dtype(operand.dtype),
        stride(operand.stride[2]),
        count(count) {}

  PYGEN_INLINE char* place(int64_t index) const { return data + index * stride * size_of(dtype); }
  PYGEN_INLINE float load(int64_t index) const { return load_one(place(index), dtype); }
  // Eight neighbours; what lies beyond the row is `pad`.
  PYGEN_INLINE void load(int64_t first, float pad, float (&to)[8]) const {
    if (in_eights(first)) {
      load_eight(place(first), dtype, to);
      return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = first + j < count ? load(first + j) : pad;
  }
  PYGEN_INLINE void store(int64_t first, const float (&from)[8]) const {
    if (in_eights(first)) {
      store_eight(place(first), dtype, from);
      return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (first + j < count) store_one(place(first + j), dtype, from[j]);
    }
  }
  PYGEN_INLINE bool in_eights(int64_t first) const {
    return stride == 1 && first + 8 <= count && reinterpret_cast<uintptr_t>(place(first)) % 16 == 0;
  }
};

// One lane's share of a block: value [k][j] is element 256 k + 8 lane + j.
struct LaneBlock {
  float at[kRounds][8];

  PYGEN_INLINE void load(const OperandRow& row, int block, int lane, float pad) {
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      row.load(int64_t{block} * kRowBlock + k * kRowPartials + 8 * lane, pad, at[k]);
    }
  }
  // Calls visit(value, index in the row).
  template <class Visit>
  PYGEN_INLINE void each(int block, int lane, Visit visit) {
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
#pragma unroll
      for (int j = 0; j < 8; ++j) visit(at[k][j], block * kRowBlock + k * kRowPartials + 8 * lane + j);
    }
  }
};

// Adds delta to the green ones of eight tokens, of which the first is a multiple of eight.
PYGEN_INLINE void add_green(const GreenList& list, float delta, int64_t first, float (&x)[8]) {
#pragma unroll
  for (int half = 0; half < 8; half += 4) {
    uint32_t words[4];
    philox_words(static_cast<uint64_t>(first + half) / 4, list.key, words);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[half + j] += words[j] < list.threshold ? delta : 0.0f;
  }
}

PYGEN_INLINE float warp_max(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = max(__shfl_xor_sync(kWholeWarp, value, step), value);
  return value;
}
PYGEN_INLINE double warp_sum(double value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

PYGEN_INLINE float block_max(LaneBlock& x) {
  float most = -kInfinity;
  x.each(0, 0, [&](float value, int) { most = max(value, most); });
  return warp_max(most);
}

// The sum of term(k, j) over a block: partial sum 8 lane + j, then the 256 of them by halves. At each of the first
// three halvings a lane passes on those of its numbers that another keeps.
template <class Term>
PYGEN_INLINE double block_sum(int lane, Term term) {
  double v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float sum = term(0, j);
#pragma unroll
    for (int k = 1; k < kRounds; ++k) sum += term(k, j);
    v[j] = sum;
  }
#pragma unroll
  for (int keeps = 4; keeps > 0; keeps /= 2) {
    const bool upper = (lane & keeps * 4) != 0;
#pragma unroll
    for (int j = 0; j < keeps; ++j) {
      const double mine = upper ? v[j + keeps] : v[j], other = upper ? v[j] : v[j + keeps];
      v[j] = mine + __shfl_xor_sync(kWholeWarp, other, keeps * 4);
    }
  }
  double sum = v[0];
#pragma unroll
  for (const int step : {2, 1, 16, 8, 4}) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  return sum;
}

// What is taken off a block's logits before exp; nothing where all are -inf.
PYGEN_INLINE float block_center(float most) { return most == -kInfinity ? 0.0f : most; }

// weight / noise, of which the largest wins; what has no weight never does.
PYGEN_INLINE float race(float weight, float noise) { return weight > 0.0f ? weight / noise : 0.0f; }

// Joins a row's blocks, whose sums are multiplied by exp(rate (m_b - m)) where they are.
PYGEN_INLINE RowSummary join_blocks(BlockSummary* blocks, int n, double rate, int lane) {
  RowSummary row{-kInfinity, -kInfinity, 0.0, 0.0, 0.0};
  for (int b = lane; b < n; b += kWarp) {
    row.max = max(blocks[b].max, row.max);
    row.others = max(blocks[b].others, row.others);
  }
  row.max = warp_max(row.max);
  row.others = warp_max(row.others);
  for (int b = lane; b < n; b += kWarp) {
    const double below = block_below(blocks[b], row.max), factor = exp_double(rate * below);
    row.raw += blocks[b].raw * exp_double(below);
    row.moment += factor * (blocks[b].moment + blocks[b].sum * (rate * below));
    blocks[b].sum *= factor;
    blocks[b].raw = factor;
    row.sum += blocks[b].sum;
  }
  row.sum = warp_sum(row.sum);
  row.raw = warp_sum(row.raw);
  row.moment = warp_sum(row.moment);
  __syncwarp();
  return row;
}

// The index that a uniform number chooses among n weights; `fraction` becomes a uniform number again, inside of it.
template <class Weight>
PYGEN_INLINE int pick_in_groups(int n, double& fraction, int lane, Weight weight) {
  double mine = 0.0, total = 0.0, before = 0.0;
  const int end = n < (lane + 1) * kRowGroup ? n : (lane + 1) * kRowGroup;
  for (int i = lane * kRowGroup; i < end; ++i) mine += weight(i);
  for (int g = 0; g < kWarp; ++g) total += __shfl_sync(kWholeWarp, mine, g);
  const double target = fraction * total;
  const int g = pick(0, kWarp, target, before, [&](int i) { return __shfl_sync(kWholeWarp, mine, i); });
  const int first = g * kRowGroup, last = n < first + kRowGroup ? n : first + kRowGroup;
  const double own = first + lane < last ? weight(first + lane) : 0.0;
  const auto shared = [&](int i) { return __shfl_sync(kWholeWarp, own, i - first); };
  const int chosen = pick(first, last, target, before, shared);
  const double inside = (target - before) / shared(chosen);
  fraction = inside < 0.0 ? 0.0 : inside > 1.0 ? 1.0 : inside;
  return chosen;
}

// What radix selection found among a row's elements: the value, the weight of all above it, and of all equal to it.
struct Selected {
  float value;
  uint64_t above, equal;
};

// A block of threads looks at a whole row.
struct RowSelection {
  const OperandRow& row;
  uint64_t* histogram;  // kHistogramBins, in shared memory

  // Calls visit(logit, index) for every element, eight neighbours to a thread at a time.
  template <class Visit>
  PYGEN_INLINE void each(Visit visit) const {
    for (int64_t first = threadIdx.x * 8; first < row.count; first += blockDim.x * 8) {
      float l[8];
      row.load(first, -kInfinity, l);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int index = static_cast<int>(first) + j;
        if (index < row.count) visit(l[j], index);
      }
    }
  }

  // radix_step by a warp, a lane to every 64 bins.
  PYGEN_INLINE uint32_t step(int bits, uint64_t target, uint64_t& before) const {
    const int lane = threadIdx.x % kWarp, per_lane = (1 << bits) / kWarp;
    unsigned long long mine = 0;
    for (int i = 0; i < per_lane; ++i) mine += histogram[lane * per_lane + i];
    int group = kWarp - 1;
    for (; group > 0; --group) {
      const uint64_t weight = __shfl_sync(kWholeWarp, mine, group);
      if (before + weight > target) break;
      before += weight;
    }
    int digit = group * per_lane + per_lane - 1;
    while (digit > 0 && before + histogram[digit] <= target) before += histogram[digit--];
    return static_cast<uint32_t>(digit);
  }

  // The element at which the running sum of weights, largest value first, exceeds `target`. element(logit, index,
  // weight) gives its value and sets its weight.
  template <class Element>
  PYGEN_INLINE Selected select_largest(uint64_t target, Element element) const {
    uint64_t before = 0, equal = 0;
    uint32_t prefix = 0;
    for (int level = 0; level < 3; ++level) {
      const RadixDigit digit = radix_digit(level);
      for (int i = threadIdx.x; i < kHistogramBins; i += blockDim.x) histogram[i] = 0;
      __syncthreads();
      each([&](float logit, int index) {
        uint64_t weight = 0;
        const uint32_t key = ordered_from_bits(to_unsigned(element(logit, index, weight)));
        if (weight > 0 && digit.holds(prefix, key)) {
          atomicAdd(reinterpret_cast<unsigned long long*>(histogram + digit.digit(key)),
                    static_cast<unsigned long long>(weight));
        }
      });
      __syncthreads();
      const uint32_t found = step(digit.bits, target, before);
      equal = histogram[found];
      prefix = prefix << digit.bits | found;
      __syncthreads();
    }
    return {float_of(bits_from_ordered(prefix)), before, equal};
  }
};

// The first index below n at which `holds`, or the last.
template <class Holds>
PYGEN_INLINE int find_first(int n, int lane, Holds holds) {
  for (int i = 0; i < n; i += kWarp) {
    const unsigned found = __ballot_sync(kWholeWarp, i + lane < n && holds(i + lane));
    if (found != 0) return i + __ffs(static_cast<int>(found)) - 1;
  }
  return n - 1;
}

// The lane's number with the largest key, of equal ones that with the smallest index; the same in all lanes.
PYGEN_INLINE int warp_argmax(double key, int index) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double other_key = __shfl_xor_sync(kWholeWarp, key, step);
    const int other = __shfl_xor_sync(kWholeWarp, index, step);
    if (other_key > key || (other_key == key && other < index)) key = other_key, index = other;
  }
  return index;
}

}  // namespace
}  // namespace pygen
