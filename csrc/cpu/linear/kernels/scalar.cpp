// Plain C++ for any CPU. It has eight lanes, as AVX2, so that the compiler can use the vectors of the
// baseline.
#include "column_kernels_inl.h"

namespace oats {
namespace {

template <class Io>
struct Scalar : Io {
  using Value = typename Io::Element;
  static constexpr int lanes = 8, group = 1, registers = 8, flip = 0;
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
  static Weights expand(const Value* values, Mask mask) { return expand_as(values, mask, Io::to_float); }
  static Weights weights(const Value* values) { return expand_as(values, 0xff, Io::to_float); }
  static Weights elements(const Value* x) { return weights(x); }
  template <class T, class F>
  static Weights expand_as(const T* values, Mask mask, const F& to_float) {
    Weights w;
    for (int i = 0; i < lanes; ++i) {
      const bool kept = mask >> i & 1;
      w.lane[i] = kept ? to_float(*values) : 0.f;
      values += kept;
    }
    return w;
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
  static void transpose_sums(Vector (&square)[lanes]) { transpose(square); }
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
};

template <class Io>
struct ScalarCodes : Scalar<Io> {
  using Value = int8_t;
  using typename Scalar<Io>::Mask;
  using typename Scalar<Io>::Vector;
  using typename Scalar<Io>::Weights;
  using Sum = Vector;
  using CellScales = Vector;
  using Scalar<Io>::lanes;

  static Weights expand(const int8_t* codes, Mask mask) {
    return Scalar<Io>::expand_as(codes, mask, [](int8_t code) { return static_cast<float>(code); });
  }
  static Weights weights(const int8_t* codes) { return expand(codes, 0xff); }
  static Sum no_sum() { return {}; }
  static Vector scales(const uint16_t* bf16) {
    return Scalar<Io>::expand_as(bf16, 0xff, Bf16Element::to_float);
  }
  static Vector add_scaled(Vector v, const Sum& sum, const Vector& scale) {
    for (int i = 0; i < lanes; ++i) v.lane[i] += sum.lane[i] * scale.lane[i];
    return v;
  }
  static CellScales cell_scales(const uint16_t* bf16) { return scales(bf16); }
  static void exact(const Weights& w, const CellScales& scale, Weights (&out)[1]) {
    out[0] = add_scaled({}, w, scale);
  }
  static void decode(const uint8_t* run, const int8_t* codebook, int8_t* codes) {
    for (int i = 0; i < kRun / 2; ++i) {
      codes[i] = codebook[run[i] & 15];
      codes[kRun / 2 + i] = codebook[run[i] >> 4];
    }
  }
};

}  // namespace

const StripKernels& strip_kernels_scalar(Dtype dtype, Storage storage) {
  return strip_table<Scalar, ScalarCodes>(dtype, storage);
}

const ColumnKernels& column_kernels_scalar(Dtype dtype, Storage storage) {
  return column_table<Scalar, ScalarCodes>(dtype, storage, 20);
}

}  // namespace oats
