#include "pygen/rope.h"

#include "head_row.h"

namespace pygen::PYGEN_ISA {
namespace {

template <DType kDType>
void turn(const RopeArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kSize = size_of(kDType);
  HeadAngles angles(args.table);
  const int64_t units = rope_units(args.length);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sequence = unit / units, first = unit % units * kRopeTokens;
    const int64_t tokens = std::min(args.length - first, kRopeTokens);
    for (int64_t t = 0; t < tokens; ++t) {
      angles.read(t, rope_angles(args.table, args.positions.at(sequence, first + t)), args.inverse);
    }
    each_head(args.x, sequence, args.heads, first, tokens, args.head_dim,
              [&](int64_t head, int64_t t, const char* from) __attribute__((always_inline)) {
                char* const to = head_place(args.out, sequence, head, first + t);
                turn_head(
                    angles.of(t), args.head_dim,
                    [&](int i, int count)
                        __attribute__((always_inline)) { return load_first<kDType>(from + i * kSize, count); },
                    [&](int i, F32 value, int count)
                        __attribute__((always_inline)) { store_first<kDType>(to + i * kSize, value, count); });
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
