#include "pygen/route_token.h"

#include "pygen/route_rule.h"
#include "token_row.h"

namespace pygen::cuda {
namespace {

__global__ void __launch_bounds__(kRowThreads)
    route_token_kernel(const __grid_constant__ RouteTokenArgs args, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (i < count) route_position(args, i / args.positions, i % args.positions);
}

}  // namespace

void route_token(const RouteTokenArgs& args, void* stream) {
  const int64_t count = args.samples * args.positions;
  PYGEN_LAUNCH(route_token_kernel, dim3(static_cast<unsigned>((count + kRowThreads - 1) / kRowThreads)),
               dim3(kRowThreads), 0, stream, args, count);
}

}  // namespace pygen::cuda
