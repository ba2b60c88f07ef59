#include "pygen/dynamic_threshold.h"

#include "pygen/affine_row.h"
#include "pygen/order_statistics.h"
#include "strips.h"

namespace pygen::PYGEN_ISA {
namespace {

// The keys of up to kChunk neighbours.
void make_keys(const AffineRow& row, const ChunkView* term, const DType* dtype, int64_t count, uint32_t* keys) {
  for (int64_t i = 0; i < count; i += kStrip) {
    const auto load = [&](int t) __attribute__((always_inline)) {
      return load_strip(term[t].data + i * term[t].size, dtype[t]);
    };
    Strip x, out, pred;
    affine_pred(row, load, x, out, pred);
    for (int v = 0; v < kStripVectors; ++v) {
      const U32 key = magnitude_key(pred.v[v]);
      std::memcpy(keys + i + v * kLanes, &key, sizeof key);
    }
  }
}

// Ends a pass.
void settle(const DynamicThresholdArgs& args, int64_t sample) {
  Selection& selection = *args.selection;
  const Digit digit(args.pass, selection.prefix);
  for (int which = 0; which < 2; ++which) {
    uint32_t rank = args.pass == 0 ? first_rank(args, selection.counts, which) : selection.rank[which];
    uint32_t bin = 0;
    for (uint32_t count; rank >= (count = digit.counted(selection.counts, which, bin)); ++bin) rank -= count;
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
  const int inner = step.ndim - 1;
  const int64_t sample = begin / args.sample_elements;
  const Digit digit(args.pass, selection.prefix);
  AffineRow row;
  affine_read_row(step, step.rows[sample * step.rows_stride[0]], sample, row);

  // Whoever has all of the sample counts in place.
  const bool alone = end - begin == args.sample_elements;
  uint32_t part[2][kBins];
  if (!alone) std::memset(part, 0, sizeof part);
  auto& counts = alone ? selection.counts : part;

  char buffers[kTermHistory][kChunk * sizeof(float)];
  uint32_t keys[kChunk];
  ChunkView term[kTermHistory];
  DType dtype[kTermHistory];
  for (int t = 0; t < kTermHistory; ++t) dtype[t] = step.term[t].dtype;
  for (Cursor at(step.size, step.ndim, begin); at.position < end;) {
    const int64_t count = std::min({step.size[inner] - at.index[inner], end - at.position, kChunk});
    for (int t = 0; t < kTermHistory; ++t) {
      if (step.term[t].data == nullptr) continue;
      term[t].open(step.term[t], at.offset(step.term[t], step.ndim), inner, count % kStrip == 0, buffers[t]);
      term[t].gather(count);
    }
    make_keys(row, term, dtype, count, keys);
    for (int64_t i = 0; i < count; ++i) {
      digit.count(keys[i], i & 1, [&](uint32_t which, uint32_t bin) { ++counts[which][bin]; });
    }
    at.advance(step.size, step.ndim, count);
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
