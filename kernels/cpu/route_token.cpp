#include "pygen/route_token.h"

#include "pygen/route_rule.h"
#include "token_row.h"

namespace pygen::PYGEN_ISA {

void route_token(const RouteTokenArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) route_position(args, i / args.positions, i % args.positions);
}

}  // namespace pygen::PYGEN_ISA
