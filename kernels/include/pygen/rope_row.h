// The arithmetic of rope and cache_append, once, for a CPU's vectors and for a GPU thread's numbers.
#pragma once

#include "pygen/lanes.h"

namespace pygen {
namespace {

// (x, y) turned by an angle.
template <class F>
PYGEN_INLINE void rope_pair(F& x, F& y, F cosine, F sine) {
  const F turned = fma(x, cosine, -(y * sine));
  y = fma(x, sine, y * cosine);
  x = turned;
}

}  // namespace
}  // namespace pygen
