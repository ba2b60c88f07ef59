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

}  // namespace
}  // namespace pygen
