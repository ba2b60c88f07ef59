#include "pygen/row_norm.h"

#include <algorithm>

#include "strips.h"

namespace pygen::PYGEN_ISA {
namespace {

// ---- A row, strip by strip: the last one may have fewer elements in memory, and is padded with zeros ---------------

template <class Visit>
PYGEN_INLINE void for_strips(int64_t count, Visit visit) {
  int64_t i = 0;
  for (; i + kStrip <= count; i += kStrip) visit(i, kStrip);
  if (i < count) visit(i, count - i);
}

template <DType kDType>
struct Elements {
  static constexpr int64_t kSize = size_of(kDType);
  char* data;

  Elements(const Operand& operand, const Cursor& row)
      : data(static_cast<char*>(operand.data) + row.offset(operand) * kSize) {}
  explicit Elements(float* sums) : data(reinterpret_cast<char*>(sums)) {}

  PYGEN_INLINE Strip load(int64_t i, int64_t count) const {
    if (count == kStrip) return load_strip<kDType>(data + i * kSize);
    char padded[kStrip * kSize] = {};
    std::memcpy(padded, data + i * kSize, count * kSize);
    return load_strip<kDType>(padded);
  }
  // The last pass over a row computes and the first waits for memory, so that one asks for the row behind.
  PYGEN_INLINE void fetch_next(int64_t i, int64_t row) const {
    constexpr int64_t kLine = 64;
    for (int64_t at = 0; at < kStrip * kSize; at += kLine) __builtin_prefetch(data + (row + i) * kSize + at);
  }
  PYGEN_INLINE void store(int64_t i, int64_t count, const Strip& value) const {
    if (count == kStrip) return store_strip<kDType>(data + i * kSize, value);
    char padded[kStrip * kSize];
    store_strip<kDType>(padded, value);
    std::memcpy(data + i * kSize, padded, count * kSize);
  }
  // Past the caches, which else would read what is about to be overwritten.
  PYGEN_INLINE void stream(int64_t i, const Strip& value) const {
    alignas(64) char strip[kStrip * kSize];
    store_strip<kDType>(strip, value);
    for (int64_t at = 0; at < kStrip * kSize; at += sizeof(__m128i)) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(data + i * kSize + at),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(strip + at)));
    }
  }
  bool may_stream() const { return reinterpret_cast<uintptr_t>(data) % 64 == 0; }
};

PYGEN_INLINE Strip load_parameter(const Operand& operand, int64_t i, int64_t count) {
  const char* from = static_cast<const char*>(operand.data) + i * size_of(operand.dtype);
  if (count == kStrip) return load_strip(from, operand.dtype);
  char padded[kStrip * sizeof(float)] = {};
  std::memcpy(padded, from, count * size_of(operand.dtype));
  return load_strip(padded, operand.dtype);
}
PYGEN_INLINE Strip load_weight(const RowNormRows& rows, int64_t i, int64_t count) {
  if (rows.weight.data == nullptr) return splat(1.0f, Strip{});
  return load_parameter(rows.weight, i, count) + splat(rows.offset, Strip{});
}

PYGEN_INLINE Strip first_of(const Strip& strip, int64_t count) {
  float lanes[kStrip] = {};
  std::memcpy(lanes, &strip, count * sizeof(float));
  return load_strip<DType::kFloat32>(reinterpret_cast<const char*>(lanes));
}

// ---- Sums over a row, in one order whatever the width of a vector --------------------------------------------------

inline constexpr int64_t kPartials = 64;
inline constexpr int kBlockStrips = kPartials / kStrip;

template <int kStep, int... kLane>
PYGEN_INLINE F32 rotate(F32 v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane + kStep) % kLanes...);
}

// The sum of the first lanes, a power of two.
template <int kCount = kLanes>
PYGEN_INLINE float by_halves(F32 v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    return by_halves<kCount / 2>(v + rotate<kCount / 2>(v, std::make_integer_sequence<int, kLanes>{}));
  }
}

