#include "pygen/affine_step.h"

#include "eights.h"
#include "pygen/affine_row.h"
#include "pygen/philox_normal.h"

namespace pygen::cuda {
namespace {

using Eight = Pack<float, kEight>;

// Bits of `eights`: the terms, then the three outputs.
inline constexpr int kOutputBit = kMaxTerms;

template <int kResults>
__global__ void __launch_bounds__(kThreads, 2)
    affine_step_kernel(const __grid_constant__ AffineStepArgs args, const __grid_constant__ InnerSpace space,
                       uint32_t eights, int64_t per_block, int64_t per_row) {
  const int64_t place = blockIdx.x / per_row, begin = blockIdx.x % per_row * per_block;
  const int64_t sample = place / args.size[1], token = place % args.size[1];
  const int64_t end = begin + per_block < space.count ? begin + per_block : space.count;

  __shared__ AffineRow row;
  if (threadIdx.x == 0) {
    affine_read_row(args, args.rows[sample * args.rows_stride[0] + token * args.rows_stride[1]], sample, row);
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

  for (int64_t element = begin + threadIdx.x * kEight; element < end; element += blockDim.x * kEight) {
    const int valid = end - element < kEight ? static_cast<int>(end - element) : kEight;
    const auto load = [&](int t) {
      Eight values;
      if (t == kTermNoise && by_philox) {
        normal_eight(token * space.count + element, key, values.v);
      } else {
        space.load(args.term[t], eights >> t & 1u, base(args.term[t]), element, valid, values.v);
      }
      return values;
    };
    Eight next, pred, second;
    affine_row<kResults>(args, row, load, next, pred, second);
    const auto store = [&](int output, const Operand& operand, const Eight& values) {
      space.store(operand, eights >> (kOutputBit + output) & 1u, base(operand), element, valid, values.v);
    };
    store(0, args.next, next);
    if (args.pred.data != nullptr) store(1, args.pred, pred);
    if (kResults == 2 && args.second.data != nullptr) store(2, args.second, second);
  }
}

}  // namespace

void affine_step(const AffineStepArgs& args, void* stream) {
  const InnerSpace space(args.size, args.ndim, 2);
  uint32_t eights = 0;
  for (int t = 0; t < kTermHistory + args.n_history; ++t) {
    if (args.term[t].data != nullptr && space.in_eights(args.term[t])) eights |= 1u << t;
  }
  const Operand* const outputs[] = {&args.next, &args.pred, &args.second};
  for (int o = 0; o < 3; ++o) {
    if (outputs[o]->data != nullptr && space.in_eights(*outputs[o])) eights |= 1u << (kOutputBit + o);
  }
  const Blocks blocks(args.size[0] * args.size[1], space.count);
  const auto kernel = affine_reads_second(args) ? affine_step_kernel<2> : affine_step_kernel<1>;
  PYGEN_LAUNCH(kernel, dim3(blocks.count), dim3(blocks.threads), 0, stream, args, space, eights, blocks.per_block,
               blocks.per_row);
}

}  // namespace pygen::cuda
