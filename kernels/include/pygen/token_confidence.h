// token_confidence: a token from every row of logits, its probability and the row's entropy, in one pass over memory.
// token_row.h holds what a row is to the kernels.
#pragma once

#include "pygen/isa.h"
#include "pygen/plane.h"

namespace pygen {

// The kernel's range runs over samples x positions. Operands have the strides of samples, positions, vocabulary.
struct TokenConfidenceArgs {
  int64_t samples, positions, vocabulary;
  Operand logits;
  Operand noise;   // standard exponentials: the token is the first to arrive, argmax p / noise
  Operand scaled;  // receives logits / temperature
  bool untempered;
  Setting<float> temperature, top_p;
  Setting<int64_t> top_k;
  PhiloxSettings philox;  // draws the token where a seed is given
  Plane<int64_t> token;
  Plane<float> prob, log_prob, neg_entropy;
  void* workspace;  // for the GPU: token_confidence_workspace() bytes
};

PYGEN_CPU_KERNEL(token_confidence, TokenConfidenceArgs)

namespace cuda {
int64_t token_confidence_workspace(int64_t rows, int64_t vocabulary);
void token_confidence(const TokenConfidenceArgs& args, void* stream);  // a cudaStream_t
}  // namespace cuda

}  // namespace pygen
