// sample_gram: the inner products of the tensors of each sample with each other and with the constant 1.
//
// Everything is summed in double, where the product of two floats is exact, and in one order whatever runs it: lane
// e % 8 of a run of 256 neighbours takes its element e in turn; the runs of a block are added lane by lane, in turn,
// then its lanes by halves, then the blocks of a sample in turn.
#pragma once

#include "pygen/isa.h"
#include "pygen/operand.h"

namespace pygen {

inline constexpr int kMaxVectors = 4;
inline constexpr int kGramLanes = 8;
inline constexpr int64_t kGramRun = 256;
inline constexpr int64_t kGramBlock = 32 * kGramRun;

// How many sums n tensors have: n of their elements, n (n + 1) / 2 of products, those of a tensor after one another.
constexpr int gram_sums(int n) { return n + n * (n + 1) / 2; }

// Iteration space: size[0] samples, then the dimensions of one sample, in any one order for all tensors.
struct SampleGramArgs {
  int32_t ndim;
  int32_t n_vectors;
  int64_t size[kMaxDims];
  Operand vector[kMaxVectors];
  int64_t sample_elements;
  int64_t blocks;    // of a sample
  double* partials;  // (samples, blocks, gram_sums(n_vectors))
  double* out;       // (samples, n_vectors + 1, n_vectors + 1)
  int64_t out_stride[3];
};

// The partial sums of blocks [begin, end) of all samples.
PYGEN_CPU_KERNEL(sample_gram, SampleGramArgs)

namespace cuda {
void sample_gram(const SampleGramArgs& args, void* stream);  // a cudaStream_t; all of it
}

// Adds the lanes of one sum.
PYGEN_INLINE double gram_lanes(const double* lane) {
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// Adds the blocks of one sum of a sample, and writes it where it belongs; `sum == gram_sums(n_vectors)` is the count.
PYGEN_INLINE void gram_entry(const SampleGramArgs& args, int64_t sample, int sum) {
  const int n = args.n_vectors, sums = gram_sums(n);
  double total = 0.0;
  for (int64_t block = 0; block < args.blocks && sum < sums; ++block) {
    total += args.partials[(sample * args.blocks + block) * sums + sum];
  }
  int i = n, j = n;
  if (sum == sums) {
    total = static_cast<double>(args.sample_elements);
  } else if (sum < n) {
    i = sum;
  } else {
    i = 0, j = sum - n;
    while (j >= n - i) j -= n - i++;
    j += i;
  }
  double* out = args.out + sample * args.out_stride[0];
  out[i * args.out_stride[1] + j * args.out_stride[2]] = total;
  out[j * args.out_stride[1] + i * args.out_stride[2]] = total;
}

}  // namespace pygen
