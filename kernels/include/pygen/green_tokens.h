// green_tokens: which tokens of a text are green, and which may be counted.
#pragma once

#include "pygen/isa.h"
#include "pygen/plane.h"

namespace pygen {

// The kernel's range runs over samples x tokens.
struct GreenTokensArgs {
  int64_t samples;
  GreenSettings green;
  Setting<int64_t> lengths;
  bool ignore_repeated;
  Plane<bool> is_green, scored;
};

PYGEN_CPU_KERNEL(green_tokens, GreenTokensArgs)

namespace cuda {
void green_tokens(const GreenTokensArgs& args, void* stream);  // a cudaStream_t
}

}  // namespace pygen
