// AVX-512 F, BW, VL and DQ: what every AVX-512 server CPU has.
#include <immintrin.h>

#include "avx512_inl.h"
#include "column_kernels_inl.h"

namespace oats {
namespace {

__m512 load_values(const float* values) {
  return _mm512_loadu_ps(values);
}

__m512 load_values(const uint16_t* values) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

template <class Stored>
struct Avx512 : Stored {
  using typename Stored::Value;
  static constexpr int lanes = 16, group = 1, registers = 24;
  using Mask = uint16_t;
  using Vector = __m512;
  using Weights = __m512;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* sums) { return _mm512_loadu_ps(sums); }
  static void store(float* sums, Vector v) { _mm512_storeu_ps(sums, v); }
  static Weights expand(const Value* values, Mask mask) {
    return _mm512_mask_expand_ps(_mm512_castsi512_ps(fresh_zero()), mask, load_values(values));
  }
  static Weights weights(const Value* values) { return load_values(values); }
  static Weights load_units(const uint32_t* units) { return _mm512_load_ps(units); }
  static void store_units(uint32_t* units, Weights w) { _mm512_storeu_ps(units, w); }
  static void transpose(Weights (&square)[lanes]) { transpose_units(square); }
  static void transpose_sums(Vector (&square)[lanes]) { transpose_units(square); }
  static uint32_t compress(uint32_t* units, Weights w) {
    return compress_units(units, _mm512_castps_si512(w));
  }
  static Vector multiply_add(Vector sum, Weights w, uint32_t activation) {
    return _mm512_fmadd_ps(w, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(activation))), sum);
  }
};

}  // namespace

const StripKernels& strip_kernels_avx512(Dtype dtype) {
  return dtype == Dtype::fp32 ? StripLoops<Avx512<Fp32Value>>::table()
                              : StripLoops<Avx512<Bf16Value>>::table();
}

const ColumnKernels& column_kernels_avx512(Dtype dtype) {
  return dtype == Dtype::fp32 ? ColumnLoops<Avx512<Fp32Value>>::table(60)
                              : ColumnLoops<Avx512<Bf16Value>>::table(60);
}

}  // namespace oats
