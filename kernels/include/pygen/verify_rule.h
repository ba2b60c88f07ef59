// The arithmetic of verify_draft, once, for a CPU and a GPU.
//
// A drafted token d, drawn from q, is accepted with probability min(1, p(d) / q(d)), p being the target; the first that
// is not gives way to a token from max(0, p - q), and behind a draft accepted whole comes one from p (Leviathan et al.
// 2023; Chen et al. 2023). A draft that was not drawn has q(d) = 1, so that p less d remains: the target's row is then
// summed up without d, and read once.
#pragma once

#include "pygen/token_row.h"
#include "pygen/verify_draft.h"

namespace pygen {

struct VerifyRule {
  int64_t sample, length;
  bool greedy, dense;  // dense: with the draft's distribution
  float rate;
  double exact_rate;

  PYGEN_INLINE VerifyRule(const VerifyDraftArgs& args, int64_t sample) : sample(sample) {
    const int64_t given = args.lengths.at(sample, args.drafted);
    length = given < args.drafted ? given : args.drafted;
    const float temperature = args.temperature.at(sample, 1.0f);
    greedy = args.philox.seed == nullptr || temperature == 0.0f;
    dense = args.draft_logits.data != nullptr && !greedy;
    rate = greedy ? 1.0f : 1.0f / temperature;
    exact_rate = greedy ? 1.0 : 1.0 / temperature;
  }

  // The token drafted for a position, or -1 where the draft has ended.
  PYGEN_INLINE int64_t drafted(const VerifyDraftArgs& args, int64_t position) const {
    if (position >= length) return -1;
    const int64_t token = args.draft.at(sample, position);
    return token >= 0 && token < args.vocabulary ? token : -1;
  }
  // The token that a position's target is summed up without, or -1.
  PYGEN_INLINE int64_t left_out(const VerifyDraftArgs& args, int64_t position) const {
    return greedy || dense ? -1 : drafted(args, position);
  }

  // exp(x) of a logit relative to its row.
  PYGEN_INLINE double weight(float logit, const RowSummary& row) const {
    return exp_double(exact_rate * (static_cast<double>(logit) - row.max));
  }
  // That of the token left out; the row becomes relative to it where it is the largest.
  PYGEN_INLINE double join(float left_out, RowSummary& row) const {
    if (left_out > row.max) {
      row.sum *= exp_double(exact_rate * (static_cast<double>(row.max) - left_out));
      row.max = left_out;
    }
    return weight(left_out, row);
  }
};

// By a uniform number u; what the target cannot be is never accepted.
PYGEN_INLINE bool accepts(double u, double p, double q) { return p > 0.0 && u * q <= p; }

// A token's weight in the residual distribution.
template <class F>
PYGEN_INLINE F residual(F p, F q) {
  return max(p - q, splat(0.0f, p));
}

// The uniform numbers of a position: that which accepts, and that which draws.
struct VerifyUniforms {
  double accepts, draws;
  PYGEN_INLINE VerifyUniforms(const VerifyDraftArgs& args, int64_t sample, int64_t position) {
    uint32_t words[4];
    philox_words(static_cast<uint64_t>(position), philox_key(args.philox, sample, kDrawVerify), words);
    accepts = uniform_double(words[0], words[1]);
    draws = uniform_double(words[2], words[3]);
  }
};

}  // namespace pygen
