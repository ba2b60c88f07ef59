#include "pygen/sample_gram.h"

#include "eights.h"

namespace pygen::cuda {
namespace {

inline constexpr int kRuns = kGramBlock / kGramRun;
static_assert(kRuns * kGramLanes == kThreads);

// A block of threads takes a block of elements, eight neighbouring threads a run of it.
template <int kVectors>
__global__ void __launch_bounds__(kThreads, 2)
    sample_gram_kernel(const __grid_constant__ SampleGramArgs args, const __grid_constant__ InnerSpace space) {
  constexpr int kSums = gram_sums(kVectors);
  const int64_t sample = blockIdx.x / args.blocks;
  const int lane = threadIdx.x % kGramLanes, run = threadIdx.x / kGramLanes;
  const int64_t begin = blockIdx.x % args.blocks * kGramBlock + run * kGramRun;
  const int64_t end = begin + kGramRun < space.count ? begin + kGramRun : space.count;

  double own[kSums] = {};
#pragma unroll 4
  for (int64_t element = begin + lane; element < end; element += kGramLanes) {
    double x[kVectors];
#pragma unroll
    for (int a = 0; a < kVectors; ++a) {
      const Operand& vector = args.vector[a];
      const int64_t offset = sample * vector.stride[0] + space.offset(vector, element);
      x[a] = load_one(static_cast<const char*>(vector.data) + offset * size_of(vector.dtype), vector.dtype);
    }
    int sum = 0;
#pragma unroll
    for (int a = 0; a < kVectors; ++a) own[sum++] += x[a];
#pragma unroll
    for (int a = 0; a < kVectors; ++a) {
#pragma unroll
      for (int b = a; b < kVectors; ++b, ++sum) own[sum] = __fma_rn(x[a], x[b], own[sum]);  // the product is exact
    }
  }

  __shared__ double runs[kRuns][kSums][kGramLanes];
  __shared__ double lanes[kSums][kGramLanes];
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) runs[run][sum][lane] = own[sum];
  __syncthreads();
  if (run < kSums) {
    double total = 0.0;
    for (int r = 0; r < kRuns; ++r) total += runs[r][run][lane];
    lanes[run][lane] = total;
  }
  __syncthreads();
  if (threadIdx.x < kSums) args.partials[blockIdx.x * kSums + threadIdx.x] = gram_lanes(lanes[threadIdx.x]);
}

__global__ void __launch_bounds__(kThreads, 2) sample_gram_entries_kernel(const __grid_constant__ SampleGramArgs args) {
  const int entries = gram_sums(args.n_vectors) + 1;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (entry < args.size[0] * entries) gram_entry(args, entry / entries, static_cast<int>(entry % entries));
}

}  // namespace

void sample_gram(const SampleGramArgs& args, void* stream) {
  constexpr decltype(&sample_gram_kernel<1>) of_vectors[] = {sample_gram_kernel<1>, sample_gram_kernel<2>,
                                                             sample_gram_kernel<3>, sample_gram_kernel<4>};
  const InnerSpace space(args.size, args.ndim, 1);
  const auto kernel = of_vectors[args.n_vectors - 1];
  PYGEN_LAUNCH(kernel, dim3(args.size[0] * args.blocks), dim3(kThreads), 0, stream, args, space);
  const int64_t entries = args.size[0] * (gram_sums(args.n_vectors) + 1);
  PYGEN_LAUNCH(sample_gram_entries_kernel, dim3((entries + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, args);
}

}  // namespace pygen::cuda
