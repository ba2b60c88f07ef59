// A float4 read from an address that is aligned for a float only: on a GPU the launch dies.
#include "bug.h"

template <bool kBug>
__global__ void misaligned_kernel(const float* in, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(in + (kBug ? 1 : 4) + 4 * threadIdx.x);
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

template <bool kBug>
bool misaligned() {
  alignas(16) const float in[136] = {};
  std::vector<float> out(32, 1.0f);
  pygen_emulation::launch(misaligned_kernel<kBug>, 1, 32, 0, &in[0], out.data());
  return out[31] == 0.0f;
}
PYGEN_BUG(misaligned);
