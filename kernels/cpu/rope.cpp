#include "pygen/rope.h"

#include "head_row.h"

namespace pygen::PYGEN_ISA {
namespace {

template <DType kDType>
void turn(const RopeArgs& args, int64_t begin, int64_t end) {
  HeadAngles angles(args.table);
  HeadRow weight;
  read_weight(args.norm, args.head_dim, weight);
  const int64_t units = rope_units(args.length);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sequence = unit / units, first = unit % units * kRopeTokens;
    const int64_t tokens = std::min(args.length - first, kRopeTokens);
    for (int64_t t = 0; t < tokens; ++t) {
      angles.read(t, rope_angles(args.table, args.positions.at(sequence, first + t)), args.inverse);
    }
    each_normed_head<kDType>(
        args.x, sequence, args.heads, first, tokens, args.head_dim, args.norm.weight == nullptr ? nullptr : weight.at,
        args.eps, [&](int64_t head, int64_t t, const char* from, const Norm& norm) __attribute__((always_inline)) {
          char* const to = head_place(args.out, sequence, head, first + t);
          convert<kDType, kDType>(from, norm, angles.of(t), args.head_dim, to);
        });
  }
}

}  // namespace

void rope(const RopeArgs& args, int64_t begin, int64_t end) {
  constexpr decltype(&turn<DType::kFloat32>) of_dtype[] = {turn<DType::kFloat32>, turn<DType::kBFloat16>,
                                                           turn<DType::kFloat16>};
  of_dtype[static_cast<int>(args.x.dtype)](args, begin, end);
}

}  // namespace pygen::PYGEN_ISA
