// watermark_logits: adds delta to the logits of green tokens.
#pragma once

#include "pygen/isa.h"
#include "pygen/plane.h"

namespace pygen {

// The kernel's range runs over samples x positions x blocks of kRowBlock. The last position's logits are for the token
// behind all that the sample has.
struct WatermarkLogitsArgs {
  int64_t samples, positions, vocabulary;
  Operand logits, out;  // strides of samples, positions, vocabulary
  GreenSettings green;
  Setting<int64_t> lengths;
  Setting<float> delta;

  PYGEN_INLINE int64_t known(int64_t sample, int64_t position) const {
    return lengths.at(sample, green.capacity) - positions + 1 + position;
  }
};

PYGEN_CPU_KERNEL(watermark_logits, WatermarkLogitsArgs)

namespace cuda {
void watermark_logits(const WatermarkLogitsArgs& args, void* stream);  // a cudaStream_t
}

}  // namespace pygen
