// The Traits of AVX-512 with BF16, VNNI and VBMI2, for avx512_bf16.cpp and amx_bf16.cpp.
#pragma once

#include <immintrin.h>

#include "avx512_inl.h"
#include "column_kernels_inl.h"

namespace oats {
namespace {

// vdpbf16ps multiplies pairs: a cell is 16 outputs x 2 inputs, and the pair of inputs is an embedded
// broadcast. The instruction takes denormals as zero and rounds each of its two additions.
struct Avx512Bf16 : Bf16Element, Avx512Vectors {
  using Value = uint16_t;
  static constexpr int group = 2, flip = 0, min_columns = 88;
  static constexpr bool scaled_activations = false;
  using Mask = uint32_t;
  using Weights = __m512i;

  static Weights expand(const Value* values, Mask mask) {
    return _mm512_mask_expand_epi16(fresh_zero(), mask, _mm512_loadu_si512(values));
  }
  static Weights weights(const void* values) { return _mm512_loadu_si512(values); }
  static Weights load_units(const uint32_t* units) { return _mm512_load_si512(units); }
  static void store_units(uint32_t* units, Weights w) { _mm512_storeu_si512(units, w); }
  static uint32_t compress(uint32_t* units, Weights w) { return compress_units(units, w); }
  static Vector multiply_add(Vector sum, Weights w, uint32_t activation) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(activation)));
  }
};

// vpdpbusd multiplies four unsigned bytes by four signed ones. The unsigned bytes are codes plus 128. The
// signed ones are the upper or the lower bytes of four 16-bit activations. Those are multiples of 1 / 32639
// (0x7f7f) of the largest of 64; that rounds a bf16 less than it already was, down to 2^-7 of the largest.
struct Avx512Codes : Avx512Bf16 {
  using Value = int8_t;
  static constexpr int group = 4, registers = 12, flip = 0x80;
  static constexpr bool scaled_activations = true;
  using Mask = uint64_t;
  struct Sum {
    __m512i upper, lower;
  };

