// Any CPU. Eight lanes, as on AVX2, so that compilers can use what vectors the baseline has.
#include "strip_kernels_inl.h"

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

}  // namespace oats
