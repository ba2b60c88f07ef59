// posterior_token: tokens of a discrete diffusion's reverse step, of which every class has the weight
//
//   (alpha p_i + beta) f_i,   p = softmax(logits + shift [i = current]),   f_i = same where i = current, else other
//
// and optionally of one class more, the mask, behind the vocabulary. posterior_rule.h holds the arithmetic.
#pragma once

#include "pygen/isa.h"
#include "pygen/plane.h"

namespace pygen {

enum PosteriorColumn : int32_t {
  kPosteriorAlpha,
  kPosteriorBeta,
  kPosteriorShift,
  kPosteriorOther,
  kPosteriorSame,
  kPosteriorMask,         // the mask's weight
  kPosteriorMaskedOther,  // where the mask is the current token: f of all others,
  kPosteriorMaskedMask,   // and the mask's weight
  kPosteriorColumns
};

// What `confidence` says of the current token: minus the log of the largest weight, of its own, or of the ratio of its
// own to the largest other.
enum class PosteriorConfidence : int32_t { kLargest, kCurrent, kMargin };

// The kernel's range runs over samples x rows: row j of a sample is position index[j], or j.
struct PosteriorTokenArgs {
  int64_t samples, rows, positions, vocabulary;
  bool has_mask;
  bool uniform;    // the noise is uniform numbers, -log of which are the exponentials
  Operand logits;  // strides of samples, positions, vocabulary
  Operand noise;   // strides of samples, rows, classes; exponentials, or none: the largest weight wins
  Plane<const int64_t> current, index;
  Setting<float> coefficients;  // kPosteriorColumns neighbours
  PhiloxSettings philox;
  PosteriorConfidence kind;
  Plane<int64_t> token;
  Plane<float> prob, confidence;
  Plane<int64_t> next;  // over positions: receives the token at its position
  void* workspace;      // GPU: posterior_token_workspace() bytes
};

PYGEN_CPU_KERNEL(posterior_token, PosteriorTokenArgs)

namespace cuda {
int64_t posterior_token_workspace(int64_t rows, int64_t vocabulary);
void posterior_token(const PosteriorTokenArgs& args, void* stream);  // a cudaStream_t
}  // namespace cuda

}  // namespace pygen
