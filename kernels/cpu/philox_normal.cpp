#include "pygen/philox_normal.h"

#include "philox.h"
#include "strips.h"

namespace pygen::PYGEN_ISA {

void philox_normal(const PhiloxNormalArgs& args, int64_t begin, int64_t end) {
  int64_t sample_size = 1;
  for (int d = 1; d < args.ndim; ++d) sample_size *= args.size[d];

  float noise[kChunk + 2 * kBlockElements];
  char buffer[kChunk * sizeof(float)];
  for (Cursor at(args.size, args.ndim, begin); at.position < end;) {
    const int64_t sample = at.index[0];
    PhiloxKey key{static_cast<uint64_t>(args.seed[sample * args.seed_stride]), args.draw,
                  static_cast<uint32_t>(args.step[sample * args.step_stride]),
                  static_cast<uint32_t>(args.sample_ids ? args.sample_ids[sample * args.sample_ids_stride] : sample)};
    const int64_t element = at.position - sample * sample_size;
    int64_t count = std::min({sample_size - element, end - at.position, kChunk});
    if (count > kStrip) count -= count % kStrip;
    const float* z = normals(element, count, key, noise);
    ChunkView out;
    out.open(args.out, at, count, buffer);
    for (int64_t i = 0; i < count; i += kStrip) {
      const Strip strip = load_strip<DType::kFloat32>(reinterpret_cast<const char*>(z + i));
      store_strip(out.data + i * out.size, args.out.dtype, strip);
    }
    out.scatter(at, count);
    at.advance(count);
  }
}

}  // namespace pygen::PYGEN_ISA
