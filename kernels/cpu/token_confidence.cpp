#include "pygen/token_confidence.h"

#include "token_row.h"

namespace pygen::PYGEN_ISA {
namespace {

// One row, and the few numbers that say what is wanted of it.
struct Row {
  const TokenConfidenceArgs& args;
  int64_t sample, position;
  OperandRow logits;
  int blocks;
  float temperature, rate;
  Kept kept = kKeepAll;

  Row(const TokenConfidenceArgs& args, int64_t row)
      : args(args),
        sample(row / args.positions),
        position(row % args.positions),
        logits(args.logits, sample, position, args.vocabulary),
        blocks(static_cast<int>((args.vocabulary + kRowBlock - 1) / kRowBlock)),
        temperature(args.temperature.at(sample, 1.0f)),
        rate(temperature == 0.0f ? 1.0f : 1.0f / temperature) {}

  void load(int block, RowBlock& to) const {
    logits.load(block, to, -kInfinity);
    if (kept.least == -kInfinity) return;
    const int first = block * kRowBlock;
    for (int i = 0; i < logits.here(block); ++i) to.at[i] = kept.drops(to.at[i], first + i) ? -kInfinity : to.at[i];
  }

  PYGEN_INLINE F32 weight(const RowBlock& x, int i, float center) const { return exp((x.vector(i) - center) * rate); }

  // Keeps the largest logits up to the one at which the sum of their weights exceeds `target`.
  template <class Weight>
  Kept select_largest(uint64_t target, Weight weight, bool all_ties) const {
    RowBlock x;
    uint64_t histogram[kHistogramBins], before = 0;
    uint32_t prefix = 0;
    for (int level = 0; level < 3; ++level) {
      const RadixDigit digit = radix_digit(level);
      std::fill(histogram, histogram + kHistogramBins, 0);
      for (int block = 0; block < blocks; ++block) {
        load(block, x);
        for (int i = 0; i < logits.here(block); ++i) {
          const uint32_t key = ordered_from_bits(bits_of(x.at[i]));
          if (digit.holds(prefix, key)) histogram[digit.digit(key)] += weight(x.at[i]);
        }
      }
      prefix = prefix << digit.bits | radix_step(histogram, digit.bits, target, before);
    }
    Kept result{float_of(bits_from_ordered(prefix)), INT32_MAX};
    if (all_ties) return result;
    uint64_t ties = ties_within(target - before, std::max<uint64_t>(1, weight(result.least))) + 1;
    for (int block = 0; block < blocks; ++block) {
      load(block, x);
      for (int i = 0; i < logits.here(block); ++i) {
        if (x.at[i] == result.least && --ties == 0) {
          result.last_tie = block * kRowBlock + i;
          return result;
        }
      }
    }
    return result;
  }

  void filter() {
    const int64_t top_k = args.top_k.at(sample, 0);
    const float top_p = args.top_p.at(sample, 1.0f);
    const bool by_count = top_k > 0 && top_k < args.vocabulary;
    if (!by_count && !(top_p < 1.0f)) return;
    RowBlock x;
    float most = -kInfinity;
    for (int block = 0; block < blocks; ++block) {
      load(block, x);
      const float here = block_max(x);
      most = here > most ? here : most;
    }
    if (!(most > -kInfinity && most < kInfinity)) return;
    if (by_count) kept = select_largest(static_cast<uint64_t>(top_k - 1), [](float) { return uint64_t{1}; }, true);
    if (!(top_p < 1.0f)) return;
    const auto mass = [&](float logit) { return fixed_weight(exp_one((logit - most) * rate)); };
    uint64_t total = 0;
    for (int block = 0; block < blocks; ++block) {
      load(block, x);
      for (int i = 0; i < logits.here(block); ++i) total += mass(x.at[i]);
    }
    const double share = top_p > 0.0f ? top_p : 0.0;
    kept = select_largest(static_cast<uint64_t>(share * static_cast<double>(total)), mass, false);
  }