// 64 partial sums, each made of shorter ones, at the end added by halves. add(i, count, sums) adds the terms of the
// strip at i to kSums sums.
template <int kSums, class Add>
PYGEN_INLINE void sum_row(int64_t count, double* result, Add add) {
  constexpr int64_t kShort = 8 * kPartials;
  Strip sums[kBlockStrips][kSums] = {};
  for (int64_t i = 0; i < count; i += kShort) {
    const int64_t end = std::min(count, i + kShort);
    Strip shorter[kBlockStrips][kSums] = {};
    int64_t j = i;
    for (; j + kPartials <= end; j += kPartials) {
#pragma GCC unroll 4
      for (int s = 0; s < kBlockStrips; ++s) add(j + s * kStrip, kStrip, shorter[s]);
    }
#pragma GCC unroll 4
    for (int s = 0; s < kBlockStrips; ++s, j += kStrip) {
      if (j < end) add(j, std::min(end - j, kStrip), shorter[s]);
    }
#pragma GCC unroll 4
    for (int s = 0; s < kBlockStrips; ++s) {
#pragma GCC unroll 4
      for (int k = 0; k < kSums; ++k) sums[s][k] = sums[s][k] + shorter[s][k];
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kSums; ++k) {
    Strip sum = sums[0][k];
    if constexpr (kBlockStrips == 2) sum = sum + sums[1][k];
    if constexpr (kBlockStrips == 4) sum = (sum + sums[2][k]) + (sums[1][k] + sums[3][k]);
    result[k] = by_halves((sum.v[0] + sum.v[2]) + (sum.v[1] + sum.v[3]));
  }
}

// A row less what is near its mean, which tells what the rounding of that mean left: no mean, however large, costs
// more than a few units in the last place. Not centred, the row itself.
template <DType kDType, bool kCentred>
struct Row {
  Elements<kDType> h;
  int64_t count;
  double share;                                         // of an element in a mean
  float center = 0.0f, reciprocal = 0.0f, rest = 0.0f;  // of the deviation; of the mean, in deviations

  Row(const Elements<kDType>& h, int64_t count) : h(h), count(count), share(1.0 / static_cast<double>(count)) {
    if constexpr (kCentred) {
      double sum;
      sum_row<1>(count, &sum, [&](int64_t i, int64_t n, Strip* sums) __attribute__((always_inline)) {
        sums[0] = sums[0] + h.load(i, n);
      });
      center = static_cast<float>(sum * share);
    }
  }

  PYGEN_INLINE Strip away(int64_t i, int64_t n) const {
    const Strip x = h.load(i, n);
    if (!kCentred) return x;
    return n == kStrip ? x - splat(center, x) : first_of(x - splat(center, x), n);
  }

  // Adds the squares, and where centred what was left of the mean, to sums that begin with these.
  static constexpr int kMoments = kCentred ? 2 : 1;
  PYGEN_INLINE void add_moments(const Strip& away, Strip* sums) const {
    sums[0] = fma(away, away, sums[0]);
    if constexpr (kCentred) sums[1] = sums[1] + away;
  }
  PYGEN_INLINE void finish(const double* sums, double eps) {
    const double left = kCentred ? sums[1] * share : 0.0;
    double square = kCentred ? (sums[0] - sums[1] * left) * share : sums[0] * share;
    square = square < 0.0 ? 0.0 : square;                              // by rounding; NaN stays
    const __m128d deviation = _mm_sqrt_pd(_mm_set1_pd(square + eps));  // std::sqrt may call the library
    const double exact = 1.0 / _mm_cvtsd_f64(deviation);
    reciprocal = static_cast<float>(exact);
    rest = static_cast<float>(-left * exact);
  }

  PYGEN_INLINE Strip normalised(int64_t i, int64_t n) const {
    const Strip x = away(i, n), r = splat(reciprocal, x);
    return kCentred ? fma(x, r, splat(rest, x)) : x * r;
  }
};

// ---- Forward -------------------------------------------------------------------------------------------------------

template <DType kDType, bool kCentred>
void normalise_row(const RowNormArgs& args, const Cursor& cursor) {
  const int64_t count = args.rows.elements;
  const Elements<kDType> x(args.x, cursor), residual(args.residual, cursor);
  auto h = x;
  if (args.residual.data != nullptr) {
    h = Elements<kDType>(args.residual_out, cursor);
    for_strips(count, [&](int64_t i, int64_t n)
                          __attribute__((always_inline)) { h.store(i, n, x.load(i, n) + residual.load(i, n)); });
  }
  Row<kDType, kCentred> row(h, count);
  double sums[row.kMoments];
  sum_row<row.kMoments>(count, sums, [&](int64_t i, int64_t n, Strip* sums) __attribute__((always_inline)) {
    row.add_moments(row.away(i, n), sums);
  });
  row.finish(sums, args.rows.eps);

  const Elements<kDType> out(args.out, cursor);
  const bool stream = args.stream && out.may_stream();
  for_strips(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    x.fetch_next(i, count);
    if (args.residual.data != nullptr) residual.fetch_next(i, count);
    const Strip y = row.normalised(i, n), weight = load_weight(args.rows, i, n);
    const Strip result = args.bias.data == nullptr ? y * weight : fma(y, weight, load_parameter(args.bias, i, n));
    stream&& n == kStrip ? out.stream(i, result) : out.store(i, n, result);
  });
}

