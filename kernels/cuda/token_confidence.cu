#include "pygen/token_confidence.h"

#include "token_row.h"

namespace pygen::cuda {
namespace {

int blocks_of(int64_t vocabulary) { return static_cast<int>((vocabulary + kRowBlock - 1) / kRowBlock); }

struct Workspace {
  BlockSummary* summaries;  // of rows x blocks
  Kept* kept;               // of rows, where there is a filter; else null
};

// What is wanted of a row.
struct Row {
  int64_t sample, position;
  OperandRow logits;
  float temperature, rate;
  double exact_rate;

  PYGEN_INLINE Row(const TokenConfidenceArgs& args, int64_t row)
      : sample(row / args.positions),
        position(row % args.positions),
        logits(args.logits, sample, position, args.vocabulary),
        temperature(args.temperature.at(sample, 1.0f)),
        rate(temperature == 0.0f ? 1.0f : 1.0f / temperature),
        exact_rate(temperature == 0.0f ? 1.0 : 1.0 / temperature) {}

  PYGEN_INLINE bool raced(const TokenConfidenceArgs& args) const {
    return args.noise.data != nullptr && temperature != 0.0f;
  }
};

// ---- What top-k and top-p keep: a block of threads to a row --------------------------------------------------------

struct Selection {
  const Row& row;
  RowSelection all;
  Kept kept = kKeepAll;

  // Calls visit(logit, index) for every element; one that is dropped is -inf.
  template <class Visit>
  PYGEN_INLINE void each(Visit visit) const {
    all.each([&](float logit, int index) { visit(kept.drops(logit, index) ? -kInfinity : logit, index); });
  }

