// The arithmetic of posterior_token, once, for a CPU and a GPU.
#pragma once

#include "pygen/posterior_token.h"
#include "pygen/token_row.h"

namespace pygen {

struct PosteriorRow {
  int64_t sample, row, position, current;
  float alpha, beta, shift, other, same, mask;

  PYGEN_INLINE PosteriorRow(const PosteriorTokenArgs& args, int64_t index) {
    sample = index / args.rows, row = index % args.rows;
    position = args.index.data == nullptr ? row : args.index.at(sample, row);
    if (position < 0 || position >= args.positions) position = 0;  // where no host could check: never read
    current = args.current.at(sample, position);
    const float* c = args.coefficients.data + sample * args.coefficients.stride;
    const bool masked = current == args.vocabulary;
    alpha = c[kPosteriorAlpha], beta = c[kPosteriorBeta], shift = c[kPosteriorShift], same = c[kPosteriorSame];
    other = c[masked ? kPosteriorMaskedOther : kPosteriorOther];
    mask = c[masked ? kPosteriorMaskedMask : kPosteriorMask];
  }

  // `scale` is alpha / sum, e = exp(x - max).
  template <class F>
  PYGEN_INLINE F weight(F e, F scale, F factor) const {
    return fma(scale, e, splat(beta, e)) * factor;
  }

  // The log of alpha p + beta; x is the shifted logit, `log_total` the log of the sum over all.
  PYGEN_INLINE double log_weight(float x, double log_total) const {
    const double log_p = x - log_total;
    if (beta == 0.0f) return log_p + log_double(alpha);
    return log_double(alpha * exp_double(log_p) + beta);
  }
  PYGEN_INLINE float confidence(PosteriorConfidence kind, float at_current, float others, double log_total) const {
    const double own = log_weight(at_current, log_total), rest = log_weight(others, log_total);
    if (kind == PosteriorConfidence::kMargin) return static_cast<float>(rest - own);
    return static_cast<float>(kind == PosteriorConfidence::kCurrent || own > rest ? -own : -rest);
  }
};

// The exponential that a uniform number stands for.
template <class F, class U>
PYGEN_INLINE F exponential(F u, U like) {
  const F least = splat(1e-30f, u);
  return least - log(u + least, like);
}

}  // namespace pygen
