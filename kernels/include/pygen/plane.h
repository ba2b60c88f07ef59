// What the token ops take beside tensors of logits: numbers per (sample, position), and settings per sample.
#pragma once

#include "pygen/operand.h"

namespace pygen {

// A number per (sample, position); `data == nullptr` says that it is not given, or not wanted.
template <class T>
struct Plane {
  T* data;
  int64_t stride[2];
  PYGEN_INLINE T& at(int64_t sample, int64_t position) const { return data[sample * stride[0] + position * stride[1]]; }
  PYGEN_INLINE void put(int64_t sample, int64_t position, T value) const {
    if (data != nullptr) at(sample, position) = value;
  }
};

// A setting, one (stride 0) or one per sample; null where it is not given.
template <class T>
struct Setting {
  const T* data;
  int64_t stride;
  PYGEN_INLINE T at(int64_t sample, T otherwise) const { return data == nullptr ? otherwise : data[sample * stride]; }
};

// Noise by Philox: a seed, a step and an id per sample (the latter 0, and the sample's index, where null).
struct PhiloxSettings {
  const int64_t* seed;
  Setting<int64_t> step, sample_ids;
  int64_t seed_stride;
};

// A watermark's green lists (green_list.h): what they are made of besides the tokens before.
struct GreenSettings {
  const int64_t* key;  // one for all
  Setting<float> gamma;
  Plane<const int64_t> tokens;  // (samples, capacity)
  int64_t capacity, context;
};

// A row of logits is cut into blocks of kRowBlock (token_row.h).
inline constexpr int kRowBlock = 1024;
inline constexpr int kMaxRowBlocks = 1024;

// Of one block of logits l, with m = max l and x = rate (l - m).
struct BlockSummary {
  float max;                // m
  float others;             // max l but for one element, where wanted
  float key;                // max exp(x) / noise, where a race decides
  double sum, raw, moment;  // sums of exp(x), and where wanted of exp(l - m) and of exp(x) x
};

}  // namespace pygen
