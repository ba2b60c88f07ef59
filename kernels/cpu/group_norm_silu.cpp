#include "pygen/group_norm_silu.h"

#include "group_moments.h"
#include "rough.h"

namespace pygen::PYGEN_ISA {
namespace {

template <DType kDType, class F>
PYGEN_INLINE F normalise(F x, F center, F factor, F offset) {
  const F y = fma(x - center, factor, offset);
  if constexpr (kDType == DType::kBFloat16) return rough_silu(y);
  return silu(y);
}

template <DType kDType>
PYGEN_INLINE void store_rounded(char* to, F32 y) {
  if constexpr (kDType == DType::kBFloat16) return store_halves(reinterpret_cast<uint16_t*>(to), y);
  store<kDType>(to, y);
}
template <DType kDType>
PYGEN_INLINE void store_rounded(char* to, const Strip& y) {
  for (int i = 0; i < kStripVectors; ++i) store_rounded<kDType>(to + i * kLanes * size_of(kDType), y.v[i]);
}

// This pass computes and the next group's first one waits for memory, so this one asks for what comes `next` bytes on:
// the group behind, or in a group that does not fit the second-level cache anyway, itself.
inline constexpr int64_t kFetchAhead = 256 << 10, kLine = 64;

template <DType kDType>
void normalise_channel(char* to, const char* from, int64_t count, const Scale& scale, int64_t next) {
  constexpr int64_t kSize = size_of(kDType);
  const auto run = [&](auto x) __attribute__((always_inline)) {
    return normalise<kDType>(x, splat(scale.center, x), splat(scale.factor, x), splat(scale.offset, x));
  };
  if (count < kLanes) {
    char buffer[kLanes * kSize] = {};
    std::memcpy(buffer, from, count * kSize);
    store_rounded<kDType>(buffer, run(load<kDType>(buffer)));
    std::memcpy(to, buffer, count * kSize);
    return;
  }
  // A last vector that overlaps the one before is read before that is written: `to` may be `from`.
  const int64_t whole = (count - count % kLanes) * kSize, last = (count - kLanes) * kSize;
  F32 end{};
  if (whole != last + kLanes * kSize) end = run(load<kDType>(from + last));
  int64_t i = 0;
  for (; i + kStrip * kSize <= whole; i += kStrip * kSize) {
    for (int64_t line = 0; line < kStrip * kSize; line += kLine) {
      __builtin_prefetch(from + i + next + line, /*write=*/0, /*level=*/2);
    }
    store_rounded<kDType>(to + i, run(load_strip<kDType>(from + i)));
  }
  for (; i < whole; i += kLanes * kSize) store_rounded<kDType>(to + i, run(load<kDType>(from + i)));
  if (whole != last + kLanes * kSize) store_rounded<kDType>(to + last, end);
}

template <DType kDType>
void by_channel(const GroupNormSiluArgs& args, int64_t sample, int64_t group) {
  const int64_t channels = args.channels / args.groups, first = group * channels;
  const auto at = [&](const Operand& operand, int64_t channel) {
    const int64_t offset = sample * operand.stride[0] + channel * operand.stride[1];
    return static_cast<char*>(operand.data) + offset * size_of(kDType);
  };
  const Moments moments = piece_moments<kDType>(at(args.x, first), channels * args.pixels);
  const Statistics statistics = statistics_of(moments, args.eps);
  const int64_t next = std::min(channels * args.pixels * size_of(kDType), kFetchAhead);
  for (int64_t c = first; c < first + channels; ++c) {
    normalise_channel<kDType>(at(args.out, c), at(args.x, c), args.pixels, statistics.scale(args, sample, c), next);
  }
}

// One vector of each of some rows.
template <DType kDType>
PYGEN_INLINE void load_column(const char* from, int64_t stride, Strip& x) {
  for (int r = 0; r < kStripVectors; ++r) x.v[r] = load<kDType>(from + r * stride);
}
template <DType kDType>
PYGEN_INLINE void load_column(const char* from, int64_t, F32& x) {
  x = load<kDType>(from);
}
template <DType kDType>
PYGEN_INLINE void store_column(char* to, int64_t stride, const Strip& x) {
  for (int r = 0; r < kStripVectors; ++r) store_rounded<kDType>(to + r * stride, x.v[r]);
}
template <DType kDType>
PYGEN_INLINE void store_column(char* to, int64_t, F32 x) {
  store_rounded<kDType>(to, x);
}
PYGEN_INLINE Strip repeat(F32 x, const Strip&) {
  Strip rows;
  for (F32& row : rows.v) row = x;
  return rows;
}
PYGEN_INLINE F32 repeat(F32 x, F32) { return x; }

struct RowScales {
  Slots center, factor, offset;
};

// As many rows as an F has vectors.
template <DType kDType, class F>
PYGEN_INLINE void normalise_some_rows(char* to, const Rows<kDType>& to_rows, const char* from,
                                      const Rows<kDType>& from_rows, const RowScales& scales) {
  constexpr int64_t kVectorSize = kLanes * size_of(kDType);
  const int64_t last = from_rows.vectors - 1, end_at = from_rows.start(last) * size_of(kDType);
  const auto run = [&](int64_t v, int64_t at) __attribute__((always_inline)) {
    F x;
    load_column<kDType>(from + at, from_rows.block_stride(), x);
    return normalise<kDType>(x, repeat(scales.center.vector(v), x), repeat(scales.factor.vector(v), x),
                             repeat(scales.offset.vector(v), x));
  };
  const F end = run(last, end_at);  // before the vector that it overlaps is written: `to` may be `from`
  for (int64_t v = 0; v < last; ++v) {
    store_column<kDType>(to + v * kVectorSize, to_rows.block_stride(), run(v, v * kVectorSize));
  }
  store_column<kDType>(to + end_at, to_rows.block_stride(), end);
}

template <DType kDType>
void normalise_rows(const Rows<kDType>& to, const Rows<kDType>& from, int64_t count, const RowScales& scales) {
  for (int64_t row = 0; row < count; row += kBlockRows) {
    const int64_t here = std::min(count - row, kBlockRows);
    from.gather(row, here);
    const char* source = from.block(row);
    char* target = to.block(row);
    int64_t r = 0;
    for (; r + kStripVectors <= here; r += kStripVectors) {
      normalise_some_rows<kDType, Strip>(target + r * to.block_stride(), to, source + r * from.block_stride(), from,
                                         scales);
    }
    for (; r < here; ++r) {
      normalise_some_rows<kDType, F32>(target + r * to.block_stride(), to, source + r * from.block_stride(), from,
                                       scales);
    }
    to.scatter(row, here);
  }
}

template <DType kDType>
void by_pixel(const GroupNormSiluArgs& args, int64_t sample, int64_t group) {
  const int64_t channels = args.channels / args.groups;
  const int64_t begin = group * channels, end = begin + args.unit * channels;
  char copies[2][Rows<kDType>::kCopyBytes];

  // Channel after channel joins its group, however they are cut into tiles.
  Moments moments[kChannelTile] = {};
  for (int64_t tile = begin; tile < end; tile += kChannelTile) {
    const int64_t width = std::min(end - tile, kChannelTile);
    const Rows<kDType> rows(args.x, sample, tile, width, copies[0]);
    double mean[kChannelTile], square[kChannelTile];
    row_moments(rows, args.pixels, mean, square);
    for (int64_t c = 0; c < width; ++c) {
      const int64_t slot = rows.slot(c);
      moments[(tile + c - begin) / channels].join({static_cast<double>(args.pixels), mean[slot], square[slot]});
    }
  }
  Statistics statistics[kChannelTile];
  for (int64_t g = 0; g < args.unit; ++g) statistics[g] = statistics_of(moments[g], args.eps);
  for (int64_t tile = begin; tile < end; tile += kChannelTile) {
    const int64_t width = std::min(end - tile, kChannelTile);
    const Rows<kDType> from(args.x, sample, tile, width, copies[0]), to(args.out, sample, tile, width, copies[1]);
    RowScales scales = {};
    for (int64_t slot = 0; slot < from.vectors * kLanes; ++slot) {
      const int64_t c = from.channel(slot);
      if (c >= width) break;
      const Scale scale = statistics[(tile + c - begin) / channels].scale(args, sample, tile + c);
      scales.center.at[slot] = scale.center;
      scales.factor.at[slot] = scale.factor;
      scales.offset.at[slot] = scale.offset;
    }
    normalise_rows(to, from, args.pixels, scales);
  }
}

template <DType kDType>
void run(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
  const int64_t units = args.groups / args.unit;
  const auto unit = args.by_channel ? by_channel<kDType> : by_pixel<kDType>;
  for (int64_t i = begin; i < end; ++i) unit(args, i / units, i % units * args.unit);
}

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& args, int64_t begin, int64_t end) {
  switch (args.x.dtype) {
    case DType::kFloat32:
      return run<DType::kFloat32>(args, begin, end);
    case DType::kBFloat16:
      return run<DType::kBFloat16>(args, begin, end);
    default:
      return run<DType::kFloat16>(args, begin, end);
  }
}

}  // namespace pygen::PYGEN_ISA
