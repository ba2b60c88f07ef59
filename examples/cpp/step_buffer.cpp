// A solver step on a plain buffer, without torch: x' = x0 x + out0 eps + noise0 z, z drawn by Philox.
#include <pygen/affine_step.h>

#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  constexpr int64_t kBatch = 2, kElements = 6;
  std::vector<float> x(kBatch * kElements, 1.0f), eps(kBatch * kElements, 0.5f);
  std::vector<double> table(pygen::kHistory, 0.0);  // one row; as pygen.plan(...).table holds them
  table[pygen::kStep] = 3;
  table[pygen::kLow] = -INFINITY;
  table[pygen::kHigh] = INFINITY;
  table[pygen::kRescale] = 1.0;
  table[pygen::kX0] = 0.9;
  table[pygen::kOut0] = -0.2;
  table[pygen::kNoise0] = 0.1;
  const int64_t row = 0, seed = 42;

  pygen::AffineStepArgs args{};
  args.ndim = 3;  // samples, tokens, elements
  args.size[0] = kBatch, args.size[1] = 1, args.size[2] = kElements;
  const pygen::Operand in_x{x.data(), {kElements, 0, 1}, pygen::DType::kFloat32};
  args.term[pygen::kTermX] = in_x;
  args.term[pygen::kTermCond] = {eps.data(), {kElements, 0, 1}, pygen::DType::kFloat32};
  args.next = in_x;  // in place
  args.table = table.data(), args.table_stride = pygen::kHistory, args.n_rows = 1;
  args.rows = &row;
  args.seed = &seed;
  pygen::affine_step(args, 0, kBatch * kElements);

  for (float value : x) std::printf("%.9g\n", value);
}