  template <class Weight>
  PYGEN_INLINE Kept select_largest(uint64_t target, Weight weight, bool all_ties) const {
    const Selected last = all.select_largest(target, [&](float logit, int index, uint64_t& own) {
      const float value = kept.drops(logit, index) ? -kInfinity : logit;
      own = weight(value);
      return value;
    });
    Kept result{last.value, INT32_MAX};
    const uint64_t each_weight = weight(result.least) > 0 ? weight(result.least) : 1;
    if (all_ties) return result;
    uint64_t ties = ties_within(target - last.above, each_weight) + 1;
    if (ties * each_weight >= last.equal) return result;
    const int64_t vocabulary = all.row.count;
    for (int64_t first = 0; first < vocabulary; first += kRowThreads) {
      const int64_t index = first + threadIdx.x;
      const auto tied = [&](int64_t i) {
        return i < vocabulary && row.logits.load(i) == result.least && !kept.drops(result.least, static_cast<int>(i));
      };
      const uint64_t here = __syncthreads_count(tied(index));
      if (here < ties) {
        ties -= here;
        continue;
      }
      int64_t i = first;
      while (i < vocabulary - 1 && (ties -= tied(i)) > 0) ++i;
      result.last_tie = static_cast<int>(i);
      break;
    }
    return result;
  }
};

__global__ void __launch_bounds__(kRowThreads, 2)
    filter_kernel(const __grid_constant__ TokenConfidenceArgs args, Workspace workspace) {
  __shared__ uint64_t histogram[kHistogramBins];
  __shared__ unsigned most_key;
  __shared__ unsigned long long total;
  const Row row(args, blockIdx.x);
  const int64_t top_k = args.top_k.at(row.sample, 0);
  const float top_p = args.top_p.at(row.sample, 1.0f);
  const bool by_count = top_k > 0 && top_k < args.vocabulary;
  Selection selection{row, {row.logits, histogram}};
  if (by_count || top_p < 1.0f) {
    if (threadIdx.x == 0) most_key = 0, total = 0;
    __syncthreads();
    unsigned mine = 0;
    selection.each([&](float logit, int) {
      const uint32_t key = logit == logit ? ordered_from_bits(to_unsigned(logit)) : 0;
      mine = key > mine ? key : mine;
    });
    atomicMax(&most_key, mine);
    __syncthreads();
    const float most = float_of(bits_from_ordered(most_key));
    if (most > -kInfinity && most < kInfinity) {
      if (by_count) {
        selection.kept =
            selection.select_largest(static_cast<uint64_t>(top_k - 1), [](float) { return uint64_t{1}; }, true);
      }
      if (top_p < 1.0f) {
        const auto mass = [&](float logit) { return fixed_weight(exp_one((logit - most) * row.rate)); };
        unsigned long long sum = 0;
        selection.each([&](float logit, int) { sum += mass(logit); });
        atomicAdd(&total, sum);
        __syncthreads();
        const double share = top_p > 0.0f ? top_p : 0.0;
        selection.kept =
            selection.select_largest(static_cast<uint64_t>(share * static_cast<double>(total)), mass, false);
      }
    }
  }
  if (threadIdx.x == 0) workspace.kept[blockIdx.x] = selection.kept;
}

// ---- What is wanted of every block: a warp to each -----------------------------------------------------------------

__global__ void __launch_bounds__(kRowThreads)
    summarise_kernel(const __grid_constant__ TokenConfidenceArgs args, Workspace workspace, int blocks, int64_t count) {
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (warp >= count) return;
  const int block = static_cast<int>(warp % blocks), lane = threadIdx.x % kWarp;
  const Row row(args, warp / blocks);
  LaneBlock x;
  x.load(row.logits, block, lane, -kInfinity);
  if (args.scaled.data != nullptr) {
    const OperandRow scaled(args.scaled, row.sample, row.position, args.vocabulary);
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = x.at[k][j] * row.rate;
      scaled.store(int64_t{block} * kRowBlock + k * kRowPartials + 8 * lane, values);
    }
  }
  if (workspace.kept != nullptr) {
    const Kept kept = workspace.kept[warp / blocks];
    x.each(block, lane, [&](float& logit, int index) { logit = kept.drops(logit, index) ? -kInfinity : logit; });
  }
  BlockSummary summary{block_max(x), -kInfinity, 0.0f, 0.0, 0.0, 0.0};
  const float center = block_center(summary.max);
  if (args.untempered && row.rate != 1.0f) {
    summary.raw = block_sum(lane, [&](int k, int j) { return exp(x.at[k][j] - center); });
  }
  x.each(block, lane, [&](float& logit, int) { logit = (logit - center) * row.rate; });
  if (args.neg_entropy.data != nullptr) {
    summary.moment = block_sum(lane, [&](int k, int j) { return exp(x.at[k][j]) * max(-200.0f, x.at[k][j]); });
  }
  x.each(block, lane, [&](float& value, int) { value = exp(value); });
  summary.sum = block_sum(lane, [&](int k, int j) { return x.at[k][j]; });
  if (args.untempered && row.rate == 1.0f) summary.raw = summary.sum;
  if (row.raced(args)) {
    LaneBlock noise;
    noise.load(OperandRow(args.noise, row.sample, row.position, args.vocabulary), block, lane, 1.0f);
    float best = -kInfinity;
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
#pragma unroll
      for (int j = 0; j < 8; ++j) best = max(race(x.at[k][j], noise.at[k][j]), best);
    }
    summary.key = warp_max(best);
  }
  if (lane == 0) workspace.summaries[warp] = summary;
}

// ---- The token: a warp to every row --------------------------------------------------------------------------------

