#include "pygen/sample_token.h"

#include "pygen/sample_rule.h"
#include "token_row.h"

namespace pygen::cuda {
namespace {

inline constexpr int kChooseThreads = 512;
inline constexpr int kChooseWarps = kChooseThreads / kWarp;

int blocks_of(int64_t vocabulary) { return static_cast<int>((vocabulary + kRowBlock - 1) / kRowBlock); }

struct Workspace {
  BlockSummary *summaries, *raw;  // of rows x blocks
  float* processed;               // of rows x vocabulary, where the logits are not those that the model gave; else null
};

PYGEN_INLINE OperandRow given_row(const SampleTokenArgs& args, int64_t row) {
  return OperandRow(args.logits, row, 0, args.vocabulary);
}
// The row as the filters see it.
PYGEN_INLINE OperandRow filtered_row(const SampleTokenArgs& args, const Workspace& workspace, int64_t row) {
  const Operand processed{workspace.processed, {args.vocabulary, 0, 1}, DType::kFloat32};
  return workspace.processed == nullptr ? given_row(args, row) : OperandRow(processed, row, 0, args.vocabulary);
}

// ---- What is wanted of every block: a warp to each -----------------------------------------------------------------

// Bias, penalties, mask. `counts` are kRowBlock of the warp.
PYGEN_INLINE void process(const SampleTokenArgs& args, const SampleRow& row, int block, int lane, int* counts,
                          LaneBlock& x) {
  const int64_t first = int64_t{block} * kRowBlock;
  if (args.bias.data != nullptr) {
    LaneBlock bias;
    bias.load(OperandRow(args.bias, row.row, 0, args.vocabulary), block, lane, 0.0f);
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
#pragma unroll
      for (int j = 0; j < 8; ++j) x.at[k][j] += bias.at[k][j];
    }
  }
  if (row.history > 0) {
    for (int i = lane; i < kRowBlock; i += kWarp) counts[i] = 0;
    __syncwarp();
    for (int64_t i = lane; i < row.history; i += kWarp) {
      const int64_t token = args.previous.at(row.row, i);
      if (token >= first && token < first + kRowBlock && token < args.vocabulary)
        atomicAdd(counts + (token - first), 1);
    }
    __syncwarp();
    x.each(0, lane, [&](float& logit, int i) {
      if (counts[i] > 0) logit = row.penalised(logit, counts[i]);
    });
  }
  if (args.bitmask.data != nullptr) {
    x.each(block, lane, [&](float& logit, int i) {
      if (i < args.vocabulary && (args.bitmask.at(row.row, i / 32) >> i % 32 & 1) == 0) logit = -kInfinity;
    });
  }
}

// Without sums, one is NaN or 0 as the block holds NaN or does not.
PYGEN_INLINE BlockSummary summarise(LaneBlock x, float rate, bool sums, int lane) {
  BlockSummary summary{block_max(x), -kInfinity, 0.0f, 0.0, 0.0, 0.0};
  const float center = block_center(summary.max);
  if (sums) {
    summary.sum = block_sum(lane, [&](int k, int j) { return exp((x.at[k][j] - center) * rate); });
  } else {
    bool nan = false;
    x.each(0, lane, [&](float value, int) { nan |= value != value; });
    if (__any_sync(kWholeWarp, nan)) summary.sum = __longlong_as_double(0x7ff8000000000000);
  }
  return summary;
}

__global__ void __launch_bounds__(kRowThreads)
    summarise_kernel(const __grid_constant__ SampleTokenArgs args, Workspace workspace, int blocks, int64_t count) {
  __shared__ int counts[kWarps][kRowBlock];
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (warp >= count) return;
  const int block = static_cast<int>(warp % blocks), lane = threadIdx.x % kWarp;
  const SampleRow row(args, warp / blocks);
  LaneBlock x;
  x.load(given_row(args, row.row), block, lane, -kInfinity);
  if (args.raw_log_prob.data != nullptr) {
    const BlockSummary raw = summarise(x, 1.0f, true, lane);
    if (lane == 0) workspace.raw[warp] = raw;
  }
  if (workspace.processed != nullptr) {
    process(args, row, block, lane, counts[threadIdx.x / kWarp], x);
    const OperandRow processed = filtered_row(args, workspace, row.row);
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      processed.store(int64_t{block} * kRowBlock + k * kRowPartials + 8 * lane, x.at[k]);
    }
  }
  const BlockSummary summary = summarise(x, row.rate, row.sums(args), lane);
  if (lane == 0) workspace.summaries[warp] = summary;
}

// ---- The token: a block of threads to every row --------------------------------------------------------------------

// What the filters keep, one after the other narrowed down.
struct Filters {
  const SampleRow& row;
  RowSelection all;
  unsigned long long* total;  // in shared memory
  float most;
  float least;                              // logits above stay, and those equal to it
  int first_tie = 0;                        // from this index on,
  float exponent = -kInfinity;              // of at least this exponent,
  float mean = 0.0f, nearest = -kInfinity;  // and as near to this one.

