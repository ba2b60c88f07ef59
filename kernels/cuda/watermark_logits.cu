#include "pygen/watermark_logits.h"

#include "token_row.h"

namespace pygen::cuda {
namespace {

// A thread to every eight neighbours.
__global__ void __launch_bounds__(kRowThreads)
    watermark_logits_kernel(const __grid_constant__ WatermarkLogitsArgs args, int64_t blocks) {
  const int64_t row = blockIdx.x / blocks, sample = row / args.positions, position = row % args.positions;
  const int64_t first = (blockIdx.x % blocks * kRowThreads + threadIdx.x) * 8;
  if (first >= args.vocabulary) return;
  float x[8];
  OperandRow(args.logits, sample, position, args.vocabulary).load(first, 0.0f, x);
  add_green(green_list(args.green, sample, args.known(sample, position)), args.delta.at(sample, 0.0f), first, x);
  OperandRow(args.out, sample, position, args.vocabulary).store(first, x);
}

}  // namespace

void watermark_logits(const WatermarkLogitsArgs& args, void* stream) {
  const int64_t blocks = (args.vocabulary + kRowThreads * 8 - 1) / (kRowThreads * 8);
  PYGEN_LAUNCH(watermark_logits_kernel, dim3(static_cast<unsigned>(args.samples * args.positions * blocks)),
               dim3(kRowThreads), 0, stream, args, blocks);
}

}  // namespace pygen::cuda
