// The arithmetic of affine_step, once, for any pack of values: of vectors on a CPU, of floats on a GPU.
#pragma once

#include "pygen/affine_step.h"
#include "pygen/exp.h"

namespace pygen {

// A factor, and whether it is other than 0: a term is read only if it is.
struct Coefficient {
  float value;
  uint32_t used;
};

// A row of the table in the arithmetic's own precision, with what it reads.
struct AffineRow {
  uint32_t step;
  bool uses_x, uses_out, uses_uncond, plain, uses_pred, clamped, draws;
  float low, high, rescale;
  float log_deviation_shift, log_deviation_scale;  // half of the log variance's
  Coefficient base, guidance, negative;            // the last two unused where the row does not read `out`
  Coefficient pred_x, pred_out;
  float pred_x_rest, pred_out_rest;  // what float lacks of the two
  Coefficient x[2], out[2], pred[2], noise[2];
  Coefficient history[kMaxHistory][2];
};

// A row that does not exist, or that reads an operand that is absent, makes NaN.
PYGEN_INLINE void affine_nan_row(AffineRow& r) {
  const Coefficient nan{__builtin_nanf(""), 1};
  r = AffineRow{};
  r.uses_pred = r.clamped = true;
  r.rescale = nan.value;
  r.pred[0] = r.pred[1] = nan;
}

PYGEN_INLINE void affine_read_row(const AffineStepArgs& args, int64_t row, int64_t sample, AffineRow& r) {
  if (row < 0 || row >= args.n_rows) return affine_nan_row(r);
  const double* table = args.table + row * args.table_stride;
  const float* scale = args.scale == nullptr ? nullptr : args.scale + sample * args.scale_stride[0];
  const auto exact = [&](int column) {
    return scale == nullptr ? table[column] : table[column] * scale[column * args.scale_stride[1]];
  };
  const auto rounded = [](double exact) {
    const float value = static_cast<float>(exact);
    return Coefficient{value, value != 0.0f};
  };
  const auto coefficient = [&](int column) { return rounded(exact(column)); };
  r.step = static_cast<uint32_t>(static_cast<int64_t>(table[kStep]));
  r.low = static_cast<float>(exact(kLow));
  r.high = static_cast<float>(exact(kHigh));
  r.rescale = static_cast<float>(exact(kRescale));
  r.clamped = r.low != -__builtin_inff() || r.high != __builtin_inff() || r.rescale != 1.0f;
  r.pred_x = coefficient(kPredX);
  r.pred_x_rest = static_cast<float>(exact(kPredX) - r.pred_x.value);
  r.pred_out = coefficient(kPredOut);
  r.pred_out_rest = static_cast<float>(exact(kPredOut) - r.pred_out.value);
  const bool wanted[2] = {args.next.data != nullptr, affine_reads_second(args)};
  for (int i = 0; i < 2; ++i) {
    const Coefficient none{0.0f, 0};
    r.x[i] = wanted[i] ? coefficient(i == 0 ? kX0 : kX1) : none;
    r.out[i] = wanted[i] ? coefficient(i == 0 ? kOut0 : kOut1) : none;
    r.pred[i] = wanted[i] ? coefficient(i == 0 ? kPred0 : kPred1) : none;
    r.noise[i] = wanted[i] ? coefficient(i == 0 ? kNoise0 : kNoise1) : none;
    for (int j = 0; j < args.n_history; ++j) r.history[j][i] = wanted[i] ? coefficient(kHistory + 2 * j + i) : none;
  }
  r.uses_pred = args.pred.data != nullptr || r.pred[0].used || r.pred[1].used;
  r.uses_x = (r.uses_pred && r.pred_x.used) || r.x[0].used || r.x[1].used;
  r.uses_out = (r.uses_pred && r.pred_out.used) || r.out[0].used || r.out[1].used;
  r.draws = r.noise[0].used || r.noise[1].used;
  r.log_deviation_shift = static_cast<float>(0.5 * exact(kLogVarShift));
  r.log_deviation_scale = static_cast<float>(0.5 * exact(kLogVarScale));
  const bool guided = args.term[kTermUncond].data != nullptr;
  const double base = guided ? exact(kBase) : 1.0, guidance = guided ? exact(kGuidance) : 1.0;
  const double negative = guided ? exact(kNegative) : 0.0;
  r.uses_uncond = r.uses_out && base - guidance - negative != 0.0;
  r.plain = base == 1.0 && negative == 0.0;
  r.base = rounded(base);
  r.guidance = r.uses_out ? rounded(guidance) : Coefficient{0.0f, 0};
  r.negative = r.uses_out ? rounded(negative) : Coefficient{0.0f, 0};
  const bool has_noise = args.seed != nullptr || args.term[kTermNoise].data != nullptr;
  if ((r.uses_out && args.term[kTermCond].data == nullptr) ||
      (r.negative.used && args.term[kTermNegative].data == nullptr) || (r.draws && !has_noise)) {
    affine_nan_row(r);
  }
}

// The deviation of the noise from what noise_scale holds.
template <class V>
PYGEN_INLINE V affine_deviation(const AffineStepArgs& args, const AffineRow& r, const V& scale) {
  if (args.noise_scale == NoiseScale::kVariance) return sqrt(scale);
  if (args.noise_scale == NoiseScale::kFactor) return scale;
  return exp(fma(splat(r.log_deviation_scale, scale), scale, splat(r.log_deviation_shift, scale)));
}

// Adds a term where it is used.
template <class V>
PYGEN_INLINE void add(const Coefficient& coefficient, const V& term, V& sum) {
  if (coefficient.used) sum = fma(splat(coefficient.value, V{}), term, sum);
}

// x, the model's output with guidance, and pred before its clamp. `load(term)` gives a V.
template <class V, class Load>
PYGEN_INLINE void affine_pred(const AffineRow& r, Load load, V& x, V& out, V& pred) {
  const V zero{};
  x = out = pred = zero;
  if (r.uses_x) x = load(kTermX);
  if (r.plain) [[likely]] {
    if (r.uses_uncond) out = load(kTermUncond);
    if (r.guidance.used) {
      const V cond = load(kTermCond);
      out = r.uses_uncond ? fma(splat(r.guidance.value, zero), cond - out, out) : cond;
    }
  } else {
    const V uncond = r.uses_uncond ? load(kTermUncond) : zero;
    add(r.base, uncond, out);
    if (r.guidance.used) add(r.guidance, load(kTermCond) - uncond, out);
    if (r.negative.used) add(r.negative, load(kTermNegative) - uncond, out);
  }
  if (!r.uses_pred) return;
  add(r.pred_x, x, pred);
  if (r.pred_x.used && r.pred_out.used) {
    // The two products cancel where alpha is small: add back what rounding took from the first and from both factors.
    V rest = fma(splat(r.pred_x.value, zero), x, zero - pred);
    rest = fma(splat(r.pred_x_rest, zero), x, rest);
    rest = fma(splat(r.pred_out_rest, zero), out, rest);
    add(r.pred_out, out, pred);
    const V restored = pred + rest;
    pred = select(is_nan(restored), pred, restored);  // infinities stay what they were
  } else {
    add(r.pred_out, out, pred);
  }
}

// kResults is 2 where `affine_reads_second`, else 1, and `second` is not made. NaN passes through the clamp, as in
// torch.clamp.
template <int kResults, class V, class Load>
PYGEN_INLINE void affine_row(const AffineStepArgs& args, const AffineRow& r, Load load, V& next, V& pred, V& second) {
  const V zero{};
  V x, out, y[2] = {zero, zero};
  affine_pred(r, load, x, out, pred);
  if (r.uses_pred && r.clamped) {
    const V low = splat(r.low, zero), high = splat(r.high, zero);
    pred = select(pred < low, low, pred);
    pred = select(pred > high, high, pred) * splat(r.rescale, zero);
  }
  for (int i = 0; i < kResults; ++i) {
    add(r.x[i], x, y[i]);
    add(r.out[i], out, y[i]);
    add(r.pred[i], pred, y[i]);
  }
  for (int j = 0; j < args.n_history; ++j) {
    if (!(r.history[j][0].used | r.history[j][1].used)) continue;
    const V term = load(kTermHistory + j);
    for (int i = 0; i < kResults; ++i) add(r.history[j][i], term, y[i]);
  }
  if (r.draws) {
    V z = load(kTermNoise);
    if (args.term[kTermNoiseScale].data != nullptr) z = z * affine_deviation(args, r, load(kTermNoiseScale));
    for (int i = 0; i < kResults; ++i) add(r.noise[i], z, y[i]);
  }
  next = y[0];
  second = y[1];
  if (kResults == 2 && args.term[kTermMask].data != nullptr) {
    const V mask = load(kTermMask);
    next = fma(mask, second, (splat(1.0f, zero) - mask) * next);
  }
}

}  // namespace pygen
