#include "pygen/sample_gram.h"

#include "strips.h"

namespace pygen::PYGEN_ISA {
namespace {

inline constexpr int kDoubles = kLanes / 2;
inline constexpr int kParts = kGramLanes / kDoubles;  // vectors that hold a sum's lanes
static_assert(kChunk % kGramRun == 0 && kGramBlock % kChunk == 0);

typedef double F64 __attribute__((vector_size(8 * kDoubles)));
typedef float HalfF32 __attribute__((vector_size(4 * kDoubles)));

// `count` elements from a position on, in place where they lie so, and zeros up to a whole number of lanes.
const float* floats(const Operand& operand, const Cursor& at, int64_t count, float* buffer) {
  char packed[kChunk * sizeof(float)];
  ChunkView chunk;
  chunk.open(operand, at, count, packed);
  chunk.gather(at, count);
  if (operand.dtype == DType::kFloat32 && chunk.data == chunk.place && count % kGramLanes == 0) {
    return reinterpret_cast<const float*>(chunk.data);
  }
  for (int64_t i = 0; i < count; i += kStrip) {
    const Strip strip = load_strip(chunk.data + i * chunk.size, operand.dtype);
    store_strip<DType::kFloat32>(reinterpret_cast<char*>(buffer + i), strip);
  }
  for (int64_t i = count; i % kGramLanes != 0; ++i) buffer[i] = 0.0f;
  return buffer;
}

template <int kVectors>
struct Sums {
  static constexpr int kCount = gram_sums(kVectors);
  F64 lanes[kParts][kCount] = {};

  // Elements [begin, end) of a run.
  void add(const float* const (&from)[kVectors], int64_t begin, int64_t end) {
    for (int part = 0; part < kParts; ++part) {
      F64 run[kCount] = {};
      for (int64_t i = begin + part * kDoubles; i < end; i += kGramLanes) {
        F64 x[kVectors];
#pragma GCC unroll 4
        for (int a = 0; a < kVectors; ++a) {
          x[a] = __builtin_convertvector(load_bytes<HalfF32>(from[a] + i), F64);
        }
        int sum = 0;
#pragma GCC unroll 4
        for (int a = 0; a < kVectors; ++a) run[sum++] += x[a];
#pragma GCC unroll 4
        for (int a = 0; a < kVectors; ++a) {
#pragma GCC unroll 4
          for (int b = a; b < kVectors; ++b) run[sum++] += x[a] * x[b];
        }
      }
      for (int sum = 0; sum < kCount; ++sum) lanes[part][sum] += run[sum];
    }
  }

  void store(double* to) const {
    for (int sum = 0; sum < kCount; ++sum) {
      double all[kGramLanes];
      for (int part = 0; part < kParts; ++part) std::memcpy(all + part * kDoubles, &lanes[part][sum], sizeof(F64));
      to[sum] = gram_lanes(all);
    }
  }
};

template <int kVectors>
void blocks(const SampleGramArgs& args, int64_t begin, int64_t end) {
  float buffers[kVectors][kChunk + kStrip];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit / args.blocks * args.sample_elements;
    const int64_t last = std::min(unit % args.blocks * kGramBlock + kGramBlock, args.sample_elements);
    Sums<kVectors> sums;
    for (int64_t element = unit % args.blocks * kGramBlock; element < last; element += kChunk) {
      const int64_t count = std::min(last - element, kChunk);
      const Cursor at(args.size, args.ndim, first + element);
      const float* from[kVectors];
      for (int a = 0; a < kVectors; ++a) from[a] = floats(args.vector[a], at, count, buffers[a]);
      for (int64_t run = 0; run < count; run += kGramRun) sums.add(from, run, std::min(run + kGramRun, count));
    }
    sums.store(args.partials + unit * Sums<kVectors>::kCount);
  }
}

}  // namespace

void sample_gram(const SampleGramArgs& args, int64_t begin, int64_t end) {
  constexpr decltype(&blocks<1>) of_vectors[] = {blocks<1>, blocks<2>, blocks<3>, blocks<4>};
  of_vectors[args.n_vectors - 1](args, begin, end);
}

}  // namespace pygen::PYGEN_ISA
