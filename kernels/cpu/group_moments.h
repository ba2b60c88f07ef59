// The moments of groups of channels, channel by channel or pixel by pixel: what group_norm_silu and its backward pass
// both begin with.
#pragma once

#include <algorithm>

#include "pygen/group_norm_silu.h"
#include "strips.h"

namespace pygen {
namespace {

// The mean of `count` numbers, and the sum of their squared deviations from it.
struct Moments {
  double count, mean, square;

  // Takes in those of others (Chan, Golub & LeVeque 1979).
  PYGEN_INLINE void join(const Moments& other) {
    const double delta = other.mean - mean, share = other.count / (count + other.count);
    square += other.square + delta * delta * count * share;
    mean += delta * share;
    count += other.count;
  }
};

// From the sums of x - shift and of its square. Rounding loses more of them the further shift lies from the mean, so
// the shift is the mean of what came before, and what comes first is summed twice. The squared distances of all blocks
// from what came before are at most twice the result: no mean, however large, costs more than a few units in the last
// place.
PYGEN_INLINE Moments shifted_moments(double count, float shift, float sum, float square) {
  const double away = sum * (1.0 / count);
  return {count, shift + away, square - sum * away};
}

// (x - center) * factor + offset: next to the mean, x - center is exact.
struct Scale {
  float center, factor, offset;
};

PYGEN_INLINE double element(const Operand& operand, int64_t offset, double otherwise) {
  if (operand.data == nullptr) return otherwise;
  const char* at = static_cast<const char*>(operand.data) + offset * size_of(operand.dtype);
  if (operand.dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  const U32 all = U32{} + half;
  return operand.dtype == DType::kBFloat16 ? from_unsigned(all << 16)[0] : half_to_float(all)[0];
}

PYGEN_INLINE double parameter(const Operand& operand, int64_t sample, int64_t channel, double otherwise) {
  return element(operand, sample * operand.stride[0] + channel * operand.stride[1], otherwise);
}

struct Statistics {
  double mean, reciprocal_deviation;

  PYGEN_INLINE double factor(const GroupNormSiluArgs& args, int64_t sample, int64_t channel) const {
    return reciprocal_deviation * parameter(args.weight, sample, channel, 1.0);
  }
  PYGEN_INLINE Scale scale(const GroupNormSiluArgs& args, int64_t sample, int64_t channel) const {
    const float center = static_cast<float>(mean);
    const double f = factor(args, sample, channel);
    const double offset = parameter(args.bias, sample, channel, 0.0) + (center - mean) * f;
    return {center, static_cast<float>(f), static_cast<float>(offset)};
  }
};

PYGEN_INLINE Statistics statistics_of(const Moments& moments, double eps) {
  const double square = moments.square < 0.0 ? 0.0 : moments.square;                 // by rounding; NaN stays
  const __m128d deviation = _mm_sqrt_pd(_mm_set1_pd(square / moments.count + eps));  // std::sqrt may call the library
  return {moments.mean, 1.0 / _mm_cvtsd_f64(deviation)};
}

// ---- Channel by channel: a group lies in one piece -----------------------------------------------------------------

inline constexpr int64_t kPartials = 64;  // of a sum, whatever the width of a vector

// Partial sums, added by halves.
PYGEN_INLINE float total_of(F32 (&partial)[kPartials / kLanes]) {
  for (int64_t width = kPartials / kLanes / 2; width > 0; width /= 2) {
    for (int64_t v = 0; v < width; ++v) partial[v] += partial[v + width];
  }
  return join_lanes(partial[0], [](F32 a, F32 b) __attribute__((always_inline)) { return a + b; })[0];
}

// By partial sums, each of them made of shorter ones.
template <DType kDType>
Moments block_moments(const char* from, int64_t count, float shift) {
  constexpr int64_t kShort = 8 * kPartials, kSize = size_of(kDType);
  constexpr int kVectors = kPartials / kLanes;
  F32 sum[kVectors] = {}, square[kVectors] = {};
  for (int64_t i = 0; i < count; i += kShort) {
    const int64_t end = std::min(count, i + kShort);
    F32 short_sum[kVectors] = {}, short_square[kVectors] = {};
    const auto add = [&](int v, F32 away) __attribute__((always_inline)) {
      short_sum[v] += away;
      short_square[v] = fma(away, away, short_square[v]);
    };
    int64_t j = i;
    for (; j + kPartials <= end; j += kPartials) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) add(v, load<kDType>(from + (j + v * kLanes) * kSize) - shift);
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const int64_t rest = end - j - v * kLanes;
      if (rest <= 0) break;
      const char* const at = from + (j + v * kLanes) * kSize;
      if (rest >= kLanes) {
        add(v, load<kDType>(at) - shift);
        continue;
      }
      char padded[kLanes * kSize] = {};
      std::memcpy(padded, at, rest * kSize);
      F32 away = load<kDType>(padded) - shift;
      for (int lane = 0; lane < kLanes; ++lane) away[lane] = lane < rest ? away[lane] : 0.0f;
      add(v, away);
    }
    for (int v = 0; v < kVectors; ++v) sum[v] += short_sum[v], square[v] += short_square[v];
  }
  return shifted_moments(static_cast<double>(count), shift, total_of(sum), total_of(square));
}

template <DType kDType>
Moments piece_moments(const char* from, int64_t count) {
  constexpr int64_t kBlock = 4096;
  const int64_t first = std::min(count, kBlock);
  const Operand operand{const_cast<char*>(from), {1}, kDType};
  const Moments guess = block_moments<kDType>(from, first, static_cast<float>(element(operand, 0, 0.0)));
  Moments moments = block_moments<kDType>(from, first, static_cast<float>(guess.mean));
  for (int64_t i = first; i < count; i += kBlock) {
    const char* at = from + i * size_of(kDType);
    moments.join(block_moments<kDType>(at, std::min(count - i, kBlock), static_cast<float>(moments.mean)));
  }
  return moments;
}

// ---- Pixel by pixel: neighbouring channels of a pixel are a row ----------------------------------------------------

inline constexpr int64_t kBlockRows = 128;

// A row is walked by whole vectors, of which the last overlaps the one before where the width asks for it: slot i
// belongs to a channel, and some channels have two. Rows narrower than a vector are copied, a block of them at a time.
template <DType kDType>
struct Rows {
  static constexpr int64_t kSize = size_of(kDType), kCopyStride = kLanes * kSize, kCopyBytes = kBlockRows * kCopyStride;

