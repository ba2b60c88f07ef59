#include "pygen/philox_normal.h"

#include "eights.h"

namespace pygen::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 2)
    philox_normal_kernel(const __grid_constant__ PhiloxNormalArgs args, const __grid_constant__ InnerSpace space,
                         bool eights, int64_t per_block, int64_t per_row) {
  const int64_t sample = blockIdx.x / per_row, begin = blockIdx.x % per_row * per_block;
  const int64_t end = begin + per_block < space.count ? begin + per_block : space.count;
  const PhiloxKey key{
      static_cast<uint64_t>(args.seed[sample * args.seed_stride]), args.draw,
      static_cast<uint32_t>(args.step[sample * args.step_stride]),
      static_cast<uint32_t>(args.sample_ids ? args.sample_ids[sample * args.sample_ids_stride] : sample)};
  for (int64_t element = begin + threadIdx.x * kEight; element < end; element += blockDim.x * kEight) {
    float z[kEight];
    normal_eight(element, key, z);
    const int64_t left = end - element;
    space.store(args.out, eights, sample * args.out.stride[0], element, left < kEight ? left : kEight, z);
  }
}

}  // namespace

void philox_normal(const PhiloxNormalArgs& args, void* stream) {
  const InnerSpace space(args.size, args.ndim, 1);
  const Blocks blocks(args.size[0], space.count);
  PYGEN_LAUNCH(philox_normal_kernel, dim3(blocks.count), dim3(blocks.threads), 0, stream, args, space,
               space.in_eights(args.out), blocks.per_block, blocks.per_row);
}

}  // namespace pygen::cuda
