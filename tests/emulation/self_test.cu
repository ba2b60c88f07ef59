// The emulation's own test: small kernels that use each thing it offers, checked against plain loops. It is CUDA as it
// stands (nvcc compiles it), and the same kernels must run without a complaint under each sanitizer.
#ifdef PYGEN_EMULATION
#include "emulation.h"
#define LAUNCH(kernel, grid, block, shared, ...) pygen_emulation::launch(kernel, grid, block, shared, __VA_ARGS__)
#define LAUNCH_COOPERATIVE(kernel, grid, block, shared, ...) \
  pygen_emulation::launch_cooperative(kernel, grid, block, shared, __VA_ARGS__)
#else
#include <cooperative_groups.h>
#include <math_constants.h>
#define LAUNCH(kernel, grid, block, shared, ...) kernel<<<grid, block, shared>>>(__VA_ARGS__)
#define LAUNCH_COOPERATIVE LAUNCH
#define PYGEN_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char pygen_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(pygen_dynamic_shared)
__device__ void grid_sync() { cooperative_groups::this_grid().sync(); }
#endif

#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

constexpr unsigned kAll = 0xffffffff;

int failures = 0;
void expect(bool holds, const char* what) {
  if (holds) return;
  printf("failed: %s\n", what);
  ++failures;
}

template <class T>
__device__ T warp_sum(T value) {
  for (int lanes = warpSize / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAll, value, lanes);
  return value;
}

template <class T>
__device__ T block_sum(T value) {
  __shared__ T partial[32];
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
  value = warp_sum(value);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  value = lane < static_cast<int>(blockDim.x) / warpSize ? partial[lane] : T(0);
  __syncthreads();  // before the next call writes
  return warp_sum(value);
}

struct SumArgs {
  const int* in;
  int64_t n;
  int* block_sums;
  double* means;
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_kernel(SumArgs args) {
  int sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.n; i += int64_t{gridDim.x} * blockDim.x) {
    sum += __ldg(&args.in[i]);
  }
  const int total = block_sum(sum);
  const double mean = block_sum(static_cast<double>(sum)) / kThreads;
  if (threadIdx.x == 0) {
    args.block_sums[blockIdx.x] = total;
    args.means[blockIdx.x] = mean;
  }
}

void test_sum() {
  constexpr int kBlocks = 5, kThreads = 128;
  std::vector<int> in(3001), expected(kBlocks), got(kBlocks);
  std::vector<double> means(kBlocks);
  for (size_t i = 0; i < in.size(); ++i) {
    in[i] = static_cast<int>(i * 7919 % 1000) - 300;
    expected[i / kThreads % kBlocks] += in[i];
  }
  const SumArgs args{in.data(), static_cast<int64_t>(in.size()), got.data(), means.data()};
  LAUNCH(sum_kernel<kThreads>, kBlocks, kThreads, 0, args);
  expect(got == expected, "block sums");
  for (int i = 0; i < kBlocks; ++i) expect(means[i] == static_cast<double>(expected[i]) / kThreads, "block means");
}

__global__ void histogram_kernel(const unsigned char* in, int n, int* counts, float* weight,
                                 unsigned long long* lowest) {
  __shared__ int local[16];
  if (threadIdx.x < 16) local[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    atomicAdd(&local[in[i] % 16], 1);
    atomicAdd(weight, 0.5f);
    atomicMin(lowest, in[i]);
  }
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&counts[threadIdx.x], local[threadIdx.x]);
}

__global__ void bits_kernel(int* most, unsigned* any, unsigned* all, int* exchanged, unsigned long long* claimed) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicMax(most, i ^ 21);
  atomicOr(any, 1u << i % 32);
  atomicAnd(all, ~(1u << i % 7));
  atomicExch(exchanged, 9);
  atomicCAS(claimed, 0, 77);
}

void test_atomics() {
  std::vector<unsigned char> in(1000);
  std::vector<int> expected(16), counts(16);
  for (size_t i = 0; i < in.size(); ++i) {
    in[i] = static_cast<unsigned char>(3 + i * i % 251);
    ++expected[in[i] % 16];
  }
  float weight = 0;
  unsigned long long lowest = 1000, claimed = 0;
  LAUNCH(histogram_kernel, 3, 64, 0, in.data(), 1000, counts.data(), &weight, &lowest);
  expect(counts == expected && weight == 500.0f && lowest == 3, "histogram");
  int most = -1, exchanged = 0;
  unsigned any = 0, all = kAll;
  LAUNCH(bits_kernel, 2, 64, 0, &most, &any, &all, &exchanged, &claimed);
  expect(most == 127 && any == kAll && all == ~127u && exchanged == 9 && claimed == 77, "atomics");
}

