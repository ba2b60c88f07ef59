#include "pygen/rope.h"

#include "head_row.h"

namespace pygen::cuda {
namespace {

template <DType kDType>
__global__ void __launch_bounds__(kWarp* kMostWarps, 4) rope_kernel(const __grid_constant__ RopeArgs args) {
  const int64_t sequence = blockIdx.x / args.length, token = blockIdx.x % args.length;
  const HeadTurn turn{rope_angles(args.table, args.positions.at(sequence, token)), args.table.pairs,
                      args.table.interleaved, args.inverse};
  for (int64_t head = threadIdx.x / kWarp; head < args.heads; head += blockDim.x / kWarp) {
    const HeadRow<kDType> x(args.x, sequence, head, token), out(args.out, sequence, head, token);
    convert(
        args.norm, args.eps, turn, args.head_dim, [&](int i) { return x.load(i); },
        [&](int i, float value) { out.store(i, value); });
  }
}

}  // namespace

void rope(const RopeArgs& args, void* stream) {
  const auto kernel =
      of_dtype(args.x.dtype, rope_kernel<DType::kFloat32>, rope_kernel<DType::kBFloat16>, rope_kernel<DType::kFloat16>);
  PYGEN_LAUNCH(kernel, dim3(static_cast<unsigned>(args.batch * args.length)), head_threads(args.heads), 0, stream,
               args);
}

}  // namespace pygen::cuda
