// timestep_embedding: cosines and sines of times at wavelengths that are spaced geometrically (Vaswani et al. 2017).
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"

namespace pygen {

// Row r of out holds cos(t[r] f_i) and sin(t[r] f_i), f_i = e^(decay * i) for i < half, and a 0 where width is odd. The
// kernel's range runs over rows.
struct TimestepEmbeddingArgs {
  const float* t;
  int64_t t_stride;
  int64_t width, half;
  double decay;
  bool cosines_first;
  Operand out;  // stride of rows; a row's elements are neighbours
};

PYGEN_CPU_KERNEL(timestep_embedding, TimestepEmbeddingArgs)

}  // namespace pygen
