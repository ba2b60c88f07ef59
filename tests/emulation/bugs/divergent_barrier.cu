// Barriers that not every thread comes to: some have exited, some wait at another barrier, some blocks have ended.
#include "bug.h"

template <bool kBug>
__global__ void exit_before_barrier_kernel(int* out, int n) {
  const int i = threadIdx.x;
  if (kBug && i >= n) return;
  __syncthreads();
  if (i < n) out[i] = i;
}

template <bool kBug>
__global__ void barriers_apart_kernel(int* out) {
  if (threadIdx.x < 32) {
    out[threadIdx.x] = 1;
    if (kBug) __syncthreads();
  } else {
    out[threadIdx.x] = 2;
    if (kBug) __syncthreads();
  }
  __syncthreads();
}

template <bool kBug>
__global__ void block_misses_grid_sync_kernel(int* out) {
  if (kBug && blockIdx.x == 1) return;
  grid_sync();
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

template <bool kBug>
__global__ void grid_sync_without_a_grid_kernel(int* out) {
  grid_sync();
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

template <bool kBug>
bool exit_before_barrier() {
  std::vector<int> out(50);
  pygen_emulation::launch(exit_before_barrier_kernel<kBug>, 1, 64, 0, out.data(), 50);
  return out[49] == 49;
}
PYGEN_BUG(exit_before_barrier);

template <bool kBug>
bool barriers_apart() {
  std::vector<int> out(64);
  pygen_emulation::launch(barriers_apart_kernel<kBug>, 1, 64, 0, out.data());
  return out[63] == 2;
}
PYGEN_BUG(barriers_apart);

template <bool kBug>
bool block_misses_grid_sync() {
  std::vector<int> out(96);
  pygen_emulation::launch_cooperative(block_misses_grid_sync_kernel<kBug>, 3, 32, 0, out.data());
  return out[95] == 1;
}
PYGEN_BUG(block_misses_grid_sync);

template <bool kBug>
bool grid_sync_without_a_grid() {
  std::vector<int> out(32);
  if (kBug) {
    pygen_emulation::launch(grid_sync_without_a_grid_kernel<kBug>, 1, 32, 0, out.data());
  } else {
    pygen_emulation::launch_cooperative(grid_sync_without_a_grid_kernel<kBug>, 1, 32, 0, out.data());
  }
  return out[31] == 1;
}
PYGEN_BUG(grid_sync_without_a_grid);

template <bool kBug>
bool grid_too_large() {
  std::vector<int> out(512);
  pygen_emulation::launch_cooperative(block_misses_grid_sync_kernel<false>, kBug ? 512 : 8, 1, 0, out.data());
  return out[7] == 1;
}
PYGEN_BUG(grid_too_large);
