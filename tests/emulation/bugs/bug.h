// A kernel with a mistake planted in it, beside the same kernel without: PYGEN_BUG(run) enters run<kPlanted> and
// run<kFixed>. all.cu runs one of them by name. `run` returns whether the result is right.
#pragma once

#include <cmath>
#include <vector>

#include "emulation.h"

struct Bug {
  const char* name;
  bool (*planted)();
  bool (*fixed)();
};

inline std::vector<Bug>& bugs() {
  static std::vector<Bug> all;
  return all;
}

inline constexpr bool kPlanted = true, kFixed = false;

#define PYGEN_BUG(run) static const bool run##_entered = (bugs().push_back({#run, run<kPlanted>, run<kFixed>}), true)
