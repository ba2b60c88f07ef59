// Blocks that read what other blocks wrote without meeting them; blocks that add to one number without an atomic; and a
// last block that adds up what the others wrote without fences.
#include "bug.h"

template <bool kBug>
__global__ void missing_grid_sync_kernel(int* partial, int* out) {
  if (threadIdx.x == 0) partial[blockIdx.x] = blockIdx.x + 1;
  kBug ? __syncthreads() : grid_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = partial[(blockIdx.x + 1) % gridDim.x];
}

template <bool kBug>
__global__ void missing_atomic_kernel(int* sum) {
  if (threadIdx.x != 0) return;
  if (kBug) {
    *sum += 1;
  } else {
    atomicAdd(sum, 1);
  }
}

template <bool kBug>
__global__ void missing_fence_kernel(int* partial, unsigned* ticket, int* out) {
  partial[blockIdx.x] = blockIdx.x + 1;
  if (!kBug) __threadfence();
  if (atomicAdd(ticket, 1) != gridDim.x - 1) return;
  if (!kBug) __threadfence();
  for (unsigned i = 0; i < gridDim.x; ++i) *out += partial[i];
}

template <bool kBug>
bool missing_grid_sync() {
  std::vector<int> partial(4), out(4);
  pygen_emulation::launch_cooperative(missing_grid_sync_kernel<kBug>, 4, 32, 0, partial.data(), out.data());
  return out == std::vector{2, 3, 4, 1};
}
PYGEN_BUG(missing_grid_sync);

template <bool kBug>
bool missing_atomic() {
  int sum = 0;
  pygen_emulation::launch(missing_atomic_kernel<kBug>, 8, 32, 0, &sum);
  return sum == 8;
}
PYGEN_BUG(missing_atomic);

template <bool kBug>
bool missing_fence() {
  std::vector<int> partial(8);
  unsigned ticket = 0;
  int out = 0;
  pygen_emulation::launch(missing_fence_kernel<kBug>, 8, 1, 0, partial.data(), &ticket, &out);
  return out == 36;
}
PYGEN_BUG(missing_fence);