// ---- Backward ------------------------------------------------------------------------------------------------------

// With n the normalised row and g = grad * weight: grad_x = (g - mean(g) - n mean(g n)) / deviation, where mean(g) is
// taken off where centred.
template <DType kDType, bool kCentred>
void differentiate_row(const RowNormBackwardArgs& args, const Cursor& cursor, float* weight_sums, float* bias_sums) {
  const int64_t count = args.rows.elements;
  const Elements<kDType> grad(args.grad, cursor);
  const Elements<kDType> x(args.x, cursor);
  Row<kDType, kCentred> row(x, count);
  constexpr int kProduct = row.kMoments, kGrad = kProduct + 1, kSums = kCentred ? kGrad + 1 : kProduct + 1;
  double sums[kSums];
  sum_row<kSums>(count, sums, [&](int64_t i, int64_t n, Strip* sums) __attribute__((always_inline)) {
    const Strip away = row.away(i, n), g = grad.load(i, n) * load_weight(args.rows, i, n);
    row.add_moments(away, sums);
    sums[kProduct] = fma(g, away, sums[kProduct]);
    if constexpr (kCentred) sums[kGrad] = sums[kGrad] + g;
  });
  row.finish(sums, args.rows.eps);
  double mean = 0.0, product = sums[kProduct] * row.reciprocal;
  if constexpr (kCentred) {
    mean = sums[kGrad] * row.share;
    product += sums[kGrad] * row.rest;
  }
  const float mean_g = static_cast<float>(mean), mean_gn = static_cast<float>(product * row.share);

  const Elements<kDType> residual_grad(args.residual_grad, cursor), grad_x(args.grad_x, cursor);
  const Elements<DType::kFloat32> weights(weight_sums), biases(bias_sums);
  for_strips(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    x.fetch_next(i, count);
    grad.fetch_next(i, count);
    const Strip normalised = row.normalised(i, n), dy = grad.load(i, n);
    if (args.grad_x.data != nullptr) {
      Strip g = dy * load_weight(args.rows, i, n);
      if constexpr (kCentred) g = g - splat(mean_g, g);
      g = fma(normalised, splat(-mean_gn, g), g) * splat(row.reciprocal, g);
      grad_x.store(i, n, args.residual_grad.data == nullptr ? g : g + residual_grad.load(i, n));
    }
    if (weight_sums != nullptr) weights.store(i, n, fma(dy, normalised, weights.load(i, n)));
    if (bias_sums != nullptr) biases.store(i, n, biases.load(i, n) + dy);
  });
}

