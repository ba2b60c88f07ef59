#include "pygen/green_rule.h"

namespace pygen::PYGEN_ISA {

void green_tokens(const GreenTokensArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) colour_token(args, i / args.green.capacity, i % args.green.capacity);
}

}  // namespace pygen::PYGEN_ISA
