#include "pygen/embedding.h"

#include "eights.h"

namespace pygen::cuda {
namespace {

// A block to a token, whose threads take eight elements at a time; by 16-byte accesses where `eights`.
__global__ void __launch_bounds__(kThreads) embedding_kernel(const __grid_constant__ EmbeddingArgs args, bool eights) {
  const int64_t sequence = blockIdx.x / args.length, t = blockIdx.x % args.length;
  const int64_t token = args.tokens[sequence * args.tokens_stride[0] + t * args.tokens_stride[1]];
  const char *from = embedding_row(args.weight, token, args.weight_dtype), *position = nullptr;
  const bool positioned = args.position_weight.data != nullptr;
  if (positioned) position = embedding_row(args.position_weight, args.positions.at(sequence, t), args.weight_dtype);
  const bool nothing = from == nullptr || (positioned && position == nullptr);
  char* const to = static_cast<char*>(args.out.data) +
                   (sequence * args.out.stride[0] + t * args.out.stride[1]) * size_of(args.out.dtype);
  for (int64_t first = threadIdx.x * kEight; first < args.width; first += blockDim.x * kEight) {
    const int count = args.width - first < kEight ? static_cast<int>(args.width - first) : kEight;
    float values[kEight] = {}, added[kEight] = {};
    if (!nothing) {
      load_neighbours(from + first * size_of(args.weight_dtype), args.weight_dtype, eights, count, values);
      if (positioned) {
        load_neighbours(position + first * size_of(args.weight_dtype), args.weight_dtype, eights, count, added);
      }
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        values[i] = positioned ? fma(values[i], args.scale, added[i]) : values[i] * args.scale;
      }
    }
    store_neighbours(to + first * size_of(args.out.dtype), args.out.dtype, eights, count, values);
  }
}

}  // namespace

void embedding(const EmbeddingArgs& args, void* stream) {
  const bool eights = rows_in_eights(args.weight.data, args.width, args.weight.stride) &&
                      rows_in_eights(args.position_weight.data, args.width, args.position_weight.stride) &&
                      rows_in_eights(args.out.data, args.width, args.out.stride[0], args.out.stride[1]);
  const int64_t rows = args.batch * args.length;
  PYGEN_LAUNCH(embedding_kernel, dim3(static_cast<unsigned>(rows)),
               dim3(static_cast<unsigned>(Blocks(rows, args.width).threads)), 0, stream, args, eights);
}

}  // namespace pygen::cuda
