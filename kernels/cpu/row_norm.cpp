#include "pygen/row_norm.h"

#include <algorithm>

#include "norm_row.h"

namespace pygen::PYGEN_ISA {
namespace {

// Rows one after the other, and whose parameters each takes.
struct Place : Cursor {
  const RowNormRows& rows;
  int64_t sample, left;  // rows of the sample

  Place(const RowNormRows& rows, int64_t row)
      : Cursor(rows.size, rows.ndim, row),
        rows(rows),
        sample(row / rows.per_sample),
        left(rows.per_sample - row % rows.per_sample) {}

  void next() {
    advance(1);
    if (--left == 0) ++sample, left = rows.per_sample;
  }
};

PYGEN_INLINE Strip load_parameter(const Operand& operand, const Place& at, int64_t i, int64_t count) {
  const int64_t place = at.sample * operand.stride[0] + i;
  const char* from = static_cast<const char*>(operand.data) + place * size_of(operand.dtype);
  if (count == kStrip) return load_strip(from, operand.dtype);
  char padded[kStrip * sizeof(float)] = {};
  std::memcpy(padded, from, count * size_of(operand.dtype));
  return load_strip(padded, operand.dtype);
}
PYGEN_INLINE Strip load_weight(const Place& at, int64_t i, int64_t count) {
  if (at.rows.weight.data == nullptr) return splat(1.0f, Strip{});
  return load_parameter(at.rows.weight, at, i, count) + splat(at.rows.offset, Strip{});
}

// ---- Forward -------------------------------------------------------------------------------------------------------

template <DType kDType, bool kCentred>
void normalise_row(const RowNormArgs& args, const Place& cursor) {
  const int64_t count = args.rows.elements;
  const Elements<kDType> x(args.x, cursor), residual(args.residual, cursor);
  auto h = x;
  if (args.residual.data != nullptr) {
    h = Elements<kDType>(args.residual_out, cursor);
    for_strips(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const Strip more = x.load(i, n), before = residual.load(i, n);
      h.store(i, n,
              args.gate.data == nullptr ? more + before : fma(more, load_parameter(args.gate, cursor, i, n), before));
    });
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
    const Strip y = row.normalised(i, n), weight = load_weight(cursor, i, n);
    const Strip result =
        args.bias.data == nullptr ? y * weight : fma(y, weight, load_parameter(args.bias, cursor, i, n));
    stream&& n == kStrip ? out.stream(i, result) : out.store(i, n, result);
  });
}

// ---- Backward ------------------------------------------------------------------------------------------------------

// With n the normalised row and g = grad * weight: grad_x = (g - mean(g) - n mean(g n)) / deviation, where mean(g) is
// taken off where centred.
template <DType kDType, bool kCentred>
void differentiate_row(const RowNormBackwardArgs& args, const Place& cursor, float* weight_sums, float* bias_sums) {
  const int64_t count = args.rows.elements;
  const Elements<kDType> grad(args.grad, cursor);
  const Elements<kDType> x(args.x, cursor);
  Row<kDType, kCentred> row(x, count);
  constexpr int kProduct = row.kMoments, kGrad = kProduct + 1, kSums = kCentred ? kGrad + 1 : kProduct + 1;
  double sums[kSums];
  sum_row<kSums>(count, sums, [&](int64_t i, int64_t n, Strip* sums) __attribute__((always_inline)) {
    const Strip away = row.away(i, n), g = grad.load(i, n) * load_weight(cursor, i, n);
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
      Strip g = dy * load_weight(cursor, i, n);
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
  const int64_t elements = args.rows.elements, rows = args.rows.per_sample, sample = chunk / args.chunks;
  const int64_t first = sample * rows + chunk % args.chunks * kRowNormChunk;
  const int64_t last = std::min(first + kRowNormChunk, (sample + 1) * rows);
  const auto sums_of_chunk = [&](float* sums) {
    if (sums != nullptr) std::fill_n(sums += chunk * elements, elements, 0.0f);
    return sums;
  };
  float *weight_sums = sums_of_chunk(args.weight_sums), *bias_sums = sums_of_chunk(args.bias_sums);
  Place cursor(args.rows, first);
  for (int64_t row = first; row < last; ++row, cursor.next()) {
    differentiate_row<kDType, kCentred>(args, cursor, weight_sums, bias_sums);
  }
}

// Adds the sums of a sample's chunks, one after the other, in double.
void add_chunks(const RowNormBackwardArgs& args, const float* sums, const Operand& grad, int64_t begin, int64_t end) {
  if (grad.data == nullptr) return;
  const int64_t elements = args.rows.elements;
  for (int64_t first = begin, count; first < end; first += count) {
    count = std::min({end - first, kChunk, elements - first % elements});
    double total[kChunk] = {};
    for (int64_t chunk = 0; chunk < args.chunks; ++chunk) {
      const float* from = sums + (first / elements * args.chunks + chunk) * elements + first % elements;
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
    Place cursor(args.rows, begin);
    for (int64_t row = begin; row < end; ++row, cursor.next()) normalise_row<kDType, kCentred>(args, cursor);
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
