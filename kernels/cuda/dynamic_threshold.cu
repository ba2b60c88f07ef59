#include "pygen/dynamic_threshold.h"

#include "eights.h"
#include "pygen/affine_row.h"
#include "pygen/order_statistics.h"

namespace pygen::cuda {
namespace {

using Eight = Pack<float, kEight>;

inline constexpr int kWarp = 32;
inline constexpr int kBinsEach = kBins / kThreads;
inline constexpr int64_t kPerBlock = 8 * kThreads * kEight;

// Ends a pass: each thread adds up its bins, a scan says how many elements lie before them, and the one thread whose
// bins hold the rank finds the digit. `selection` lies in shared memory.
__device__ void settle(const DynamicThresholdArgs& args, int pass, const Digit& digit, Selection& selection) {
  __shared__ uint32_t warp_counts[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int which = 0; which < 2; ++which) {
    const uint32_t rank = pass == 0 ? first_rank(args, selection.counts, which) : selection.rank[which];
    uint32_t counts[kBinsEach], own = 0;
#pragma unroll
    for (int i = 0; i < kBinsEach; ++i) {
      own += counts[i] = digit.counted(selection.counts, which, threadIdx.x * kBinsEach + i);
    }
    uint32_t through = own;
    for (int delta = 1; delta < kWarp; delta *= 2) {
      const uint32_t below = __shfl_up_sync(0xffffffffu, through, delta);
      if (lane >= delta) through += below;
    }
    if (lane == kWarp - 1) warp_counts[warp] = through;
    __syncthreads();
    uint32_t before = through - own;
    for (int i = 0; i < warp; ++i) before += warp_counts[i];
#pragma unroll
    for (int i = 0; i < kBinsEach; ++i) {
      if (rank >= before && rank - before < counts[i]) {
        selection.prefix[which] = digit.append(which, threadIdx.x * kBinsEach + i);
        selection.rank[which] = rank - before;
      }
      before += counts[i];
    }
    __syncthreads();
  }
}

// Passes [first, last). A block that has a sample alone makes all of them; else a launch makes one, and the last block
// of a sample to arrive ends it.
__global__ void __launch_bounds__(kThreads, 2)
    dynamic_threshold_kernel(const __grid_constant__ DynamicThresholdArgs args,
                             const __grid_constant__ InnerSpace space, uint32_t eights, int64_t per_row, int first,
                             int last) {
  const AffineStepArgs& step = args.step;
  const int64_t sample = blockIdx.x / per_row, begin = blockIdx.x % per_row * kPerBlock;
  const int64_t end = begin + kPerBlock < space.count ? begin + kPerBlock : space.count;
  const bool alone = per_row == 1;
  Selection* const all = alone ? nullptr : args.selection + sample;

  __shared__ AffineRow row;
  __shared__ Selection selection;
  __shared__ bool ends;
  if (threadIdx.x == 0) affine_read_row(step, step.rows[sample * step.rows_stride[0]], sample, row);
  if (threadIdx.x < 2) {
    selection.prefix[threadIdx.x] = first == 0 ? 0 : all->prefix[threadIdx.x];
    selection.rank[threadIdx.x] = first == 0 ? 0 : all->rank[threadIdx.x];
  }
  for (int pass = first; pass < last; ++pass) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) selection.counts[0][bin] = selection.counts[1][bin] = 0;
    __syncthreads();
    const Digit digit(pass, selection.prefix);
    for (int64_t element = begin + threadIdx.x * kEight; element < end; element += kThreads * kEight) {
      const int valid = end - element < kEight ? static_cast<int>(end - element) : kEight;
      const auto load = [&](int t) {
        Eight values;
        space.load(step.term[t], eights >> t & 1u, sample * step.term[t].stride[0], element, valid, values.v);
        return values;
      };
      Eight x, out, pred;
      affine_pred(row, load, x, out, pred);
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        if (i >= valid) break;
        const uint32_t key = magnitude_key(pred.v[i]), settled = digit.settled(key);
        const bool second = settled == digit.prefix[1];
        if (!second && settled != digit.prefix[0]) continue;
        atomicAdd(&selection.counts[digit.which(second, threadIdx.x)][digit.bin(key)], 1u);
      }
    }
    __syncthreads();
    if (!alone) {
      for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
        for (int which = 0; which < 2; ++which) {
          const uint32_t count = selection.counts[which][bin];
          if (count != 0) atomicAdd(&all->counts[which][bin], count);
        }
      }
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) ends = atomicAdd(&all->arrived, 1u) == per_row - 1;
      __syncthreads();
      if (!ends) return;
      __threadfence();
      for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
        for (int which = 0; which < 2; ++which) {
          selection.counts[which][bin] = all->counts[which][bin];
          all->counts[which][bin] = 0;
        }
      }
      __syncthreads();
    }
    settle(args, pass, digit, selection);
  }
  if (last < kPasses) {
    if (threadIdx.x < 2) {
      all->prefix[threadIdx.x] = selection.prefix[threadIdx.x];
      all->rank[threadIdx.x] = selection.rank[threadIdx.x];
    }
    if (threadIdx.x == 0) all->arrived = 0;
    return;
  }
  const float s = threshold(args, selection.prefix);
  for (int64_t column = threadIdx.x; column < args.columns; column += kThreads) {
    args.factors[sample * args.factors_stride[0] + column * args.factors_stride[1]] = threshold_factor(s, column);
  }
}

}  // namespace

bool dynamic_threshold_needs_selections(const DynamicThresholdArgs& args) { return args.sample_elements > kPerBlock; }

void dynamic_threshold(const DynamicThresholdArgs& args, void* stream) {
  const InnerSpace space(args.step.size, args.step.ndim, 1);
  uint32_t eights = 0;
  for (int t = 0; t < kTermHistory; ++t) {
    if (args.step.term[t].data != nullptr && space.in_eights(args.step.term[t])) eights |= 1u << t;
  }
  const int64_t per_row = (args.sample_elements + kPerBlock - 1) / kPerBlock;
  const int passes = per_row == 1 ? kPasses : 1;
  for (int first = 0; first < kPasses; first += passes) {
    PYGEN_LAUNCH(dynamic_threshold_kernel, dim3(args.step.size[0] * per_row), dim3(kThreads), 0, stream, args, space,
                 eights, per_row, first, first + passes);
  }
}

}  // namespace pygen::cuda
