// Runs the step kernels over buffers that end where their last element does, for the sanitizers to watch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "pygen/affine_step.h"
#include "pygen/diffusion_loss.h"
#include "pygen/dynamic_threshold.h"
#include "pygen/embedding.h"
#include "pygen/linear_decode.h"
#include "pygen/philox_normal.h"
#include "pygen/sample_gram.h"

using namespace pygen;

namespace {

// A tensor of (samples, tokens, elements) whose elements lie `step` apart, in memory of exactly its size.
struct Buffer {
  Buffer(int64_t samples, int64_t tokens, int64_t elements, int64_t step, DType dtype) {
    const int64_t span = samples * tokens * elements * step - (step - 1);
    bytes.reset(new char[span * size_of(dtype)]());
    operand = {bytes.get(), {tokens * elements * step, elements * step, step}, dtype};
  }
  std::unique_ptr<char[]> bytes;
  Operand operand;
};

void step(int64_t samples, int64_t tokens, int64_t elements, int64_t stride, DType dtype, bool second) {
  constexpr int kHistoryTerms = 2, kColumns = kHistory + 2 * kHistoryTerms;
  std::vector<double> table(2 * kColumns, 0.5);
  for (int row = 0; row < 2; ++row) {
    table[row * kColumns + kStep] = row;
    table[row * kColumns + kGuidance] = 2.0;
    table[row * kColumns + kNegative] = row;
  }
  std::vector<int64_t> rows(samples * tokens), ids(samples), seeds(samples, 7);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = i % 2;
  std::vector<Buffer> buffers;
  const auto make = [&](DType type) {
    buffers.emplace_back(samples, tokens, elements, stride, type);
    return buffers.back().operand;
  };
  AffineStepArgs args{};
  args.ndim = 3;
  args.n_history = kHistoryTerms;
  args.size[0] = samples, args.size[1] = tokens, args.size[2] = elements;
  for (int term = 0; term < kTermHistory + kHistoryTerms; ++term) {
    if (term != kTermNoise && term != kTermMask) args.term[term] = make(dtype);
  }
  if (second) args.term[kTermMask] = make(DType::kBool);
  args.next = make(dtype);
  args.pred = make(DType::kFloat32);
  if (second) args.second = make(dtype);
  args.table = table.data(), args.table_stride = kColumns, args.n_rows = 2;
  args.rows = rows.data(), args.rows_stride[0] = tokens, args.rows_stride[1] = 1;
  args.seed = seeds.data(), args.seed_stride = 1;
  args.sample_ids = ids.data(), args.sample_ids_stride = 1;
  args.noise_scale = NoiseScale::kLogVariance;
  cuda::affine_step(args, nullptr);
}

void normals(int64_t samples, int64_t elements, int64_t stride, DType dtype) {
  const Buffer out(samples, 1, elements, stride, dtype);
  const int64_t seed = 7, at = 3;
  PhiloxNormalArgs args{};
  args.ndim = 2;
  args.size[0] = samples, args.size[1] = elements;
  args.out = {out.operand.data, {elements * stride, stride}, dtype};
  args.seed = &seed, args.step = &at;
  cuda::philox_normal(args, nullptr);
}

void threshold(int64_t samples, int64_t elements, int64_t stride, DType dtype) {
  const Buffer x(samples, 1, elements, stride, dtype), out(samples, 1, elements, stride, dtype);
  const std::vector<double> table(kHistory, 0.5);
  const int64_t row = 0;
  std::vector<float> factors(samples * kHistory);
  std::vector<Selection> selections(samples);
  DynamicThresholdArgs args{};
  args.step.ndim = 2;
  args.step.size[0] = samples, args.step.size[1] = elements;
  args.step.term[kTermX] = {x.operand.data, {elements * stride, stride}, dtype};
  args.step.term[kTermCond] = {out.operand.data, {elements * stride, stride}, dtype};
  args.step.pred.data = args.factors = factors.data();
  args.step.table = table.data(), args.step.table_stride = kHistory, args.step.n_rows = 1;
  args.step.rows = &row;
  args.sample_elements = elements;
  args.rank[0] = elements / 2, args.rank[1] = elements - 1;
  args.max_value = 1.0f;
  args.factors_stride[0] = args.columns = kHistory, args.factors_stride[1] = 1;
  args.selection = selections.data();
  cuda::dynamic_threshold(args, nullptr);
}

void loss(int64_t samples, int64_t tokens, int64_t elements, int64_t stride, DType dtype) {
  std::vector<double> table(2 * kLossColumns, 0.5);
  table[kLossBin] = 0.0;
  std::vector<int64_t> rows(samples * tokens);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = i % 2;
  const int64_t seed = 7;
  DiffusionLossArgs args{};
  args.ndim = 3;
  args.size[0] = samples, args.size[1] = tokens, args.size[2] = elements;
  args.place_elements = elements, args.segments = (elements + kLossSegment - 1) / kLossSegment;
  std::vector<Buffer> buffers;
  const auto make = [&](DType type) {
    buffers.emplace_back(samples, tokens, elements, stride, type);
    return buffers.back().operand;
  };
  for (int term : {kLossTermOutput, kLossTermX0, kLossTermVariance}) args.term[term] = make(dtype);
  args.term[kLossTermMask] = make(DType::kBool);
  for (Operand& gradient : args.gradient) gradient = make(dtype);
  args.table = table.data(), args.table_stride = kLossColumns, args.n_rows = 2;
  args.rows = rows.data(), args.rows_stride[0] = tokens, args.rows_stride[1] = 1;
  args.seed = &seed;
  std::vector<float> losses(samples);
  std::vector<double> partial(samples * tokens * args.segments);
  args.partial = partial.data();
  args.loss = losses.data(), args.loss_stride = 1;
  cuda::diffusion_loss(args, nullptr);
}

void gram(int64_t samples, int64_t elements, int64_t stride, DType dtype) {
  const Buffer one(samples, 1, elements, stride, dtype), other(samples, 1, elements, stride, dtype);
  SampleGramArgs args{};
  args.ndim = args.n_vectors = 2;
  args.size[0] = samples, args.size[1] = args.sample_elements = elements;
  args.vector[0] = {one.operand.data, {elements * stride, stride}, dtype};
  args.vector[1] = {other.operand.data, {elements * stride, stride}, dtype};
  args.blocks = (elements + kGramBlock - 1) / kGramBlock;
  std::vector<double> partials(samples * args.blocks * gram_sums(2)), out(samples * 9);
  args.partials = partials.data(), args.out = out.data();
  args.out_stride[0] = 9, args.out_stride[1] = 3, args.out_stride[2] = 1;
  cuda::sample_gram(args, nullptr);
}

// With experts, of which rows name some that there are not; few enough for the threads that ThreadSanitizer takes.
void linear(int64_t rows, WeightFormat format, int64_t group, bool zeros, bool gated, int64_t experts = 0) {
  constexpr int64_t kInputs = 200, kOutputs = 20;
  LinearDecodeArgs args{};
  args.weight = {nullptr, kOutputs, kInputs, format, gated, zeros, group};
  std::vector<char> weight(std::max<int64_t>(1, experts) * args.weight.panels() * args.weight.panel_bytes(), 1);
  args.weight.data = weight.data();
  args.rows = rows, args.choices = experts > 0 && rows % 3 == 0 ? 3 : 1;
  std::vector<int64_t> chosen(rows);
  for (int64_t row = 0; row < rows; ++row) chosen[row] = row % (experts + 2) - 1;
  if (experts > 0) args.experts = chosen.data(), args.expert_count = experts;
  const Buffer x(1, rows / args.choices, kInputs, 1, DType::kFloat16), out(1, rows, kOutputs, 3, DType::kFloat16);
  const Buffer bias(1, 1, 2 * kOutputs, 1, DType::kFloat32);
  args.x = {x.operand.data, {kInputs, 1}, DType::kFloat16};
  args.out = args.residual = {out.operand.data, {kOutputs * 3, 3}, DType::kFloat16};
  if (experts == 0) args.bias = {bias.operand.data, {1}, DType::kFloat32};
  args.norm = LinearNorm::kLayer;
  args.activated = true;
  std::vector<char> scratch(cuda::linear_decode_workspace(args));
  args.scratch = scratch.data();
  cuda::linear_decode(args, nullptr);
}

// What no row has is not read.
bool makes_zeros(int64_t token, int64_t position) {
  float weight[3 * 9], learned[2 * 9], out[9];
  std::fill_n(weight, 3 * 9, 1.0f), std::fill_n(learned, 2 * 9, 1.0f);
  EmbeddingArgs args{};
  args.batch = args.length = 1, args.width = 9, args.scale = 1.0f;
  args.tokens = &token, args.positions.data = &position;
  args.weight = {weight, 9, 3}, args.position_weight = {learned, 9, 2};
  args.weight_dtype = DType::kFloat32, args.out = {out, {9, 9}, DType::kFloat32};
  cuda::embedding(args, nullptr);
  return std::count(out, out + 9, 0.0f) == 9;
}

// Where no host could check a launch before it ran: a row beyond the table, or one that reads what is absent.
bool makes_nan(int64_t row, bool reads_output) {
  float x[9] = {}, next[9] = {};
  double table[kHistory] = {};
  table[kX0] = 1.0;
  table[kOut0] = reads_output;
  AffineStepArgs args{};
  args.ndim = 3;
  args.size[0] = args.size[1] = 1, args.size[2] = 9;
  args.term[kTermX] = {x, {9, 9, 1}, DType::kFloat32};
  args.next = {next, {9, 9, 1}, DType::kFloat32};
  args.table = table, args.table_stride = kHistory, args.n_rows = 1;
  args.rows = &row;
  cuda::affine_step(args, nullptr);
  for (const float value : next) {
    if (!std::isnan(value)) return false;
  }
  return true;
}

bool loses_nan(int64_t row, double noise) {
  float x[9] = {}, gradient[9] = {}, loss = 0.0f;
  double partial = 0.0, table[kLossColumns] = {};
  table[kLossNoise] = noise;
  table[kLossHuber] = table[kLossWeight] = 1.0;
  DiffusionLossArgs args{};
  args.ndim = 3;
  args.size[0] = args.size[1] = 1, args.size[2] = 9;
  args.place_elements = 9, args.segments = 1;
  args.term[kLossTermOutput] = args.term[kLossTermX0] = {x, {9, 9, 1}, DType::kFloat32};
  args.gradient[kLossTermOutput] = {gradient, {9, 9, 1}, DType::kFloat32};
  args.table = table, args.table_stride = kLossColumns, args.n_rows = 1;
  args.rows = &row;
  args.partial = &partial, args.loss = &loss;
  cuda::diffusion_loss(args, nullptr);
  for (const float value : gradient) {
    if (!std::isnan(value)) return false;
  }
  return std::isnan(loss);
}

}  // namespace

