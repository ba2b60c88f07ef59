// sample_token: the next token of every row of logits, by the processors and filters of text generation in the order of
// transformers. sample_rule.h holds their arithmetic, token_row.h what a row is to the kernels.
#pragma once

#include "pygen/isa.h"
#include "pygen/plane.h"

namespace pygen {

// Operands have the strides of rows, nothing, vocabulary; planes those of rows and, where there are any, of columns.
struct SampleTokenArgs {
  int64_t rows, vocabulary;
  Operand logits;
  Operand bias;
  Plane<const int64_t>
      previous;  // the tokens so far, `history` columns; what lies outside the vocabulary is passed over
  int64_t history;
  Setting<int64_t> previous_lengths;  // how many of the columns count
  Setting<float> repetition, presence, frequency;
  Plane<const int32_t> bitmask;  // bit i % 32 of word i / 32 allows token i
  Setting<float> temperature, top_p, min_p, typical_p;
  Setting<int64_t> top_k;
  PhiloxSettings philox;  // without a seed every row takes its largest logit
  Plane<int64_t> token;
  Plane<float> log_prob, raw_log_prob;
  Plane<bool> ok;
  int64_t parts;     // CPU: the pieces of a row that threads share; the kernel's range runs over rows x parts
  bool slot_by_row;  // CPU: whether each row has a slot, as it must where it is cut; else there is one
  char* workspace;   // CPU: the slots; GPU: sample_token_workspace() bytes
};

PYGEN_CPU_KERNEL(sample_token, SampleTokenArgs)

namespace cuda {
int64_t sample_token_workspace(const SampleTokenArgs& args);
void sample_token(const SampleTokenArgs& args, void* stream);  // a cudaStream_t
}  // namespace cuda

}  // namespace pygen
