#include "pygen/diffusion_loss.h"

#include "eights.h"
#include "pygen/diffusion_loss_row.h"
#include "pygen/philox_normal.h"

namespace pygen::cuda {
namespace {

using Eight = Pack<float, kEight>;

// Bits of `eights`: the terms, then the gradients.
inline constexpr int kGradientBit = kLossTerms;

// The sum of a block's numbers by halves, in its first thread.
PYGEN_INLINE double by_halves(double value, double* sums) {
  sums[threadIdx.x] = value;
  __syncthreads();
  for (uint32_t width = blockDim.x / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    __syncthreads();
  }
  return sums[0];
}

// A block to a segment. Threads that are left out where a segment is short would add zeros.
__global__ void __launch_bounds__(kLossEights, 4)
    diffusion_loss_kernel(const __grid_constant__ DiffusionLossArgs args, const __grid_constant__ InnerSpace space,
                          uint32_t eights) {
  const int64_t place = blockIdx.x / args.segments, begin = blockIdx.x % args.segments * kLossSegment;
  const int64_t sample = place / args.size[1], token = place % args.size[1];
  const int64_t end = begin + kLossSegment < space.count ? begin + kLossSegment : space.count;

  __shared__ LossRow row;
  if (threadIdx.x == 0) {
    loss_read_row(args, args.rows[sample * args.rows_stride[0] + token * args.rows_stride[1]], sample, row);
  }
  __syncthreads();
  const auto base = [&](const Operand& operand) { return sample * operand.stride[0] + token * operand.stride[1]; };
  const bool by_philox = args.seed != nullptr;
  PhiloxKey key{};
  if (by_philox) {
    const int64_t id = args.sample_ids ? args.sample_ids[sample * args.sample_ids_stride] : sample;
    key = {static_cast<uint64_t>(args.seed[sample * args.seed_stride]), kDrawAffineStep, row.step,
           static_cast<uint32_t>(id)};
  }

  Eight lanes{};
  for (int64_t element = begin + threadIdx.x * kEight; element < end; element += kLossLanes) {
    const int valid = end - element < kEight ? static_cast<int>(end - element) : kEight;
    const auto load = [&](int t) {
      Eight values;
      if (t == kLossTermNoise && by_philox) {
        normal_eight(token * space.count + element, key, values.v);
      } else {
        space.load(args.term[t], eights >> t & 1u, base(args.term[t]), element, valid, values.v);
      }
      return values;
    };
    Eight value, gradient, variance_gradient;
    loss_row(args, row, load, value, gradient, variance_gradient);
#pragma unroll
    for (int i = 0; i < kEight; ++i) lanes.v[i] += i < valid ? value.v[i] : 0.0f;
    for (int g = 0; g < kLossGradients; ++g) {
      const Operand& operand = args.gradient[g];
      if (operand.data == nullptr) continue;
      const Eight values = loss_gradient(row, g, gradient, variance_gradient);
      space.store(operand, eights >> (kGradientBit + g) & 1u, base(operand), element, valid, values.v);
    }
  }
  if (args.partial == nullptr) return;
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kEight; ++i) sum += lanes.v[i];
  __shared__ double sums[kLossEights];
  sum = by_halves(sum, sums);
  if (threadIdx.x == 0) args.partial[blockIdx.x] = sum;
}

// A block to a sample.
__global__ void __launch_bounds__(kMeanLanes) diffusion_loss_mean(const __grid_constant__ DiffusionLossArgs args) {
  const int64_t count = args.size[1] * args.segments, sample = blockIdx.x;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kMeanLanes) sum += args.partial[sample * count + i];
  __shared__ double sums[kMeanLanes];
  sum = by_halves(sum, sums);
  if (threadIdx.x == 0) {
    const double mean = sum / static_cast<double>(args.size[1] * args.place_elements);
    args.loss[sample * args.loss_stride] = static_cast<float>(mean);
  }
}

}  // namespace

void diffusion_loss(const DiffusionLossArgs& args, void* stream) {
  const InnerSpace space(args.size, args.ndim, 2);
  uint32_t eights = 0;
  for (int t = 0; t < kLossTerms; ++t) {
    if (args.term[t].data != nullptr && space.in_eights(args.term[t])) eights |= 1u << t;
  }
  for (int g = 0; g < kLossGradients; ++g) {
    if (args.gradient[g].data != nullptr && space.in_eights(args.gradient[g])) eights |= 1u << (kGradientBit + g);
  }
  int threads = kLossEights;
  while (threads > 32 && threads / 2 * kEight >= space.count) threads /= 2;
  PYGEN_LAUNCH(diffusion_loss_kernel, dim3(args.size[0] * args.size[1] * args.segments), dim3(threads), 0, stream, args,
               space, eights);
  if (args.loss == nullptr) return;
  PYGEN_LAUNCH(diffusion_loss_mean, dim3(args.size[0]), dim3(kMeanLanes), 0, stream, args);
}

}  // namespace pygen::cuda
