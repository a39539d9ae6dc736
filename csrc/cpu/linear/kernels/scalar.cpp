// Plain C++ for any CPU. It has eight lanes, as AVX2, so that the compiler can use the vectors of the
// baseline.
#include "../layout.h"
#include "column_kernels_inl.h"

namespace oats {
namespace {

float number(float value) {
  return value;
}
float number(uint16_t bf16) {
  return Bf16Element::to_float(bf16);
}
float number(int8_t code) {
  return code;
}

template <class Io>
struct Scalar : Io {
  using Value = typename Io::Element;
  static constexpr int lanes = 8, group = 1, registers = 8, flip = 0, min_columns = 20;
  static constexpr bool scaled_activations = false;
  using Mask = uint8_t;
  struct Vector {
    float lane[lanes];
  };
  using Weights = Vector;

  static Vector zero() { return {}; }
  static Vector load(const float* sums) {
    Vector v;
    std::memcpy(v.lane, sums, sizeof v.lane);
    return v;
  }
  static void store(float* sums, const Vector& v) { std::memcpy(sums, v.lane, sizeof v.lane); }
  template <class T>
  static Weights expand(const T* values, Mask mask) {
    Weights w;
    for (int i = 0; i < lanes; ++i) {
      const bool kept = mask >> i & 1;
      w.lane[i] = kept ? number(*values) : 0.f;
      values += kept;
    }
    return w;
  }
  template <class T>
  static Weights weights(const T* values) {
    return expand(values, 0xff);
  }
  static Weights load_units(const uint32_t* units) {
    Weights w;
    std::memcpy(w.lane, units, sizeof w.lane);
    return w;
  }
  static void store_units(uint32_t* units, const Weights& w) { std::memcpy(units, w.lane, sizeof w.lane); }
  static void transpose(Weights (&square)[lanes]) {
    for (int i = 0; i < lanes; ++i) {
      for (int j = 0; j < i; ++j) std::swap(square[i].lane[j], square[j].lane[i]);
    }
  }
  static uint32_t compress(uint32_t* units, const Weights& w) {
    uint32_t used = 0;
    for (int i = 0; i < lanes; ++i) {
      if (w.lane[i] == 0.f) continue;
      std::memcpy(units++, &w.lane[i], 4);
      used |= 1u << i;
    }
    return used;
  }
  static Vector multiply_add(Vector sum, const Weights& w, uint32_t activation) {
    float x;
    std::memcpy(&x, &activation, 4);
    for (int i = 0; i < lanes; ++i) sum.lane[i] += w.lane[i] * x;
    return sum;
  }
  static Vector add_scaled(Vector v, const Vector& sum, const Vector& scale) {
    for (int i = 0; i < lanes; ++i) v.lane[i] += sum.lane[i] * scale.lane[i];
    return v;
  }
  static Vector multiply(const Weights& w, const Vector& scale) { return add_scaled({}, w, scale); }
  template <int Bits>
  static void decode(const uint8_t* runs, int64_t count, const int8_t* codebook, int8_t* codes) {
    const Runs<Bits> stored{const_cast<uint8_t*>(runs)};
    for (int64_t i = 0; i < count * Runs<Bits>::kCodes; ++i) codes[i] = codebook[stored.get(i)];
  }
};

}  // namespace

const Kernels& kernels_scalar(Dtype dtype, Storage storage) {
  return float_kernels<Scalar>(dtype, storage);
}

}  // namespace oats
