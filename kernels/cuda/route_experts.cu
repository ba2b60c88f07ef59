#include "pygen/route_experts_rule.h"

namespace pygen::cuda {
namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;
static_assert(kRouteSums == kWarp);

// A warp to each row. A choice is the first, in the order of chosen_before, of those behind the last choice.
__global__ void __launch_bounds__(kWarp) route_experts_kernel(const __grid_constant__ RouteExpertsArgs args) {
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x;
  const auto logit = [&](int64_t i) {
    const int64_t at = row * args.logits.stride[0] + i * args.logits.stride[1];
    return load_one(static_cast<const char*>(args.logits.data) + at * size_of(args.logits.dtype), args.logits.dtype);
  };
  float largest = -__builtin_inff(), sum = 0.0f;
  for (int64_t i = lane; i < args.count; i += kWarp) largest = max(logit(i), largest);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) largest = max(__shfl_xor_sync(kWholeWarp, largest, step), largest);
  for (int64_t i = lane; i < args.count; i += kWarp) sum += exp(logit(i) - largest);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
  float last = 0.0f;
  int64_t last_expert = -1;
  for (int64_t choice = 0; choice < args.choices; ++choice) {
    float best = 0.0f;
    int64_t expert = -1;
    for (int64_t i = lane; i < args.count; i += kWarp) {
      const float x = logit(i);
      if (last_expert >= 0 && !chosen_before(last, last_expert, x, i)) continue;
      if (expert < 0 || chosen_before(x, i, best, expert)) best = x, expert = i;
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kWholeWarp, best, step);
      const int64_t other_expert = __shfl_xor_sync(kWholeWarp, expert, step);
      if (other_expert >= 0 && (expert < 0 || chosen_before(other, other_expert, best, expert))) {
        best = other, expert = other_expert;
      }
    }
    last = best, last_expert = expert;
    if (lane == 0) args.weights.at(row, choice) = best, args.experts.at(row, choice) = expert;
  }
  if (lane == 0) route_weights(args, row, largest, sum);
}

}  // namespace

void route_experts(const RouteExpertsArgs& args, void* stream) {
  PYGEN_LAUNCH(route_experts_kernel, dim3(static_cast<unsigned>(args.rows)), dim3(kWarp), 0, stream, args);
}

}  // namespace pygen::cuda
