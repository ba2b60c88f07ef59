// The arithmetic of route_token, once, for a CPU and a GPU.
#pragma once

#include "pygen/route_token.h"
#include "pygen/token_row.h"

namespace pygen {

PYGEN_INLINE void route_position(const RouteTokenArgs& args, int64_t sample, int64_t position) {
  const int64_t held = args.sample.at(sample, position), token = args.token.at(sample, position);
  const float* weights = args.weights.data + sample * args.weights.stride;
  const float weight[3] = {weights[held == token ? kRouteAgrees : kRouteDiffers], weights[kRouteStay],
                           weights[kRouteRandom]};
  int64_t random = args.random.data != nullptr ? args.random.at(sample, position) : 0;
  int route = 0;
  if (args.philox.seed != nullptr) {
    const PhiloxKey key = philox_key(args.philox, sample, kDrawRoute);
    uint32_t words[4];
    philox_words(static_cast<uint64_t>(position), key, words);
    const double total = static_cast<double>(weight[0]) + weight[1] + weight[2];
    double before = 0.0;
    route = pick(0, 3, uniform_double(words[0], words[1]) * total, before, [&](int i) -> double {
      return i == 0 ? weight[0] : i == 1 ? weight[1] : weight[2];
    });
    if (args.random.data == nullptr) {
      const uint64_t vocabulary = static_cast<uint64_t>(args.vocabulary);
      random = static_cast<int64_t>((words[2] * vocabulary + (words[3] * vocabulary >> 32)) >> 32);
    }
  } else {
    float best = -1.0f;
    for (int i = 0; i < 3; ++i) {
      const int64_t offset = sample * args.noise.stride[0] + position * args.noise.stride[1] + i * args.noise.stride[2];
      const float noise =
          load_one(static_cast<const char*>(args.noise.data) + offset * size_of(args.noise.dtype), args.noise.dtype);
      const float arrival = weight[i] > 0.0f ? weight[i] / noise : 0.0f;
      if (arrival > best) best = arrival, route = i;
    }
  }
  args.next.put(sample, position, route == 0 ? token : route == 1 ? held : random);
}

}  // namespace pygen
