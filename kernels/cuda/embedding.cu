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
  const auto load = [&](const char* row, int64_t first, int count, float (&values)[kEight]) {
    row += first * size_of(args.weight_dtype);
    if (eights) return load_eight(row, args.weight_dtype, values);
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < count) values[i] = load_one(row + i * size_of(args.weight_dtype), args.weight_dtype);
    }
  };
  for (int64_t first = threadIdx.x * kEight; first < args.width; first += blockDim.x * kEight) {
    const int count = args.width - first < kEight ? static_cast<int>(args.width - first) : kEight;
    float values[kEight] = {}, added[kEight] = {};
    if (!nothing) {
      load(from, first, count, values);
      if (positioned) load(position, first, count, added);
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        values[i] = positioned ? fma(values[i], args.scale, added[i]) : values[i] * args.scale;
      }
    }
    char* const place = to + first * size_of(args.out.dtype);
    if (eights) {
      store_eight(place, args.out.dtype, values);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < count) store_one(place + i * size_of(args.out.dtype), args.out.dtype, values[i]);
    }
  }
}

bool in_eights(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kEight == 0;
}

}  // namespace

void embedding(const EmbeddingArgs& args, void* stream) {
  const bool eights = args.width % kEight == 0 && in_eights(args.weight.data, args.weight.stride) &&
                      in_eights(args.position_weight.data, args.position_weight.stride) &&
                      in_eights(args.out.data, args.out.stride[0]) && args.out.stride[1] % kEight == 0;
  const int64_t rows = args.batch * args.length;
  PYGEN_LAUNCH(embedding_kernel, dim3(static_cast<unsigned>(rows)),
               dim3(static_cast<unsigned>(Blocks(rows, args.width).threads)), 0, stream, args, eights);
}

}  // namespace pygen::cuda
