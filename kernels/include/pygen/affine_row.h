// The arithmetic of affine_step, once, for any value type V with +, -, *, <, >, fma, splat, select and is_nan:
// strips of vectors on a CPU, scalars on a GPU. Include the header of V's operations first.
#pragma once

#include "pygen/affine_step.h"

namespace pygen {

// A row of the table in the arithmetic's own precision, with what it reads.
struct AffineRow {
  uint32_t step;
  bool uses_x, uses_out, uses_pred, clamped, draws;
  float guidance, low, high, rescale;
  float pred_x[2], pred_out[2];  // each the sum of two floats
  float x[2], out[2], pred[2], noise[2];
  float history[kMaxHistory][2];
};

// A row that does not exist, or that reads an operand that is absent, makes NaN.
PYGEN_INLINE AffineRow affine_nan_row() {
  AffineRow r{};
  r.uses_pred = r.clamped = true;
  r.rescale = r.pred[0] = r.pred[1] = __builtin_nanf("");
  return r;
}

PYGEN_INLINE AffineRow affine_read_row(const AffineStepArgs& args, int64_t row, int64_t sample) {
  if (row < 0 || row >= args.n_rows) return affine_nan_row();
  const double* table = args.table + row * args.table_stride;
  const float* scale = args.scale == nullptr ? nullptr : args.scale + sample * args.scale_stride[0];
  const auto exact = [&](int column) {
    return scale == nullptr ? table[column] : table[column] * scale[column * args.scale_stride[1]];
  };
  const auto value = [&](int column) { return static_cast<float>(exact(column)); };
  AffineRow r;
  r.step = static_cast<uint32_t>(static_cast<int64_t>(table[kStep]));
  r.guidance = args.term[kTermUncond].data == nullptr ? 1.0f : value(kGuidance);
  r.pred_x[0] = value(kPredX);
  r.pred_x[1] = static_cast<float>(exact(kPredX) - r.pred_x[0]);
  r.pred_out[0] = value(kPredOut);
  r.pred_out[1] = static_cast<float>(exact(kPredOut) - r.pred_out[0]);
  r.low = value(kLow);
  r.high = value(kHigh);
  r.rescale = value(kRescale);
  const bool reads_second = args.second.data != nullptr || args.term[kTermMask].data != nullptr;
  for (int i = 0; i < 2; ++i) {
    const bool wanted = i == 0 ? args.next.data != nullptr : reads_second;
    r.x[i] = wanted ? value(i == 0 ? kX0 : kX1) : 0.0f;
    r.out[i] = wanted ? value(i == 0 ? kOut0 : kOut1) : 0.0f;
    r.pred[i] = wanted ? value(i == 0 ? kPred0 : kPred1) : 0.0f;
    r.noise[i] = wanted ? value(i == 0 ? kNoise0 : kNoise1) : 0.0f;
    for (int j = 0; j < args.n_history; ++j) r.history[j][i] = wanted ? value(kHistory + 2 * j + i) : 0.0f;
  }
  r.uses_pred = args.pred.data != nullptr || r.pred[0] != 0.0f || r.pred[1] != 0.0f;
  r.uses_x = (r.uses_pred && r.pred_x[0] != 0.0f) || r.x[0] != 0.0f || r.x[1] != 0.0f;
  r.uses_out = (r.uses_pred && r.pred_out[0] != 0.0f) || r.out[0] != 0.0f || r.out[1] != 0.0f;
  r.draws = r.noise[0] != 0.0f || r.noise[1] != 0.0f;
  r.clamped = r.low != -__builtin_inff() || r.high != __builtin_inff() || r.rescale != 1.0f;
  const bool has_noise = args.seed != nullptr || args.term[kTermNoise].data != nullptr;
  if ((r.uses_out && args.term[kTermCond].data == nullptr) || (r.draws && !has_noise)) return affine_nan_row();
  return r;
}

// `load(term)` gives a V; NaN passes through the clamp, as in torch.clamp.
template <class V, class Load>
PYGEN_INLINE void affine_row(const AffineStepArgs& args, const AffineRow& r, Load load, V& next, V& pred, V& second) {
  const V zero{};
  const auto add = [&](float coefficient, const V& term, const V& sum) {
    return coefficient == 0.0f ? sum : fma(splat(coefficient, zero), term, sum);
  };
  const V x = r.uses_x ? load(kTermX) : zero;
  V out = zero;
  if (r.uses_out) {
    if (r.guidance == 1.0f) {
      out = load(kTermCond);
    } else {
      out = load(kTermUncond);
      if (r.guidance != 0.0f) out = fma(splat(r.guidance, zero), load(kTermCond) - out, out);
    }
  }
  pred = zero;
  if (r.uses_pred) {
    const V product = add(r.pred_x[0], x, zero);
    pred = add(r.pred_out[0], out, product);
    if (r.pred_x[0] != 0.0f && r.pred_out[0] != 0.0f) {
      // The two products cancel where alpha is small: add back what rounding took from the first and from both factors.
      V lost = fma(splat(r.pred_x[0], zero), x, zero - product);
      lost = add(r.pred_out[1], out, add(r.pred_x[1], x, lost));
      const V restored = pred + lost;
      pred = select(is_nan(restored), pred, restored);  // infinities stay what they were
    }
    if (r.clamped) {
      const V low = splat(r.low, zero), high = splat(r.high, zero);
      pred = select(pred < low, low, pred);
      pred = select(pred > high, high, pred) * splat(r.rescale, zero);
    }
  }
  V y[2];
  for (int i = 0; i < 2; ++i) y[i] = add(r.pred[i], pred, add(r.out[i], out, add(r.x[i], x, zero)));
  for (int j = 0; j < args.n_history; ++j) {
    if (r.history[j][0] == 0.0f && r.history[j][1] == 0.0f) continue;
    const V term = load(kTermHistory + j);
    for (int i = 0; i < 2; ++i) y[i] = add(r.history[j][i], term, y[i]);
  }
  if (r.draws) {
    V z = load(kTermNoise);
    if (args.term[kTermNoiseScale].data != nullptr) z = z * load(kTermNoiseScale);
    for (int i = 0; i < 2; ++i) y[i] = add(r.noise[i], z, y[i]);
  }
  next = y[0];
  second = y[1];
  if (args.term[kTermMask].data != nullptr) {
    const V mask = load(kTermMask);
    next = fma(mask, second, (splat(1.0f, zero) - mask) * next);
  }
}

}  // namespace pygen
