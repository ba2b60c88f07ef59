// A row of logits on a CPU: block by block through a buffer in the first-level cache.
#pragma once

#include "philox.h"
#include "pygen/green_list.h"
#include "pygen/token_row.h"
#include "strips.h"

namespace pygen {
namespace {

struct alignas(64) RowBlock {
  float at[kRowBlock];
  PYGEN_INLINE F32 vector(int i) const { return load_bytes<F32>(at + i); }
  PYGEN_INLINE void set(int i, F32 value) { std::memcpy(at + i, &value, sizeof value); }
};

// A row of an operand: `count` elements `stride` apart.
struct OperandRow {
  char* data;
  DType dtype;
  int64_t stride, count;

  OperandRow(const Operand& operand, int64_t sample, int64_t position, int64_t count)
      : data(static_cast<char*>(operand.data) +
             (sample * operand.stride[0] + position * operand.stride[1]) * size_of(operand.dtype)),
        dtype(operand.dtype),
        stride(operand.stride[2]),
        count(count) {}

  int here(int block) const {
    return static_cast<int>(std::min<int64_t>(kRowBlock, count - int64_t{block} * kRowBlock));
  }
  char* place(int block) const { return data + int64_t{block} * kRowBlock * stride * size_of(dtype); }

  float one(int64_t index) const { return load_one(data + index * stride * size_of(dtype), dtype); }

  // What lies beyond the row is `pad`.
  void load(int block, RowBlock& to, float pad) const {
    alignas(64) char copy[kRowBlock * sizeof(float)];
    const int n = here(block);
    const char* from = place(block);
    if (stride != 1 || n < kRowBlock) {
      copy_elements(copy, 1, from, stride, n, size_of(dtype));
      from = copy;
    }
    const int whole = (n + static_cast<int>(kStrip) - 1) / static_cast<int>(kStrip) * static_cast<int>(kStrip);
    for (int i = 0; i < whole; i += kStrip) {
      const Strip strip = load_strip(from + i * size_of(dtype), dtype);
      std::memcpy(to.at + i, &strip, sizeof strip);
    }
    std::fill(to.at + n, to.at + kRowBlock, pad);
  }
  void store(int block, const RowBlock& from) const {
    alignas(64) char copy[kRowBlock * sizeof(float)];
    for (int i = 0; i < kRowBlock; i += kStrip) {
      Strip strip;
      std::memcpy(&strip, from.at + i, sizeof strip);
      store_strip(copy + i * size_of(dtype), dtype, strip);
    }
    copy_elements(place(block), stride, copy, 1, here(block), size_of(dtype));
  }
};

// Of a block; NaN is passed over.
PYGEN_INLINE float block_max(const RowBlock& x) {
  F32 most = splat(-kInfinity, F32{});
  for (int i = 0; i < kRowBlock; i += kLanes) most = max(x.vector(i), most);
  float result = -kInfinity;
  for (int lane = 0; lane < kLanes; ++lane) result = most[lane] > result ? most[lane] : result;
  return result;
}

// Adds delta to the green tokens of a block.
PYGEN_INLINE void add_green(const GreenList& list, float delta, int block, RowBlock& x) {
  const F32 zero{}, raised = splat(delta, zero);
  const PhiloxRounds rounds(list.key.seed);
  const uint64_t first = static_cast<uint64_t>(block) * kRowBlock / 4;
  constexpr int kStep = kWays * static_cast<int>(kBlockElements);
  static_assert(kRowBlock % kStep == 0);
  for (int i = 0; i < kRowBlock; i += kStep) {
    U32 word[kWays][4];
    philox_vectors(first + static_cast<uint64_t>(i) / 4, list.key, rounds, word);
    for (int v = 0; v < kWays; ++v) {
      F32 bias[4];
      for (int k = 0; k < 4; ++k) bias[k] = select(word[v][k] < list.threshold, raised, zero);
      in_order(bias);
      for (int k = 0; k < 4; ++k) {
        const int at = i + (4 * v + k) * kLanes;
        x.set(at, x.vector(at) + bias[k]);
      }
    }
  }
}

PYGEN_INLINE bool has_nan(const RowBlock& x) {
  I32 nan = {};
  for (int i = 0; i < kRowBlock; i += kLanes) nan |= x.vector(i) != x.vector(i);
  return lanes_of(nan) != 0;
}

// The sum of `count` numbers, a power of two, by halves.
PYGEN_INLINE double add_by_halves(double* v, int count) {
  for (int width = count / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
}

template <class Term>
PYGEN_INLINE double block_sum(Term term) {
  alignas(64) double partial[kRowPartials];
  for (int i = 0; i < kRowPartials; i += kLanes) {
    F32 sum = term(i);
    for (int j = i + kRowPartials; j < kRowBlock; j += kRowPartials) sum += term(j);
    for (int lane = 0; lane < kLanes; ++lane) partial[i + lane] = sum[lane];
  }
  return add_by_halves(partial, kRowPartials);
}

// What is taken off a block's logits before exp; nothing where all are -inf.
PYGEN_INLINE float block_center(float most) { return most == -kInfinity ? 0.0f : most; }

// weight / noise, of which the largest wins; what has no weight never does.
PYGEN_INLINE F32 race(F32 weight, F32 noise) {
  return select(weight > splat(0.0f, weight), weight / noise, splat(0.0f, weight));
}

// The sum of term(0 .. count), by 32 partial sums: those of a warp's lanes.
template <class Term>
PYGEN_INLINE double sum_by_lanes(int count, Term term) {
  double partial[kRowGroup] = {};
  for (int i = 0; i < count; ++i) partial[i % kRowGroup] += term(i);
  return add_by_halves(partial, kRowGroup);
}

// Joins n blocks. `factor` receives exp(rate (m_b - m)), by which a block's sums are multiplied.
[[maybe_unused]] inline RowSummary join_blocks(const BlockSummary* blocks, int n, double rate, double* factor) {
  RowSummary row{-kInfinity, -kInfinity, 0.0, 0.0, 0.0};
  for (int b = 0; b < n; ++b) {
    row.max = blocks[b].max > row.max ? blocks[b].max : row.max;
    row.others = blocks[b].others > row.others ? blocks[b].others : row.others;
  }
  for (int b = 0; b < n; ++b) factor[b] = exp_double(rate * block_below(blocks[b], row.max));
  row.sum = sum_by_lanes(n, [&](int b) { return blocks[b].sum * factor[b]; });
  row.raw = sum_by_lanes(n, [&](int b) { return blocks[b].raw * exp_double(block_below(blocks[b], row.max)); });
  row.moment = sum_by_lanes(n, [&](int b) {
    return factor[b] * (blocks[b].moment + blocks[b].sum * (rate * block_below(blocks[b], row.max)));
  });
  return row;
}

// The index that a uniform number chooses among n weights; `fraction` becomes a uniform number again, inside of it.
template <class Weight>
PYGEN_INLINE int pick_in_groups(int n, double& fraction, Weight weight) {
  double group[kRowGroup] = {}, total = 0.0, before = 0.0;
  for (int i = 0; i < n; ++i) group[i / kRowGroup] += weight(i);
  for (const double sum : group) total += sum;
  const double target = fraction * total;
  const int g = pick(0, kRowGroup, target, before, [&](int i) { return group[i]; });
  const int chosen = pick(g * kRowGroup, std::min(n, (g + 1) * kRowGroup), target, before, weight);
  const double inside = (target - before) / weight(chosen);
  fraction = inside < 0.0 ? 0.0 : inside > 1.0 ? 1.0 : inside;
  return chosen;
}

}  // namespace
}  // namespace pygen
