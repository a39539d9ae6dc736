// What this CPU can execute, and what the user allows.
#pragma once

namespace oats {

// In order: each one's instructions include those of the ones before it.
enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4 };
constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// False where the name is unknown; `isa` is then left as it was.
bool parse_isa(const char* name, Isa* isa);

// The most capable ISA of this CPU for which kernels were built.
Isa best_isa();

// OATS_ISA from the environment, clamped to best_isa(); best_isa() where it is unset or unknown. Read
// at each call, so that a test can change it.
Isa active_isa();

}  // namespace oats
