// The arithmetic of diffusion_loss, once, for any pack of values: of vectors on a CPU, of floats on a GPU.
#pragma once

#include "pygen/diffusion_loss.h"
#include "pygen/pack.h"

namespace pygen {

// A row of the table in the arithmetic's own precision; `slope` is what the derivative is multiplied with.
struct LossRow {
  uint32_t step;
  float x0, noise, huber, per_huber, slope;
  double weight;
};

// A row that does not exist, or that reads noise that is absent, makes NaN.
PYGEN_INLINE void loss_read_row(const DiffusionLossArgs& args, int64_t index, int64_t sample, LossRow& r) {
  const bool has_noise = args.seed != nullptr || args.term[kLossTermNoise].data != nullptr;
  const double* row = args.table + index * args.table_stride;
  const bool exists = index >= 0 && index < args.n_rows;
  if (!exists || (row[kLossNoise] != 0.0 && !has_noise)) {
    r = LossRow{};
    r.weight = r.slope = __builtin_nanf("");
    return;
  }
  r.step = static_cast<uint32_t>(static_cast<int64_t>(row[kLossStep]));
  r.x0 = static_cast<float>(row[kLossX0]);
  r.noise = static_cast<float>(row[kLossNoise]);
  r.huber = static_cast<float>(row[kLossHuber]);
  r.per_huber = static_cast<float>(1.0 / row[kLossHuber]);
  r.weight = row[kLossWeight];
  const double grad = args.grad == nullptr ? 1.0 : args.grad[sample * args.grad_stride];
  r.slope = static_cast<float>(grad * r.weight / static_cast<double>(args.size[1] * args.place_elements));
}

// `load(term)` gives a V. `value` is what is summed, before the row's weight; `gradient` is that of the output.
template <class V, class Load>
PYGEN_INLINE void loss_row(const DiffusionLossArgs& args, const LossRow& row, Load load, V& value, V& gradient) {
  const V zero{}, one = splat(1.0f, zero);
  V target = zero;
  if (row.noise != 0.0f) target = splat(row.noise, zero) * load(kLossTermNoise);
  if (row.x0 != 0.0f) target = fma(splat(row.x0, zero), load(kLossTermX0), target);
  const V r = load(kLossTermOutput) - target;
  value = r * r;
  gradient = r + r;
  if (row.per_huber != 0.0f) {
    const V away = r * splat(row.per_huber, zero), root = sqrt(fma(away, away, one));
    const V far = splat(2.0f * row.huber, zero) * select(r < zero, -r, r);
    const V infinity = splat(__builtin_inff(), zero);
    value = select(root < infinity, gradient * (r / (one + root)), far);  // not root - 1, where digits would cancel
    gradient = gradient / root;
  }
  gradient = gradient * splat(row.slope, zero);
  if (args.term[kLossTermMask].data != nullptr) {
    const V mask = load(kLossTermMask);
    value = value * mask;
    gradient = gradient * mask;
  }
}

// The gradients of x0 and of the noise, from that of the output.
template <class V>
PYGEN_INLINE V loss_gradient(const LossRow& row, int term, const V& gradient) {
  if (term == kLossTermOutput) return gradient;
  return gradient * splat(term == kLossTermX0 ? -row.x0 : -row.noise, gradient);
}

}  // namespace pygen
