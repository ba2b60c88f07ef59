#include "pygen/green_rule.h"

namespace pygen::cuda {
namespace {

inline constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    green_tokens_kernel(const __grid_constant__ GreenTokensArgs args, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) colour_token(args, i / args.green.capacity, i % args.green.capacity);
}

}  // namespace

void green_tokens(const GreenTokensArgs& args, void* stream) {
  const int64_t count = args.samples * args.green.capacity;
  PYGEN_LAUNCH(green_tokens_kernel, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), dim3(kThreads), 0,
               stream, args, count);
}

}  // namespace pygen::cuda
