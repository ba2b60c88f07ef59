#include "pygen/affine_step.h"

#include "philox.h"
#include "pygen/philox_normal.h"
#include "strips.h"
//
#include "pygen/affine_row.h"

namespace pygen::PYGEN_ISA {

void affine_step(const AffineStepArgs& args, int64_t begin, int64_t end) {
  const int inner = args.ndim - 1;
  const int n_terms = kTermHistory + args.n_history;
  const bool by_philox = args.seed != nullptr;
  const Operand* const outputs[3] = {&args.next, &args.pred, &args.second};
  int64_t sample_size = 1;
  for (int d = 1; d < args.ndim; ++d) sample_size *= args.size[d];

  char buffers[kMaxTerms + 3][kChunk * sizeof(float)];
  float noise[kChunk + 2 * kBlockElements];
  ChunkView term[kMaxTerms], output[3];
  DType dtype[kMaxTerms];
  for (int t = 0; t < n_terms; ++t) dtype[t] = args.term[t].dtype;
  if (by_philox) {
    dtype[kTermNoise] = DType::kFloat32;
    term[kTermNoise].size = sizeof(float);
  }

  AffineRow row;
  int64_t row_sample = -1, row_index = -1;
  for (Cursor at(args.size, args.ndim, begin); at.position < end;) {
    const int64_t sample = at.index[0];
    const int64_t index = args.rows[sample * args.rows_stride[0] + at.index[1] * args.rows_stride[1]];
    if (index != row_index || (args.scale != nullptr && sample != row_sample)) {
      row = affine_read_row(args, index, sample);
    }
    row_index = index;
    row_sample = sample;

    int64_t count = std::min({args.size[inner] - at.index[inner], end - at.position, kChunk});
    if (count > kStrip) count -= count % kStrip;
    const bool whole = count % kStrip == 0;
    for (int t = 0; t < n_terms; ++t) {
      if (args.term[t].data == nullptr) continue;
      term[t].open(args.term[t], at.offset(args.term[t], args.ndim), inner, whole, buffers[t]);
      term[t].gather(count);
    }
    if (by_philox && row.draws) {
      const auto id = args.sample_ids ? args.sample_ids[sample * args.sample_ids_stride] : sample;
      const PhiloxKey key{static_cast<uint64_t>(*args.seed), kDrawAffineStep, row.step, static_cast<uint32_t>(id)};
      const float* z = normals(at.position - sample * sample_size, count, key, noise);
      term[kTermNoise].data = const_cast<char*>(reinterpret_cast<const char*>(z));
    }
    for (int o = 0; o < 3; ++o) {
      if (outputs[o]->data == nullptr) continue;
      output[o].open(*outputs[o], at.offset(*outputs[o], args.ndim), inner, whole, buffers[kMaxTerms + o]);
    }
    for (int64_t i = 0; i < count; i += kStrip) {
      const auto load = [&](int t) __attribute__((always_inline)) {
        return load_strip(term[t].data + i * term[t].size, dtype[t]);
      };
      Strip result[3];
      affine_row<Strip>(args, row, load, result[0], result[1], result[2]);
      for (int o = 0; o < 3; ++o) {
        if (outputs[o]->data != nullptr) store_strip(output[o].data + i * output[o].size, outputs[o]->dtype, result[o]);
      }
    }
    for (int o = 0; o < 3; ++o) {
      if (outputs[o]->data != nullptr) output[o].scatter(count);
    }
    at.advance(args.size, args.ndim, count);
  }
}

}  // namespace pygen::PYGEN_ISA
