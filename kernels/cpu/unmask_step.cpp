#include "pygen/unmask_step.h"

#include "pygen/unmask_rule.h"
#include "token_row.h"

namespace pygen::PYGEN_ISA {
namespace {

struct Less {
  bool operator()(uint64_t a, uint64_t b) const { return a < b; }
};

}  // namespace

void unmask_step(const UnmaskStepArgs& args, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) {
    uint64_t* keys = args.workspace + sample * args.positions;
    int64_t candidates = 0;
    for (int64_t i = 0; i < args.positions; ++i) {
      keys[i] = unmask_key(args, sample, i).bits;
      candidates += UnmaskKey{keys[i]}.candidate();
    }
    std::sort(keys, keys + args.positions, Less{});
    const int64_t limit = std::max(unmask_count(args, sample, candidates),
                                   unmask_within_budget(args, sample, candidates, [&](int64_t i) { return keys[i]; }));
    for (int64_t rank = 0; rank < args.positions; ++rank) {
      unmask_write(args, sample, rank, {keys[rank]}, limit, {keys[limit > 0 ? limit - 1 : 0]});
    }
  }
}

}  // namespace pygen::PYGEN_ISA
