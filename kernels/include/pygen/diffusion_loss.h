// diffusion_loss: how far a model's output lies from what it was to predict, as each sample's mean, and the gradients.
//
//   r    = output - (x0_c x0 + noise_c z)
//   loss = sum mask (weight huber(r) + bound nats(r, variance)) / elements
//
//   huber(r) = 2 c (sqrt(r^2 + c^2) - c), or r^2 where c is infinite
//   nats     = the variational bound of the step before (Ho et al. 2020, equations 5 and 13), of which only the learned
//              variance has a gradient (Nichol & Dhariwal 2021): a Gaussian whose mean is off by mean * r, whose log
//              variance is w = spread (variance + 1) / 2 above the posterior's; lengths in the posterior's deviations.
//              Its divergence from the posterior, or where bin is not 0 the negative logarithm of what it gives to the
//              values closer than bin to x0, and to all beyond where x0 lies outside [-0.999, 0.999].
//
// A term whose coefficient is exactly 0 is not read. diffusion_loss_row.h holds the arithmetic.
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"

namespace pygen {

// Columns of the table; pygen/ops/diffusion_loss.py reads the same names from the extension.
enum LossColumn : int32_t {
  kLossStep,  // the counter of this row's noise
  kLossX0,
  kLossNoise,
  kLossWeight,
  kLossHuber,
  kLossBound,
  kLossMean,
  kLossSpread,
  kLossBin,
  kLossColumns,
};
inline constexpr const char* kLossColumnNames[] = {"step",  "x0",   "noise",  "weight", "huber_c",
                                                   "bound", "mean", "spread", "bin"};
static_assert(sizeof(kLossColumnNames) / sizeof(*kLossColumnNames) == kLossColumns);

enum LossTerm : int32_t { kLossTermOutput, kLossTermX0, kLossTermNoise, kLossTermVariance, kLossTermMask, kLossTerms };
inline constexpr int kLossGradients = 4;  // of the first four terms

// The order of summation, the same on every device: a segment of a place (a sample's token) adds, lane by lane and in
// float, what lies kLossLanes apart; then in double eights of neighbouring lanes, and these by halves. A sample adds
// its segments, kMeanLanes apart, in double, and these by halves.
inline constexpr int64_t kLossLanes = 1024, kLossSegment = 4 * kLossLanes;
inline constexpr int kLossEights = kLossLanes / 8, kMeanLanes = 128;

// Iteration space: size[0] samples, size[1] tokens, then whatever is left of a sample, in any one order for all
// operands (row-major where Philox draws the noise). A row is chosen by (sample, token). The kernel's range runs over
// samples x tokens x segments.
struct DiffusionLossArgs {
  int32_t ndim;
  int64_t size[kMaxDims];
  int64_t place_elements, segments;  // of each (sample, token)
  Operand term[kLossTerms];
  Operand gradient[kLossGradients];
  const double* table;  // (n_rows, kLossColumns), rows table_stride apart
  int64_t table_stride;
  int64_t n_rows;
  const int64_t* rows;  // an index outside [0, n_rows) makes NaN
  int64_t rows_stride[2];
  const int64_t* seed;  // where noise is drawn by Philox: one per sample, `seed_stride` apart, read at launch
  int64_t seed_stride;
  const int64_t* sample_ids;  // one per sample, or null for 0, 1, 2, ...
  int64_t sample_ids_stride;
  const float* grad;  // of each loss, or null for 1
  int64_t grad_stride;
  double* partial;  // a number for each place and segment; null where no loss is wanted
  float* loss;      // one per sample
  int64_t loss_stride;
};

PYGEN_CPU_KERNEL(diffusion_loss, DiffusionLossArgs)
PYGEN_CPU_KERNEL(diffusion_loss_mean, DiffusionLossArgs)  // after all of the other: over the samples

namespace cuda {
void diffusion_loss(const DiffusionLossArgs& args, void* stream);  // both; a cudaStream_t
}

}  // namespace pygen
