// What green_tokens does at one token, for a CPU and a GPU.
#pragma once

#include "pygen/green_list.h"
#include "pygen/green_tokens.h"

namespace pygen {

// Whether a token and its context stood earlier in the text.
PYGEN_INLINE bool is_repeated(const GreenSettings& settings, int64_t sample, int64_t at) {
  const auto token = [&](int64_t i) { return settings.tokens.at(sample, i); };
  for (int64_t earlier = settings.context; earlier < at; ++earlier) {
    int64_t same = 0;
    while (same <= settings.context && token(earlier - same) == token(at - same)) ++same;
    if (same > settings.context) return true;
  }
  return false;
}

PYGEN_INLINE void colour_token(const GreenTokensArgs& args, int64_t sample, int64_t at) {
  const bool scored = at >= args.green.context && at < args.lengths.at(sample, args.green.capacity) &&
                      !(args.ignore_repeated && is_repeated(args.green, sample, at));
  args.is_green.put(sample, at,
                    scored && is_green(green_list(args.green, sample, at), args.green.tokens.at(sample, at)));
  args.scored.put(sample, at, scored);
}

}  // namespace pygen
