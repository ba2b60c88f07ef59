#include "pygen/embedding.h"

#include "first_lanes.h"

namespace pygen::PYGEN_ISA {
namespace {

template <DType kWeight, DType kOut>
void rows(const EmbeddingArgs& args, int64_t begin, int64_t end) {
  const F32 scale = splat(args.scale, F32{});
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sequence = row / args.length, t = row % args.length;
    const int64_t token = args.tokens[sequence * args.tokens_stride[0] + t * args.tokens_stride[1]];
    const char *const from = embedding_row(args.weight, token, kWeight), *position = nullptr;
    char* const to =
        static_cast<char*>(args.out.data) + (sequence * args.out.stride[0] + t * args.out.stride[1]) * size_of(kOut);
    const bool positioned = args.position_weight.data != nullptr;
    if (positioned) position = embedding_row(args.position_weight, args.positions.at(sequence, t), kWeight);
    if (from == nullptr || (positioned && position == nullptr)) {
      std::memset(to, 0, args.width * size_of(kOut));
      continue;
    }
    for (int64_t i = 0; i < args.width; i += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(args.width - i, kLanes));
      const F32 value = load_first<kWeight>(from + i * size_of(kWeight), count);
      const F32 result =
          positioned ? fma(value, scale, load_first<kWeight>(position + i * size_of(kWeight), count)) : value * scale;
      store_first<kOut>(to + i * size_of(kOut), result, count);
    }
  }
}

}  // namespace

void embedding(const EmbeddingArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.weight_dtype, [&](auto weight) {
    with_dtype(args.out.dtype, [&](auto out) { rows<weight.value, out.value>(args, begin, end); });
  });
}

}  // namespace pygen::PYGEN_ISA