  PYGEN_INLINE float exponent_of(float logit) const { return (logit - most) * row.rate; }
  PYGEN_INLINE float weight(float logit) const { return exp_one(exponent_of(logit)); }
  PYGEN_INLINE bool keeps(float logit, int index) const {
    return (logit > least || (logit == least && index >= first_tie)) && exponent_of(logit) >= exponent &&
           nearness_to(mean, exponent_of(logit)) >= nearest;
  }
  // The sum of term(logit) over all that are kept.
  template <class Term>
  PYGEN_INLINE uint64_t sum(Term term) const {
    if (threadIdx.x == 0) *total = 0;
    __syncthreads();
    unsigned long long mine = 0;
    all.each([&](float logit, int index) {
      if (keeps(logit, index)) mine += fixed_weight(term(logit));
    });
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) mine += __shfl_xor_sync(kWholeWarp, mine, step);
    if (threadIdx.x % kWarp == 0) atomicAdd(total, mine);
    __syncthreads();
    const uint64_t result = *total;
    __syncthreads();
    return result;
  }
  // The value is NaN where all that is kept weighs no more than the target.
  template <class Value, class Weight>
  PYGEN_INLINE Selected select_largest(uint64_t target, Value value, Weight weight) const {
    return all.select_largest(target, [&](float logit, int index, uint64_t& own) {
      own = keeps(logit, index) ? fixed_weight(weight(logit)) : 0;
      return value(logit);
    });
  }
  // The index of the last but `ties` - 1 of the logits equal to `value`.
  PYGEN_INLINE int tie_from_end(float value, uint64_t ties) const {
    for (int64_t last = all.row.count - 1; last >= 0; last -= blockDim.x) {
      const auto tied = [&](int64_t i) { return i >= 0 && all.row.load(i) == value; };
      const uint64_t here = __syncthreads_count(tied(last - threadIdx.x));
      if (here < ties) {
        ties -= here;
        continue;
      }
      int64_t i = last;
      while (i > 0 && (ties -= tied(i)) > 0) --i;
      return static_cast<int>(i);
    }
    return 0;
  }

  PYGEN_INLINE void narrow(double row_sum) {
    const auto itself = [](float logit) { return logit; };
    const auto own = [&](float logit) { return weight(logit); };
    if (row.top_k > 0) {
      const uint64_t target = static_cast<uint64_t>(row.top_k - 1) << kFixedBits;
      least = max(select_largest(target, itself, [](float) { return 1.0f; }).value, least);
    }
    if (row.top_p < 1.0f) {
      const double whole = row.top_k > 0 ? static_cast<double>(sum(own)) : row_sum * (1ull << kFixedBits);
      const uint64_t target = mass_target(row.top_p, whole);
      const Selected last = select_largest(target, itself, own);
      least = max(last.value, least);
      const uint64_t each = fixed_weight(weight(least)), ties = ties_within(target - last.above, each) + 1;
      if (ties * each < last.equal) first_tie = tie_from_end(least, ties);
    }
    if (row.min_p > 0.0f) exponent = row.least_exponent();
    if (row.typical_p < 1.0f) {
      const double whole = static_cast<double>(sum(own));
      const uint64_t surprises = sum([&](float logit) { return surprise(exponent_of(logit), weight(logit)); });
      const float expected = static_cast<float>(-(static_cast<double>(surprises) / whole));
      const auto nearness = [&](float logit) { return nearness_to(expected, exponent_of(logit)); };
      nearest = max(select_largest(mass_target(row.typical_p, whole), nearness, own).value, nearest);
      mean = expected;
    }
  }

  // The token that a uniform number chooses, and the weight of all.
  PYGEN_INLINE int64_t draw(double uniform, int blocks, uint64_t& whole) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const auto own = [&](float logit, int64_t index) {
      return index < all.row.count && keeps(logit, static_cast<int>(index)) ? fixed_weight(weight(logit)) : 0;
    };
    for (int block = warp; block < blocks; block += kChooseWarps) {
      LaneBlock x;
      x.load(all.row, block, lane, -kInfinity);
      unsigned long long mine = 0;
      x.each(block, lane, [&](float logit, int index) { mine += own(logit, index); });
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) mine += __shfl_xor_sync(kWholeWarp, mine, step);
      if (lane == 0) all.histogram[block] = mine;
    }
    __syncthreads();
    whole = 0;
    for (int block = 0; block < blocks; ++block) whole += all.histogram[block];
    if (whole == 0) return 0;
    uint64_t place = place_in(uniform, whole);
    int block = 0;
    while (place >= all.histogram[block]) place -= all.histogram[block++];
    for (int64_t first = int64_t{block} * kRowBlock;; first += kWarp) {
      const int64_t index = first + lane;
      unsigned long long before = index < all.row.count ? own(all.row.load(index), index) : 0;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const unsigned long long other = __shfl_up_sync(kWholeWarp, before, step);
        before += lane >= step ? other : 0;
      }
      const unsigned found = __ballot_sync(kWholeWarp, before > place);
      if (found != 0) return first + __ffs(static_cast<int>(found)) - 1;
      place -= __shfl_sync(kWholeWarp, before, kWarp - 1);
    }
  }
};

