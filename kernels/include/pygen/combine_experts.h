// combine_experts: out = sum_k weight_k x_k + residual, what a row's experts made of it.
#pragma once

#include "pygen/isa.h"
#include "pygen/plane.h"

namespace pygen {

// Rows of `width` neighbours. The kernel's range runs over rows.
struct CombineExpertsArgs {
  int64_t rows, choices, width;
  Operand x;                   // strides of rows, choices
  Plane<const float> weights;  // (rows, choices)
  Operand residual, out;       // strides of rows; of one dtype
};

PYGEN_CPU_KERNEL(combine_experts, CombineExpertsArgs)

namespace cuda {
void combine_experts(const CombineExpertsArgs& args, void* stream);  // a cudaStream_t
}

}  // namespace pygen
