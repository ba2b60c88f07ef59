#include "pygen/unmask_step.h"

#include "pygen/unmask_rule.h"
#include "token_row.h"

namespace pygen::cuda {
namespace {

inline constexpr int64_t kSharedKeys = 4096;  // more are sorted in global memory

int64_t padded(int64_t positions) {
  int64_t size = 1;
  while (size < positions) size *= 2;
  return size;
}

// A block of threads to every sample: bitonic sort, then a thread to every rank.
__global__ void __launch_bounds__(kRowThreads, 2)
    unmask_step_kernel(const __grid_constant__ UnmaskStepArgs args, int64_t padded) {
  PYGEN_DYNAMIC_SHARED(uint64_t, shared);
  __shared__ unsigned long long candidates;
  __shared__ int64_t limit;
  const int64_t sample = blockIdx.x;
  uint64_t* keys = args.workspace != nullptr ? args.workspace + sample * padded : shared;
  if (threadIdx.x == 0) candidates = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (int64_t i = threadIdx.x; i < padded; i += kRowThreads) {
    const UnmaskKey key = i < args.positions ? unmask_key(args, sample, i) : UnmaskKey{~uint64_t{0}};
    keys[i] = key.bits;
    mine += key.candidate();
  }
  atomicAdd(&candidates, mine);
  __syncthreads();
  for (int64_t run = 2; run <= padded; run *= 2) {
    for (int64_t step = run / 2; step > 0; step /= 2) {
      for (int64_t i = threadIdx.x; i < padded; i += kRowThreads) {
        const int64_t other = i ^ step;
        if (other < i) continue;
        const uint64_t a = keys[i], b = keys[other];
        if ((a > b) == ((i & run) == 0)) keys[i] = b, keys[other] = a;
      }
      __syncthreads();
    }
  }
  if (threadIdx.x == 0) {
    const int64_t n = static_cast<int64_t>(candidates), by_rank = unmask_count(args, sample, n);
    const int64_t by_budget = unmask_within_budget(args, sample, n, [&](int64_t i) { return keys[i]; });
    limit = by_rank > by_budget ? by_rank : by_budget;
  }
  __syncthreads();
  const UnmaskKey last{keys[limit > 0 ? limit - 1 : 0]};
  for (int64_t rank = threadIdx.x; rank < args.positions; rank += kRowThreads) {
    unmask_write(args, sample, rank, {keys[rank]}, limit, last);
  }
}

}  // namespace

int64_t unmask_step_workspace(int64_t samples, int64_t positions) {
  return padded(positions) <= kSharedKeys ? 0 : samples * padded(positions);
}

void unmask_step(const UnmaskStepArgs& args, void* stream) {
  const int64_t size = padded(args.positions);
  const int64_t bytes = args.workspace != nullptr ? 0 : size * static_cast<int64_t>(sizeof(uint64_t));
  PYGEN_LAUNCH(unmask_step_kernel, dim3(static_cast<unsigned>(args.samples)), dim3(kRowThreads),
               static_cast<size_t>(bytes), stream, args, size);
}

}  // namespace pygen::cuda
