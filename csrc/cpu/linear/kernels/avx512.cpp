// AVX-512 F, BW, VL and DQ, which every server CPU with AVX-512 has: sixteen lanes, all weights become fp32.
#include <immintrin.h>

#include "avx512_inl.h"
#include "column_kernels_inl.h"

namespace oats {
namespace {

__m512 load_values(const float* values) {
  return _mm512_loadu_ps(values);
}

__m512 load_values(const int8_t* codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}

template <class Io>
struct Avx512 : Io, Avx512Vectors {
  using Value = typename Io::Element;
  static constexpr int group = 1, flip = 0, min_columns = 60;
  static constexpr bool scaled_activations = false;
  using Mask = uint16_t;
  using Weights = __m512;

  template <class T>
  static Weights expand(const T* values, Mask mask) {
    return _mm512_mask_expand_ps(_mm512_castsi512_ps(fresh_zero()), mask, load_values(values));
  }
  template <class T>
  static Weights weights(const T* values) {
    return load_values(values);
  }
  static Weights load_units(const uint32_t* units) { return _mm512_load_ps(units); }
  static void store_units(uint32_t* units, Weights w) { _mm512_storeu_ps(units, w); }
  static uint32_t compress(uint32_t* units, Weights w) {
    return compress_units(units, _mm512_castps_si512(w));
  }
  static Vector multiply_add(Vector sum, Weights w, uint32_t activation) {
    return _mm512_fmadd_ps(w, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(activation))), sum);
  }
  static Vector add_scaled(Vector v, Vector sum, Vector scale) { return _mm512_fmadd_ps(sum, scale, v); }
  static Vector multiply(Weights w, Vector scale) { return _mm512_mul_ps(w, scale); }
};

}  // namespace

const Kernels& kernels_avx512(Dtype dtype, Storage storage) {
  return float_kernels<Avx512>(dtype, storage);
}

}  // namespace oats
