#include "pygen/group_norm_silu_backward.h"

#include "group_moments.h"
#include "pygen/exp.h"

namespace pygen::PYGEN_ISA {
namespace {

// With z = away * factor + offset, where away = x - center: grad_x = dz * factor + away * tilt + shift, the last two of
// which are of a group.
struct Slope {
  float tilt, shift;
};

// The sums of dz and dz * away over a channel's pixels, and with them over a group's.
struct Sums {
  double gradient, product;
};

PYGEN_INLINE F32 gradient_of_z(F32 away, F32 grad, F32 factor, F32 offset) {
  const F32 z = fma(away, factor, offset), one = splat(1.0f, z), sigmoid = one / (exp(-z) + one);
  return grad * fma(z * sigmoid, one - sigmoid, sigmoid);
}

// A channel's sums become those of dz and dz n, which are kept, and join its group's, weighted.
PYGEN_INLINE void keep(const GroupNormSiluBackwardArgs& args, const Statistics& statistics, int64_t sample,
                       int64_t channel, const Sums& sums, Sums& group) {
  const double off_center = static_cast<float>(statistics.mean) - statistics.mean;
  const double product = (sums.product + sums.gradient * off_center) * statistics.reciprocal_deviation;
  float* const to = args.channel_sums + (sample * args.forward.channels + channel) * 2;
  to[0] = static_cast<float>(product), to[1] = static_cast<float>(sums.gradient);
  const double weight = parameter(args.forward.weight, sample, channel, 1.0);
  group.gradient += weight * sums.gradient, group.product += weight * product;
}

PYGEN_INLINE Slope slope_of(const GroupNormSiluArgs& args, const Statistics& statistics, const Sums& group) {
  const double count = static_cast<double>(args.channels / args.groups * args.pixels);
  const double reciprocal = statistics.reciprocal_deviation, tilt = -group.product / count * reciprocal * reciprocal;
  const double off_center = static_cast<float>(statistics.mean) - statistics.mean;
  return {static_cast<float>(tilt), static_cast<float>(-group.gradient / count * reciprocal + tilt * off_center)};
}

// ---- Channel by channel --------------------------------------------------------------------------------------------

// Calls visit(v, at, x, grad, place) for vectors of a channel's pixels, where `at` counts pixels and v vectors of 64;
// what lies behind the last is 0, and is not written.
inline constexpr int64_t kTogether = kPartials;  // pixels

template <DType kDType, class Visit>
PYGEN_INLINE void each_pixel(const char* x, const char* grad, char* out, int64_t count, Visit visit) {
  constexpr int64_t kSize = size_of(kDType);
  const auto run = [&](int64_t v, int64_t i, const char* from, const char* from_grad, char* to)
                       __attribute__((always_inline)) { visit(v, i, load<kDType>(from), load<kDType>(from_grad), to); };
  const auto place = [&](int64_t i) { return out == nullptr ? nullptr : out + i * kSize; };
  int64_t first = 0;
  for (; first + kTogether <= count; first += kTogether) {
#pragma GCC unroll 16
    for (int64_t v = 0; v < kTogether / kLanes; ++v) {
      const int64_t i = first + v * kLanes;
      run(v, i, x + i * kSize, grad + i * kSize, place(i));
    }
  }
#pragma GCC unroll 16
  for (int64_t v = 0; v < kTogether / kLanes; ++v) {
    const int64_t i = first + v * kLanes, here = count - i;
    if (here <= 0) break;
    if (here >= kLanes) {
      run(v, i, x + i * kSize, grad + i * kSize, place(i));
      continue;
    }
    alignas(64) char padded[3][kLanes * kSize] = {};
    std::memcpy(padded[0], x + i * kSize, here * kSize);
    std::memcpy(padded[1], grad + i * kSize, here * kSize);
    run(v, i, padded[0], padded[1], padded[2]);
    if (out != nullptr) std::memcpy(place(i), padded[2], here * kSize);
  }
}

// Keeps dz too, where there is room for it.
template <DType kDType>
Sums channel_sums(const char* x, const char* grad, int64_t count, const Scale& scale, float* kept) {
  constexpr int kVectors = kTogether / kLanes;
  constexpr int64_t kBlock = 16 * kTogether, kSize = size_of(kDType);
  const F32 center = splat(scale.center, F32{}), factor = splat(scale.factor, F32{}),
            offset = splat(scale.offset, F32{});
  Sums sums{};
  for (int64_t i = 0; i < count; i += kBlock) {
    F32 gradient[kVectors] = {}, product[kVectors] = {};
    each_pixel<kDType>(x + i * kSize, grad + i * kSize, nullptr, std::min(count - i, kBlock),
                       [&](int64_t v, int64_t at, F32 value, F32 g, char*) __attribute__((always_inline)) {
                         const F32 away = value - center, dz = gradient_of_z(away, g, factor, offset);
                         gradient[v] += dz, product[v] = fma(dz, away, product[v]);
                         if (kept != nullptr) std::memcpy(kept + i + at, &dz, sizeof dz);
                       });
    sums.gradient += total_of(gradient), sums.product += total_of(product);
  }
  return sums;
}

template <DType kDType>
void by_channel(const GroupNormSiluBackwardArgs& args, int64_t sample, int64_t group) {
  const GroupNormSiluArgs& of = args.forward;
  const int64_t channels = of.channels / of.groups, first = group * channels;
  const auto at = [&](const Operand& operand, int64_t channel) {
    const int64_t offset = sample * operand.stride[0] + channel * operand.stride[1];
    return static_cast<char*>(operand.data) + offset * size_of(kDType);
  };
  // A group's dz, which cost more than to write and read them.
  constexpr int64_t kMostKept = 64 << 10;
  alignas(64) float memory[kMostKept];
  const int64_t padded = (of.pixels + kTogether - 1) / kTogether * kTogether;
  const bool keeps = channels * padded <= kMostKept;
  const auto kept = [&](int64_t c) { return keeps ? memory + (c - first) * padded : nullptr; };
  const Statistics statistics = statistics_of(piece_moments<kDType>(at(of.x, first), channels * of.pixels), of.eps);
  Sums sums{};
  for (int64_t c = first; c < first + channels; ++c) {
    const Scale scale = statistics.scale(of, sample, c);
    keep(args, statistics, sample, c, channel_sums<kDType>(at(of.x, c), at(args.grad, c), of.pixels, scale, kept(c)),
         sums);
  }
  const auto all = [](float value) __attribute__((always_inline)) { return splat(value, F32{}); };
  const Slope slope = slope_of(of, statistics, sums);
  const F32 center = all(static_cast<float>(statistics.mean)), tilt = all(slope.tilt), shift = all(slope.shift);
  for (int64_t c = first; c < first + channels; ++c) {
    const F32 factor = all(static_cast<float>(statistics.factor(of, sample, c)));
    const auto run = [&](auto dz_of) __attribute__((always_inline)) {
      each_pixel<kDType>(at(of.x, c), at(args.grad, c), at(args.grad_x, c), of.pixels,
                         [&](int64_t, int64_t i, F32 value, F32 g, char* to) __attribute__((always_inline)) {
                           const F32 away = value - center;
                           store<kDType>(to, fma(dz_of(i, away, g), factor, fma(away, tilt, shift)));
                         });
    };
    if (keeps) {
      const float* const of_channel = kept(c);
      run([&](int64_t i, F32, F32) __attribute__((always_inline)) { return load_bytes<F32>(of_channel + i); });
    } else {
      const F32 offset = all(statistics.scale(of, sample, c).offset);
      run([&](int64_t, F32 away, F32 g)
              __attribute__((always_inline)) { return gradient_of_z(away, g, factor, offset); });
    }
  }
}

// ---- Pixel by pixel ------------------------------------------------------------------------------------------------

struct SlotCoefficients {
  Slots center, factor, offset, tilt, shift;
};

// Of a block: few, so that sums of float lose little, and the first-level cache holds them.
inline constexpr int64_t kSumRows = 16;
static_assert(kSumRows <= kBlockRows);

// Calls visit(v, over) for the vectors of each block of rows, of which over(step) calls step(x, grad, place) row by
// row.
template <DType kDType, class Visit, class Block>
PYGEN_INLINE void each_row(const Rows<kDType>& x, const Rows<kDType>& grad, const Rows<kDType>* out, int64_t count,
                           Visit visit, Block block) {
  for (int64_t row = 0; row < count; row += kSumRows) {
    const int64_t here = std::min(count - row, kSumRows);
    x.gather(row, here), grad.gather(row, here);
    const char *const from = x.block(row), *const from_grad = grad.block(row);
    char* const to = out == nullptr ? nullptr : out->block(row);
    for (int64_t v = 0; v < x.vectors; ++v) {
      const int64_t at = x.start(v) * size_of(kDType);
      visit(v, [&](auto step) __attribute__((always_inline)) {
        for (int64_t r = 0; r < here; ++r) {
          step(load<kDType>(from + r * x.block_stride() + at), load<kDType>(from_grad + r * grad.block_stride() + at),
               to == nullptr ? nullptr : to + r * out->block_stride() + at);
        }
      });
    }
    if (out != nullptr) out->scatter(row, here);
    block();
  }
}

template <DType kDType>
void by_pixel(const GroupNormSiluBackwardArgs& args, int64_t sample, int64_t group) {
  const GroupNormSiluArgs& of = args.forward;
  const int64_t channels = of.channels / of.groups;
  const int64_t begin = group * channels, end = begin + of.unit * channels;
  char copies[3][Rows<kDType>::kCopyBytes];

  Moments moments[kChannelTile] = {};
  Statistics statistics[kChannelTile];
  Sums sums[kChannelTile] = {};
  SlotCoefficients k = {};
  const auto each_tile = [&](auto visit) {
    for (int64_t tile = begin; tile < end; tile += kChannelTile) {
      const int64_t width = std::min(end - tile, kChannelTile);
      visit(tile, width, Rows<kDType>(of.x, sample, tile, width, copies[0]),
            Rows<kDType>(args.grad, sample, tile, width, copies[1]));
    }
  };
  const auto each_slot = [&](const Rows<kDType>& rows, int64_t tile, int64_t width, auto visit) {
    for (int64_t slot = 0; slot < rows.vectors * kLanes; ++slot) {
      const int64_t c = rows.channel(slot);
      if (c >= width) break;
      visit(slot, tile + c, (tile + c - begin) / channels);
    }
  };
  const auto scale = [&](int64_t slot, int64_t channel, int64_t g) {
    const Scale of_channel = statistics[g].scale(of, sample, channel);
    k.center.at[slot] = of_channel.center, k.factor.at[slot] = of_channel.factor;
    k.offset.at[slot] = of_channel.offset;
  };

  each_tile([&](int64_t tile, int64_t width, const Rows<kDType>& rows, const Rows<kDType>&) {
    double mean[kChannelTile], square[kChannelTile];
    row_moments(rows, of.pixels, mean, square);
    for (int64_t c = 0; c < width; ++c) {
      const int64_t slot = rows.slot(c);
      moments[(tile + c - begin) / channels].join({static_cast<double>(of.pixels), mean[slot], square[slot]});
    }
  });
  for (int64_t g = 0; g < of.unit; ++g) statistics[g] = statistics_of(moments[g], of.eps);

  each_tile([&](int64_t tile, int64_t width, const Rows<kDType>& x, const Rows<kDType>& grad) {
    const int64_t slots = x.vectors * kLanes;
    double gradients[kChannelTile] = {}, products[kChannelTile] = {};
    Slots gradient = {}, product = {};
    each_slot(x, tile, width, scale);
    const auto visit = [&](int64_t v, auto over) __attribute__((always_inline)) {
      const F32 center = k.center.vector(v), factor = k.factor.vector(v), offset = k.offset.vector(v);
      F32 a{}, b{};
      over([&](F32 value, F32 g, char*) __attribute__((always_inline)) {
        const F32 away = value - center, dz = gradient_of_z(away, g, factor, offset);
        a += dz, b = fma(dz, away, b);
      });
      gradient.set(v, a), product.set(v, b);
    };
    each_row<kDType>(x, grad, nullptr, of.pixels, visit, [&] {
      for (int64_t i = 0; i < slots; ++i) gradients[i] += gradient.at[i], products[i] += product.at[i];
    });
    for (int64_t c = 0; c < width; ++c) {
      const int64_t slot = x.slot(c), g = (tile + c - begin) / channels;
      keep(args, statistics[g], sample, tile + c, {gradients[slot], products[slot]}, sums[g]);
    }
  });

  Slope slopes[kChannelTile];
  for (int64_t g = 0; g < of.unit; ++g) slopes[g] = slope_of(of, statistics[g], sums[g]);
  each_tile([&](int64_t tile, int64_t width, const Rows<kDType>& x, const Rows<kDType>& grad) {
    const Rows<kDType> out(args.grad_x, sample, tile, width, copies[2]);
    each_slot(x, tile, width, [&](int64_t slot, int64_t channel, int64_t g) {
      scale(slot, channel, g);
      k.tilt.at[slot] = slopes[g].tilt, k.shift.at[slot] = slopes[g].shift;
    });
    const auto visit = [&](int64_t v, auto over) __attribute__((always_inline)) {
      const F32 center = k.center.vector(v), factor = k.factor.vector(v), offset = k.offset.vector(v);
      const F32 tilt = k.tilt.vector(v), shift = k.shift.vector(v);
      over([&](F32 value, F32 g, char* to) __attribute__((always_inline)) {
        const F32 away = value - center, dz = gradient_of_z(away, g, factor, offset);
        store<kDType>(to, fma(dz, factor, fma(away, tilt, shift)));
      });
    };
    each_row<kDType>(x, grad, &out, of.pixels, visit, [] {});
  });
}

template <DType kDType>
void run(const GroupNormSiluBackwardArgs& args, int64_t begin, int64_t end) {
  const GroupNormSiluArgs& of = args.forward;
  const int64_t units = of.groups / of.unit;
  const auto unit = of.by_channel ? by_channel<kDType> : by_pixel<kDType>;
  for (int64_t i = begin; i < end; ++i) unit(args, i / units, i % units * of.unit);
}

}  // namespace

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& args, int64_t begin, int64_t end) {
  switch (args.forward.x.dtype) {
    case DType::kFloat32:
      return run<DType::kFloat32>(args, begin, end);
    case DType::kBFloat16:
      return run<DType::kBFloat16>(args, begin, end);
    default:
      return run<DType::kFloat16>(args, begin, end);
  }
}

}  // namespace pygen::PYGEN_ISA
