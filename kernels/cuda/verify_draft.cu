#include "pygen/verify_draft.h"

#include "pygen/verify_rule.h"
#include "token_row.h"

namespace pygen::cuda {
namespace {

int blocks_of(int64_t vocabulary) { return static_cast<int>((vocabulary + kRowBlock - 1) / kRowBlock); }
int64_t rows_of(const VerifyDraftArgs& args) {
  return args.drafted + 1 + (args.draft_logits.data != nullptr ? args.drafted : 0);
}

// A row of logits as a distribution.
struct Distribution {
  OperandRow logits;
  int64_t without;

  PYGEN_INLINE Distribution(const Operand& operand, int64_t vocabulary, int64_t sample, int64_t position,
                            int64_t without)
      : logits(operand, sample, position, vocabulary), without(without) {}

  PYGEN_INLINE float logit(int64_t token) const { return token == without ? -kInfinity : logits.load(token); }
  PYGEN_INLINE void load(int block, int lane, LaneBlock& x) const {
    x.load(logits, block, lane, -kInfinity);
    if (without < 0 || without / kRowBlock != block) return;
    x.each(block, lane, [&](float& value, int index) { value = index == without ? -kInfinity : value; });
  }
};

// ---- What is wanted of every block: a warp to each -----------------------------------------------------------------

__global__ void __launch_bounds__(kRowThreads)
    summarise_kernel(const __grid_constant__ VerifyDraftArgs args, int64_t rows, int blocks) {
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp, row = warp / blocks % rows;
  if (warp >= args.samples * rows * blocks) return;
  const int block = static_cast<int>(warp % blocks), lane = threadIdx.x % kWarp;
  const VerifyRule rule(args, warp / blocks / rows);
  const bool of_draft = row > args.drafted;
  const int64_t position = of_draft ? row - args.drafted - 1 : row;
  if (of_draft ? rule.greedy || position >= rule.length : position > rule.length) return;
  LaneBlock x;
  Distribution(of_draft ? args.draft_logits : args.logits, args.vocabulary, rule.sample, position,
               of_draft ? -1 : rule.left_out(args, position))
      .load(block, lane, x);
  BlockSummary summary{block_max(x), -kInfinity, 0.0f, 0.0, 0.0, 0.0};
  const float center = block_center(summary.max);
  x.each(block, lane, [&](float& value, int) {
    // A greedy row is only searched for NaN.
    value = rule.greedy ? (value == value ? 0.0f : value) : exp((value - center) * rule.rate);
  });
  summary.sum = block_sum(lane, [&](int k, int j) { return x.at[k][j]; });
  if (lane == 0) static_cast<BlockSummary*>(args.workspace)[warp] = summary;
}

// ---- The verdict, and the token that follows: a block of threads to every sample -----------------------------------

struct Verdict {
  int64_t position, token;
  RowSummary p, q;
  double draws;
  bool by_residual;
};

// Draws by the weights of all blocks, then of one's elements.
template <class BlockWeight, class Weight>
PYGEN_INLINE int64_t draw(int64_t vocabulary, int blocks, double u, int lane, BlockWeight block_weight, Weight weight) {
  const int block = pick_in_groups(blocks, u, lane, block_weight);
  const int64_t first = int64_t{block} * kRowBlock;
  const int here = static_cast<int>(vocabulary - first < kRowBlock ? vocabulary - first : kRowBlock);
  return first + pick_in_groups(here, u, lane, [&](int i) -> double { return weight(block, first + i); });
}

struct Sample {
  const VerifyDraftArgs& args;
  VerifyRule rule;
  int blocks, lane;
  BlockSummary* summaries;  // of the sample's rows x blocks

  PYGEN_INLINE Distribution target(int64_t position) const {
    return {args.logits, args.vocabulary, rule.sample, position, rule.left_out(args, position)};
  }
  PYGEN_INLINE Distribution draft(int64_t position) const {
    return {args.draft_logits, args.vocabulary, rule.sample, position, -1};
  }
  PYGEN_INLINE BlockSummary* target_blocks(int64_t position) const { return summaries + position * blocks; }
  PYGEN_INLINE BlockSummary* draft_blocks(int64_t position) const {
    return summaries + (args.drafted + 1 + position) * blocks;
  }

  PYGEN_INLINE int64_t largest(int64_t position, float most) const {
    const BlockSummary* row = target_blocks(position);
    const int block = find_first(blocks, lane, [&](int b) { return row[b].max == most; });
    const int64_t first = int64_t{block} * kRowBlock;
    const int here = static_cast<int>(args.vocabulary - first < kRowBlock ? args.vocabulary - first : kRowBlock);
    const Distribution p = target(position);
    return first + find_first(here, lane, [&](int i) { return p.logit(first + i) == most; });
  }
  PYGEN_INLINE int64_t draw_target(int64_t position, double u) const {
    const BlockSummary* row = target_blocks(position);
    const Distribution p = target(position);
    return draw(
        args.vocabulary, blocks, u, lane, [&](int b) { return row[b].sum; },
        [&](int b, int64_t i) { return exp_one((p.logit(i) - block_center(row[b].max)) * rule.rate); });
  }

