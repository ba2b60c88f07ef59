#include "pygen/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace pygen {
namespace {

constexpr Isa kIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};  // each includes the ones before

bool supported(Isa isa) {
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512cd");
    case Isa::kAvx512Bf16:
      return supported(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
  return false;
}

Isa parse(const char* name) {
  for (Isa isa : kIsas) {
    if (std::strcmp(name, kIsaNames[static_cast<int>(isa)]) != 0) continue;
    if (!supported(isa)) {
      throw std::runtime_error("the instruction set '" + std::string(name) + "' is not supported by this processor");
    }
    return isa;
  }
  throw std::runtime_error("the instruction set must be baseline, avx2, avx512 or avx512_bf16, got '" +
                           std::string(name) + "'");
}

Isa initial() {
  const char* name = std::getenv("PYGEN_CPU_ISA");
  if (name == nullptr || *name == '\0') return best_isa();
  try {
    return parse(name);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string("PYGEN_CPU_ISA: ") + error.what());
  }
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{initial()};
  return value;
}

}  // namespace

Isa best_isa() {
  Isa best = Isa::kBaseline;
  for (Isa isa : kIsas) best = supported(isa) ? isa : best;
  return best;
}

Isa isa() { return current().load(std::memory_order_relaxed); }

void set_isa(const char* name) { current().store(parse(name), std::memory_order_relaxed); }

}  // namespace pygen
