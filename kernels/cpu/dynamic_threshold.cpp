#include "pygen/dynamic_threshold.h"

#include "pygen/affine_row.h"
#include "pygen/order_statistics.h"
#include "strips.h"

namespace pygen::PYGEN_ISA {
namespace {

// Adds `count` neighbours to the counts. In the first pass every one of them belongs, later few do.
template <bool kFirst>
void count_chunk(const AffineRow& row, const ChunkView* term, const DType* dtype, int64_t count, const Digit& digit,
                 uint32_t (&counts)[2][kBins]) {
  for (int64_t i = 0; i < count; i += kStrip) {
    const auto load = [&](int t) __attribute__((always_inline)) {
      return load_strip(term[t].data + i * term[t].size, dtype[t]);
    };
    Strip x, out, pred;
    affine_pred(row, load, x, out, pred);
    for (int v = 0; v < kStripVectors; ++v) {
      const int64_t left = count - i - v * kLanes;
      if (left <= 0) break;
      const U32 key = magnitude_key(pred.v[v]), bins = digit.bin(key);
      uint32_t bin[kLanes];
      std::memcpy(bin, &bins, sizeof bin);
      if (kFirst) {
        for (int lane = 0; lane < std::min<int64_t>(left, kLanes); ++lane) ++counts[lane & 1][bin[lane]];
        continue;
      }
      const U32 settled = digit.settled(key);
      const uint32_t second = lanes_of(settled == digit.prefix[1]);
      uint32_t belongs = second | lanes_of(settled == digit.prefix[0]);
      if (left < kLanes) belongs &= (1u << left) - 1;
      for (; belongs != 0; belongs &= belongs - 1) {
        const int lane = __builtin_ctz(belongs);
        ++counts[digit.which(second >> lane & 1, lane)][bin[lane]];
      }
    }
  }
}

// Ends a pass.
void settle(const DynamicThresholdArgs& args, int64_t sample) {
  Selection& selection = *args.selection;
  const Digit digit(args.pass, selection.prefix);
  for (int which = 0; which < 2; ++which) {
    uint32_t rank = args.pass == 0 ? first_rank(args, selection.counts, which) : selection.rank[which];
    const auto counted = [&](int bin, int bins) {
      uint32_t sum = 0;
      for (int i = bin; i < bin + bins; ++i) sum += digit.counted(selection.counts, which, i);
      return sum;
    };
    int bin = 0;
    for (const int bins : {64, 1}) {
      for (uint32_t count; rank >= (count = counted(bin, bins)); bin += bins) rank -= count;
    }
    selection.prefix[which] = digit.append(which, bin);
    selection.rank[which] = rank;
  }
  if (args.pass < kPasses - 1) {
    std::memset(selection.counts, 0, sizeof selection.counts);
    selection.arrived = 0;
    return;
  }
  const float s = threshold(args, selection.prefix);
  float* factors = args.factors + sample * args.factors_stride[0];
  for (int64_t column = 0; column < args.columns; ++column) {
    factors[column * args.factors_stride[1]] = threshold_factor(s, column);
  }
}

}  // namespace

void dynamic_threshold(const DynamicThresholdArgs& args, int64_t begin, int64_t end) {
  const AffineStepArgs& step = args.step;
  Selection& selection = *args.selection;
  const int64_t sample = begin / args.sample_elements;
  const Digit digit(args.pass, selection.prefix);
  AffineRow row;
  affine_read_row(step, step.rows[sample * step.rows_stride[0]], sample, row);

  // Whoever has all of the sample counts in place.
  const bool alone = end - begin == args.sample_elements;
  uint32_t part[2][kBins];
  if (!alone) std::memset(part, 0, sizeof part);
  auto& counts = alone ? selection.counts : part;

  const auto count_neighbours = args.pass == 0 ? count_chunk<true> : count_chunk<false>;

  char buffers[kTermHistory][kChunk * sizeof(float)];
  ChunkView term[kTermHistory];
  DType dtype[kTermHistory];
  for (int t = 0; t < kTermHistory; ++t) dtype[t] = step.term[t].dtype;
  for (Cursor at(step.size, step.ndim, begin); at.position < end;) {
    const int64_t count = std::min(end - at.position, kChunk);
    for (int t = 0; t < kTermHistory; ++t) {
      if (step.term[t].data == nullptr) continue;
      term[t].open(step.term[t], at, count, buffers[t]);
      term[t].gather(at, count);
    }
    count_neighbours(row, term, dtype, count, digit, counts);
    at.advance(count);
  }

  if (!alone) {
    for (int which = 0; which < 2; ++which) {
      for (int bin = 0; bin < kBins; ++bin) {
        if (part[which][bin] == 0) continue;
        __atomic_fetch_add(&selection.counts[which][bin], part[which][bin], __ATOMIC_RELAXED);
      }
    }
  }
  const auto mine = static_cast<uint32_t>(end - begin);
  if (__atomic_add_fetch(&selection.arrived, mine, __ATOMIC_ACQ_REL) == args.sample_elements) settle(args, sample);
}

}  // namespace pygen::PYGEN_ISA