template <DType kDType, bool kCentred>
void differentiate_chunk(const RowNormBackwardArgs& args, int64_t chunk) {
  const int64_t elements = args.rows.elements, first = chunk * kRowNormChunk;
  const int64_t last = std::min(first + kRowNormChunk, args.row_count);
  const auto sums_of_chunk = [&](float* sums) {
    if (sums != nullptr) std::fill_n(sums += chunk * elements, elements, 0.0f);
    return sums;
  };
  float *weight_sums = sums_of_chunk(args.weight_sums), *bias_sums = sums_of_chunk(args.bias_sums);
  Cursor cursor(args.rows.size, args.rows.ndim, first);
  for (int64_t row = first; row < last; ++row, cursor.advance(1)) {
    differentiate_row<kDType, kCentred>(args, cursor, weight_sums, bias_sums);
  }
}

// Adds the chunks' sums, one after the other, in double.
void add_chunks(const RowNormBackwardArgs& args, const float* sums, const Operand& grad, int64_t begin, int64_t end) {
  if (grad.data == nullptr) return;
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = std::min(end - first, kChunk);
    double total[kChunk] = {};
    for (int64_t chunk = 0; chunk < args.chunks; ++chunk) {
      const float* from = sums + chunk * args.rows.elements + first;
      for (int64_t i = 0; i < count; ++i) total[i] += from[i];
    }
    float rounded[kChunk];
    char stored[kChunk * sizeof(float)];
    const int64_t size = size_of(grad.dtype);
    std::copy_n(total, kChunk, rounded);
    for (int64_t i = 0; i < count; i += kStrip) {
      store_strip(stored + i * size, grad.dtype,
                  load_strip<DType::kFloat32>(reinterpret_cast<const char*>(rounded + i)));
    }
    std::memcpy(static_cast<char*>(grad.data) + first * size, stored, count * size);
  }
}

// Calls run.template operator()<dtype, centred>().
template <class Run>
PYGEN_INLINE void choose(DType dtype, bool centred, Run run) {
  const auto by_dtype = [&]<bool kCentred>() {
    switch (dtype) {
      case DType::kFloat32:
        return run.template operator()<DType::kFloat32, kCentred>();
      case DType::kBFloat16:
        return run.template operator()<DType::kBFloat16, kCentred>();
      default:
        return run.template operator()<DType::kFloat16, kCentred>();
    }
  };
  centred ? by_dtype.template operator()<true>() : by_dtype.template operator()<false>();
}

}  // namespace

void row_norm(const RowNormArgs& args, int64_t begin, int64_t end) {
  choose(args.x.dtype, args.rows.centred, [&]<DType kDType, bool kCentred>() {
    Cursor cursor(args.rows.size, args.rows.ndim, begin);
    for (int64_t row = begin; row < end; ++row, cursor.advance(1)) normalise_row<kDType, kCentred>(args, cursor);
  });
  if (args.stream) _mm_sfence();
}

void row_norm_backward(const RowNormBackwardArgs& args, int64_t begin, int64_t end) {
  choose(args.x.dtype, args.rows.centred, [&]<DType kDType, bool kCentred>() {
    for (int64_t chunk = begin; chunk < end; ++chunk) differentiate_chunk<kDType, kCentred>(args, chunk);
  });
}

void row_norm_gradients(const RowNormBackwardArgs& args, int64_t begin, int64_t end) {
  add_chunks(args, args.weight_sums, args.grad_weight, begin, end);
  add_chunks(args, args.bias_sums, args.grad_bias, begin, end);
}

}  // namespace pygen::PYGEN_ISA
