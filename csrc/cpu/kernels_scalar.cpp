// Any CPU. Eight lanes, as on AVX2, so that compilers can use what vectors the baseline has.
#include "column_kernels_inl.h"

namespace oats {
namespace {

template <class Stored>
struct Scalar : Stored {
  using typename Stored::Value;
  static constexpr int lanes = 8, group = 1, registers = 8;
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
  static Weights expand(const Value* values, Mask mask) {
    Weights w;
    for (int i = 0; i < lanes; ++i) {
      const bool kept = mask >> i & 1;
      w.lane[i] = kept ? Stored::to_float(*values) : 0.f;
      values += kept;
    }
    return w;
  }
  static Weights weights(const Value* values) {
    Weights w;
    for (int i = 0; i < lanes; ++i) w.lane[i] = Stored::to_float(values[i]);
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

}  // namespace

const StripKernels& strip_kernels_scalar(Dtype dtype) {
  return dtype == Dtype::fp32 ? StripLoops<Scalar<Fp32Value>>::table()
                              : StripLoops<Scalar<Bf16Value>>::table();
}

const ColumnKernels& column_kernels_scalar(Dtype dtype) {
  return dtype == Dtype::fp32 ? ColumnLoops<Scalar<Fp32Value>>::table(20)
                              : ColumnLoops<Scalar<Bf16Value>>::table(20);
}

}  // namespace oats
