// The arithmetic of diffusion_loss, once, for any pack of values: of vectors on a CPU, of floats on a GPU.
#pragma once

#include "pygen/diffusion_loss.h"
#include "pygen/exp.h"
#include "pygen/philox.h"

namespace pygen {

// A row of the table in the arithmetic's own precision; the slopes are what derivatives are multiplied with.
struct LossRow {
  uint32_t step;
  bool reads_x0;
  float x0, noise, weight, slope, huber, per_huber;
  float bound, bound_slope, mean, spread, bin;
};

// A row that does not exist, or that reads an operand that is absent, makes NaN.
PYGEN_INLINE void loss_read_row(const DiffusionLossArgs& args, int64_t index, int64_t sample, LossRow& r) {
  const bool has_noise = args.seed != nullptr || args.term[kLossTermNoise].data != nullptr;
  const bool has_variance = args.term[kLossTermVariance].data != nullptr;
  const double* row = args.table + index * args.table_stride;
  const bool exists = index >= 0 && index < args.n_rows;
  if (!exists || (row[kLossNoise] != 0.0 && !has_noise) || (row[kLossBound] != 0.0 && !has_variance)) {
    r = LossRow{};
    r.weight = r.slope = r.bound_slope = __builtin_nanf("");
    return;
  }
  r.step = static_cast<uint32_t>(static_cast<int64_t>(row[kLossStep]));
  r.x0 = static_cast<float>(row[kLossX0]);
  r.noise = static_cast<float>(row[kLossNoise]);
  r.weight = static_cast<float>(row[kLossWeight]);
  r.huber = static_cast<float>(row[kLossHuber]);
  r.per_huber = static_cast<float>(1.0 / row[kLossHuber]);
  r.bound = static_cast<float>(row[kLossBound]);
  r.mean = static_cast<float>(row[kLossMean]);
  r.spread = static_cast<float>(row[kLossSpread]);
  r.bin = static_cast<float>(row[kLossBin]);
  r.reads_x0 = r.x0 != 0.0f || (r.bound != 0.0f && r.bin != 0.0f);
  const double grad = args.grad == nullptr ? 1.0 : args.grad[sample * args.grad_stride];
  const double share = grad / static_cast<double>(args.size[1] * args.place_elements);
  r.slope = static_cast<float>(share * row[kLossWeight]);
  r.bound_slope = static_cast<float>(share * row[kLossBound]);
}

// What a standard normal gives to all beyond x >= 0, times e^(x^2 / 2); within 4e-7 of it.
template <class F>
PYGEN_INLINE F normal_tail(F x) {
  const F t = splat(1.0f, x) / fma(splat(0.25f, x), x, splat(1.0f, x));
  F p = splat(-0.010468549f, x);
  p = fma(p, t, splat(0.057246078f, x));
  p = fma(p, t, splat(-0.11493047f, x));
  p = fma(p, t, splat(0.0975703f, x));
  p = fma(p, t, splat(-0.050537184f, x));
  p = fma(p, t, splat(0.044777025f, x));
  p = fma(p, t, splat(0.038128298f, x));
  p = fma(p, t, splat(0.064270295f, x));
  p = fma(p, t, splat(0.080968015f, x));
  p = fma(p, t, splat(0.09350511f, x));
  p = fma(p, t, splat(0.09973552f, x));
  p = fma(p, t, splat(0.09973557f, x));
  return p * t;
}

// The divergence of the two Gaussians, and its derivative by w.
template <class F>
PYGEN_INLINE void loss_divergence(F off, F w, F& nats, F& slope) {
  const F one = splat(1.0f, w), half = splat(0.5f, w);
  const F spread = exp(-w) * fma(off, off, one);
  nats = half * ((w - one) + spread);
  slope = half * (one - spread);
}

// The discretised decoder: -ln(Q(near) - Q(far)), where Q is what a standard normal gives to all beyond, and its
// derivative by w. A factor of e^(-near^2 / 2) is kept out of the logarithm where near is positive.
template <class F>
PYGEN_INLINE void loss_decoder(F off, F x0, float bin, F w, F& nats, F& slope) {
  const F zero = w - w, one = splat(1.0f, w), half = splat(0.5f, w), width = splat(bin, w);
  const F scale = exp(-half * w);
  const auto low = x0<splat(-0.999f, w), high = x0> splat(0.999f, w);
  const F away = select(off < zero, -off, off);
  const F side = select(low, -off, select(high, off, away));
  const F near = (side - width) * scale, far = (away + width) * scale;
  const auto outside = near > zero;
  const F near_length = select(outside, near, -near);
  const F near_bell = exp(-half * near * near);
  const F far_bell = exp(select(outside, splat(-2.0f, w) * away * width * scale * scale, -half * far * far));
  const F near_share = select(outside, one, near_bell);  // without the factor
  const F far_share = select(low | high, zero, far_bell);
  const F near_tail = near_share * normal_tail(near_length), far_tail = far_share * normal_tail(far);
  const F given = select(outside, near_tail, one - near_tail) - far_tail;
  const F least = splat(0x1p-126f, w), logarithm = log(select(given < least, least, given), to_unsigned(w));
  const F factored = select(outside, half * near * near, zero);
  nats = (factored - logarithm) + (given - given);                                 // log does not know NaN
  slope = splat(0.199471140f, w) * (far * far_share - near * near_share) / given;  // 1 / (2 sqrt(2 pi))
}

template <class T, int N>
PYGEN_INLINE void loss_bound(const LossRow& row, const Pack<T, N>& r, const Pack<T, N>& x0, const Pack<T, N>& variance,
                             Pack<T, N>& nats, Pack<T, N>& slope) {
#ifdef __CUDACC__
#pragma unroll  // a pack lies in registers
#endif
  for (int i = 0; i < N; ++i) {
    const T half_spread = splat(0.5f * row.spread, r.v[i]);
    const T off = splat(row.mean, r.v[i]) * r.v[i], w = fma(half_spread, variance.v[i], half_spread);
    if (row.bin != 0.0f) {
      loss_decoder(off, x0.v[i], row.bin, w, nats.v[i], slope.v[i]);
    } else {
      loss_divergence(off, w, nats.v[i], slope.v[i]);
    }
    slope.v[i] = slope.v[i] * half_spread;
  }
}

// `load(term)` gives a V. `value` is what is summed; the gradients are the output's and the variance's.
template <class V, class Load>
PYGEN_INLINE void loss_row(const DiffusionLossArgs& args, const LossRow& row, Load load, V& value, V& gradient,
                           V& variance_gradient) {
  const V zero{}, one = splat(1.0f, zero);
  V target = zero, x0 = zero;
  if (row.noise != 0.0f) target = splat(row.noise, zero) * load(kLossTermNoise);
  if (row.reads_x0) x0 = load(kLossTermX0);
  if (row.x0 != 0.0f) target = fma(splat(row.x0, zero), x0, target);
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
  value = value * splat(row.weight, zero);
  gradient = gradient * splat(row.slope, zero);
  variance_gradient = splat(row.bound_slope, zero);
  if (row.bound != 0.0f) {
    V nats, slope;
    loss_bound(row, r, x0, load(kLossTermVariance), nats, slope);
    value = fma(splat(row.bound, zero), nats, value);
    variance_gradient = variance_gradient * slope;
  }
  if (args.term[kLossTermMask].data != nullptr) {
    const V mask = load(kLossTermMask);
    value = value * mask;
    gradient = gradient * mask;
    variance_gradient = variance_gradient * mask;
  }
}

// The gradient of a term, from those that `loss_row` made.
template <class V>
PYGEN_INLINE V loss_gradient(const LossRow& row, int term, const V& gradient, const V& variance_gradient) {
  if (term == kLossTermOutput) return gradient;
  if (term == kLossTermVariance) return variance_gradient;
  return gradient * splat(term == kLossTermX0 ? -row.x0 : -row.noise, gradient);
}

}  // namespace pygen