  static Weights expand(const int8_t* codes, Mask mask) {
    // As fresh_zero(), but zero is 128 here.
    __m512i zero = _mm512_set1_epi8(-128);
    asm("" : "+v"(zero));
    return _mm512_mask_expand_epi8(zero, mask, _mm512_loadu_si512(codes));
  }
  static Sum no_sum(const XScale& scale) {
    return {_mm512_setzero_si512(), _mm512_set1_epi32(scale.minus_128_sums)};
  }
  static Sum multiply_add(Sum sum, Weights w, uint32_t upper, uint32_t lower) {
    // With the intrinsic, GCC 12 copies each sum in every step of a loop.
    const __m512i u = _mm512_set1_epi32(static_cast<int>(upper));
    const __m512i l = _mm512_set1_epi32(static_cast<int>(lower));
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.upper) : "v"(w), "v"(u));
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.lower) : "v"(w), "v"(l));
    return sum;
  }
  static Vector scales(const uint16_t* bf16) { return load_values(bf16); }
  static Vector times(Vector scale, float x_scale) { return _mm512_mul_ps(scale, _mm512_set1_ps(x_scale)); }
  static Vector add_scaled(Vector v, Sum sum, Vector scale) {
    const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(sum.upper, 8), sum.lower);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, v);
  }

  static __m512 load_some(const uint16_t* x, __mmask16 valid) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static __m512 load_some(const float* x, __mmask16 valid) { return _mm512_maskz_loadu_ps(valid, x); }

  // Up to kMostScaledColumns numbers as integers of one or two bytes. A NaN or infinity makes the scale NaN
  // or infinite, and with it all products of these inputs. Numbers below 2^-100 become zero: the inverse of
  // the scale would overflow. Calls store(i, integers) with numbers 16 i to 16 i + 15; those past `count` are
  // zero, up to a multiple of kScaledColumns.
  template <int Bytes, class T, class Store>
  static XScale quantise_to(const T* x, int64_t count, const Store& store) {
    static_assert(kMostScaledColumns == 2 * kScaledColumns);
    constexpr int kVectors = kScaledColumns / 16;
    return count > kScaledColumns ? quantise_vectors<Bytes, 2 * kVectors>(x, count, store)
                                  : quantise_vectors<Bytes, kVectors>(x, count, store);
  }
  template <int Bytes, int kVectors, class T, class Store>
  static XScale quantise_vectors(const T* x, int64_t count, const Store& store) {
    // The lower of two bytes is signed too.
    constexpr float kLargest = Bytes == 2 ? 0x7f7f : 0x7f;
    __m512 part[kVectors];
    __m512i largest = _mm512_setzero_si512(), sum = largest;
    for (int i = 0; i < kVectors; ++i) {
      const int64_t left = count - i * 16;
      const auto valid = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
      part[i] = load_some(x + (left > 0 ? i * 16 : 0), valid);
      // The bits of magnitudes order like the magnitudes, NaN above all.
      largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(part[i])));
    }
    const int bits = static_cast<int>(_mm512_reduce_max_epu32(largest));
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    const bool tiny = magnitude < 0x1p-100f;
    const __m512 inverse = _mm512_set1_ps(tiny ? 0.f : kLargest / magnitude);
    for (int i = 0; i < kVectors; ++i) {
      const __m256i whole = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(part[i], inverse)));
      sum = _mm512_add_epi32(sum, _mm512_cvtepi16_epi32(whole));
      store(i, whole);
    }
    return {tiny ? 0.f : magnitude / kLargest, -128 * _mm512_reduce_add_epi32(sum)};
  }

  static __m128i lower_bytes(__m256i integers) { return _mm256_cvtepi16_epi8(integers); }
  // Of the nearest multiples of 256.
  static __m128i upper_bytes(__m256i integers) {
    return lower_bytes(_mm256_srai_epi16(_mm256_add_epi16(integers, _mm256_set1_epi16(128)), 8));
  }

  // Units of upper and of lower bytes, in turns, `stride` apart.
  template <class T>
  static XScale quantise(const T* x, int64_t count, uint32_t* units, int64_t stride) {
    const int64_t used = 2 * divide_up(count, group);
    return quantise_to<2>(x, count, [&](int i, __m256i integers) {
      const __m128i upper = upper_bytes(integers), lower = lower_bytes(integers);
      const __m256i pairs =
          _mm256_set_m128i(_mm_unpackhi_epi32(upper, lower), _mm_unpacklo_epi32(upper, lower));
      if (stride == 1) {
        if (i * 8 < used) {
          const int64_t left = used - i * 8;
          _mm256_mask_storeu_epi32(units + i * 8, static_cast<__mmask8>(left >= 8 ? 0xff : (1u << left) - 1),
                                   pairs);
        }
      } else {
        alignas(32) uint32_t turned[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(turned), pairs);
        for (int64_t j = 0; j < std::min<int64_t>(8, used - i * 8); ++j)
          units[(i * 8 + j) * stride] = turned[j];
      }
    });
  }

  // kScaledColumns upper bytes, then as many lower ones. Those of the next inputs are `next` bytes further.
  template <int Bytes, class T>
  static XScale quantise_bytes(const T* x, int64_t count, char* bytes, int64_t next) {
    return quantise_to<Bytes>(x, count, [&](int i, __m256i integers) {
      constexpr int kVectors = kScaledColumns / 16;
      auto* out = reinterpret_cast<__m128i*>(bytes + i / kVectors * next) + i % kVectors;
      if constexpr (Bytes == 2) {
        _mm_storeu_si128(out, upper_bytes(integers));
        out += kVectors;
      }
      _mm_storeu_si128(out, lower_bytes(integers));
    });
  }

  // Each scale twice: for the pairs of outputs 0 to 7, and of 8 to 15.
  struct CellScales {
    __m512 low, high;
  };
  static CellScales cell_scales(const uint16_t* bf16) {
    const __m512 scale = load_values(bf16);
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return {_mm512_permutexvar_ps(twice, scale),
            _mm512_permutexvar_ps(_mm512_add_epi32(twice, _mm512_set1_epi32(8)), scale)};
  }
  static void exact(Weights codes, const CellScales& scale, Weights (&out)[2]) {
    const __m512i w = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
    // Moves bytes to the upper halves of 16 bits: of each output the first two, then the other two.
    const __m512i first =
        _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
    const __m512i second = _mm512_or_si512(first, _mm512_set1_epi16(0x0200));
    out[0] = exact_pairs(_mm512_srai_epi16(_mm512_shuffle_epi8(w, first), 8), scale);
    out[1] = exact_pairs(_mm512_srai_epi16(_mm512_shuffle_epi8(w, second), 8), scale);
  }
  static Weights exact_pairs(__m512i w, const CellScales& scale) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(w)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(w, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale.high), _mm512_mul_ps(low, scale.low));
  }
};

}  // namespace
}  // namespace oats