int main() {
  int cases = 0;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t stride : {1, 3}) {
      for (const int64_t elements : {1, 7, 8, 9, 64, 300, 2056}) {
        for (const bool second : {false, true}) step(2, 3, elements, stride, dtype, second), ++cases;
        normals(3, elements, stride, dtype), ++cases;
        loss(2, 3, elements, stride, dtype), ++cases;
      }
    }
  }
  for (const int64_t elements : {1, 9, 300, 16384, 16385}) threshold(2, elements, 1, DType::kFloat32), ++cases;
  threshold(2, 40000, 3, DType::kBFloat16), ++cases;
  for (const int64_t elements : {1, 9, 300, 8192, 8193}) gram(2, elements, 1, DType::kFloat32), ++cases;
  gram(2, 20000, 3, DType::kBFloat16), ++cases;
  for (const int64_t rows : {1, 3, 5}) {
    for (const WeightFormat format : {WeightFormat::kFloat32, WeightFormat::kBFloat16}) {
      linear(rows, format, 0, false, rows == 3), ++cases;
      if (rows < 5) linear(rows, format, 0, false, rows == 1, 3), ++cases;
    }
    for (const int64_t group : {32, 64, 128, 200}) {
      linear(rows, WeightFormat::kInt8, group, rows == 1, rows == 3), ++cases;
      linear(rows, WeightFormat::kInt4, group, rows == 5, rows == 1), ++cases;
      if (rows < 5) linear(rows, WeightFormat::kInt4, group, rows == 3, rows == 1, 4), ++cases;
    }
  }
  std::printf("%d launches\n", cases);
  const bool poisoned = makes_nan(1, false) && makes_nan(-1, false) && makes_nan(0, true) && !makes_nan(0, false) &&
                        makes_zeros(3, 0) && makes_zeros(-1, 0) && makes_zeros(0, 2) && makes_zeros(0, -1) &&
                        makes_zeros(int64_t{1} << 62, 0) && !makes_zeros(2, 1) && loses_nan(1, 0.0) &&
                        loses_nan(-1, 0.0) && loses_nan(0, 1.0) && !loses_nan(0, 0.0);
  return poisoned ? 0 : 1;
}
