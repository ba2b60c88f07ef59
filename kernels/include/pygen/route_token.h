// route_token: whether a position takes its predicted token, keeps its own, or takes a random one.
#pragma once

#include "pygen/isa.h"
#include "pygen/plane.h"

namespace pygen {

// Weights of the three routes: of the prediction, where it differs from what the position holds and where it agrees.
enum RouteColumn : int32_t { kRouteDiffers, kRouteAgrees, kRouteStay, kRouteRandom, kRouteColumns };

// The kernel's range runs over samples x positions.
struct RouteTokenArgs {
  int64_t samples, positions, vocabulary;
  Plane<const int64_t> sample, token, random;
  Setting<float> weights;  // kRouteColumns neighbours
  Operand noise;           // exponentials; strides of samples, positions, routes
  PhiloxSettings philox;   // draws the route, and the random token where there is none
  Plane<int64_t> next;
};

PYGEN_CPU_KERNEL(route_token, RouteTokenArgs)

namespace cuda {
void route_token(const RouteTokenArgs& args, void* stream);  // a cudaStream_t
}

}  // namespace pygen
