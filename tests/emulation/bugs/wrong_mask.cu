// Shuffles and votes with a mask that names a lane which has exited or waits elsewhere, that leaves out the caller, or
// that leaves out the lane that is read.
#include "bug.h"

constexpr unsigned kAll = 0xffffffff;

template <bool kBug>
__global__ void exited_lane_kernel(int* out) {
  if (threadIdx.x >= 20) return;
  out[threadIdx.x] = __ballot_sync(kBug ? kAll : 0xfffff, 1);
}

template <bool kBug>
__global__ void lane_elsewhere_kernel(int* out) {
  int value = threadIdx.x;
  if (threadIdx.x < 16) value = __shfl_xor_sync(kBug ? kAll : 0xffff, value, 1);
  __syncwarp();
  out[threadIdx.x] = value;
}

template <bool kBug>
__global__ void caller_not_in_mask_kernel(int* out) {
  out[threadIdx.x] = __any_sync(kBug ? 0xffff : kAll, 1);
}

template <bool kBug>
__global__ void source_not_in_mask_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffff, threadIdx.x, kBug ? 16 : 15);
}

template <bool kBug>
__global__ void source_beyond_block_kernel(int* out) {
  int value = threadIdx.x;
  for (int lanes = kBug ? 16 : 4; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAll, value, lanes);
  out[threadIdx.x] = value;
}

template <class Kernel>
int last_of(Kernel kernel, int threads) {
  std::vector<int> out(threads);
  pygen_emulation::launch(kernel, 1, threads, 0, out.data());
  return out[threads - 1];
}

template <bool kBug>
bool exited_lane() {
  std::vector<int> out(32);
  pygen_emulation::launch(exited_lane_kernel<kBug>, 1, 32, 0, out.data());
  return out[19] == 0xfffff;
}
PYGEN_BUG(exited_lane);

template <bool kBug>
bool lane_elsewhere() {
  return last_of(lane_elsewhere_kernel<kBug>, 32) == 31;
}
PYGEN_BUG(lane_elsewhere);

template <bool kBug>
bool caller_not_in_mask() {
  return last_of(caller_not_in_mask_kernel<kBug>, 32) == 1;
}
PYGEN_BUG(caller_not_in_mask);

template <bool kBug>
bool source_not_in_mask() {
  std::vector<int> out(32);
  pygen_emulation::launch(source_not_in_mask_kernel<kBug>, 1, 32, 0, out.data());
  return out[7] == 15;
}
PYGEN_BUG(source_not_in_mask);

template <bool kBug>
bool source_beyond_block() {
  return last_of(source_beyond_block_kernel<kBug>, 8) == 28;
}
PYGEN_BUG(source_beyond_block);
