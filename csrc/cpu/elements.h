// The numbers that x, y and exact weights are made of: fp32, or bf16, which is the upper half of an fp32.
#pragma once

#include <cstdint>
#include <cstring>

namespace oats {
// Files that are compiled for different ISAs include this. The anonymous namespace gives each its own copy:
// the linker must not give one file code that another compiled.
namespace {

struct Fp32Element {
  using Element = float;
  static float to_float(float value) { return value; }
  static float from_float(float value) { return value; }
};

struct Bf16Element {
  using Element = uint16_t;
  static float to_float(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  }
  // Rounds to nearest, ties to even; NaN stays NaN.
  static uint16_t from_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
  }
  // Two numbers in one unit, the first in the lower half.
  static uint32_t pair(float first, float second) {
    return from_float(first) | static_cast<uint32_t>(from_float(second)) << 16;
  }
};

}  // namespace
}  // namespace oats
