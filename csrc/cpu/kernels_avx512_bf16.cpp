// AVX-512 with VBMI2 (expansion of 16-bit lanes) and BF16 (products of pairs).
#include <immintrin.h>

#include "avx512_inl.h"
#include "column_kernels_inl.h"

namespace oats {
namespace {

// vdpbf16ps multiplies pairs, so a mask word covers 16 outputs x 2 inputs, and the pair of inputs
// is an embedded broadcast. It treats denormals as zero and rounds each of its two additions.
struct Avx512Bf16 : Bf16Value {
  static constexpr int lanes = 16, group = 2, registers = 24;
  using Mask = uint32_t;
  using Vector = __m512;
  using Weights = __m512i;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* sums) { return _mm512_loadu_ps(sums); }
  static void store(float* sums, Vector v) { _mm512_storeu_ps(sums, v); }
  static Weights expand(const Value* values, Mask mask) {
    return _mm512_mask_expand_epi16(fresh_zero(), mask, _mm512_loadu_si512(values));
  }
  static Weights weights(const Value* values) { return _mm512_loadu_si512(values); }
  static Weights load_units(const uint32_t* units) { return _mm512_load_si512(units); }
  static void store_units(uint32_t* units, Weights w) { _mm512_storeu_si512(units, w); }
  static void transpose(Weights (&square)[lanes]) { transpose_units(square); }
  static void transpose_sums(Vector (&square)[lanes]) { transpose_units(square); }
  static uint32_t compress(uint32_t* units, Weights w) { return compress_units(units, w); }
  static Vector multiply_add(Vector sum, Weights w, uint32_t activation) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(activation)));
  }
};

}  // namespace

// fp32 gains nothing from these instructions.
const StripKernels& strip_kernels_avx512_bf16(Dtype dtype) {
  return dtype == Dtype::fp32 ? strip_kernels_avx512(dtype) : StripLoops<Avx512Bf16>::table();
}

const ColumnKernels& column_kernels_avx512_bf16(Dtype dtype) {
  return dtype == Dtype::fp32 ? column_kernels_avx512(dtype) : ColumnLoops<Avx512Bf16>::table(88);
}

}  // namespace oats
