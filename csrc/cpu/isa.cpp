// Detects what the CPU and the operating system support. This file is compiled without ISA flags: a detector
// that itself uses AVX-512 would crash before it could say no.
#include "oats/isa.h"

#include <cstdlib>
#include <cstring>

#if defined(OATS_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace oats {

namespace {
constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// Whether the CPU has AMX with bf16 and int8, and Linux saves its 8 KB of tiles. Linux does so only for a
// process that asked for it, so this asks.
[[maybe_unused]] bool tiles_usable() {
#if defined(OATS_X86) && defined(__linux__)
  // Of leaf 7, EDX (Intel SDM, volume 2, CPUID): AMX-BF16, AMX-TILE, AMX-INT8.
  constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25;
  constexpr unsigned kState = 3u << 17;                        // XCR0: configuration and data
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl, ARCH_REQ_XCOMP_PERM
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTiles) != kTiles) return false;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kState) == kState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
}  // namespace

const char* isa_name(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

bool parse_isa(const char* name, Isa* isa) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

Isa best_isa() {
#ifdef OATS_X86
  // __builtin_cpu_supports() also checks that the operating system saves the registers.
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2");
    if (!avx2) return Isa::scalar;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!avx512) return Isa::avx2;
    const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512vpopcntdq");
    if (!bf16) return Isa::avx512;
    return tiles_usable() ? Isa::amx_bf16 : Isa::avx512_bf16;
  }();
  return best;
#else
  return Isa::scalar;
#endif
}

Isa active_isa() {
  Isa wanted = best_isa();
  if (const char* name = std::getenv("OATS_ISA")) parse_isa(name, &wanted);
  return wanted < best_isa() ? wanted : best_isa();
}

}  // namespace oats
