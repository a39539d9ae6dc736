// AVX-512 F, BW, VL and DQ, which every server CPU with AVX-512 has: sixteen lanes, all weights become fp32.
#include <immintrin.h>

#include "avx512_inl.h"
#include "column_kernels_inl.h"

namespace oats {
namespace {

__m512 load_values(const float* values) {
  return _mm512_loadu_ps(values);
}

__m512 load_values(const uint16_t* values) {
  return load_bf16(values);
}

__m512 load_values(const int8_t* codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}

__m512 expand_lanes(__m512 values, __mmask16 mask) {
  return _mm512_mask_expand_ps(_mm512_castsi512_ps(fresh_zero()), mask, values);
}

template <class Io>
struct Avx512 : Io {
  using Value = typename Io::Element;
  static constexpr int lanes = 16, group = 1, registers = 24, flip = 0;
  static constexpr bool scaled_activations = false;
  using Mask = uint16_t;
  using Vector = __m512;
  using Weights = __m512;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* sums) { return _mm512_loadu_ps(sums); }
  static void store(float* sums, Vector v) { _mm512_storeu_ps(sums, v); }
  static Weights expand(const Value* values, Mask mask) { return expand_lanes(load_values(values), mask); }
  static Weights weights(const Value* values) { return load_values(values); }
  static Weights elements(const Value* x) { return load_values(x); }
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

template <class Io>
struct Avx512Codes : Avx512<Io> {
  using Value = int8_t;
  using Sum = __m512;
  using CellScales = __m512;

  static __m512 expand(const int8_t* codes, uint16_t mask) { return expand_lanes(load_values(codes), mask); }
  static __m512 weights(const int8_t* codes) { return load_values(codes); }
  static Sum no_sum() { return _mm512_setzero_ps(); }
  static __m512 scales(const uint16_t* bf16) { return load_bf16(bf16); }
  static __m512 add_scaled(__m512 v, Sum sum, __m512 scale) { return _mm512_fmadd_ps(sum, scale, v); }
  static CellScales cell_scales(const uint16_t* bf16) { return load_bf16(bf16); }
  static void exact(__m512 w, CellScales scale, __m512 (&out)[1]) { out[0] = _mm512_mul_ps(w, scale); }
  static void decode(const uint8_t* run, const int8_t* codebook, int8_t* codes) {
    decode_run(run, codebook, codes);
  }
};

}  // namespace

const StripKernels& strip_kernels_avx512(Dtype dtype, Storage storage) {
  return strip_table<Avx512, Avx512Codes>(dtype, storage);
}

const ColumnKernels& column_kernels_avx512(Dtype dtype, Storage storage) {
  return column_table<Avx512, Avx512Codes>(dtype, storage, 60);
}

}  // namespace oats
