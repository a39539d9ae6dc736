// Pieces that the Traits for AVX-512 share, with and without BF16.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "oats/packed_weight.h"

namespace oats {
namespace {

// A zero that the compiler believes to be unknown. On Zen 5 an expansion or compression waits for the last
// writer of its destination, even if zero-masking overwrites all of it: it takes 5 cycles in a row of them.
// If the old value of the destination is this zero, it takes 1 (docs/kernels.md).
inline __m512i fresh_zero() {
  __m512i zero = _mm512_setzero_si512();
  asm("" : "+v"(zero));
  return zero;
}

inline void transpose_units(__m512i (&rows)[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // b[4 i + j] holds column j of each 128-bit lane, rows 4 i to 4 i + 3.
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even_top = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
    const __m512i odd_top = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i even_bottom = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i odd_bottom = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(even_top, even_bottom, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(odd_top, odd_bottom, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(even_top, even_bottom, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(odd_top, odd_bottom, 0xdd);
  }
}

inline void transpose_units(__m512 (&rows)[16]) {
  __m512i bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = _mm512_castps_si512(rows[i]);
  transpose_units(bits);
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_castsi512_ps(bits[i]);
}

// Compresses in a register and stores all of it, because compression to memory is slow on some CPUs. The
// caller allows that the lanes behind the used units are overwritten.
inline uint32_t compress_units(uint32_t* units, __m512i row) {
  const __mmask16 used = _mm512_test_epi32_mask(row, row);
  _mm512_storeu_si512(units, _mm512_mask_compress_epi32(fresh_zero(), used, row));
  return used;
}

// Sixteen bf16 to fp32.
inline __m512 load_values(const uint16_t* values) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// What all Traits for AVX-512 have.
struct Avx512Vectors {
  static constexpr int lanes = 16, registers = 24;
  using Vector = __m512;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* sums) { return _mm512_loadu_ps(sums); }
  static void store(float* sums, Vector v) { _mm512_storeu_ps(sums, v); }
  template <class T>
  static void transpose(T (&square)[lanes]) {
    transpose_units(square);
  }
  // Levels that bytes index. The codebook repeats, so bits above the code do not matter: with VBMI the upper
  // two, without it all but the highest.
  static __m512i levels(__m512i table, __m512i indices) {
#ifdef __AVX512VBMI__
    return _mm512_permutexvar_epi8(indices, table);
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(indices, _mm512_set1_epi8(15)));
#endif
  }
  static __m512i table_of(const int8_t* codebook) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
  }
  // A run of codes below 8 bits as vectors of 64 int8.
  template <int Bits>
  static constexpr int kRunVectors = Bits == 3 ? 8 : 8 / Bits;
  template <int Bits>
  static void decode_run(const uint8_t* run, __m512i table, __m512i (&out)[kRunVectors<Bits>]) {
    const __m512i first = _mm512_loadu_si512(run);
    out[0] = levels(table, first);
    if constexpr (Bits == 3) {
      const __m512i second = _mm512_loadu_si512(run + 64), third = _mm512_loadu_si512(run + 128);
      out[1] = levels(table, _mm512_srli_epi16(first, 3));
      out[2] = levels(table, second);
      out[3] = levels(table, _mm512_srli_epi16(second, 3));
      out[4] = levels(table, third);
      out[5] = levels(table, _mm512_srli_epi16(third, 3));
      // The upper two bits of each: 0xd8 selects the second operand where the third has ones.
      const auto select = [](__m512i a, __m512i b, int where) {
        return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8(static_cast<char>(where)), 0xd8);
      };
      const __m512i rest = select(select(_mm512_srli_epi16(first, 6), _mm512_srli_epi16(second, 4), 0x0c),
                                  _mm512_srli_epi16(third, 2), 0x30);
      out[6] = levels(table, rest);
      out[7] = levels(table, _mm512_srli_epi16(rest, 3));
    } else {
#pragma GCC unroll 4
      for (int part = 1; part < 8 / Bits; ++part)
        out[part] = levels(table, _mm512_srli_epi16(first, part * Bits));
    }
  }
  template <int Bits>
  static void decode(const uint8_t* runs, int64_t count, const int8_t* codebook, int8_t* codes) {
    constexpr int kVectors = kRunVectors<Bits>;
    const __m512i table = table_of(codebook);
    for (; count > 0; --count, runs += kVectors * 8 * Bits, codes += kVectors * 64) {
      __m512i out[kVectors];
      decode_run<Bits>(runs, table, out);
      for (int i = 0; i < kVectors; ++i) _mm512_storeu_si512(codes + i * 64, out[i]);
    }
  }
};

}  // namespace
}  // namespace oats
