#include "pygen/sample_token.h"

#include "candidates.h"
#include "pygen/sample_rule.h"
#include "pygen/sample_slot.h"

namespace pygen::PYGEN_ISA {
namespace {

inline constexpr int64_t kFirstList = 2048;  // candidates that are listed before the first look at what may be dropped

struct Row : SampleRow {
  const SampleTokenArgs& args;
  OperandRow logits;
  int blocks;
  SampleSlot slot;

  Row(const SampleTokenArgs& args, int64_t row)
      : SampleRow(args, row),
        args(args),
        logits(args.logits, row, 0, args.vocabulary),
        blocks(static_cast<int>((args.vocabulary + kRowBlock - 1) / kRowBlock)),
        slot(args, args.workspace) {
    if (args.slot_by_row) slot = SampleSlot(args, args.workspace + row * slot.bytes);
  }

  int first_block(int64_t part) const { return SampleSlot::first_block(blocks, args.parts, part); }
  int64_t part_of(int block) const {
    int64_t part = 0;
    while (first_block(part + 1) <= block) ++part;
    return part;
  }
  int32_t* met_from(int64_t part) const { return slot.met_from + first_block(part) + part; }
  int32_t* met(int64_t part) const { return slot.met + part * args.history; }
  Candidates candidates(int64_t part) const {
    const int64_t place = int64_t{first_block(part)} * kRowBlock + part * SampleSlot::kPadding;
    return {slot.logit + place, slot.index + place, slot.listed[part]};
  }
  float* scratch(int64_t part) const {
    return slot.scratch + int64_t{first_block(part)} * kRowBlock + part * SampleSlot::kPadding;
  }

  // Sorts those of the previous tokens that lie in a part's blocks by block.
  void sort_history(int64_t part) const {
    const int first = first_block(part), count = first_block(part + 1) - first;
    int32_t* from = met_from(part);
    std::fill(from, from + count + 1, 0);
    const auto each = [&](auto visit) {
      for (int64_t i = 0; i < history; ++i) {
        const int64_t token = args.previous.at(row, i);
        const int64_t block = token / kRowBlock - first;
        if (token >= 0 && token < args.vocabulary && block >= 0 && block < count) visit(token, block);
      }
    };
    each([&](int64_t, int64_t block) { ++from[block + 1]; });
    for (int b = 0; b < count; ++b) from[b + 1] += from[b];
    each([&](int64_t token, int64_t block) { met(part)[from[block]++] = static_cast<int32_t>(token); });
    for (int b = count; b > 0; --b) from[b] = from[b - 1];
    from[0] = 0;
  }

  // A block as the filters see it: bias, penalties, mask.
  void process(int block, RowBlock& x) const {
    const int64_t first = int64_t{block} * kRowBlock;
    if (args.bias.data != nullptr) {
      RowBlock bias;
      OperandRow(args.bias, row, 0, args.vocabulary).load(block, bias, 0.0f);
      for (int i = 0; i < kRowBlock; i += kLanes) x.set(i, x.vector(i) + bias.vector(i));
    }
    if (history > 0) {
      const int64_t part = part_of(block);
      const int32_t* from = met_from(part) + (block - first_block(part));
      int32_t counts[kRowBlock];
      for (int i = from[0]; i < from[1]; ++i) counts[met(part)[i] - first] = 0;
      for (int i = from[0]; i < from[1]; ++i) ++counts[met(part)[i] - first];
      for (int i = from[0]; i < from[1]; ++i) {
        const int64_t at = met(part)[i] - first;
        if (counts[at] > 0) x.at[at] = penalised(x.at[at], counts[at]);
        counts[at] = 0;
      }
    }
    if (args.bitmask.data != nullptr) {
      const I32 lane = lane_numbers();
      for (int i = 0; i < logits.here(block); i += kLanes) {
        const int32_t word = args.bitmask.at(row, (first + i) / 32) >> (i % 32);
        const I32 allowed = ((word - I32{}) >> lane & 1) != 0;
        x.set(i, select(allowed, x.vector(i), splat(-kInfinity, F32{})));
      }
    }
  }
  void load(int block, RowBlock& x) const {
    logits.load(block, x, -kInfinity);
    process(block, x);
  }

  // ---- One part of a row: its blocks' summaries, and its candidates ------------------------------------------------

