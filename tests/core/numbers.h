// fp32 and bf16 as numbers, written apart from those of the core that is tested.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

inline float to_float(float v) {
  return v;
}

inline float to_float(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest, ties to even; finite values only.
template <class Value>
Value from_float(float v) {
  if constexpr (std::is_same_v<Value, float>) {
    return v;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    const uint32_t rest = bits & 0xffff, upper = bits >> 16;
    return static_cast<uint16_t>(upper + (rest > 0x8000 || (rest == 0x8000 && upper % 2)));
  }
}
