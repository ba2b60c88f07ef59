// philox_normal: fills a tensor with the standard normals that belong to its samples.
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"

namespace pygen {

// The top four bits of a draw name the op that draws; the other twelve are the caller's.
enum : uint32_t {
  kDrawPhiloxNormal = 0u << 12,
  kDrawAffineStep = 1u << 12,
  kDrawToken = 8u << 12,
  kDrawUnmask = 9u << 12,
  kDrawPosterior = 10u << 12,
  kDrawRoute = 11u << 12,
  kDrawWatermark = 12u << 12,  // the odd draw hashes a context
  kDrawVerify = 13u << 12,
  kDrawSample = 14u << 12,
  kDrawDropout = 15u << 12
};

// Iteration space: size[0] samples, then the logical dimensions of one sample, row-major. The linear index of the
// kernel's range runs over all of it.
struct PhiloxNormalArgs {
  int32_t ndim;
  uint32_t draw;
  int64_t size[kMaxDims];
  Operand out;
  const int64_t* seed;        // one per sample, `seed_stride` apart; read at launch, as the others
  const int64_t* step;        // one per sample, `step_stride` apart
  const int64_t* sample_ids;  // one per sample, or null for 0, 1, 2, ...
  int64_t seed_stride, step_stride, sample_ids_stride;
};

PYGEN_CPU_KERNEL(philox_normal, PhiloxNormalArgs)

namespace cuda {
void philox_normal(const PhiloxNormalArgs& args, void* stream);  // a cudaStream_t
}

}  // namespace pygen
