// What the sanitizers must find before their silence over the real kernels means anything.
#include <cstdio>
#include <cstring>

__global__ void stores_one_past_the_end(float* out, int count) { out[threadIdx.x + 1] = static_cast<float>(count); }

__global__ void sums_without_a_barrier(float* out) {
  __shared__ float partial[64];
  partial[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (float value : partial) sum += value;
    *out = sum;
  }
}

int main(int argc, char** argv) {
  float* out;
  cudaMalloc(&out, 64 * sizeof(float));
  if (argc > 1 && std::strcmp(argv[1], "memcheck") == 0) {
    stores_one_past_the_end<<<1, 64>>>(out, 64);
  } else {
    sums_without_a_barrier<<<1, 64>>>(out);
  }
  std::printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
