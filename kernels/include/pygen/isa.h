// The instruction sets a CPU kernel is compiled for, and the one in use.
#pragma once

#include <cstdint>

namespace pygen {

// kAvx512Bf16 is AVX-512 with the dot products of bfloat16 (BF16) and of bytes (VNNI).
enum class Isa : int32_t { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

inline constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// The best set this processor and operating system support.
Isa best_isa();

// The set in use: PYGEN_CPU_ISA where it is set, else the best. Throws std::runtime_error on a name that is
// unknown or not supported here.
Isa isa();

// Changes the set in use; throws as `isa` does.
void set_isa(const char* name);

// Every CPU kernel is one function per instruction set; PYGEN_CPU_KERNEL declares them and the one that
// chooses between them.
#define PYGEN_CPU_KERNEL(name, Args)                                                                                   \
  namespace baseline {                                                                                                 \
  void name(const Args& args, int64_t begin, int64_t end);                                                             \
  }                                                                                                                    \
  namespace avx2 {                                                                                                     \
  void name(const Args& args, int64_t begin, int64_t end);                                                             \
  }                                                                                                                    \
  namespace avx512 {                                                                                                   \
  void name(const Args& args, int64_t begin, int64_t end);                                                             \
  }                                                                                                                    \
  namespace avx512_bf16 {                                                                                              \
  void name(const Args& args, int64_t begin, int64_t end);                                                             \
  }                                                                                                                    \
  inline void name(const Args& args, int64_t begin, int64_t end) {                                                     \
    constexpr decltype(&baseline::name) kernels[] = {&baseline::name, &avx2::name, &avx512::name, &avx512_bf16::name}; \
    kernels[static_cast<int>(isa())](args, begin, end);                                                                \
  }

}  // namespace pygen
