// AVX2: eight lanes. It has no expansion and no compression, so both are a permutation by an index from a
// table.
#include <immintrin.h>

#include "column_kernels_inl.h"

namespace oats {
namespace {

// For each mask byte, the index of the value that goes to each lane, and -128 for a lane that becomes zero:
// the permutation reads the low three bits only, and the sign becomes the mask of the zero.
struct ExpandTable {
  int8_t index[256][8];
  constexpr ExpandTable() : index() {
    for (int mask = 0; mask < 256; ++mask) {
      int8_t next = 0;
      for (int lane = 0; lane < 8; ++lane) index[mask][lane] = (mask >> lane & 1) ? next++ : int8_t{-128};
    }
  }
};
alignas(64) constexpr ExpandTable kExpand;

// For each mask byte, the lanes that it keeps, in order.
struct CompressTable {
  int8_t index[256][8];
  constexpr CompressTable() : index() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int8_t lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) index[mask][next++] = lane;
      }
    }
  }
};
alignas(64) constexpr CompressTable kCompress;

void transpose_units(__m256 (&rows)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    rows[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  }
}

__m256 expand_lanes(__m256 packed, uint8_t mask) {
  const __m256i index =
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.index[mask])));
  const __m256 lanes = _mm256_permutevar8x32_ps(packed, index);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), lanes);
}

__m256 load_values(const float* values) {
  return _mm256_loadu_ps(values);
}

__m256 load_values(const uint16_t* values) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

__m256 load_values(const int8_t* codes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}

template <class Io>
struct Avx2 : Io {
  using Value = typename Io::Element;
  static constexpr int lanes = 8, group = 1, registers = 12, flip = 0, min_columns = 36;
  static constexpr bool scaled_activations = false;
  using Mask = uint8_t;
  using Vector = __m256;
  using Weights = __m256;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const float* sums) { return _mm256_loadu_ps(sums); }
  static void store(float* sums, Vector v) { _mm256_storeu_ps(sums, v); }
  template <class T>
  static Weights expand(const T* values, Mask mask) {
    return expand_lanes(load_values(values), mask);
  }
  template <class T>
  static Weights weights(const T* values) {
    return load_values(values);
  }
  static Weights load_units(const uint32_t* units) {
    return _mm256_load_ps(reinterpret_cast<const float*>(units));
  }
  static void store_units(uint32_t* units, Weights w) {
    _mm256_storeu_ps(reinterpret_cast<float*>(units), w);
  }
  static void transpose(Weights (&square)[lanes]) { transpose_units(square); }
  static uint32_t compress(uint32_t* units, Weights w) {
    const __m256i zero = _mm256_cmpeq_epi32(_mm256_castps_si256(w), _mm256_setzero_si256());
    const int used = ~_mm256_movemask_ps(_mm256_castsi256_ps(zero)) & 0xff;
    const __m256i index =
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.index[used])));
    store_units(units, _mm256_permutevar8x32_ps(w, index));
    return static_cast<uint32_t>(used);
  }
  static Vector multiply_add(Vector sum, Weights w, uint32_t activation) {
    return _mm256_fmadd_ps(w, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(activation))), sum);
  }
  static Vector add_scaled(Vector v, Vector sum, Vector scale) { return _mm256_fmadd_ps(sum, scale, v); }
  static Vector multiply(Weights w, Vector scale) { return _mm256_mul_ps(w, scale); }
  template <int Bits>
  static void decode(const uint8_t* runs, int64_t count, const int8_t* codebook, int8_t* codes) {
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
    // The codebook repeats, so bits above the code do not matter; but bit 7 must be zero.
    const auto put = [&](int64_t at, __m256i indices) {
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(codes + at),
          _mm256_shuffle_epi8(table, _mm256_and_si256(indices, _mm256_set1_epi8((1 << Bits) - 1))));
    };
    const auto load = [](const uint8_t* bytes) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    };
    for (; count > 0; --count) {
      for (int i = 0; i < 64; i += 32) {
        if constexpr (Bits == 3) {
          const __m256i top = _mm256_set1_epi8(static_cast<char>(0xc0));
          __m256i rest = _mm256_setzero_si256();
          for (int v = 0; v < 3; ++v) {
            const __m256i bytes = load(runs + v * 64 + i), two = _mm256_and_si256(bytes, top);
            put(v * 128 + i, bytes);
            put(v * 128 + 64 + i, _mm256_srli_epi16(bytes, 3));
            rest = _mm256_or_si256(rest, _mm256_srli_epi16(two, 6 - 2 * v));
          }
          put(384 + i, rest);
          put(448 + i, _mm256_srli_epi16(rest, 3));
        } else {
          const __m256i bytes = load(runs + i);
          for (int part = 0; part < 8 / Bits; ++part)
            put(part * 64 + i, _mm256_srli_epi16(bytes, part * Bits));
        }
      }
      runs += Bits == 3 ? 192 : 64;
      codes += Bits == 3 ? 512 : 512 / Bits;
    }
  }
};

}  // namespace

const Kernels& kernels_avx2(Dtype dtype, Storage storage) {
  return float_kernels<Avx2>(dtype, storage);
}

}  // namespace oats
