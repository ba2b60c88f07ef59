// A sum over shared memory of which only a part was written: on a GPU it often holds zeros, or the last block's values.
#include "bug.h"

template <bool kBug>
__global__ void uninitialised_static_kernel(float* out) {
  __shared__ float partial[32];
  if (threadIdx.x < (kBug ? 2 : 32)) partial[threadIdx.x] = threadIdx.x < 2 ? 1.0f : 0.0f;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 32; ++i) sum += partial[i];
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <bool kBug>
__global__ void uninitialised_dynamic_kernel(float* out) {
  PYGEN_DYNAMIC_SHARED(int, flags);
  if (threadIdx.x < (kBug ? 2 : 32)) flags[threadIdx.x] = threadIdx.x < 2;
  __syncthreads();
  int count = 0;
  for (int i = 0; i < 32; ++i) count += flags[i] != 0;
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<float>(count);
}

template <bool kBug>
bool uninitialised_static() {
  std::vector<float> out(8);
  pygen_emulation::launch(uninitialised_static_kernel<kBug>, 8, 32, 0, out.data());
  return out == std::vector<float>(8, 2.0f);
}
PYGEN_BUG(uninitialised_static);

template <bool kBug>
bool uninitialised_dynamic() {
  std::vector<float> out(8);
  pygen_emulation::launch(uninitialised_dynamic_kernel<kBug>, 8, 32, 32 * sizeof(int), out.data());
  return out == std::vector<float>(8, 2.0f);
}
PYGEN_BUG(uninitialised_dynamic);
