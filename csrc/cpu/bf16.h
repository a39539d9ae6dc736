// bf16 as numbers.
#pragma once

#include <cstdint>
#include <cstring>

namespace oats {
// Files compiled with different instructions include this: the linker must not hand one's to another.
namespace {

[[maybe_unused]] inline float float_from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Rounds to nearest, ties to even; NaN stays NaN.
[[maybe_unused]] inline uint16_t bf16_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

}  // namespace
}  // namespace oats
