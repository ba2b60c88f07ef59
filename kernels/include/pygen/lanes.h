// The operations that shared arithmetic is written in: over a CPU's vectors, or over a GPU thread's own numbers.
#pragma once

#if defined(__CUDACC__) || defined(PYGEN_EMULATION)
#include "pygen/device.h"
#else
#include "pygen/simd.h"
#endif
