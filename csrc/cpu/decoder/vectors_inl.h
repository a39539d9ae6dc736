// Vectors of floats for the decoder's loops, in the width of the instructions that the including file is
// compiled with: GCC's vector types, so that one source serves every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../elements.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace oats {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Units __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

template <class Vector>
inline Vector load_vector(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(Vector));
  return v;
}

inline Floats broadcast(float value) {
  return value - Floats{};
}

// Elements of x, y, weights and cache: float, or bf16 as uint16_t.
inline Floats load_floats(const float* from) {
  return load_vector<Floats>(from);
}
inline Floats load_floats(const uint16_t* from) {
  return (Floats)(__builtin_convertvector(load_vector<Halves>(from), Units) << 16);
}
inline void store_floats(float* to, Floats v) {
  std::memcpy(to, &v, sizeof(v));
}
inline void store_floats(uint16_t* to, Floats v) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const Units bits = (Units)v;
  // To nearest, ties to even; NaN stays NaN.
  const Units rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Units nan = (Units)(v != v);
  const Halves halves = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
  std::memcpy(to, &halves, sizeof(halves));
#endif
}

inline float to_float(float value) {
  return value;
}
inline float to_float(uint16_t value) {
  return Bf16Element::to_float(value);
}
inline void from_float(float value, float* to) {
  *to = value;
}
inline void from_float(float value, uint16_t* to) {
  *to = Bf16Element::from_float(value);
}

inline Floats select(Ints where, Floats a, Floats b) {
  return (Floats)(((Ints)a & where) | ((Ints)b & ~where));
}
inline Floats larger(Floats a, Floats b) {
  return select(a > b, a, b);
}

inline float sum_of(Floats v) {
  float sums[kWidth];
  std::memcpy(sums, &v, sizeof(v));
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}
// Sums of neighbours: those of a, then those of b.
template <int... I>
inline Floats neighbour_sums(Floats a, Floats b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
  return __builtin_shuffle(a, b, Ints{(2 * I)...}) + __builtin_shuffle(a, b, Ints{(2 * I + 1)...});
#endif
}

// The sum of each of `Count` vectors, a power of two up to kWidth, in the first lanes. `v` is used up.
template <int Count>
inline Floats sums_of(Floats* v) {
  constexpr auto kLanes = std::make_integer_sequence<int, kWidth>();
  int count = Count;
  for (int lanes = kWidth; lanes > 1; lanes /= 2) {
    if (count == 1) {
      v[0] = neighbour_sums(v[0], v[0], kLanes);
    } else {
      count /= 2;
      for (int i = 0; i < count; ++i) v[i] = neighbour_sums(v[2 * i], v[2 * i + 1], kLanes);
    }
  }
  return v[0];
}

inline float largest_of(Floats v) {
  float values[kWidth];
  std::memcpy(values, &v, sizeof(v));
  float largest = values[0];
  for (int i = 1; i < kWidth; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}

// e to the v, with a relative error below 2^-22; 0 below -87. The argument is cut into a whole multiple of
// ln 2 and a rest of at most ln 2 / 2, whose power is a polynomial of degree 6 (Cephes).
inline Floats exp_of(Floats v) {
  const Ints vanishes = v < broadcast(-87.f);
  v = select(vanishes, broadcast(-87.f), v);
  v = select(v > broadcast(88.f), broadcast(88.f), v);
  const Floats shift = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats whole = (v * 1.44269504f + shift) - shift;
  Floats rest = v - whole * 0.693359375f;
  rest = rest + whole * 2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.f;
  const Ints exponent = (__builtin_convertvector(whole, Ints) + 127) << 23;
  return select(vanishes, Floats{}, p * (Floats)exponent);
}

inline Floats tanh_of(Floats v) {
  // Near zero 1 - 2 / (e^2v + 1) would lose what it has: v - v³ / 3 + 2 v⁵ / 15 there.
  const Floats square = v * v;
  const Floats small = v - v * square * (1.f / 3) + v * square * square * (2.f / 15);
  const Floats large = 1.f - 2.f / (exp_of(2.f * v) + 1.f);
  return select(square < broadcast(0.01f), small, large);
}

}  // namespace
}  // namespace oats
