// Which instruction set (ISA) this CPU supports, and which the user allows.
#pragma once

namespace oats {

// In order: each one includes the instructions of those before it.
enum class Isa { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4 };
constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// Returns false and leaves `isa` alone if the name is unknown.
bool parse_isa(const char* name, Isa* isa);

// The best ISA of this CPU for which kernels were built.
Isa best_isa();

// OATS_ISA from the environment, at most best_isa(); best_isa() if it is unset or unknown. Read at each call,
// so that a test can change it.
Isa active_isa();

}  // namespace oats
