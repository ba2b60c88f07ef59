// affine_step: one row of a solver's table, executed over a batch in one pass over memory.
//
//   out  = base uncond + guidance (cond - uncond) + negative (neg - uncond)
//   pred = rescale * clamp(pred_x x + pred_out out, low, high)
//   y_r  = x_r x + out_r out + pred_r pred + sum_j history_rj history_j + noise_r s z     for r = 0, 1
//   next = y_0, or (1 - mask) y_0 + mask y_1 where there is a mask;   second = y_1
//
// s, the deviation of the noise, is 1, or read from noise_scale as NoiseScale says. A term whose coefficient is exactly
// 0 is not read; that of uncond is base - guidance - negative. affine_row.h holds the arithmetic.
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"

namespace pygen {

inline constexpr int kMaxHistory = 12;

// Columns of the table of coefficients; pygen/ops/affine_step.py reads the same names from the extension.
enum Column : int32_t {
  kStep,  // the counter of this row's noise
  kBase,
  kGuidance,
  kNegative,
  kPredX,
  kPredOut,
  kLow,
  kHigh,
  kRescale,
  kX0,
  kOut0,
  kPred0,
  kNoise0,  // clang-format off
  kX1, kOut1, kPred1, kNoise1,  // clang-format on
  kLogVarShift,
  kLogVarScale,
  kHistory,  // from here on two columns per history term, one for each result
};
inline constexpr const char* kColumnNames[] = {
    "step", "base",  "guidance", "negative", "pred_x", "pred_out", "low",    "high",          "rescale",      "x0",
    "out0", "pred0", "noise0",   "x1",       "out1",   "pred1",    "noise1", "log_var_shift", "log_var_scale"};
static_assert(sizeof(kColumnNames) / sizeof(*kColumnNames) == kHistory);

enum Term : int32_t {
  kTermX,
  kTermCond,
  kTermUncond,
  kTermNegative,
  kTermNoise,
  kTermNoiseScale,
  kTermMask,
  kTermHistory
};
inline constexpr int kMaxTerms = kTermHistory + kMaxHistory;

// What noise_scale holds: s itself, s^2, or v with ln s^2 = log_var_shift + log_var_scale v.
enum class NoiseScale : int32_t { kFactor, kVariance, kLogVariance };
inline constexpr const char* kNoiseScaleNames[] = {"factor", "variance", "log_variance"};

// Iteration space: size[0] samples, size[1] tokens, then whatever is left of a sample, in any one order for all
// operands (row-major where Philox draws the noise). A row is chosen by (sample, token).
struct AffineStepArgs {
  int32_t ndim;
  int32_t n_history;
  int64_t size[kMaxDims];
  Operand term[kMaxTerms];
  Operand next, pred, second;
  const double* table;  // (n_rows, kHistory + 2 n_history), rows table_stride apart
  int64_t table_stride;
  int64_t n_rows;
  const int64_t* rows;  // an index outside [0, n_rows) fills its results with NaN
  int64_t rows_stride[2];
  const float* scale;  // optional factors on the coefficients, one per sample and column
  int64_t scale_stride[2];
  const int64_t* seed;  // where noise is drawn by Philox: one per sample, `seed_stride` apart, read at launch
  int64_t seed_stride;
  const int64_t* sample_ids;  // one per sample, or null for 0, 1, 2, ...
  int64_t sample_ids_stride;
  NoiseScale noise_scale;
};

// Whether anything wants y_1.
constexpr bool affine_reads_second(const AffineStepArgs& args) {
  return args.second.data != nullptr || args.term[kTermMask].data != nullptr;
}

PYGEN_CPU_KERNEL(affine_step, AffineStepArgs)

namespace cuda {
void affine_step(const AffineStepArgs& args, void* stream);  // a cudaStream_t
}

}  // namespace pygen
