#include "pygen/combine_experts.h"

#include "first_lanes.h"

namespace pygen::PYGEN_ISA {
namespace {

template <DType kX, DType kOut>
void rows(const CombineExpertsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const auto place = [&](const Operand& operand, int64_t choice) {
      const int64_t offset = row * operand.stride[0] + choice * operand.stride[1];
      return static_cast<char*>(operand.data) + offset * size_of(operand.dtype);
    };
    for (int64_t i = 0; i < args.width; i += kLanes) {
      const int count = static_cast<int>(std::min<int64_t>(args.width - i, kLanes));
      F32 sum = {};
      for (int64_t choice = 0; choice < args.choices; ++choice) {
        const F32 x = load_first<kX>(place(args.x, choice) + i * size_of(kX), count);
        sum = fma(x, splat(args.weights.at(row, choice), x), sum);
      }
      if (args.residual.data != nullptr) sum += load_first<kOut>(place(args.residual, 0) + i * size_of(kOut), count);
      store_first<kOut>(place(args.out, 0) + i * size_of(kOut), sum, count);
    }
  }
}

}  // namespace

void combine_experts(const CombineExpertsArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.x.dtype, [&](auto x) {
    with_dtype(args.out.dtype, [&](auto out) { rows<x.value, out.value>(args, begin, end); });
  });
}

}  // namespace pygen::PYGEN_ISA
