#include "pygen/diffusion_loss.h"

#include "philox.h"
#include "pygen/diffusion_loss_row.h"
#include "pygen/philox_normal.h"
#include "strips.h"

namespace pygen::PYGEN_ISA {
namespace {

static_assert(kChunk == kLossLanes);

void by_halves(double* sums, int count) {
  for (int width = count / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
}

double sum_of_lanes(const float* lanes) {
  double eights[kLossEights];
  for (int i = 0; i < kLossEights; ++i) {
    eights[i] = 0.0;
    for (int k = 0; k < 8; ++k) eights[i] += lanes[8 * i + k];
  }
  by_halves(eights, kLossEights);
  return eights[0];
}

}  // namespace

void diffusion_loss(const DiffusionLossArgs& args, int64_t begin, int64_t end) {
  char buffers[kLossTerms + kLossGradients][kChunk * sizeof(float)];
  float noise[kChunk + 2 * kBlockElements], lanes[kLossLanes];
  const bool by_philox = args.seed != nullptr;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t place = unit / args.segments, first = unit % args.segments * kLossSegment;
    const int64_t sample = place / args.size[1], token = place % args.size[1];
    const int64_t last = std::min(first + kLossSegment, args.place_elements);
    LossRow row;
    loss_read_row(args, args.rows[sample * args.rows_stride[0] + token * args.rows_stride[1]], sample, row);

    std::fill_n(lanes, kLossLanes, 0.0f);
    for (int64_t element = first; element < last; element += kChunk) {
      const int64_t count = std::min(last - element, kChunk);
      const Cursor at(args.size, args.ndim, place * args.place_elements + element);
      ChunkView terms[kLossTerms], gradients[kLossGradients];
      DType dtype[kLossTerms];
      for (int t = 0; t < kLossTerms; ++t) {
        dtype[t] = args.term[t].dtype;
        if (args.term[t].data == nullptr) continue;
        terms[t].open(args.term[t], at, count, buffers[t]);
        terms[t].gather(at, count);
      }
      if (by_philox && row.noise != 0.0f) {
        const auto id = args.sample_ids ? args.sample_ids[sample * args.sample_ids_stride] : sample;
        const PhiloxKey key{static_cast<uint64_t>(args.seed[sample * args.seed_stride]), kDrawAffineStep, row.step,
                            static_cast<uint32_t>(id)};
        const float* z = normals(token * args.place_elements + element, count, key, noise);
        terms[kLossTermNoise].data = const_cast<char*>(reinterpret_cast<const char*>(z));
        terms[kLossTermNoise].size = sizeof(float);
        dtype[kLossTermNoise] = DType::kFloat32;
      }
      for (int g = 0; g < kLossGradients; ++g) {
        if (args.gradient[g].data == nullptr) continue;
        gradients[g].open(args.gradient[g], at, count, buffers[kLossTerms + g]);
      }
      for (int64_t i = 0; i < count; i += kStrip) {
        const auto load = [&](int t) __attribute__((always_inline)) {
          return load_strip(terms[t].data + i * terms[t].size, dtype[t]);
        };
        Strip value, gradient, variance_gradient;
        loss_row(args, row, load, value, gradient, variance_gradient);
        if (count - i < kStrip) value = first_of(value, count - i);
        char* const sums = reinterpret_cast<char*>(lanes + i);
        store_strip<DType::kFloat32>(sums, load_strip<DType::kFloat32>(sums) + value);
        for (int g = 0; g < kLossGradients; ++g) {
          if (args.gradient[g].data == nullptr) continue;
          store_strip(gradients[g].data + i * gradients[g].size, args.gradient[g].dtype,
                      loss_gradient(row, g, gradient, variance_gradient));
        }
      }
      for (int g = 0; g < kLossGradients; ++g) {
        if (args.gradient[g].data != nullptr) gradients[g].scatter(at, count);
      }
    }
    if (args.partial != nullptr) args.partial[unit] = sum_of_lanes(lanes);
  }
}

void diffusion_loss_mean(const DiffusionLossArgs& args, int64_t begin, int64_t end) {
  const int64_t count = args.size[1] * args.segments;
  for (int64_t sample = begin; sample < end; ++sample) {
    double sums[kMeanLanes] = {};
    for (int64_t i = 0; i < count; ++i) sums[i % kMeanLanes] += args.partial[sample * count + i];
    by_halves(sums, kMeanLanes);
    const double mean = sums[0] / static_cast<double>(args.size[1] * args.place_elements);
    args.loss[sample * args.loss_stride] = static_cast<float>(mean);
  }
}

}  // namespace pygen::PYGEN_ISA
