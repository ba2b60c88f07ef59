// A head of one token on a CPU: read, scaled, turned and stored vector by vector.
#pragma once

#include "first_lanes.h"
#include "pygen/rope.h"
#include "pygen/rope_row.h"

namespace pygen {
namespace {

// What turns a head: cosines and sines in whole vectors.
struct HeadTurn {
  const float *cosine, *sine;
  int pairs;
  bool interleaved;
};
inline constexpr HeadTurn kNoTurn{};

// The angles of a unit's tokens.
struct HeadAngles {
  int pairs, padded;
  bool interleaved;
  alignas(64) float at[kRopeTokens * (kMaxHeadDim + 2 * kLanes)];

  explicit HeadAngles(const RopeTable& table)
      : pairs(table.pairs), padded((pairs + kLanes - 1) / kLanes * kLanes), interleaved(table.interleaved) {}

  void read(int64_t token, const float* from, bool inverse) {
    float *cosine = at + token * 2 * padded, *sine = cosine + padded;
    if (from == nullptr) {
      std::fill_n(cosine, 2 * padded, __builtin_nanf(""));
      return;
    }
    std::fill_n(cosine, 2 * padded, 0.0f);
    std::copy_n(from, pairs, cosine);
    std::copy_n(from + pairs, pairs, sine);
    for (int i = 0; inverse && i < pairs; ++i) sine[i] = -sine[i];
  }
  PYGEN_INLINE HeadTurn of(int64_t token) const {
    const float* cosine = at + token * 2 * padded;
    return {cosine, cosine + padded, pairs, interleaved};
  }
};

// Calls store(i, vector, how many) for the elements of a head of `count`, as load(i, how many) gives them, turned.
template <class Load, class Store>
PYGEN_INLINE void turn_head(const HeadTurn& turn, int count, Load load, Store store) {
  const int pairs = turn.pairs;
  if (turn.interleaved) {
    for (int i = 0; i < pairs; i += kLanes) {
      const int here = 2 * (pairs - i);
      const F32 low = load(2 * i, here), high = load(2 * i + kLanes, here - kLanes);
      F32 x = every_other<0>(low, high), y = every_other<1>(low, high);
      rope_pair(x, y, load_bytes<F32>(turn.cosine + i), load_bytes<F32>(turn.sine + i));
      store(2 * i, interleave<0>(x, y), here);
      store(2 * i + kLanes, interleave<1>(x, y), here - kLanes);
    }
  } else {
    for (int i = 0; i < pairs; i += kLanes) {
      F32 x = load(i, pairs - i), y = load(pairs + i, pairs - i);
      rope_pair(x, y, load_bytes<F32>(turn.cosine + i), load_bytes<F32>(turn.sine + i));
      store(i, x, pairs - i);
      store(pairs + i, y, pairs - i);
    }
  }
  for (int i = 2 * pairs; i < count; i += kLanes) store(i, load(i, count - i), count - i);
}

PYGEN_INLINE char* head_place(const Operand& operand, int64_t sequence, int64_t head, int64_t token) {
  const int64_t offset = sequence * operand.stride[0] + head * operand.stride[1] + token * operand.stride[2];
  return static_cast<char*>(operand.data) + offset * size_of(operand.dtype);
}

// Walks over the heads of tokens [0, tokens), in the order in which they lie in memory.
struct HeadCursor {
  int64_t heads, tokens;
  bool by_token;
  int64_t head = 0, token = 0;

  HeadCursor(const Operand& operand, int64_t heads, int64_t tokens)
      : heads(heads), tokens(tokens), by_token(operand.stride[1] < operand.stride[2]) {}
  PYGEN_INLINE void advance() {
    if (by_token) {
      if (++head == heads) head = 0, ++token;
    } else {
      if (++token == tokens) token = 0, ++head;
    }
  }
};

// Calls visit(head, token, place) for the heads of `count` elements of tokens [first, first + tokens); `token` counts
// from 0. They are fetched ahead: where parts of a projection lie apart, the processor does not foresee the next.
inline constexpr int64_t kHeadsAhead = 16;
template <class Visit>
PYGEN_INLINE void each_head(const Operand& operand, int64_t sequence, int64_t heads, int64_t first, int64_t tokens,
                            int count, Visit visit) {
  HeadCursor ahead(operand, heads, tokens), here = ahead;
  const int64_t total = heads * tokens, bytes = count * size_of(operand.dtype);
  for (int64_t i = 0; i < total + kHeadsAhead; ++i) {
    if (i < total) {
      const char* const place = head_place(operand, sequence, ahead.head, first + ahead.token);
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(place + line);
      ahead.advance();
    }
    if (i >= kHeadsAhead) {
      visit(here.head, here.token, head_place(operand, sequence, here.head, first + here.token));
      here.advance();
    }
  }
}

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

inline void read_weight(const HeadNorm& norm, int head_dim, HeadRow& to) {
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

// What an RMSNorm multiplies the elements of a head by, all and each; nothing where there are no weights.
struct Norm {
  const float* weight;
  float factor;
};

// As each_head, which calls visit(head, token, place, norm). Heads are taken in groups, whose factors are made
// together: one by one, each head would wait for its own.
template <DType kDType, class Visit>
PYGEN_INLINE void each_normed_head(const Operand& operand, int64_t sequence, int64_t heads, int64_t first,
                                   int64_t tokens, int head_dim, const float* weight, float eps, Visit visit) {
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
      group[i].norm.factor = rms_factor(squares, head_dim, eps);
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

// Normalises, turns and stores a head; apart from the loops over heads, for the sake of registers.
template <DType kDType, DType kTo>
__attribute__((noinline)) void convert(const char* from, Norm norm, HeadTurn turn, int head_dim, char* to) {
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

}  // namespace
}  // namespace pygen