  BlockSummary summarise(int block, bool raced) const {
    RowBlock x, e;
    load(block, x);
    BlockSummary summary{block_max(x), -kInfinity, 0.0f, 0.0, 0.0, 0.0};
    const float center = block_center(summary.max);
    for (int i = 0; i < kRowBlock; i += kLanes) e.set(i, weight(x, i, center));
    summary.sum = block_sum([&](int i) __attribute__((always_inline)) { return e.vector(i); });
    if (args.untempered) {
      summary.raw = rate == 1.0f
                        ? summary.sum
                        : block_sum([&](int i) __attribute__((always_inline)) { return exp(x.vector(i) - center); });
    }
    if (args.neg_entropy.data != nullptr) {
      summary.moment = block_sum([&](int i) __attribute__((always_inline)) {
        return e.vector(i) * max(splat(-200.0f, F32{}), (x.vector(i) - center) * rate);
      });
    }
    if (raced) {
      RowBlock noise;
      OperandRow(args.noise, sample, position, args.vocabulary).load(block, noise, 1.0f);
      for (int i = 0; i < kRowBlock; i += kLanes) noise.set(i, race(e.vector(i), noise.vector(i)));
      summary.key = block_max(noise);
    }
    if (args.scaled.data != nullptr) {
      if (kept.least != -kInfinity) logits.load(block, x, -kInfinity);
      for (int i = 0; i < kRowBlock; i += kLanes) x.set(i, x.vector(i) * rate);
      OperandRow(args.scaled, sample, position, args.vocabulary).store(block, x);
    }
    return summary;
  }

  // The token, in the one block that holds it; x receives its logit.
  int64_t choose(const BlockSummary* summaries, const double* factor, float most, bool raced, float& logit) const {
    const bool drawn = !raced && args.philox.seed != nullptr && temperature != 0.0f;
    int block = 0, index = 0;
    double fraction = 0.0;
    if (drawn) {
      fraction = position_uniform(position, philox_key(args.philox, sample, kDrawToken));
      block = pick_in_groups(blocks, fraction, [&](int b) { return summaries[b].sum * factor[b]; });
    } else {
      double best = -1.0;
      for (int b = 0; b < blocks; ++b) {
        const double key = raced ? summaries[b].key * factor[b] : summaries[b].max == most;
        if (key > best) best = key, block = b;
      }
    }
    RowBlock x;
    load(block, x);
    const float center = block_center(summaries[block].max);
    if (drawn) {
      RowBlock e;
      for (int i = 0; i < kRowBlock; i += kLanes) e.set(i, weight(x, i, center));
      index = pick_in_groups(logits.here(block), fraction, [&](int i) -> double { return e.at[i]; });
    } else {
      RowBlock key = x;
      if (raced) {
        OperandRow(args.noise, sample, position, args.vocabulary).load(block, key, 1.0f);
        for (int i = 0; i < kRowBlock; i += kLanes) key.set(i, race(weight(x, i, center), key.vector(i)));
      }
      const float best = raced ? summaries[block].key : most;
      while (index < logits.here(block) - 1 && key.at[index] != best) ++index;
    }
    logit = x.at[index];
    return int64_t{block} * kRowBlock + index;
  }

  void run() {
    filter();
    const bool raced = args.noise.data != nullptr && temperature != 0.0f;
    BlockSummary summaries[kMaxRowBlocks];
    double factor[kMaxRowBlocks];
    for (int block = 0; block < blocks; ++block) summaries[block] = summarise(block, raced);
    const double exact_rate = temperature == 0.0f ? 1.0 : 1.0 / temperature;
    const RowSummary row = join_blocks(summaries, blocks, exact_rate, factor);
    int64_t token = 0;
    float prob = 0.0f, log_prob = -kInfinity, neg_entropy = -kInfinity;
    if (row.ok()) {
      float logit;
      token = choose(summaries, factor, row.max, raced, logit);
      const double below = (static_cast<double>(logit) - row.max) * (args.untempered ? 1.0 : exact_rate);
      const double sum = args.untempered ? row.raw : row.sum;
      prob = static_cast<float>(exp_double(below) / sum);
      log_prob = static_cast<float>(below - log_double(sum));
      neg_entropy = static_cast<float>(row.moment / row.sum - log_double(row.sum));
    }
    args.token.put(sample, position, token);
    args.prob.put(sample, position, prob);
    args.log_prob.put(sample, position, log_prob);
    args.neg_entropy.put(sample, position, neg_entropy);
  }
};

}  // namespace

void token_confidence(const TokenConfidenceArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) Row(args, row).run();
}

}  // namespace pygen::PYGEN_ISA
