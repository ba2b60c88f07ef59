// route_experts: the experts that rows of a router's logits choose, and their weights.
#pragma once

#include "pygen/isa.h"
#include "pygen/plane.h"

namespace pygen {

// The kernel's range runs over rows.
struct RouteExpertsArgs {
  int64_t rows, count, choices;  // choices <= count
  Operand logits;                // strides of rows, experts
  bool normalise;                // divide by the sum of the weights chosen
  Plane<int64_t> experts;        // (rows, choices)
  Plane<float> weights;
};

PYGEN_CPU_KERNEL(route_experts, RouteExpertsArgs)

namespace cuda {
void route_experts(const RouteExpertsArgs& args, void* stream);  // a cudaStream_t
}

}  // namespace pygen
