// Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the Box-Muller transform,
// written once over a lane type: vectors on a CPU, scalars on a GPU. Noise belongs to the sample: the key is the
// seed, the counter (element / 4 low, element / 4 high | draw << 16, step, sample id), the four words of a block
// make the four normals of elements 4 b .. 4 b + 3.
#pragma once

#include "pygen/plane.h"
#include "pygen/sine_cosine.h"

namespace pygen {

struct PhiloxKey {
  uint64_t seed;
  uint32_t draw;
  uint32_t step;
  uint32_t sample;
};

PYGEN_INLINE PhiloxKey philox_key(const PhiloxSettings& settings, int64_t sample, uint32_t draw) {
  return {static_cast<uint64_t>(settings.seed[sample * settings.seed_stride]), draw,
          static_cast<uint32_t>(settings.step.at(sample, 0)),
          static_cast<uint32_t>(settings.sample_ids.at(sample, sample))};
}

inline constexpr int kPhiloxRounds = 10;
inline constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;  // of the keys, from round to round

struct PhiloxRound {
  uint64_t key0, key1;  // of 32 bits each
};

// One round over counters held in the low halves of 64-bit lanes (what lies above is never looked at).
template <class Lanes>
PYGEN_INLINE void philox_round(Lanes (&c)[4], const PhiloxRound& round) {
  const Lanes product0 = mul_low(c[0], 0xD2511F53u), product1 = mul_low(c[2], 0xCD9E8D57u);
  c[0] = (product1 >> 32) ^ c[1] ^ round.key0;
  c[1] = product1;
  c[2] = (product0 >> 32) ^ c[3] ^ round.key1;
  c[3] = product0;
}

template <class Lanes>
PYGEN_INLINE void philox_counter(Lanes block, const PhiloxKey& key, Lanes (&words)[4]) {
  words[0] = block;
  words[1] = ((block >> 32) & 0xffffull) | (static_cast<uint64_t>(key.draw) << 16);
  words[2] = block ^ block ^ static_cast<uint64_t>(key.step);
  words[3] = block ^ block ^ static_cast<uint64_t>(key.sample);
}

template <class Lanes>
PYGEN_INLINE void philox_block(Lanes block, const PhiloxKey& key, Lanes (&words)[4]) {
  philox_counter(block, key, words);
  uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(words, {key0, key1});
    key0 += kPhiloxStep0;
    key1 += kPhiloxStep1;
  }
}

// ln x for normal x > 0, within 1 ulp: x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
template <class F, class U>
PYGEN_INLINE F log(F x, U) {
  const U all = to_unsigned(x);
  const U exponent = ((all - 0x3f3504f3u + 0x40000000u) >> 23) - 0x80u;  // biased: the shift then needs no sign
  const F f = from_unsigned(all - (exponent << 23)) - 1.0f;
  const F e = to_float(to_signed(exponent));
  const F f2 = f * f;
  F p = splat(0.0870043039f, x);
  p = fma(p, f, splat(-0.142674863f, x));
  p = fma(p, f, splat(0.149147689f, x));
  p = fma(p, f, splat(-0.165775850f, x));
  p = fma(p, f, splat(0.199630633f, x));
  p = fma(p, f, splat(-0.250013381f, x));
  p = fma(p, f, splat(0.333339095f, x));
  p = fma(f * f2, p, e * -2.12194440e-4f);
  p = fma(f2, splat(-0.5f, x), p) + f;
  return fma(e, splat(0.693359375f, x), p);
}

// Two independent standard normals from two uniform words (Box & Muller 1958): the radius from the first, u in
// (0, 1]; the angle from the second, whose top two bits choose a quadrant and whose others turn by +- pi/4 at most.
template <class F, class U>
PYGEN_INLINE void box_muller(U word0, U word1, F& normal0, F& normal1) {
  const F one = splat(1.0f, F{});
  const F u = fma(to_float(word0), splat(0x1p-32f, one), splat(0x1p-33f, one));
  const F radius = sqrt(log(u, word0) * -2.0f);
  const F angle = to_float(to_signed(word1 << 2)) * 3.6572953e-10f;  // 2^-32 pi/2
  F s, c;
  sine_cosine(angle, s, c);
  turn_quarters(word1 >> 30, s, c);
  normal0 = radius * c;
  normal1 = radius * s;
}

}  // namespace pygen