  void scan(int64_t part) const {
    if (history > 0) sort_history(part);
    const bool listing = filtered(), raw = args.raw_log_prob.data != nullptr;
    Candidates list = candidates(part);
    list.count = 0;
    int64_t enough = kFirstList;
    float least = kLeastFinite, most = -kInfinity;
    double sum = 0.0;
    RowBlock x;
    for (int block = first_block(part); block < first_block(part + 1); ++block) {
      logits.load(block, x, -kInfinity);
      if (raw) slot.raw[block] = summarise(x, 1.0f, true);
      process(block, x);
      const BlockSummary& summary = slot.summaries[block] = summarise(x, rate, sums(args));
      if (!listing) continue;
      if (summary.max > most) {
        sum *= exp_one((most - summary.max) * rate);
        most = summary.max;
      }
      sum += summary.sum * exp_one((summary.max - most) * rate);
      if (!(summary.max >= least)) continue;
      for (int i = 0; i < kRowBlock; i += kLanes) {
        list.append(x.vector(i), lane_numbers() + (block * kRowBlock + i), x.vector(i) >= least);
      }
      if (list.count < enough) continue;
      list.close();
      least = std::max(least, bound(most, sum, args.vocabulary));
      if (top_k > 0 && list.count >= top_k) least = std::max(least, rank(list, scratch(part)));
      list.keep([&](F32 l, I32) { return l >= least; });
      enough = std::max(kFirstList, 2 * list.count);
    }
    list.close();
    slot.listed[part] = list.count;
  }

  // Without sums, one is NaN or 0 as the block holds NaN or does not.
  static BlockSummary summarise(const RowBlock& x, float rate, bool sums) {
    BlockSummary summary{block_max(x), -kInfinity, 0.0f, 0.0, 0.0, 0.0};
    const float center = block_center(summary.max);
    if (sums) {
      summary.sum = block_sum([&](int i) __attribute__((always_inline)) { return exp((x.vector(i) - center) * rate); });
    } else if (has_nan(x)) {
      summary.sum = __builtin_nan("");
    }
    return summary;
  }

  // The smallest of the top k, or of fewer all.
  float rank(const Candidates& list, float* scratch) const {
    const auto value = [](F32 l) { return l; };
    const auto one = [](F32 l) { return splat(1.0f, l); };
    return select_largest(list, scratch, static_cast<uint64_t>(top_k - 1) << kFixedBits, value, one).value;
  }

  // ---- The row, once all parts are done ----------------------------------------------------------------------------

  // What the filters leave, in the order of transformers.
  Candidates filter(const RowSummary& whole) const {
    Candidates list = candidates(0);
    list.count = 0;
    const float most = whole.max, least = bound(most, whole.sum, args.vocabulary);
    for (int64_t part = 0; part < args.parts; ++part) {
      list.append(candidates(part), [&](F32 l, I32) { return l >= least; });
    }
    list.close();
    const auto exponent = [&](F32 l) { return (l - most) * rate; };
    const auto weight = [&](F32 l) { return exp((l - most) * rate); };
    if (top_k > 0) {
      const float kth = rank(list, slot.scratch);
      list.keep([&](F32 l, I32) { return l >= kth; });
    }
    if (top_p < 1.0f) {
      const double total =
          top_k > 0 ? static_cast<double>(list.sum(0, list.count, weight)) : whole.sum * (1ull << kFixedBits);
      const uint64_t target = mass_target(top_p, total);
      const auto value = [](F32 l) { return l; };
      const Selected last = select_largest(list, slot.scratch, target, value, weight);
      list.keep([&](F32 l, I32) { return l >= last.value; });
      drop_ties(list, last.value,
                ties_within(target - last.above, fixed_weight(weight(splat(last.value, F32{}))[0])) + 1);
    }
    if (min_p > 0.0f) {
      const float least_kept = least_exponent();
      list.keep([&](F32 l, I32) { return exponent(l) >= least_kept; });
    }
    if (typical_p < 1.0f) {
      const double total = static_cast<double>(list.sum(0, list.count, weight));
      const auto expected = [&](F32 l) { return surprise(exponent(l), weight(l)); };
      const float mean = static_cast<float>(-(static_cast<double>(list.sum(0, list.count, expected)) / total));
      const auto nearness = [&](F32 l) { return nearness_to(mean, exponent(l)); };
      const float least_near =
          select_largest(list, slot.scratch, mass_target(typical_p, total), nearness, weight).value;
      list.keep([&](F32 l, I32) { return (nearness(l) >= least_near) & (l > splat(-kInfinity, l)); });
    }
    return list;
  }

