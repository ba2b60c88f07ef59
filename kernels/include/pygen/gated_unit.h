// gated_unit: out = activation(gate) * up (Shazeer 2020), and the gradients of gate and up.
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"

namespace pygen {

// x times the share of a logistic (silu) or a normal distribution (gelu) that lies below x; in gelu_tanh the normal's
// is a logistic's of an argument close to it (Hendrycks & Gimpel 2016).
enum class Activation : int32_t { kSilu, kGelu, kGeluTanh };

inline constexpr const char* kActivationNames[] = {"silu", "gelu", "gelu_tanh"};

// All tensors are of one dtype; what is not wanted has no data. `grad`, of `out`, is there where a gradient is.
struct GatedUnitArgs {
  Activation activation;
  int32_t ndim;
  int64_t size[kMaxDims];
  Operand gate, up, grad, out, grad_gate, grad_up;
};

PYGEN_CPU_KERNEL(gated_unit, GatedUnitArgs)

}  // namespace pygen
