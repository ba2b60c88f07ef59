#include "pygen/cache_append.h"

#include "head_row.h"

namespace pygen::PYGEN_ISA {
namespace {

struct alignas(64) HeadRow {
  float at[kMaxHeadDim + 2 * kLanes];
};

// The sum of the squares of a head.
template <DType kDType>
PYGEN_INLINE float sum_of_squares(const char* from, int count) {
  constexpr int kSums = kNormSums / kLanes;
  F32 sums[kSums] = {};
  for (int i = 0; i < count; i += kNormSums) {
    for (int part = 0; part < kSums; ++part) {
      const int at = i + part * kLanes;
      const F32 x = at < count ? load_first<kDType>(from + at * size_of(kDType), count - at) : F32{};
      sums[part] = fma(x, x, sums[part]);
    }
  }
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int part = 0; part < width; ++part) sums[part] += sums[part + width];
  }
  return join_lanes(sums[0], [](F32 a, F32 b) { return a + b; })[0];
}

void quantise(const HeadRow& row, int count, char* to, float* scale) {
  const auto vector = [&](int i) {
    return load_first<DType::kFloat32>(reinterpret_cast<const char*>(row.at + i), count - i);
  };
  const auto larger = [](U32 a, U32 b) { return select(to_signed(a) > to_signed(b), a, b); };
  U32 most{};  // by their bits, of which those of NaN are the largest
  for (int i = 0; i < count; i += kLanes) most = larger(to_unsigned(vector(i)) & 0x7fffffffu, most);
  const Int8Scale chosen(from_unsigned(join_lanes(most, larger))[0]);
  *scale = chosen.scale;
  if (chosen.inverse == 0.0f) {
    std::memset(to, 0, count);
    return;
  }
  for (int i = 0; i < count; i += kLanes) {
    const U8 bytes = narrow_bytes(int8_bits(vector(i), chosen.inverse));
    if (count - i >= kLanes) {
      std::memcpy(to + i, &bytes, sizeof bytes);
    } else {
      std::memcpy(to + i, &bytes, count - i);
    }
  }
}

// What an RMSNorm multiplies the elements of a head by, all and each; nothing where there are no weights.
struct Norm {
  const float* weight;
  float factor;
};

// Normalises, turns and stores heads of kDType.
template <DType kDType>
struct Heads {
  const CacheAppendArgs& args;
  int head_dim;
  HeadAngles angles;
  HeadRow row, q_weight, k_weight;

  explicit Heads(const CacheAppendArgs& args)
      : args(args), head_dim(static_cast<int>(args.cache.head_dim)), angles(args.rope) {
    read_weight(args.q_norm, q_weight);
    read_weight(args.k_norm, k_weight);
  }

  void read_weight(const HeadNorm& norm, HeadRow& to) {
    if (norm.weight == nullptr) return;
    const char* const from = static_cast<const char*>(norm.weight);
    for (int i = 0; i < head_dim; i += kLanes) {
      const char* const place = from + i * size_of(norm.dtype);
      const F32 weight = norm.dtype == DType::kFloat32    ? load_first<DType::kFloat32>(place, head_dim - i)
                         : norm.dtype == DType::kBFloat16 ? load_first<DType::kBFloat16>(place, head_dim - i)
                                                          : load_first<DType::kFloat16>(place, head_dim - i);
      std::memcpy(to.at + i, &weight, sizeof weight);
    }
  }

  // Calls visit(head, token, place, norm) for heads of tokens [first, first + tokens). They are taken in groups, whose
  // factors are made together: one by one, each head would wait for its own.
  template <class Visit>
  PYGEN_INLINE void each_normed(const Operand& operand, int64_t heads, int64_t tokens, int64_t sequence, int64_t first,
                                const float* weight, Visit visit) const {
    constexpr int kGroup = 16;
    struct {
      int64_t head, token;
      const char* place;
      Norm norm;
    } group[kGroup];
    int count = 0;
    const auto finish = [&]() __attribute__((always_inline)) {
      for (int i = 0; weight != nullptr && i < count; ++i) {
        const float squares = sum_of_squares<kDType>(group[i].place, head_dim);
        group[i].norm.factor = rms_factor(squares, head_dim, args.eps);
      }
      for (int i = 0; i < count; ++i) visit(group[i].head, group[i].token, group[i].place, group[i].norm);
      count = 0;
    };
    each_head(operand, sequence, heads, first, tokens, head_dim,
              [&](int64_t head, int64_t token, const char* place) __attribute__((always_inline)) {
                group[count++] = {head, token, place, {weight, 0.0f}};
                if (count == kGroup) finish();
              });
    finish();
  }

