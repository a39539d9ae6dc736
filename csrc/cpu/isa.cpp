// Compiled without any ISA flag: a detector built with AVX-512 crashes before it can say no.
#include "oats/isa.h"

#include <cstdlib>
#include <cstring>

namespace oats {

namespace {
constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16"};
}

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
  // __builtin_cpu_supports also asks the operating system whether it saves the registers.
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
    return bf16 ? Isa::avx512_bf16 : Isa::avx512;
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
