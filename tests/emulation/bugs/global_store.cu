// The last thread of the grid stores one element past the end of its array.
#include "bug.h"

template <bool kBug>
__global__ void global_store_kernel(float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (kBug ? i <= n : i < n) out[i] = 1.0f;
}

template <bool kBug>
bool global_store() {
  std::vector<float> out(100);
  pygen_emulation::launch(global_store_kernel<kBug>, 4, 32, 0, out.data(), 100);
  return out[99] == 1.0f;
}
PYGEN_BUG(global_store);