// Everyone adds up what all blocks wrote, twice over, and what lies in shared memory outlives the meetings.
__global__ void grid_kernel(const int* in, int per_block, int* partial, int* out) {
  __shared__ int mine;
  const int first = blockIdx.x * per_block;
  const int sum = block_sum(static_cast<int>(threadIdx.x) < per_block ? in[first + threadIdx.x] : 0);
  if (threadIdx.x == 0) partial[blockIdx.x] = mine = sum;
  grid_sync();
  int total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += partial[i];
  grid_sync();
  if (threadIdx.x == 1) partial[blockIdx.x] = total - mine;
  grid_sync();
  if (threadIdx.x == 2) out[blockIdx.x] = partial[(blockIdx.x + 1) % gridDim.x];
}

void test_grid_sync() {
  constexpr int kBlocks = 6, kPerBlock = 50;
  std::vector<int> in(kBlocks * kPerBlock), sums(kBlocks), partial(kBlocks), out(kBlocks);
  int total = 0;
  for (size_t i = 0; i < in.size(); ++i) {
    in[i] = static_cast<int>(i * i % 97);
    sums[i / kPerBlock] += in[i];
    total += in[i];
  }
  LAUNCH_COOPERATIVE(grid_kernel, kBlocks, 64, 0, in.data(), kPerBlock, partial.data(), out.data());
  for (int i = 0; i < kBlocks; ++i) expect(out[i] == total - sums[(i + 1) % kBlocks], "grid sync");
}

// The last block to come adds up what the others left, which fences on both sides put in order.
__global__ void last_block_kernel(int* partial, unsigned* ticket, int* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = blockIdx.x + 1;
    __threadfence();
    last = atomicAdd(ticket, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 1) {
    for (unsigned i = 0; i < gridDim.x; ++i) *out += partial[i];
  }
}

void test_fence() {
  std::vector<int> partial(10);
  unsigned ticket = 0;
  int out = 0;
  LAUNCH(last_block_kernel, 10, 40, 0, partial.data(), &ticket, &out);
  expect(out == 55, "the last block");
}

// Three-dimensional blocks and grids: tiles of a batch of matrices.
template <class T>
__global__ void transpose_kernel(const T* in, T* out, int rows, int columns) {
  PYGEN_DYNAMIC_SHARED(T, tile);
  const int width = blockDim.x + 1, batch = blockIdx.z * blockDim.z + threadIdx.z;
  T* const mine = tile + threadIdx.z * blockDim.y * width;
  const int row = blockIdx.y * blockDim.y + threadIdx.y, column = blockIdx.x * blockDim.x + threadIdx.x;
  if (row < rows && column < columns)
    mine[threadIdx.y * width + threadIdx.x] = in[(batch * rows + row) * columns + column];
  __syncthreads();
  const int to_row = blockIdx.x * blockDim.x + threadIdx.y, to_column = blockIdx.y * blockDim.y + threadIdx.x;
  if (to_row < columns && to_column < rows) {
    out[(batch * columns + to_row) * rows + to_column] = mine[threadIdx.x * width + threadIdx.y];
  }
}

void test_transpose() {
  constexpr int kBatch = 4, kRows = 11, kColumns = 14;
  std::vector<double> in(kBatch * kRows * kColumns), out(in.size()), expected(in.size());
  for (int b = 0; b < kBatch; ++b) {
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        const int at = (b * kRows + i) * kColumns + j;
        in[at] = expected[(b * kColumns + j) * kRows + i] = at * 0.25;
      }
    }
  }
  LAUNCH(transpose_kernel<double>, dim3(4, 3, 2), dim3(4, 4, 2), 2 * 4 * 5 * sizeof(double), in.data(), out.data(),
         kRows, kColumns);
  expect(out == expected, "transposition");
}

struct Lanes {
  unsigned ballot, even, active, active_even;
  int any, all, all_of_few, up, down, across, first, count, both, either;
};

// Blocks of 40 threads: the second warp has 8 lanes, and a mask may name those that it lacks.
__global__ void lanes_kernel(Lanes* out) {
  const int i = threadIdx.x, lane = i % warpSize;
  Lanes r = {};
  r.count = __syncthreads_count(i % 3 == 0);
  r.both = __syncthreads_and(i < 39);
  r.either = __syncthreads_or(i == 39);
  r.ballot = __ballot_sync(kAll, i % 3 == 0);
  r.any = __any_sync(kAll, i == 33);
  r.all = __all_sync(kAll, i >= 32);
  r.up = __shfl_up_sync(kAll, i, 3, 8);
  r.down = __shfl_down_sync(kAll, i, 3, 8);
  r.across = __shfl_xor_sync(kAll, i, 5, 8);
  r.first = __shfl_sync(kAll, i, 10, 8);
  r.active = __activemask();
  if (lane % 2 == 0) {
    r.active_even = __activemask();
    r.even = __ballot_sync(0x55555555, lane < 4);
  } else {
    r.all_of_few = __all_sync(0xaaaaaaaa, lane % 2);
  }
  __syncwarp();
  out[i] = r;
}