  // Apart from the loops over heads, for the sake of registers.
  template <DType kTo>
  __attribute__((noinline)) static void convert(const char* from, Norm norm, HeadTurn turn, int head_dim, char* to) {
    constexpr int64_t kSize = size_of(kDType), kToSize = size_of(kTo);
    const F32 factor = splat(norm.factor, F32{});
    turn_head(
        turn, head_dim,
        [&](int i, int count) __attribute__((always_inline)) {
          const F32 x = load_first<kDType>(from + i * kSize, count);
          return norm.weight == nullptr ? x : x * factor * load_bytes<F32>(norm.weight + i);
        },
        [&](int i, F32 value, int count)
            __attribute__((always_inline)) { store_first<kTo>(to + i * kToSize, value, count); });
  }

  PYGEN_INLINE void append(const char* from, const Norm& norm, const HeadTurn& turn, const KvTensor& cache, KvSlot slot,
                           int64_t head) {
    char* const to = kv_row(cache, slot, head);
    if (cache.dtype == kDType) return convert<kDType>(from, norm, turn, head_dim, to);
    convert<DType::kFloat32>(from, norm, turn, head_dim, reinterpret_cast<char*>(row.at));
    if (cache.dtype == DType::kInt8) return quantise(row, head_dim, to, kv_scale(cache, slot, head));
    for (int i = 0; i < head_dim; i += kLanes) {
      const F32 value = load_bytes<F32>(row.at + i);
      char* const place = to + i * size_of(cache.dtype);
      if (cache.dtype == DType::kFloat32) {
        store_first<DType::kFloat32>(place, value, head_dim - i);
      } else if (cache.dtype == DType::kBFloat16) {
        store_first<DType::kBFloat16>(place, value, head_dim - i);
      } else {
        store_first<DType::kFloat16>(place, value, head_dim - i);
      }
    }
  }

  // Tokens [first, first + tokens) of a sequence.
  void run(int64_t sequence, int64_t first, int64_t tokens) {
    const KvCache& cache = args.cache;
    const int64_t start = kv_length(cache, sequence) - args.length + first;
    KvSlot slots[kRopeTokens];
    for (int64_t t = 0; t < tokens; ++t) {
      slots[t] = append_slot(args, sequence, start + t);
      if (args.rope.data == nullptr || start + t < 0) continue;
      const int64_t position = args.positions.data == nullptr ? start + t : args.positions.at(sequence, first + t);
      angles.read(t, rope_angles(args.rope, position), /*inverse=*/false);
    }
    const float* const q_norm = args.q_norm.weight == nullptr ? nullptr : q_weight.at;
    const float* const k_norm = args.k_norm.weight == nullptr ? nullptr : k_weight.at;
    each_normed(args.q, args.q_heads, tokens, sequence, first, q_norm,
                [&](int64_t head, int64_t t, const char* from, const Norm& norm) __attribute__((always_inline)) {
                  char* const to = head_place(args.out, sequence, head, first + t);
                  if (start + t < 0) {
                    std::memset(to, 0, head_dim * size_of(kDType));
                  } else {
                    convert<kDType>(from, norm, angles.of(t), head_dim, to);
                  }
                });
    each_normed(args.k, cache.kv_heads, tokens, sequence, first, k_norm,
                [&](int64_t head, int64_t t, const char* from, const Norm& norm) __attribute__((always_inline)) {
                  if (slots[t].page >= 0) append(from, norm, angles.of(t), cache.k, slots[t], head);
                });
    each_normed(args.v, cache.kv_heads, tokens, sequence, first, nullptr,
                [&](int64_t head, int64_t t, const char* from, const Norm& norm) __attribute__((always_inline)) {
                  if (slots[t].page >= 0) append(from, norm, kNoTurn, cache.v, slots[t], head);
                });
  }
};

template <DType kDType>
void units(const CacheAppendArgs& args, int64_t begin, int64_t end) {
  Heads<kDType> heads(args);
  const int64_t units = rope_units(args.length);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % units * kRopeTokens;
    heads.run(unit / units, first, std::min(args.length - first, kRopeTokens));
  }
}

}  // namespace

void cache_append(const CacheAppendArgs& args, int64_t begin, int64_t end) {
  constexpr decltype(&units<DType::kFloat32>) of_dtype[] = {units<DType::kFloat32>, units<DType::kBFloat16>,
                                                            units<DType::kFloat16>};
  of_dtype[static_cast<int>(args.k.dtype)](args, begin, end);
}

}  // namespace pygen::PYGEN_ISA
