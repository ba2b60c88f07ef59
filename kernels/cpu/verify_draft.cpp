#include "pygen/verify_draft.h"

#include "pygen/verify_rule.h"
#include "token_row.h"

namespace pygen::PYGEN_ISA {
namespace {

// A row of logits as a distribution.
struct Distribution {
  OperandRow logits;
  const VerifyRule& rule;
  int64_t without;
  int blocks;
  BlockSummary summaries[kMaxRowBlocks];
  double factor[kMaxRowBlocks];
  RowSummary row;

  Distribution(const Operand& operand, int64_t vocabulary, const VerifyRule& rule, int64_t position, int64_t without)
      : logits(operand, rule.sample, position, vocabulary),
        rule(rule),
        without(without),
        blocks(static_cast<int>((vocabulary + kRowBlock - 1) / kRowBlock)) {
    for (int block = 0; block < blocks; ++block) summaries[block] = summarise(block);
    row = join_blocks(summaries, blocks, rule.exact_rate, factor);
  }

  float logit(int64_t token) const {
    return load_one(logits.data + token * logits.stride * size_of(logits.dtype), logits.dtype);
  }
  void load(int block, RowBlock& to) const {
    logits.load(block, to, -kInfinity);
    if (without >= 0 && without / kRowBlock == block) to.at[without % kRowBlock] = -kInfinity;
  }

  BlockSummary summarise(int block) const {
    RowBlock x;
    load(block, x);
    const float most = block_max(x);
    const F32 center = splat(block_center(most), F32{}), rate = splat(rule.rate, F32{});
    // A greedy row is only searched for NaN.
    const double sum =
        rule.greedy
            ? block_sum([&](int i) __attribute__((always_inline)) {
                return select(x.vector(i) == x.vector(i), F32{}, x.vector(i));
              })
            : block_sum([&](int i) __attribute__((always_inline)) { return exp((x.vector(i) - center) * rate); });
    return {most, -kInfinity, 0.0f, sum, 0.0, 0.0};
  }

  int64_t largest() const {
    RowBlock x;
    int block = 0, index = 0;
    while (summaries[block].max != row.max) ++block;
    load(block, x);
    while (x.at[index] != row.max) ++index;
    return int64_t{block} * kRowBlock + index;
  }

  // Of a block, relative to `center` and times `scale`.
  void weigh(int block, float center, float scale, RowBlock& w) const {
    load(block, w);
    for (int i = 0; i < kRowBlock; i += kLanes) w.set(i, exp((w.vector(i) - center) * rule.rate) * scale);
  }

  int64_t draw(double u) const {
    RowBlock w;
    const int block = pick_in_groups(blocks, u, [&](int b) { return summaries[b].sum * factor[b]; });
    weigh(block, block_center(summaries[block].max), 1.0f, w);
    return int64_t{block} * kRowBlock + pick_in_groups(logits.here(block), u, [&](int i) -> double { return w.at[i]; });
  }
};

// Of max(0, p - q), which is weighed block by block.
int64_t draw_residual(const Distribution& p, const Distribution& q, double u) {
  const float p_scale = static_cast<float>(1.0 / p.row.sum), q_scale = static_cast<float>(1.0 / q.row.sum);
  RowBlock w, other;
  const auto weigh = [&](int block) {
    p.weigh(block, p.row.max, p_scale, w);
    q.weigh(block, q.row.max, q_scale, other);
    for (int i = 0; i < kRowBlock; i += kLanes) w.set(i, residual(w.vector(i), other.vector(i)));
  };
  double sums[kMaxRowBlocks], total = 0.0;
  for (int block = 0; block < p.blocks; ++block) {
    weigh(block);
    sums[block] = block_sum([&](int i) __attribute__((always_inline)) { return w.vector(i); });
    total += sums[block];
  }
  if (total == 0.0) return p.draw(u);  // p and q differ by rounding alone
  const int block = pick_in_groups(p.blocks, u, [&](int b) { return sums[b]; });
  weigh(block);
  return int64_t{block} * kRowBlock + pick_in_groups(p.logits.here(block), u, [&](int i) -> double { return w.at[i]; });
}

// The token of a position, or -1 where there is no telling; `go_on` where it is the one drafted.
int64_t verify(const VerifyDraftArgs& args, const VerifyRule& rule, int64_t position, bool& go_on) {
  const int64_t drafted = rule.drafted(args, position), left_out = rule.left_out(args, position);
  Distribution p(args.logits, args.vocabulary, rule, position, left_out);
  const double own = left_out >= 0 ? rule.join(p.logit(left_out), p.row) : 0.0, all = p.row.sum + own;
  if (!p.row.ok() || all != all) return -1;
  if (rule.greedy) {
    const int64_t token = p.largest();
    go_on = token == drafted;
    return token;
  }
  const VerifyUniforms uniform(args, rule.sample, position);
  if (left_out >= 0) {
    go_on = accepts(uniform.accepts, own, all);
    return go_on ? drafted : p.draw(uniform.draws);
  }
  if (drafted >= 0) {
    const Distribution q(args.draft_logits, args.vocabulary, rule, position, -1);
    if (q.row.ok()) {
      go_on = accepts(uniform.accepts, rule.weight(p.logit(drafted), p.row) * q.row.sum,
                      rule.weight(q.logit(drafted), q.row) * p.row.sum);
      return go_on ? drafted : draw_residual(p, q, uniform.draws);
    }
  }
  return p.draw(uniform.draws);
}

void verify_sample(const VerifyDraftArgs& args, int64_t sample) {
  const VerifyRule rule(args, sample);
  int64_t position = 0, token;
  for (bool go_on = true;; ++position) {
    go_on = false;
    token = verify(args, rule, position, go_on);
    args.token.put(sample, position, token < 0 ? 0 : token);
    if (!go_on) break;
  }
  args.accepted.put(sample, 0, position);
  args.ok.put(sample, 0, token >= 0);
  while (++position <= args.drafted) args.token.put(sample, position, -1);
}

}  // namespace

void verify_draft(const VerifyDraftArgs& args, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) verify_sample(args, sample);
}

}  // namespace pygen::PYGEN_ISA