void test_lanes() {
  std::vector<Lanes> out(40);
  LAUNCH(lanes_kernel, 1, 40, 0, out.data());
  for (int i = 0; i < 40; ++i) {
    const int first = i / 8 * 8, lane = i % 32, start = i - lane;
    const unsigned there = i < 32 ? kAll : 0xff;
    unsigned ballot = 0;
    for (int j = 0; j < 32; ++j) ballot |= ((start + j) % 3 == 0 ? 1u << j : 0) & there;
    const Lanes& r = out[i];
    expect(r.count == 14 && r.both == 0 && r.either != 0, "counting barriers");
    expect(r.ballot == ballot && (r.any != 0) == (i >= 32) && (r.all != 0) == (i >= 32), "votes");
    expect(r.up == (i % 8 < 3 ? i : i - 3) && r.down == (i % 8 > 4 ? i : i + 3), "shuffles up and down");
    expect(r.across == (i ^ 5) && r.first == first + 2, "shuffles");
    expect(r.active == there, "the active mask");
    const unsigned even = i % 2 ? 0 : there & 0x55555555;
    expect(r.active_even == even && r.even == (i % 2 ? 0u : 5u) && r.all_of_few == i % 2, "half a warp");
  }
}

// Threads that are done return; the others still meet in what is left of their warps.
__global__ void early_exit_kernel(int n, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const unsigned active = __activemask();
  const int lowest = __shfl_sync(active, i, 0);
  out[i] = 1000 * __popc(active) + lowest;
}

void test_early_exit() {
  std::vector<int> out(150);
  LAUNCH(early_exit_kernel, 3, 64, 0, 150, out.data());
  for (int i = 0; i < 150; ++i) expect(out[i] == 1000 * (i < 128 ? 32 : 22) + i / 32 * 32, "early exits");
}

// A warp at a time writes what its other lanes then read, with nothing but __syncwarp between.
__global__ void syncwarp_kernel(int* out) {
  __shared__ int values[64];
  for (int round = 1; round < 4; ++round) {
    values[threadIdx.x] = round * static_cast<int>(threadIdx.x);
    __syncwarp();
    out[threadIdx.x] += values[threadIdx.x ^ 31];
    __syncwarp();
  }
}

void test_syncwarp() {
  std::vector<int> out(64);
  LAUNCH(syncwarp_kernel, 1, 64, 0, out.data());
  for (int i = 0; i < 64; ++i) expect(out[i] == 6 * (i ^ 31), "syncwarp");
}

__constant__ float kWeights[4] = {0.5f, 1.0f, 2.0f, 4.0f};

__global__ void vectors_kernel(const float4* in, float2* out, unsigned* bits, int* dot) {
  const float4 v = in[threadIdx.x];
  float sum = __fmaf_rn(v.x, kWeights[0], __fmul_rn(v.y, kWeights[1]));
  sum = __fmaf_rn(v.z, kWeights[2], __fmaf_rn(v.w, kWeights[3], sum));
  out[threadIdx.x] = make_float2(sum, min(max(v.x, v.y), 2.0f));
  bits[threadIdx.x] = __float_as_uint(__uint2float_rn(__umulhi(0x80000000u, 6u)));
  *dot = __dp4a(0x01ff0203, 0x04030201, 10);
}

void test_vectors() {
  const std::vector<float4> in{make_float4(1, 2, 3, 4), make_float4(5, 6, 7, 8)};
  std::vector<float2> out(2);
  std::vector<unsigned> bits(2);
  int dots[2] = {};
  LAUNCH(vectors_kernel, 1, 1, 0, in.data(), out.data(), bits.data(), dots);
  LAUNCH(vectors_kernel, 1, 1, 0, in.data() + 1, out.data() + 1, bits.data() + 1, dots + 1);
  expect(out[0].x == 24.5f && out[0].y == 2.0f && out[1].x == 54.5f && out[1].y == 2.0f, "float4");
  expect(bits[1] == 0x40400000u && dots[0] == 4 - 3 + 4 + 3 + 10, "integer intrinsics");
}

struct AxpyArgs {
  float a;
  const float* x;
  float* y;
  int64_t n;
};

__global__ void axpy_kernel(AxpyArgs args) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < args.n) args.y[i] = __fmaf_rn(args.a, args.x[i], args.y[i]);
}

}  // namespace

// As the project's launchers look to Python: a pointer to the arguments.
extern "C" void axpy(const AxpyArgs* args) {
  LAUNCH(axpy_kernel, static_cast<unsigned>((args->n + 255) / 256), 256, 0, *args);
}

extern "C" int self_test() {
  test_sum();
  test_atomics();
  test_grid_sync();
  test_fence();
  test_transpose();
  test_lanes();
  test_early_exit();
  test_syncwarp();
  test_vectors();
  return failures;
}

int main() { return self_test() == 0 ? 0 : 1; }
