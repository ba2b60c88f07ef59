#include "pygen/combine_experts.h"

#include "eights.h"

namespace pygen::cuda {
namespace {

// A block to each row, whose threads take eight elements at a time.
__global__ void __launch_bounds__(kThreads)
    combine_experts_kernel(const __grid_constant__ CombineExpertsArgs args, bool eights) {
  const int64_t row = blockIdx.x;
  for (int64_t first = threadIdx.x * kEight; first < args.width; first += blockDim.x * kEight) {
    const int count = args.width - first < kEight ? static_cast<int>(args.width - first) : kEight;
    const auto place = [&](const Operand& operand, int64_t choice) {
      const int64_t offset = row * operand.stride[0] + choice * operand.stride[1] + first;
      return static_cast<char*>(operand.data) + offset * size_of(operand.dtype);
    };
    float sum[kEight] = {};
    for (int64_t choice = 0; choice < args.choices; ++choice) {
      float x[kEight] = {};
      load_neighbours(place(args.x, choice), args.x.dtype, eights, count, x);
      const float weight = args.weights.at(row, choice);
#pragma unroll
      for (int i = 0; i < kEight; ++i) sum[i] = fma(x[i], weight, sum[i]);
    }
    if (args.residual.data != nullptr) {
      float residual[kEight] = {};
      load_neighbours(place(args.residual, 0), args.residual.dtype, eights, count, residual);
#pragma unroll
      for (int i = 0; i < kEight; ++i) sum[i] += residual[i];
    }
    store_neighbours(place(args.out, 0), args.out.dtype, eights, count, sum);
  }
}

}  // namespace

void combine_experts(const CombineExpertsArgs& args, void* stream) {
  const bool eights = rows_in_eights(args.x.data, args.width, args.x.stride[0], args.x.stride[1]) &&
                      rows_in_eights(args.residual.data, args.width, args.residual.stride[0]) &&
                      rows_in_eights(args.out.data, args.width, args.out.stride[0]);
  PYGEN_LAUNCH(combine_experts_kernel, dim3(static_cast<unsigned>(args.rows)),
               dim3(static_cast<unsigned>(Blocks(args.rows, args.width).threads)), 0, stream, args, eights);
}

}  // namespace pygen::cuda
