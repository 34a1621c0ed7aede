// The instruction sets that the kernels are compiled for, and the choice among them on this processor.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Defined by a library that runs AMX instructions in software; where it is loaded first, this processor has AMX.
extern "C" __attribute__((weak)) bool pathnet_amx_emulated();
#endif

namespace pathnet::cpu {

enum class Isa { kBase, kAvx2, kAvx512, kAvx512Bf16, kAmx };

inline const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"base", "avx2", "avx512", "avx512bf16", "amx"};
  return names[int(isa)];
}

#if defined(__x86_64__)
// GCC 12 does not know its name in __builtin_cpu_supports.
inline bool has_avx512_bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}

// Tiles are 8 KB of state a thread, which a process must request of the system's kernel.
inline bool has_amx() {
  if (pathnet_amx_emulated != nullptr && pathnet_amx_emulated()) return true;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kAmxBf16) || !(edx & kAmxTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// Fastest first.
inline std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (avx512 && has_avx512_bf16()) {
    if (has_amx()) isas.push_back(Isa::kAmx);
    isas.push_back(Isa::kAvx512Bf16);
  }
  if (avx512) isas.push_back(Isa::kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back(Isa::kAvx2);
#endif
  isas.push_back(Isa::kBase);
  return isas;
}

// The fastest, unless the environment variable PATHNET_ISA names another. It is read at every call, so that a test
// can force each in turn.
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

}  // namespace pathnet::cpu
