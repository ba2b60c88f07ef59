#include "pygen/timestep_embedding.h"

#include <cmath>

#include "first_lanes.h"
#include "pygen/sine_cosine.h"

namespace pygen::PYGEN_ISA {
namespace {

// A frequency in two floats: one would move the angle of a large time by thousandths.
struct Frequencies {
  static constexpr int64_t kMost = 512;
  alignas(64) float high[kMost + kLanes], low[kMost + kLanes];

  Frequencies(double decay, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count + kLanes; ++i) {
      const double exact = i < count ? std::exp(decay * static_cast<double>(first + i)) : 0.0;
      high[i] = static_cast<float>(exact), low[i] = static_cast<float>(exact - high[i]);
    }
  }
};

// The sines and cosines of t * frequency, which is taken exactly and less its quarter turns.
PYGEN_INLINE void of_time(float t, const float* high, const float* low, F32& sine, F32& cosine) {
  const F32 time = splat(t, F32{}), frequency = load_bytes<F32>(high), magic = splat(0x1.8p23f, time);
  const F32 angle = time * frequency;
  const F32 rest = fma(time, load_bytes<F32>(low), fma(time, frequency, -angle));
  const F32 shifted = fma(angle, splat(0.636619772f, time), magic), quarters = shifted - magic;
  F32 small = fma(quarters, splat(-1.57079637f, time), angle);
  small = fma(quarters, splat(4.37113900e-8f, time), small) + rest;
  sine_cosine(small, sine, cosine);
  turn_quarters(to_unsigned(shifted), sine, cosine);
}

inline constexpr float kLargest = 1e5f;  // more turns are taken off in double

template <DType kDType>
void rows(const TimestepEmbeddingArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kSize = size_of(kDType);
  for (int64_t first = 0; first < args.half; first += Frequencies::kMost) {
    const int64_t count = std::min(args.half - first, Frequencies::kMost);
    const Frequencies frequencies(args.decay, first, count);
    for (int64_t row = begin; row < end; ++row) {
      const float t = args.t[row * args.t_stride];
      char* const to = static_cast<char*>(args.out.data) + row * args.out.stride[0] * kSize;
      char *const cosines = to + (args.cosines_first ? first : args.half + first) * kSize,
                  *const sines = to + (args.cosines_first ? args.half + first : first) * kSize;
      for (int64_t i = 0; i < count; i += kLanes) {
        F32 sine, cosine;
        of_time(t, frequencies.high + i, frequencies.low + i, sine, cosine);
        if (!(std::fabs(t) <= kLargest)) {
          for (int lane = 0; lane < kLanes; ++lane) {
            const double angle = double{t} * (double{frequencies.high[i + lane]} + frequencies.low[i + lane]);
            sine[lane] = static_cast<float>(std::sin(angle)), cosine[lane] = static_cast<float>(std::cos(angle));
          }
        }
        const int here = static_cast<int>(std::min<int64_t>(count - i, kLanes));
        store_first<kDType>(cosines + i * kSize, cosine, here);
        store_first<kDType>(sines + i * kSize, sine, here);
      }
      if (args.width > 2 * args.half) std::memset(to + 2 * args.half * kSize, 0, kSize);
    }
  }
}

}  // namespace

void timestep_embedding(const TimestepEmbeddingArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.out.dtype, [&](auto dtype) { rows<dtype.value>(args, begin, end); });
}

}  // namespace pygen::PYGEN_ISA
