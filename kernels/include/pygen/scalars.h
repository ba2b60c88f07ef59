// Single numbers by the arithmetic that is written over lanes: those of a GPU's thread, or the first lane of a CPU's
// vectors, to the same bits.
#pragma once

#include "pygen/exp.h"
#include "pygen/philox.h"

namespace pygen {
namespace {

#if defined(__CUDACC__) || defined(PYGEN_EMULATION)
PYGEN_INLINE uint32_t bits_of(float value) { return to_unsigned(value); }
PYGEN_INLINE float float_of(uint32_t bits) { return from_unsigned(bits); }
PYGEN_INLINE float exp_one(float x) { return exp(x); }
PYGEN_INLINE float log_one(float x) { return log(x, uint32_t{}); }
PYGEN_INLINE void philox_words(uint64_t block, const PhiloxKey& key, uint32_t (&to)[4]) {
  uint64_t words[4];
  philox_block(block, key, words);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = static_cast<uint32_t>(words[i]);
}
#else
PYGEN_INLINE uint32_t bits_of(float value) { return bits<uint32_t>(value); }
PYGEN_INLINE float float_of(uint32_t all) { return bits<float>(all); }
PYGEN_INLINE float exp_one(float x) { return exp(splat(x, F32{}))[0]; }
PYGEN_INLINE float log_one(float x) { return log(splat(x, F32{}), U32{})[0]; }
PYGEN_INLINE void philox_words(uint64_t block, const PhiloxKey& key, uint32_t (&to)[4]) {
  U64 words[4];
  philox_block(U64{} + block, key, words);
  for (int i = 0; i < 4; ++i) to[i] = static_cast<uint32_t>(words[i][0]);
}
PYGEN_INLINE float load_one(const char* from, DType dtype) {
  char copy[kLanes * sizeof(float)] = {};
  std::memcpy(copy, from, size_of(dtype));
  if (dtype == DType::kFloat32) return load<DType::kFloat32>(copy)[0];
  return dtype == DType::kBFloat16 ? load<DType::kBFloat16>(copy)[0] : load<DType::kFloat16>(copy)[0];
}
#endif

}  // namespace
}  // namespace pygen
