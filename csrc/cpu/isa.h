// The instruction sets that the kernels are compiled for, and the one that serves on this processor.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace pathnet {

enum class Isa { kBase, kAvx2, kAvx512 };

inline const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "base"; }

// Fastest first.
inline std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
    isas.push_back(Isa::kAvx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back(Isa::kAvx2);
#endif
  isas.push_back(Isa::kBase);
  return isas;
}

// The fastest, unless the environment variable PATHNET_ISA names another; read at every call so that a test can
// force each in turn.
inline Isa selected_isa() {
  static const std::vector<Isa> isas = supported_isas();
  const char* forced = std::getenv("PATHNET_ISA");
  if (forced == nullptr || *forced == '\0') return isas.front();
  std::string names;
  for (Isa isa : isas) {
    if (std::strcmp(forced, isa_name(isa)) == 0) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::runtime_error("PATHNET_ISA: this processor has " + names + ", got " + forced);
}

}  // namespace pathnet
