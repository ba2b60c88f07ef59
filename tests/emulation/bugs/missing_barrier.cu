// A reduction in shared memory without a barrier between its steps; the same reduction used twice without a barrier
// between the uses; and a warp's exchange through shared memory with a shuffle, which orders nothing, for its barrier.
#include "bug.h"

template <bool kBarriers>
__device__ int reduce(int value) {
  __shared__ int values[128];
  values[threadIdx.x] = value;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (kBarriers) __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  __syncthreads();
  return values[0];
}

template <bool kBug>
__global__ void missing_barrier_kernel(int* out) {
  const int sum = reduce<!kBug>(threadIdx.x);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <bool kBug>
__global__ void missing_barrier_between_uses_kernel(int* out) {
  const int first = reduce<true>(1);
  if (!kBug) __syncthreads();
  const int second = reduce<true>(threadIdx.x);
  if (threadIdx.x == 0) out[blockIdx.x] = first + second - 128;
}

template <bool kBug>
__global__ void shuffle_for_barrier_kernel(int* out) {
  __shared__ int values[32];
  values[threadIdx.x] = threadIdx.x;
  kBug ? static_cast<void>(__shfl_sync(0xffffffff, 0, 0)) : __syncwarp();
  const int other = values[31 - threadIdx.x];
  atomicAdd(&out[blockIdx.x], other);
}

template <bool kBug>
bool missing_barrier() {
  std::vector<int> out(2);
  pygen_emulation::launch(missing_barrier_kernel<kBug>, 2, 128, 0, out.data());
  return out[1] == 127 * 64;
}
PYGEN_BUG(missing_barrier);

template <bool kBug>
bool missing_barrier_between_uses() {
  std::vector<int> out(2);
  pygen_emulation::launch(missing_barrier_between_uses_kernel<kBug>, 2, 128, 0, out.data());
  return out[1] == 127 * 64;
}
PYGEN_BUG(missing_barrier_between_uses);

template <bool kBug>
bool shuffle_for_barrier() {
  std::vector<int> out(2);
  pygen_emulation::launch(shuffle_for_barrier_kernel<kBug>, 2, 32, 0, out.data());
  return out[1] == 31 * 16;
}
PYGEN_BUG(shuffle_for_barrier);