  // Whether the draft goes on behind a position; by a warp.
  PYGEN_INLINE bool goes_on(Verdict& verdict) const {
    const int64_t position = verdict.position, drafted = rule.drafted(args, position);
    const int64_t left_out = rule.left_out(args, position);
    RowSummary p = join_blocks(target_blocks(position), blocks, rule.exact_rate, lane);
    const double own = left_out >= 0 ? rule.join(own_logit(left_out, position), p) : 0.0, all = p.sum + own;
    verdict.token = -1;
    verdict.by_residual = false;
    if (!p.ok() || all != all) return false;
    if (rule.greedy) {
      verdict.token = largest(position, p.max);
      return verdict.token == drafted;
    }
    const VerifyUniforms uniform(args, rule.sample, position);
    if (left_out >= 0) {
      verdict.token = left_out;
      if (accepts(uniform.accepts, own, all)) return true;
    } else if (drafted >= 0) {
      const RowSummary q = join_blocks(draft_blocks(position), blocks, rule.exact_rate, lane);
      if (q.ok()) {
        verdict.token = drafted;
        if (accepts(uniform.accepts, rule.weight(target(position).logit(drafted), p) * q.sum,
                    rule.weight(draft(position).logit(drafted), q) * p.sum)) {
          return true;
        }
        verdict.by_residual = true;
        verdict.p = p, verdict.q = q;
      }
    }
    verdict.draws = uniform.draws;
    if (!verdict.by_residual) verdict.token = draw_target(position, uniform.draws);
    return false;
  }
  PYGEN_INLINE float own_logit(int64_t token, int64_t position) const {
    return OperandRow(args.logits, rule.sample, position, args.vocabulary).load(token);
  }
};

__global__ void __launch_bounds__(kRowThreads, 2)
    verify_kernel(const __grid_constant__ VerifyDraftArgs args, int64_t rows, int blocks) {
  __shared__ Verdict verdict;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Sample sample{args, VerifyRule(args, blockIdx.x), blocks, lane,
                      static_cast<BlockSummary*>(args.workspace) + blockIdx.x * rows * blocks};
  if (warp == 0) {
    Verdict mine{};
    while (sample.goes_on(mine)) {
      if (lane == 0) args.token.put(blockIdx.x, mine.position, mine.token);
      ++mine.position;
    }
    if (lane == 0) verdict = mine;
  }
  __syncthreads();
  const int64_t position = verdict.position;
  int64_t token = verdict.token;
  if (verdict.by_residual) {
    const Distribution p = sample.target(position), q = sample.draft(position);
    const float p_scale = static_cast<float>(1.0 / verdict.p.sum), q_scale = static_cast<float>(1.0 / verdict.q.sum);
    const float p_max = verdict.p.max, q_max = verdict.q.max, rate = sample.rule.rate;
    const auto weight = [&](float p_logit, float q_logit) {
      return residual(exp((p_logit - p_max) * rate) * p_scale, exp((q_logit - q_max) * rate) * q_scale);
    };
    BlockSummary* of_blocks = sample.target_blocks(position);
    for (int block = warp; block < blocks; block += kWarps) {
      LaneBlock x, y;
      p.load(block, lane, x);
      q.load(block, lane, y);
      const double sum = block_sum(lane, [&](int k, int j) { return weight(x.at[k][j], y.at[k][j]); });
      if (lane == 0) of_blocks[block].moment = sum;
    }
    __syncthreads();
    if (warp == 0) {
      double total = 0.0;
      for (int block = 0; block < blocks; ++block) total += of_blocks[block].moment;
      token = total == 0.0
                  ? sample.draw_target(position, verdict.draws)  // p and q differ by rounding alone
                  : draw(
                        args.vocabulary, blocks, verdict.draws, lane, [&](int b) { return of_blocks[b].moment; },
                        [&](int, int64_t i) { return weight(p.logit(i), q.logit(i)); });
    }
  }
  if (warp != 0) return;
  for (int64_t i = position + lane; i <= args.drafted; i += kWarp) {
    args.token.put(blockIdx.x, i, i > position ? -1 : token < 0 ? 0 : token);
  }
  if (lane != 0) return;
  args.accepted.put(blockIdx.x, 0, position);
  args.ok.put(blockIdx.x, 0, token >= 0);
}

}  // namespace

int64_t verify_draft_workspace(const VerifyDraftArgs& args) {
  return args.samples * rows_of(args) * blocks_of(args.vocabulary) * static_cast<int64_t>(sizeof(BlockSummary));
}

void verify_draft(const VerifyDraftArgs& args, void* stream) {
  const int64_t rows = rows_of(args);
  const int blocks = blocks_of(args.vocabulary);
  const int64_t warps = args.samples * rows * blocks;
  PYGEN_LAUNCH(summarise_kernel, dim3(static_cast<unsigned>((warps + kWarps - 1) / kWarps)), dim3(kRowThreads), 0,
               stream, args, rows, blocks);
  PYGEN_LAUNCH(verify_kernel, dim3(static_cast<unsigned>(args.samples)), dim3(kRowThreads), 0, stream, args, rows,
               blocks);
}

}  // namespace pygen::cuda
