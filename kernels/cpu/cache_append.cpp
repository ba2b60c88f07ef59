#include "pygen/cache_append.h"

#include "head_row.h"

namespace pygen::PYGEN_ISA {
namespace {

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

// Normalises, turns and stores heads of kDType.
template <DType kDType>
struct Heads {
  const CacheAppendArgs& args;
  int head_dim;
  HeadAngles angles;
  HeadRow row, q_weight, k_weight;

  explicit Heads(const CacheAppendArgs& args)
      : args(args), head_dim(static_cast<int>(args.cache.head_dim)), angles(args.rope) {
    read_weight(args.q_norm, head_dim, q_weight);
    read_weight(args.k_norm, head_dim, k_weight);
  }

  template <class Visit>
  PYGEN_INLINE void each_normed(const Operand& operand, int64_t heads, int64_t tokens, int64_t sequence, int64_t first,
                                const float* weight, Visit visit) const {
    each_normed_head<kDType>(operand, sequence, heads, first, tokens, head_dim, weight, args.eps, visit);
  }

  PYGEN_INLINE void append(const char* from, const Norm& norm, const HeadTurn& turn, const KvTensor& cache, KvSlot slot,
                           int64_t head) {
    char* const to = kv_row(cache, slot, head);
    if (cache.dtype == kDType) return convert<kDType, kDType>(from, norm, turn, head_dim, to);
    convert<kDType, DType::kFloat32>(from, norm, turn, head_dim, reinterpret_cast<char*>(row.at));
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
                    convert<kDType, kDType>(from, norm, angles.of(t), head_dim, to);
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
