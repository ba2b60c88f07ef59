// A store one element past a static and past a dynamic array in shared memory, through a pointer, where no bound is
// known to the compiler.
#include "bug.h"

__device__ __attribute__((noinline)) void fill(float* shared, int at) { shared[at] = static_cast<float>(threadIdx.x); }

template <bool kBug>
__global__ void static_shared_store_kernel(float* out) {
  __shared__ float tile[64];
  fill(tile, kBug ? threadIdx.x + 1 : threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

template <bool kBug>
__global__ void dynamic_shared_store_kernel(float* out) {
  PYGEN_DYNAMIC_SHARED(float, tile);
  fill(tile, kBug ? threadIdx.x + 1 : threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

template <bool kBug>
bool static_shared_store() {
  std::vector<float> out(64);
  pygen_emulation::launch(static_shared_store_kernel<kBug>, 1, 64, 0, out.data());
  return out[63] == 0.0f;
}
PYGEN_BUG(static_shared_store);

template <bool kBug>
bool dynamic_shared_store() {
  std::vector<float> out(64);
  pygen_emulation::launch(dynamic_shared_store_kernel<kBug>, 1, 64, 64 * sizeof(float), out.data());
  return out[63] == 0.0f;
}
PYGEN_BUG(dynamic_shared_store);