// The token of a row without filters, in the one block that holds it: by a warp.
PYGEN_INLINE int64_t choose(const SampleTokenArgs& args, const SampleRow& row, const OperandRow& logits,
                            const BlockSummary* summaries, int blocks, float most, int lane) {
  double fraction = 0.0;
  int block;
  if (row.drawn) {
    fraction = row.uniform(args);
    block = pick_in_groups(blocks, fraction, lane, [&](int b) { return summaries[b].sum; });
  } else {
    block = find_first(blocks, lane, [&](int b) { return summaries[b].max == most; });
  }
  const int64_t first = int64_t{block} * kRowBlock;
  const int here = static_cast<int>(args.vocabulary - first < kRowBlock ? args.vocabulary - first : kRowBlock);
  if (!row.drawn) return first + find_first(here, lane, [&](int i) { return logits.load(first + i) == most; });
  const float center = block_center(summaries[block].max);
  return first + pick_in_groups(here, fraction, lane, [&](int i) {
           return static_cast<double>(exp_one((logits.load(first + i) - center) * row.rate));
         });
}

__global__ void __launch_bounds__(kChooseThreads, 1)
    choose_kernel(const __grid_constant__ SampleTokenArgs args, Workspace workspace, int blocks) {
  __shared__ uint64_t histogram[kHistogramBins];
  __shared__ unsigned long long total;
  __shared__ RowSummary joined;
  const int lane = threadIdx.x % kWarp;
  const SampleRow row(args, blockIdx.x);
  const OperandRow logits = filtered_row(args, workspace, row.row);
  BlockSummary* summaries = workspace.summaries + row.row * blocks;
  if (threadIdx.x < kWarp) {
    const RowSummary whole = join_blocks(summaries, blocks, row.exact_rate, lane);
    if (lane == 0) joined = whole;
  }
  __syncthreads();
  int64_t token = 0;
  float log_prob = -kInfinity, raw_log_prob = -kInfinity;
  if (joined.ok()) {
    double sum = joined.sum;
    if (row.filtered()) {
      Filters filters{row, {logits, histogram}, &total, joined.max, row.bound(joined.max, joined.sum, args.vocabulary)};
      filters.narrow(joined.sum);
      uint64_t whole;
      token = filters.draw(row.uniform(args), blocks, whole);
      sum = static_cast<double>(whole) * 0x1p-40;
    } else if (threadIdx.x < kWarp) {
      token = choose(args, row, logits, summaries, blocks, joined.max, lane);
    }
    if (threadIdx.x < kWarp) {
      const double below = static_cast<double>(logits.load(token)) - joined.max;
      log_prob = static_cast<float>(below * row.exact_rate - log_double(sum));
      if (args.raw_log_prob.data != nullptr) {
        const RowSummary given = join_blocks(workspace.raw + row.row * blocks, blocks, 1.0, lane);
        const double raw = static_cast<double>(given_row(args, row.row).load(token)) - given.max;
        if (given.ok()) raw_log_prob = static_cast<float>(raw - log_double(given.sum));
      }
    }
  }
  if (threadIdx.x == 0) {
    args.token.put(row.row, 0, token);
    args.log_prob.put(row.row, 0, log_prob);
    args.raw_log_prob.put(row.row, 0, raw_log_prob);
    args.ok.put(row.row, 0, joined.ok());
  }
}

int64_t raw_blocks(const SampleTokenArgs& args) {
  return args.raw_log_prob.data == nullptr ? 0 : args.rows * blocks_of(args.vocabulary);
}

}  // namespace

int64_t sample_token_workspace(const SampleTokenArgs& args) {
  return (args.rows * blocks_of(args.vocabulary) + raw_blocks(args)) * sizeof(BlockSummary) +
         (SampleRow::processed(args) ? args.rows * args.vocabulary * sizeof(float) : 0);
}

void sample_token(const SampleTokenArgs& args, void* stream) {
  const int blocks = blocks_of(args.vocabulary);
  const int64_t count = args.rows * blocks;
  Workspace workspace{reinterpret_cast<BlockSummary*>(args.workspace), nullptr, nullptr};
  workspace.raw = workspace.summaries + count;
  if (SampleRow::processed(args)) workspace.processed = reinterpret_cast<float*>(workspace.raw + raw_blocks(args));
  const unsigned warps = static_cast<unsigned>((count + kWarps - 1) / kWarps);
  PYGEN_LAUNCH(summarise_kernel, dim3(warps), dim3(kRowThreads), 0, stream, args, workspace, blocks, count);
  PYGEN_LAUNCH(choose_kernel, dim3(static_cast<unsigned>(args.rows)), dim3(kChooseThreads), 0, stream, args, workspace,
               blocks);
}

}  // namespace pygen::cuda
