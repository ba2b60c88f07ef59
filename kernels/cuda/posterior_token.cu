#include "pygen/posterior_token.h"

#include "pygen/posterior_rule.h"
#include "token_row.h"

namespace pygen::cuda {
namespace {

int blocks_of(int64_t vocabulary) { return static_cast<int>((vocabulary + kRowBlock - 1) / kRowBlock); }

struct Workspace {
  BlockSummary* summaries;  // of rows x blocks
  RowSummary* rows;
};

PYGEN_INLINE OperandRow logits_of(const PosteriorTokenArgs& args, const PosteriorRow& row) {
  return OperandRow(args.logits, row.sample, row.position, args.vocabulary);
}

PYGEN_INLINE float noise_of(const PosteriorTokenArgs& args, const PosteriorRow& row, int64_t index) {
  if (args.noise.data == nullptr) return 1.0f;
  const float noise = OperandRow(args.noise, row.sample, row.row, 0).load(index);
  return args.uniform ? exponential(noise, uint32_t{}) : noise;
}

PYGEN_INLINE float weight_of(const PosteriorRow& row, const RowSummary& whole, float logit, int64_t index) {
  const bool current = index == row.current;
  const float x = current ? logit + row.shift : logit;
  return row.weight(exp(x - whole.max), static_cast<float>(row.alpha / whole.sum), current ? row.same : row.other);
}

// A warp to every block: the sums of softmax.
__global__ void __launch_bounds__(kRowThreads)
    summarise_kernel(const __grid_constant__ PosteriorTokenArgs args, Workspace workspace, int blocks, int64_t count) {
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (warp >= count) return;
  const int block = static_cast<int>(warp % blocks), lane = threadIdx.x % kWarp;
  const PosteriorRow row(args, warp / blocks);
  LaneBlock x;
  x.load(logits_of(args, row), block, lane, -kInfinity);
  float others = -kInfinity;
  x.each(block, lane, [&](float& logit, int index) {
    if (index == row.current) {
      logit += row.shift;
    } else {
      others = max(logit, others);
    }
  });
  BlockSummary summary{block_max(x), warp_max(others), 0.0f, 0.0, 0.0, 0.0};
  const float center = block_center(summary.max);
  summary.sum = block_sum(lane, [&](int k, int j) { return exp(x.at[k][j] - center); });
  if (lane == 0) workspace.summaries[warp] = summary;
}

// A warp to every row.
__global__ void __launch_bounds__(kRowThreads)
    join_kernel(const __grid_constant__ PosteriorTokenArgs args, Workspace workspace, int blocks, int64_t rows) {
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (index >= rows) return;
  const int lane = threadIdx.x % kWarp;
  const RowSummary whole = join_blocks(workspace.summaries + index * blocks, blocks, 1.0, lane);
  if (lane != 0) return;
  workspace.rows[index] = whole;
  if (args.confidence.data == nullptr) return;
  const PosteriorRow row(args, index);
  float confidence = -kInfinity;
  if (whole.ok()) {
    const bool inside = row.current >= 0 && row.current < args.vocabulary;
    const float at_current = inside ? logits_of(args, row).load(row.current) + row.shift : -kInfinity;
    confidence = row.confidence(args.kind, at_current, whole.others, whole.max + log_double(whole.sum));
  }
  args.confidence.put(row.sample, row.row, confidence);
}

// A warp to every block: the sums of the weights, and who wins the race.
__global__ void __launch_bounds__(kRowThreads)
    weigh_kernel(const __grid_constant__ PosteriorTokenArgs args, Workspace workspace, int blocks, int64_t count) {
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (warp >= count) return;
  const int block = static_cast<int>(warp % blocks), lane = threadIdx.x % kWarp;
  const PosteriorRow row(args, warp / blocks);
  const RowSummary whole = workspace.rows[warp / blocks];
  LaneBlock w;
  w.load(logits_of(args, row), block, lane, -kInfinity);
  float best = -kInfinity;
  w.each(block, lane, [&](float& value, int index) {
    value = index < args.vocabulary ? weight_of(row, whole, value, index) : 0.0f;
    if (args.philox.seed == nullptr && index < args.vocabulary) {
      best = max(race(value, noise_of(args, row, index)), best);
    }
  });
  BlockSummary summary{};
  summary.sum = block_sum(lane, [&](int k, int j) { return w.at[k][j]; });
  summary.key = warp_max(best);
  if (lane == 0) workspace.summaries[warp] = summary;
}

// A warp to every row.
__global__ void __launch_bounds__(kRowThreads)
    choose_kernel(const __grid_constant__ PosteriorTokenArgs args, Workspace workspace, int blocks, int64_t rows) {
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (index >= rows) return;
  const int lane = threadIdx.x % kWarp;
  const PosteriorRow row(args, index);
  const RowSummary whole = workspace.rows[index];
  const BlockSummary* summaries = workspace.summaries + index * blocks;
  int64_t token = 0;
  float prob = 0.0f;
  if (whole.ok()) {
    const OperandRow logits = logits_of(args, row);
    double rest = 0.0;
    for (int b = lane; b < blocks; b += kWarp) rest += summaries[b].sum;
    rest = warp_sum(rest);
    const double total = rest + (args.has_mask ? static_cast<double>(row.mask) : 0.0);
    const bool drawn = args.philox.seed != nullptr;
    double fraction = 0.0;
    int block = 0;
    bool masked;
    if (drawn) {
      const double u = position_uniform(row.position, philox_key(args.philox, row.sample, kDrawPosterior));
      masked = u * total > rest;
      fraction = u * total / rest;
      if (!masked) block = pick_in_groups(blocks, fraction, lane, [&](int b) { return summaries[b].sum; });
    } else {
      double best = -1.0;
      for (int b = lane; b < blocks; b += kWarp) {
        if (summaries[b].key > best) best = summaries[b].key, block = b;
      }
      block = warp_argmax(best, block);
      masked = args.has_mask && race(row.mask, noise_of(args, row, args.vocabulary)) > summaries[block].key;
    }
    const int64_t first = int64_t{block} * kRowBlock;
    const int here = static_cast<int>(args.vocabulary - first < kRowBlock ? args.vocabulary - first : kRowBlock);
    const auto weight = [&](int i) { return weight_of(row, whole, logits.load(first + i), first + i); };
    token = args.vocabulary;
    double chosen = row.mask;
    if (!masked) {
      int found;
      if (drawn) {
        found = pick_in_groups(here, fraction, lane, [&](int i) { return static_cast<double>(weight(i)); });
      } else {
        found = find_first(
            here, lane, [&](int i) { return race(weight(i), noise_of(args, row, first + i)) == summaries[block].key; });
      }
      token = first + found;
      chosen = weight(found);
    }
    prob = static_cast<float>(chosen / total);
  }
  if (lane == 0) {
    args.token.put(row.sample, row.row, token);
    args.prob.put(row.sample, row.row, prob);
    args.next.put(row.sample, row.position, token);
  }
}

}  // namespace

int64_t posterior_token_workspace(int64_t rows, int64_t vocabulary) {
  return rows * (blocks_of(vocabulary) * sizeof(BlockSummary) + sizeof(RowSummary));
}

void posterior_token(const PosteriorTokenArgs& args, void* stream) {
  const int64_t rows = args.samples * args.rows;
  const int blocks = blocks_of(args.vocabulary);
  const auto grid = [](int64_t warps) { return dim3(static_cast<unsigned>((warps + kWarps - 1) / kWarps)); };
  Workspace workspace{static_cast<BlockSummary*>(args.workspace), nullptr};
  workspace.rows = reinterpret_cast<RowSummary*>(workspace.summaries + rows * blocks);
  const dim3 threads(kRowThreads);
  PYGEN_LAUNCH(summarise_kernel, grid(rows * blocks), threads, 0, stream, args, workspace, blocks, rows * blocks);
  PYGEN_LAUNCH(join_kernel, grid(rows), threads, 0, stream, args, workspace, blocks, rows);
  if (args.token.data == nullptr) return;
  PYGEN_LAUNCH(weigh_kernel, grid(rows * blocks), threads, 0, stream, args, workspace, blocks, rows * blocks);
  PYGEN_LAUNCH(choose_kernel, grid(rows), threads, 0, stream, args, workspace, blocks, rows);
}

}  // namespace pygen::cuda