__global__ void __launch_bounds__(kRowThreads)
    choose_kernel(const __grid_constant__ TokenConfidenceArgs args, Workspace workspace, int blocks, int64_t rows) {
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (index >= rows) return;
  const int lane = threadIdx.x % kWarp;
  const Row row(args, index);
  BlockSummary* summaries = workspace.summaries + index * blocks;
  const RowSummary joined = join_blocks(summaries, blocks, row.exact_rate, lane);
  int64_t token = 0;
  float prob = 0.0f, log_prob = -kInfinity, neg_entropy = -kInfinity;
  if (joined.ok()) {
    const bool raced = row.raced(args);
    const bool drawn = !raced && args.philox.seed != nullptr && row.temperature != 0.0f;
    double fraction = 0.0;
    int block;
    if (drawn) {
      fraction = position_uniform(row.position, philox_key(args.philox, row.sample, kDrawToken));
      block = pick_in_groups(blocks, fraction, lane, [&](int b) { return summaries[b].sum; });
    } else {
      double best = -1.0;
      block = 0;
      for (int b = lane; b < blocks; b += kWarp) {
        const double key = raced ? summaries[b].key * summaries[b].raw : summaries[b].max == joined.max;
        if (key > best) best = key, block = b;
      }
      block = warp_argmax(best, block);
    }
    const Kept kept = workspace.kept != nullptr ? workspace.kept[index] : kKeepAll;
    const int64_t first = int64_t{block} * kRowBlock;
    const int here = static_cast<int>(args.vocabulary - first < kRowBlock ? args.vocabulary - first : kRowBlock);
    const float center = block_center(summaries[block].max), key = raced ? summaries[block].key : joined.max;
    const auto logit_at = [&](int i) {
      const float logit = row.logits.load(first + i);
      return kept.drops(logit, static_cast<int>(first) + i) ? -kInfinity : logit;
    };
    const auto weight = [&](int i) { return exp_one((logit_at(i) - center) * row.rate); };
    int found;
    if (drawn) {
      found = pick_in_groups(here, fraction, lane, [&](int i) { return static_cast<double>(weight(i)); });
    } else {
      const OperandRow noise(args.noise, row.sample, row.position, args.vocabulary);
      found = find_first(here, lane,
                         [&](int i) { return (raced ? race(weight(i), noise.load(first + i)) : logit_at(i)) == key; });
    }
    token = first + found;
    const double below = (static_cast<double>(logit_at(found)) - joined.max) * (args.untempered ? 1.0 : row.exact_rate);
    const double sum = args.untempered ? joined.raw : joined.sum;
    prob = static_cast<float>(exp_double(below) / sum);
    log_prob = static_cast<float>(below - log_double(sum));
    neg_entropy = static_cast<float>(joined.moment / joined.sum - log_double(joined.sum));
  }
  if (lane == 0) {
    args.token.put(row.sample, row.position, token);
    args.prob.put(row.sample, row.position, prob);
    args.log_prob.put(row.sample, row.position, log_prob);
    args.neg_entropy.put(row.sample, row.position, neg_entropy);
  }
}

}  // namespace

int64_t token_confidence_workspace(int64_t rows, int64_t vocabulary) {
  return rows * (blocks_of(vocabulary) * sizeof(BlockSummary) + sizeof(Kept));
}

void token_confidence(const TokenConfidenceArgs& args, void* stream) {
  const int64_t rows = args.samples * args.positions;
  const int blocks = blocks_of(args.vocabulary);
  const auto grid = [](int64_t warps) { return dim3(static_cast<unsigned>((warps + kWarps - 1) / kWarps)); };
  Workspace workspace{static_cast<BlockSummary*>(args.workspace), nullptr};
  if (args.top_k.data != nullptr || args.top_p.data != nullptr) {
    workspace.kept = reinterpret_cast<Kept*>(workspace.summaries + rows * blocks);
    PYGEN_LAUNCH(filter_kernel, dim3(static_cast<unsigned>(rows)), dim3(kRowThreads), 0, stream, args, workspace);
  }
  PYGEN_LAUNCH(summarise_kernel, grid(rows * blocks), dim3(kRowThreads), 0, stream, args, workspace, blocks,
               rows * blocks);
  PYGEN_LAUNCH(choose_kernel, grid(rows), dim3(kRowThreads), 0, stream, args, workspace, blocks, rows);
}

}  // namespace pygen::cuda