  char *data, *copy;
  int64_t stride, width, vectors;

  Rows(const Operand& operand, int64_t sample, int64_t channel, int64_t width, char* copy)
      : data(static_cast<char*>(operand.data) + (sample * operand.stride[0] + channel) * kSize),
        copy(width < kLanes ? copy : nullptr),
        stride(operand.stride[2] * kSize),
        width(width),
        vectors((width + kLanes - 1) / kLanes) {}

  int64_t start(int64_t vector) const { return copy != nullptr ? 0 : std::min(vector * kLanes, width - kLanes); }
  int64_t channel(int64_t slot) const { return start(slot / kLanes) + slot % kLanes; }
  int64_t slot(int64_t channel) const { return channel + channel / kLanes * kLanes - start(channel / kLanes); }

  // Where `count` rows lie, and how far apart.
  char* block(int64_t row) const { return copy != nullptr ? copy : data + row * stride; }
  int64_t block_stride() const { return copy != nullptr ? kCopyStride : stride; }
  void gather(int64_t row, int64_t count) const {
    if (copy == nullptr) return;
    for (int64_t r = 0; r < count; ++r) std::memcpy(copy + r * kCopyStride, data + (row + r) * stride, width * kSize);
  }
  void scatter(int64_t row, int64_t count) const {
    if (copy == nullptr) return;
    for (int64_t r = 0; r < count; ++r) std::memcpy(data + (row + r) * stride, copy + r * kCopyStride, width * kSize);
  }
};

// A number for each slot, that vectors read and write.
struct Slots {
  alignas(64) float at[kChannelTile];
  PYGEN_INLINE F32 vector(int64_t v) const { return load_bytes<F32>(at + v * kLanes); }
  PYGEN_INLINE void set(int64_t v, F32 value) { std::memcpy(at + v * kLanes, &value, sizeof value); }
};

// Adds `rows` rows to the sums.
template <DType kDType, int kRows>
PYGEN_INLINE void add_rows(const char* from, const Rows<kDType>& rows, const Slots& shift, Slots& sum, Slots& square) {
  for (int64_t v = 0; v < rows.vectors; ++v) {
    const char* at = from + rows.start(v) * size_of(kDType);
    const F32 center = shift.vector(v);
    F32 s = sum.vector(v), q = square.vector(v);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32 away = load<kDType>(at + r * rows.block_stride()) - center;
      s += away;
      q = fma(away, away, q);
    }
    sum.set(v, s);
    square.set(v, q);
  }
}

// The mean of each slot and its sum of squared deviations.
template <DType kDType>
void row_moments(const Rows<kDType>& rows, int64_t count, double* mean, double* square) {
  const int64_t slots = rows.vectors * kLanes, stride = rows.block_stride();
  Slots shift, sum, squares;
  const auto join_block = [&](int64_t row, int64_t before) {
    const int64_t here = std::min(count - row, kBlockRows);
    rows.gather(row, here);
    std::fill_n(sum.at, slots, 0.0f);
    std::fill_n(squares.at, slots, 0.0f);
    const char* from = rows.block(row);
    int64_t r = 0;
    for (; r + 8 <= here; r += 8) add_rows<kDType, 8>(from + r * stride, rows, shift, sum, squares);
    for (; r < here; ++r) add_rows<kDType, 1>(from + r * stride, rows, shift, sum, squares);
    for (int64_t i = 0; i < slots; ++i) {
      Moments moments{static_cast<double>(before), mean[i], square[i]};
      moments.join(shifted_moments(static_cast<double>(here), shift.at[i], sum.at[i], squares.at[i]));
      mean[i] = moments.mean;
      square[i] = moments.square;
      shift.at[i] = static_cast<float>(moments.mean);
    }
  };
  rows.gather(0, 1);
  for (int64_t v = 0; v < rows.vectors; ++v) {
    shift.set(v, load<kDType>(rows.block(0) + rows.start(v) * size_of(kDType)));
  }
  for (int time = 0; time < 2; ++time) {
    std::fill_n(mean, slots, 0.0);
    std::fill_n(square, slots, 0.0);
    join_block(0, 0);
  }
  for (int64_t row = kBlockRows; row < count; row += kBlockRows) join_block(row, row);
}

}  // namespace
}  // namespace pygen