  // Of the candidates equal to `value`, keeps the last `ties`.
  static void drop_ties(Candidates& list, float value, uint64_t ties) {
    if (list.sum(0, list.count, [&](F32 l) { return select(l == value, splat(1.0f, l), F32{}); }) >> kFixedBits <=
        ties) {
      return;
    }
    int64_t i = list.count - 1;
    while (list.logit[i] != value || ties > 0) ties -= list.logit[i--] == value;
    const int32_t last = list.index[i];
    list.keep([&](F32 l, I32 at) { return (l > value) | ((l == value) & (at > last)); });
  }

  // The candidate that a uniform number chooses, and the weight of all.
  int64_t draw(const Candidates& list, float most, uint64_t& total) const {
    uint64_t sums[kMaxRowBlocks];
    const auto weight = [&](F32 l) { return exp((l - most) * rate); };
    const int64_t chunks = (list.count + kRowBlock - 1) / kRowBlock;
    total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = chunk * kRowBlock;
      total += sums[chunk] = list.sum(begin, std::min<int64_t>(begin + kRowBlock, list.count), weight);
    }
    if (total == 0) return 0;
    uint64_t place = place_in(uniform(args), total);
    int64_t chunk = 0;
    while (place >= sums[chunk]) place -= sums[chunk++];
    for (int64_t i = chunk * kRowBlock;; i += kLanes) {
      const F32 w = weight(list.logits(i));
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint64_t own = fixed_weight(w[lane]);
        if (place < own) return i + lane;
        place -= own;
      }
    }
  }

  // The token, in the one block that holds it; no filter.
  int64_t choose(const BlockSummary* summaries, const double* factor, float most, float& logit) const {
    int block = 0, index = 0;
    double fraction = 0.0;
    RowBlock x;
    if (drawn) {
      fraction = uniform(args);
      block = pick_in_groups(blocks, fraction, [&](int b) { return summaries[b].sum * factor[b]; });
      load(block, x);
      RowBlock e;
      const float center = block_center(summaries[block].max);
      for (int i = 0; i < kRowBlock; i += kLanes) e.set(i, exp((x.vector(i) - center) * rate));
      index = pick_in_groups(logits.here(block), fraction, [&](int i) -> double { return e.at[i]; });
    } else {
      while (summaries[block].max != most) ++block;
      load(block, x);
      while (x.at[index] != most) ++index;
    }
    logit = x.at[index];
    return int64_t{block} * kRowBlock + index;
  }

  void finish() const {
    double factor[kMaxRowBlocks];
    const RowSummary whole = join_blocks(slot.summaries, blocks, exact_rate, factor);
    int64_t token = 0;
    float log_prob = -kInfinity, raw_log_prob = -kInfinity;
    if (whole.ok()) {
      float logit;
      double sum = whole.sum;
      if (filtered()) {
        const Candidates list = filter(whole);
        uint64_t total;
        const int64_t place = draw(list, whole.max, total);
        token = list.index[place], logit = list.logit[place];
        sum = static_cast<double>(total) * 0x1p-40;
      } else {
        token = choose(slot.summaries, factor, whole.max, logit);
      }
      log_prob = static_cast<float>((static_cast<double>(logit) - whole.max) * exact_rate - log_double(sum));
      if (args.raw_log_prob.data != nullptr) {
        const RowSummary given = join_blocks(slot.raw, blocks, 1.0, factor);
        const double below = static_cast<double>(logits.one(token)) - given.max;
        if (given.ok()) raw_log_prob = static_cast<float>(below - log_double(given.sum));
      }
    }
    args.token.put(row, 0, token);
    args.log_prob.put(row, 0, log_prob);
    args.raw_log_prob.put(row, 0, raw_log_prob);
    args.ok.put(row, 0, whole.ok());
  }
};

}  // namespace

void sample_token(const SampleTokenArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Row row(args, i / args.parts);
    row.scan(i % args.parts);
    if (args.parts > 1 && __atomic_add_fetch(row.slot.finished, 1, __ATOMIC_ACQ_REL) < args.parts) continue;
    *row.slot.finished = 0;
    row.finish();
  }
}

}  // namespace pygen::PYGEN_ISA
