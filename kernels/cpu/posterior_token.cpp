#include "pygen/posterior_token.h"

#include "pygen/posterior_rule.h"
#include "token_row.h"

namespace pygen::PYGEN_ISA {
namespace {

struct Row : PosteriorRow {
  const PosteriorTokenArgs& args;
  OperandRow logits;
  int blocks;

  Row(const PosteriorTokenArgs& args, int64_t index)
      : PosteriorRow(args, index),
        args(args),
        logits(args.logits, sample, position, args.vocabulary),
        blocks(static_cast<int>((args.vocabulary + kRowBlock - 1) / kRowBlock)) {}

  // Where the current token lies in a block, or -1.
  int current_in(int block) const {
    const int64_t place = current - int64_t{block} * kRowBlock;
    return place >= 0 && place < logits.here(block) ? static_cast<int>(place) : -1;
  }
  void load(int block, RowBlock& to) const {
    logits.load(block, to, -kInfinity);
    if (const int i = current_in(block); i >= 0) to.at[i] += shift;
  }

  BlockSummary summarise(int block, float& at_current) const {
    RowBlock x;
    load(block, x);
    BlockSummary summary{block_max(x), -kInfinity, 0.0f, 0.0, 0.0, 0.0};
    const float center = block_center(summary.max);
    summary.sum = block_sum([&](int i) __attribute__((always_inline)) { return exp(x.vector(i) - center); });
    summary.others = summary.max;
    if (const int i = current_in(block); i >= 0) {
      at_current = x.at[i];
      x.at[i] = -kInfinity;
      summary.others = block_max(x);
    }
    return summary;
  }

  // Weights of a block, 0 beyond the row.
  void weigh(int block, const RowSummary& whole, RowBlock& w) const {
    load(block, w);
    const F32 scale = splat(static_cast<float>(alpha / whole.sum), F32{});
    const int here = logits.here(block), i = current_in(block);
    const F32 at = splat(i >= 0 ? w.at[i] : 0.0f, F32{});
    for (int j = 0; j < kRowBlock; j += kLanes) {
      w.set(j, weight(exp(w.vector(j) - whole.max), scale, splat(other, scale)));
    }
    if (i >= 0) w.at[i] = weight(exp(at - whole.max), scale, splat(same, scale))[0];
    std::fill(w.at + here, w.at + kRowBlock, 0.0f);
  }

  // Of `count` classes from the first of a block on, by the noise of the row.
  void load_noise(int64_t first, int64_t count, RowBlock& noise) const {
    if (args.noise.data == nullptr) {
      std::fill(noise.at, noise.at + kRowBlock, 1.0f);
      return;
    }
    OperandRow operand(args.noise, sample, row, count);
    operand.data += first * operand.stride * size_of(operand.dtype);
    operand.load(0, noise, 1.0f);
    if (!args.uniform) return;
    for (int i = 0; i < kRowBlock; i += kLanes) noise.set(i, exponential(noise.vector(i), U32{}));
  }
  void race_block(int block, const RowSummary& whole, RowBlock& key) const {
    RowBlock noise;
    weigh(block, whole, key);
    load_noise(int64_t{block} * kRowBlock, logits.here(block), noise);
    for (int i = 0; i < kRowBlock; i += kLanes) key.set(i, race(key.vector(i), noise.vector(i)));
  }

  int64_t choose(const RowSummary& whole, double& chosen_weight, double& total) const {
    BlockSummary summaries[kMaxRowBlocks];
    RowBlock w;
    const bool drawn = args.philox.seed != nullptr;
    for (int block = 0; block < blocks; ++block) {
      weigh(block, whole, w);
      summaries[block].sum = block_sum([&](int i) __attribute__((always_inline)) { return w.vector(i); });
      if (drawn) continue;
      race_block(block, whole, w);
      summaries[block].key = block_max(w);
    }
    const double rest = sum_by_lanes(blocks, [&](int b) { return summaries[b].sum; });
    total = rest + (args.has_mask ? static_cast<double>(mask) : 0.0);
    chosen_weight = mask;
    int block = 0, index = 0;
    if (drawn) {
      const double u = position_uniform(position, philox_key(args.philox, sample, kDrawPosterior));
      if (u * total > rest) return args.vocabulary;
      double fraction = u * total / rest;
      block = pick_in_groups(blocks, fraction, [&](int b) { return summaries[b].sum; });
      weigh(block, whole, w);
      index = pick_in_groups(logits.here(block), fraction, [&](int i) -> double { return w.at[i]; });
    } else {
      for (int b = 1; b < blocks; ++b) block = summaries[b].key > summaries[block].key ? b : block;
      if (args.has_mask) {
        load_noise(args.vocabulary, 1, w);
        if (race(splat(mask, F32{}), splat(w.at[0], F32{}))[0] > summaries[block].key) return args.vocabulary;
      }
      race_block(block, whole, w);
      while (index < logits.here(block) - 1 && w.at[index] != summaries[block].key) ++index;
      weigh(block, whole, w);
    }
    chosen_weight = w.at[index];
    return int64_t{block} * kRowBlock + index;
  }

  void run() const {
    BlockSummary summaries[kMaxRowBlocks];
    double factor[kMaxRowBlocks];
    float at_current = -kInfinity;
    for (int block = 0; block < blocks; ++block) summaries[block] = summarise(block, at_current);
    const RowSummary whole = join_blocks(summaries, blocks, 1.0, factor);
    int64_t token = 0;
    float prob = 0.0f, confidence = -kInfinity;
    if (whole.ok()) {
      if (args.confidence.data != nullptr) {
        confidence = PosteriorRow::confidence(args.kind, at_current, whole.others, whole.max + log_double(whole.sum));
      }
      if (args.token.data != nullptr) {
        double chosen, total;
        token = choose(whole, chosen, total);
        prob = static_cast<float>(chosen / total);
      }
    }
    args.token.put(sample, row, token);
    args.prob.put(sample, row, prob);
    args.confidence.put(sample, row, confidence);
    args.next.put(sample, position, token);
  }
};

}  // namespace

void posterior_token(const PosteriorTokenArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) Row(args, row).run();
}

}  // namespace pygen::PYGEN_ISA
