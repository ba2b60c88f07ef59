#include "pygen/affine_step.h"

#include "philox.h"
#include "pygen/affine_row.h"
#include "pygen/philox_normal.h"
#include "strips.h"

namespace pygen::PYGEN_ISA {
namespace {

// The chunks of all operands, and the strips of one of them after the other.
struct Chunks {
  ChunkView term[kMaxTerms], output[3];
  DType term_dtype[kMaxTerms], output_dtype[3];

  // Moves on by one along a dimension.
  void follow(const AffineStepArgs& args, int n_terms, int dim) {
    for (int t = 0; t < n_terms; ++t) term[t].move(args.term[t].stride[dim]);
    const Operand* const outputs[] = {&args.next, &args.pred, &args.second};
    for (int o = 0; o < 3; ++o) output[o].move(outputs[o]->stride[dim]);
  }

  // kDType is that of every operand, or kMixed.
  static constexpr DType kMixed = DType::kBool;
  template <DType kDType, int kResults>
  void run(const AffineStepArgs& args, const AffineRow& row, int64_t count) const {
    const bool stores[3] = {true, args.pred.data != nullptr, args.second.data != nullptr};
    for (int64_t i = 0; i < count; i += kStrip) {
      const auto load = [&](int t) __attribute__((always_inline)) {
        if constexpr (kDType == kMixed) return load_strip(term[t].data + i * term[t].size, term_dtype[t]);
        return load_strip<kDType>(term[t].data + i * size_of(kDType));
      };
      Strip result[3];
      affine_row<kResults>(args, row, load, result[0], result[1], result[2]);
      for (int o = 0; o < 1 + kResults; ++o) {
        if (!stores[o]) continue;
        if constexpr (kDType == kMixed) {
          store_strip(output[o].data + i * output[o].size, output_dtype[o], result[o]);
        } else {
          store_strip<kDType>(output[o].data + i * size_of(kDType), result[o]);
        }
      }
    }
  }
};

using Run = void (Chunks::*)(const AffineStepArgs&, const AffineRow&, int64_t) const;

template <int kResults>
Run choose(DType dtype, bool uniform) {
  if (uniform && dtype == DType::kFloat32) return &Chunks::run<DType::kFloat32, kResults>;
  if (uniform && dtype == DType::kBFloat16) return &Chunks::run<DType::kBFloat16, kResults>;
  return &Chunks::run<Chunks::kMixed, kResults>;
}

}  // namespace

void affine_step(const AffineStepArgs& args, int64_t begin, int64_t end) {
  const int inner = args.ndim - 1;
  const int n_terms = kTermHistory + args.n_history;
  const bool by_philox = args.seed != nullptr;
  const Operand* const outputs[3] = {&args.next, &args.pred, &args.second};
  int64_t token_size = 1;
  for (int d = 2; d < args.ndim; ++d) token_size *= args.size[d];

  char buffers[kMaxTerms + 3][kChunk * sizeof(float)];
  float noise[kChunk + 2 * kBlockElements];
  Chunks chunks{};
  bool uniform = !by_philox || args.next.dtype == DType::kFloat32;
  // Runs of whole strips of which nothing goes through a buffer are taken one by one, others several to a chunk.
  bool in_place = !by_philox && (args.size[inner] % kStrip == 0 || args.size[inner] >= kChunk);
  for (int t = 0; t < n_terms; ++t) {
    chunks.term_dtype[t] = args.term[t].dtype;
    if (args.term[t].data == nullptr) continue;
    uniform &= args.term[t].dtype == args.next.dtype;
    in_place &= args.term[t].stride[inner] == 1;
  }
  for (int o = 0; o < 3; ++o) {
    chunks.output_dtype[o] = outputs[o]->dtype;
    if (outputs[o]->data == nullptr) continue;
    uniform &= outputs[o]->dtype == args.next.dtype;
    in_place &= outputs[o]->stride[inner] == 1;
  }
  if (by_philox) {
    chunks.term_dtype[kTermNoise] = DType::kFloat32;
    chunks.term[kTermNoise].size = sizeof(float);
  }
  const Run run = affine_reads_second(args) ? choose<2>(args.next.dtype, uniform) : choose<1>(args.next.dtype, uniform);

  AffineRow row;
  int64_t row_sample = -1, row_index = -1;
  for (Cursor at(args.size, args.ndim, begin); at.position < end;) {
    const int64_t sample = at.index[0];
    const int64_t index = args.rows[sample * args.rows_stride[0] + at.index[1] * args.rows_stride[1]];
    if (index != row_index || row_sample < 0 || (args.scale != nullptr && sample != row_sample)) {
      affine_read_row(args, index, sample, row);
    }
    row_index = index;
    row_sample = sample;

    const int64_t token = sample * args.size[1] + at.index[1];
    const int64_t longest = in_place ? at.run() : kChunk;
    int64_t count = std::min({(token + 1) * token_size - at.position, end - at.position, longest});
    if (count > kStrip) count -= count % kStrip;
    for (int t = 0; t < n_terms; ++t) {
      if (args.term[t].data == nullptr) continue;
      chunks.term[t].open(args.term[t], at, count, buffers[t]);
      chunks.term[t].gather(at, count);
    }
    if (by_philox && row.draws) {
      const auto id = args.sample_ids ? args.sample_ids[sample * args.sample_ids_stride] : sample;
      const PhiloxKey key{static_cast<uint64_t>(args.seed[sample * args.seed_stride]), kDrawAffineStep, row.step,
                          static_cast<uint32_t>(id)};
      const float* z = normals(at.position - sample * args.size[1] * token_size, count, key, noise);
      chunks.term[kTermNoise].data = const_cast<char*>(reinterpret_cast<const char*>(z));
    }
    for (int o = 0; o < 3; ++o) {
      if (outputs[o]->data == nullptr) continue;
      chunks.output[o].open(*outputs[o], at, count, buffers[kMaxTerms + o]);
    }
    // Short runs that lie in place follow one another at equal distances.
    const bool follow = in_place && inner > 2 && count == args.size[inner];
    const int64_t runs = follow ? std::min(args.size[inner - 1] - at.index[inner - 1], (end - at.position) / count) : 1;
    for (int64_t i = 0; i < runs; ++i) {
      if (i > 0) chunks.follow(args, n_terms, inner - 1);
      (chunks.*run)(args, row, count);
    }
    for (int o = 0; o < 3; ++o) {
      if (outputs[o]->data != nullptr) chunks.output[o].scatter(at, count);
    }
    at.advance(runs * count);
  }
}

}  // namespace pygen::PYGEN_ISA
