// The loops of DecoderKernels. Each kernels_<isa>.cpp includes this once, inside its own flags.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "vectors_inl.h"

namespace oats {
namespace {

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls f(Constant<n>{}) for an n of 1 to Most.
template <int Most, class F>
inline void with_constant(int n, const F& f) {
  if constexpr (Most >= 1) {
    if (n == Most) return f(Constant<Most>{});
    with_constant<Most - 1>(n, f);
  }
}

template <class Element>
struct DecoderLoops {
  static constexpr int kGroup = 4 / sizeof(Element);  // dimensions in a unit of keys and queries
  // Rows x vectors of sums that fit into the registers, with the vectors of keys and one broadcast.
  static constexpr int kVectors = 4;
  static constexpr int kRows = kWidth == 16 ? 6 : 2;

  static const Element* elements(const void* from) { return static_cast<const Element*>(from); }
  static Element* elements(void* to) { return static_cast<Element*>(to); }

  template <class Source>
  static float inverse_norm(const Source* x, int64_t n, float eps) {
    Floats sums[2] = {Floats{}, Floats{}};
    int64_t i = 0;
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
      const Floats a = load_floats(x + i), b = load_floats(x + i + kWidth);
      sums[0] += a * a;
      sums[1] += b * b;
    }
    float sum = sum_of(sums[0] + sums[1]);
    for (; i < n; ++i) sum += to_float(x[i]) * to_float(x[i]);
    return 1.f / std::sqrt(sum / static_cast<float>(n) + eps);
  }

  static void norm(const float* x, int64_t n, const DecoderNorm& norm, const void* powers, void* y) {
    const float scale = norm.weight ? inverse_norm(x, n, norm.eps) : 1.f;
    const Element* w = elements(norm.weight);
    const Element* p = elements(powers);
    const float one = norm.one_plus ? 1.f : 0.f;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      Floats v = load_floats(x + i) * scale;
      if (w) v *= load_floats(w + i) + one;
      if (p) v *= load_floats(p + i);
      store_floats(elements(y) + i, v);
    }
    for (; i < n; ++i) {
      float v = x[i] * scale;
      if (w) v *= to_float(w[i]) + one;
      if (p) v *= to_float(p[i]);
      from_float(v, elements(y) + i);
    }
  }

  static void add(float* x, int64_t n, const void* y, const DecoderNorm& norm, float scale) {
    const Element* in = elements(y);
    const Element* w = elements(norm.weight);
    const float one = norm.one_plus ? 1.f : 0.f;
    if (w) scale *= inverse_norm(in, n, norm.eps);
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      Floats v = load_floats(in + i) * scale;
      if (w) v *= load_floats(w + i) + one;
      store_floats(x + i, load_floats(x + i) + v);
    }
    for (; i < n; ++i) x[i] += to_float(in[i]) * scale * (w ? to_float(w[i]) + one : 1.f);
  }

  static void widen(const void* y, int64_t n, float scale, float* x) {
    for (int64_t i = 0; i < n; ++i) x[i] = to_float(elements(y)[i]) * scale;
  }

  static void norm_and_rotate(void* x, int64_t head_dim, const DecoderNorm& norm, const float* cosine,
                              const float* sine, int64_t n) {
    Element* head = elements(x);
    float values[kMostHeadDim];
    const float scale = norm.weight ? inverse_norm(head, head_dim, norm.eps) : 1.f;
    const Element* w = elements(norm.weight);
    const float one = norm.one_plus ? 1.f : 0.f;
    for (int64_t i = 0; i < head_dim; i += kWidth) {
      Floats v = load_floats(head + i) * scale;
      if (w) v *= load_floats(w + i) + one;
      store_floats(values + i, v);
    }
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      const Floats a = load_floats(values + i), b = load_floats(values + n + i);
      const Floats c = load_floats(cosine + i), s = load_floats(sine + i);
      store_floats(values + i, a * c - b * s);
      store_floats(values + n + i, b * c + a * s);
    }
    for (; i < n; ++i) {
      const float a = values[i], b = values[n + i];
      values[i] = a * cosine[i] - b * sine[i];
      values[n + i] = b * cosine[i] + a * sine[i];
    }
    for (int64_t j = 0; j < head_dim; j += kWidth) store_floats(head + j, load_floats(values + j));
  }

  static Floats gated(Gate kind, Floats v) {
    switch (kind) {
      case Gate::silu:
        return v / (1.f + exp_of(-v));
      case Gate::gelu_tanh:
        // (1 + tanh z) / 2 = 1 / (1 + e^-2z)
        return v / (1.f + exp_of(-1.5957691216f * (v + 0.044715f * v * v * v)));
      case Gate::relu:
        return larger(v, Floats{});
      case Gate::gelu: {
        float values[kWidth];
        store_floats(values, v);
        for (float& value : values) value = 0.5f * value * (1.f + std::erf(value * 0.70710678f));
        return load_floats(values);
      }
      case Gate::none:
        break;
    }
    return v;
  }

  static void gate(Gate kind, const void* g, const void* up, int64_t n, const void* powers, void* y) {
    const auto some = [&](const Element* from_g, const Element* from_up, const Element* from_powers,
                          Element* to) {
      Floats v = gated(kind, load_floats(from_g));
      if (from_up) v *= load_floats(from_up);
      if (from_powers) v *= load_floats(from_powers);
      store_floats(to, v);
    };
    const auto at = [](const void* from, int64_t i) { return from ? elements(from) + i : nullptr; };
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) some(at(g, i), at(up, i), at(powers, i), elements(y) + i);
    if (i == n) return;
    Element rest[4][kWidth] = {};
    const void* whole[3] = {g, up, powers};
    for (int j = 0; j < 3; ++j)
      if (whole[j]) std::copy_n(elements(whole[j]) + i, n - i, rest[j]);
    some(rest[0], up ? rest[1] : nullptr, powers ? rest[2] : nullptr, rest[3]);
    std::copy_n(rest[3], n - i, elements(y) + i);
  }

  static void write_key(const void* key, int64_t head_dim, void* page, int64_t token) {
    auto* units = static_cast<uint32_t*>(page) + token;
    const auto* from = static_cast<const char*>(key);
    for (int64_t i = 0; i < head_dim / kGroup; ++i) std::memcpy(units + i * kPageTokens, from + 4 * i, 4);
  }

  // A unit holds one dimension of all tokens of a group. A token that is not there yet is zero.
  static void write_value(const void* value, const void* next, int64_t head_dim, void* page, int64_t token) {
    Element* to = elements(page) + token / kGroup * kGroup * head_dim + token % kGroup;
    if constexpr (kGroup == 1) {
      std::copy_n(elements(value), head_dim, to);
    } else {
      for (int64_t d = 0; d < head_dim; ++d) to[kGroup * d] = elements(value)[d];
      if (token % kGroup) return;
      for (int64_t d = 0; d < head_dim; ++d) to[kGroup * d + 1] = next ? elements(next)[d] : Element{};
    }
  }

  // sum += units of keys or values times a unit of a query or of weights.
  static Floats multiply_add(Floats sum, Units keys, uint32_t query) {
    if constexpr (kGroup == 1) {
      float q;
      std::memcpy(&q, &query, 4);
      return sum + (Floats)keys * q;
    } else {
#ifdef __AVX512BF16__
      return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)keys,
                                      (__m512bh)_mm512_set1_epi32(static_cast<int>(query)));
#else
      const uint32_t first = query << 16, second = query & 0xffff0000u;
      float a, b;
      std::memcpy(&a, &first, 4);
      std::memcpy(&b, &second, 4);
      return sum + (Floats)(keys << 16) * a + (Floats)(keys & 0xffff0000u) * b;
#endif
    }
  }

  // The cache is read too irregularly for the CPU to foresee it: while keys are read, the values of the page
  // are fetched, `ahead` bytes behind, and while values are, the next keys.
  template <int Vectors>
  static void fetch(const void* from, int64_t ahead) {
    for (int64_t i = 0; i < Vectors * static_cast<int64_t>(sizeof(Floats)); i += 64)
      __builtin_prefetch(static_cast<const char*>(from) + ahead + i, 0, 2);
  }

  // scores [rows][kPageTokens] = queries times the keys of a page.
  template <int Rows>
  static void scores_of(const uint32_t* queries, int64_t units, const uint32_t* keys, int64_t ahead,
                        float* scores) {
    for (int64_t t = 0; t < kPageTokens; t += kVectors * kWidth) {
      Floats sums[Rows][kVectors];
      for (auto& row : sums)
        for (auto& sum : row) sum = Floats{};
      for (int64_t i = 0; i < units; ++i) {
        Units k[kVectors];
        fetch<kVectors>(keys + i * kPageTokens + t, ahead);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) k[v] = load_vector<Units>(keys + i * kPageTokens + t + v * kWidth);
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) {
          const uint32_t query = queries[r * units + i];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(sums[r][v], k[v], query);
        }
      }
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kVectors; ++v)
          store_floats(scores + r * kPageTokens + t + v * kWidth, sums[r][v]);
    }
  }

  // sums [rows][head_dim] += weights, units in rows of kPageTokens floats, times `count` units of values.
  template <int Rows, int Vectors>
  static void add_values(const float* weights, int64_t count, const uint32_t* values, int64_t ahead,
                         int64_t head_dim, int64_t d, float* sums) {
    Floats s[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) s[r][v] = load_floats(sums + r * head_dim + d + v * kWidth);
    for (int64_t t = 0; t < count; ++t) {
      Units value[Vectors];
      const uint32_t* at = values + t * head_dim + d;
      fetch<Vectors>(at, ahead);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) value[v] = load_vector<Units>(at + v * kWidth);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
        uint32_t weight;
        std::memcpy(&weight, weights + r * kPageTokens + t, 4);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) s[r][v] = multiply_add(s[r][v], value[v], weight);
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) store_floats(sums + r * head_dim + d + v * kWidth, s[r][v]);
  }

  // Softmax as it goes: `state` and the sums are rescaled whenever a page has a larger score (Milakov and
  // Gimelshein, arXiv 1805.02867). Scores become weights, as elements.
  static void to_weights(const AttentionUnit& unit, int row, int64_t page_begin, float* scores) {
    PartialAttention& state = unit.partial[row];
    const int64_t position = unit.positions[row];
    int64_t first = unit.begin, last = std::min(unit.end, position + 1);
    if (unit.window) first = std::max(first, position + 1 - unit.window);
    first = std::max<int64_t>(first - page_begin, 0);
    last = std::min<int64_t>(last - page_begin, kPageTokens);
    if (first >= last) {
      std::fill_n(scores, kPageTokens, 0.f);
      return;
    }
    const Floats low = broadcast(-std::numeric_limits<float>::infinity());
    Ints index;
    for (int i = 0; i < kWidth; ++i) index[i] = i;
    Floats largest = low;
    for (int64_t t = 0; t < kPageTokens; t += kWidth) {
      Floats s = load_floats(scores + t) * unit.scale;
      if (unit.softcap != 0.f) s = unit.softcap * tanh_of(s / unit.softcap);
      const Ints at = index + static_cast<int32_t>(t);
      s = select((at >= static_cast<int32_t>(first)) & (at < static_cast<int32_t>(last)), s, low);
      store_floats(scores + t, s);
      largest = larger(s, largest);
    }
    const float before = state.largest;
    state.largest = std::max(before, largest_of(largest));
    const float kept =
        before == -std::numeric_limits<float>::infinity() ? 0.f : std::exp(before - state.largest);
    if (kept != 1.f) {
      float* sums = unit.sums + row * unit.head_dim;
      for (int64_t d = 0; d < unit.head_dim; d += kWidth)
        store_floats(sums + d, load_floats(sums + d) * kept);
    }
    Floats sum = Floats{};
    for (int64_t t = 0; t < kPageTokens; t += kWidth) {
      const Floats weight = exp_of(load_floats(scores + t) - state.largest);
      store_floats(reinterpret_cast<Element*>(scores) + t, weight);
      sum += weight;
    }
    state.sum = state.sum * kept + sum_of(sum);
  }

  static void begin_attention(const AttentionUnit& unit) {
    for (int r = 0; r < unit.rows; ++r) unit.partial[r] = {-std::numeric_limits<float>::infinity(), 0.f};
    std::fill_n(unit.sums, unit.rows * unit.head_dim, 0.f);
  }

  static void attend(const AttentionUnit& unit) {
    alignas(64) float scores[kQueryRows * kPageTokens];
    const int64_t units = unit.head_dim / kGroup;
    const auto* queries = static_cast<const uint32_t*>(unit.queries);
    begin_attention(unit);
    for (int64_t page = unit.begin / kPageTokens; page * kPageTokens < unit.end; ++page) {
      if (unit.pages[page] < 0) continue;  // it left the window
      const char* keys = unit.cache + unit.pages[page] * unit.page_bytes;
      const bool last = (page + 1) * kPageTokens >= unit.end || unit.pages[page + 1] < 0;
      const int64_t next =
          last ? 0 : (unit.pages[page + 1] - unit.pages[page]) * unit.page_bytes - unit.values_bytes;
      const auto* values = reinterpret_cast<const uint32_t*>(keys + unit.values_bytes);
      const int64_t begin = page * kPageTokens;
      const int64_t count = (std::min(unit.end - begin, kPageTokens) + kGroup - 1) / kGroup;
      for (int r = 0; r < unit.rows; r += kRows) {
        with_constant<kRows>(std::min(kRows, unit.rows - r), [&](auto rows) {
          float* mine = scores + r * kPageTokens;
          scores_of<rows>(queries + r * units, units, reinterpret_cast<const uint32_t*>(keys),
                          unit.values_bytes, mine);
          for (int i = 0; i < rows; ++i) to_weights(unit, r + i, begin, mine + i * kPageTokens);
          float* sums = unit.sums + r * unit.head_dim;
          int64_t d = 0;
          for (; d + kVectors * kWidth <= unit.head_dim; d += kVectors * kWidth)
            add_values<rows, kVectors>(mine, count, values, next, unit.head_dim, d, sums);
          for (; d < unit.head_dim; d += kWidth)
            add_values<rows, 1>(mine, count, values, next, unit.head_dim, d, sums);
        });
      }
    }
  }

  static void merge(PartialAttention* partials, const float* sums, int64_t ranges, int64_t partial_stride,
                    int64_t sums_stride, int64_t head_dim, const void* powers, void* y) {
    float largest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t i = 0; i < ranges; ++i) largest = std::max(largest, partials[i * partial_stride].largest);
    for (int64_t i = 0; i < ranges; ++i) {
      PartialAttention& one = partials[i * partial_stride];
      one.largest = one.sum > 0 ? std::exp(one.largest - largest) : 0.f;  // from here on the range's share
      sum += one.sum * one.largest;
    }
    for (int64_t d = 0; d < head_dim; d += kWidth) {
      Floats v = Floats{};
      for (int64_t i = 0; i < ranges; ++i)
        v += partials[i * partial_stride].largest * load_floats(sums + i * sums_stride + d);
      v /= sum;
      if (powers) v *= load_floats(elements(powers) + d);
      store_floats(elements(y) + d, v);
    }
  }

  // sums += weights times x, of a vector of elements, or two halves of one.
  static Floats dot(Floats sum, const Element* w, const Element* x) {
#ifdef __AVX512BF16__
    if constexpr (kGroup == 2) {
      return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)load_vector<Units>(w),
                                      (__m512bh)load_vector<Units>(x));
    }
#endif
    for (int i = 0; i < kStep; i += kWidth) sum += load_floats(w + i) * load_floats(x + i);
    return sum;
  }
  static constexpr int kStep = kWidth * kGroup;  // elements of dot()

  // How far ahead of the weight its lines are fetched. Rows lie one behind the other, so this reaches into
  // the rows of the next squares.
  static constexpr int64_t kFetchBytes = 8192;

  template <int Rows, int Columns>
  static void dense_square(const DecoderLinear& linear, int64_t row, const Element* x, int64_t x_stride,
                           Element* y, int64_t y_stride) {
    const int64_t d_in = linear.d_in;
    const Element* w = elements(linear.dense) + row * d_in;
    Floats sums[Columns * Rows];
    for (Floats& sum : sums) sum = Floats{};
    int64_t i = 0;
    for (; i + kStep <= d_in; i += kStep) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        for (int64_t at = 0; at < kStep * static_cast<int64_t>(sizeof(Element)); at += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(w + r * d_in + i) + kFetchBytes + at);
#pragma GCC unroll 4
        for (int c = 0; c < Columns; ++c)
          sums[c * Rows + r] = dot(sums[c * Rows + r], w + r * d_in + i, x + c * x_stride + i);
      }
    }
    float out[kWidth];
    store_floats(out, sums_of<Rows * Columns>(sums));
    const Element* bias = elements(linear.bias);
    for (int c = 0; c < Columns; ++c) {
      for (int r = 0; r < Rows; ++r) {
        float sum = out[c * Rows + r];
        for (int64_t j = i; j < d_in; ++j) sum += to_float(w[r * d_in + j]) * to_float(x[c * x_stride + j]);
        from_float(bias ? sum + to_float(bias[row + r]) : sum, y + c * y_stride + row + r);
      }
    }
  }

  // Calls visit(Constant<n>{}, first) for pieces of n elements of [begin, end): n is Most as long as that
  // fits, then smaller powers of two.
  template <int Most, class Visit>
  static void in_powers(int64_t begin, int64_t end, const Visit& visit) {
    for (; begin + Most <= end; begin += Most) visit(Constant<Most>{}, begin);
    if constexpr (Most > 1) in_powers<Most / 2>(begin, end, visit);
  }

  static void dense(const DecoderLinear& linear, int64_t begin, int64_t end, const void* x, int64_t columns,
                    int64_t x_stride, void* y, int64_t y_stride) {
    const auto square = [&](auto rows, auto wide, int64_t row, int64_t column) {
      dense_square<rows, wide>(linear, row, elements(x) + column * x_stride, x_stride,
                               elements(y) + column * y_stride, y_stride);
    };
    // One column: as many sums as hide the time of an addition.
    constexpr int kTall = std::min(8, kWidth), kBlock = kWidth == 16 ? 4 : 2;
    if (columns == 1) {
      in_powers<kTall>(begin, end, [&](auto rows, int64_t row) { square(rows, Constant<1>{}, row, 0); });
      return;
    }
    in_powers<kBlock>(begin, end, [&](auto rows, int64_t row) {
      in_powers<kBlock>(0, columns, [&](auto wide, int64_t column) { square(rows, wide, row, column); });
    });
  }

  static void cap(void* y, int64_t n, float scale, float softcap) {
    for (int64_t i = 0; i < n; i += kWidth) {
      const int64_t count = std::min<int64_t>(kWidth, n - i);
      Element some[kWidth] = {};
      std::copy_n(elements(y) + i, count, some);
      Floats v = load_floats(some) * scale;
      if (softcap != 0.f) v = softcap * tanh_of(v / softcap);
      store_floats(some, v);
      std::copy_n(some, count, elements(y) + i);
    }
  }

  static int64_t most_likely(const void* logits, int64_t n) {
    const Element* x = elements(logits);
    // Of each lane the largest so far. A NaN stays: nothing is larger than it.
    Floats largest = broadcast(-std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      const Floats v = load_floats(x + i);
      largest = select((v > largest) | (v != v), v, largest);
    }
    float best = -std::numeric_limits<float>::infinity();
    const auto take = [&](float v) {
      if (v > best || v != v) best = v;
    };
    float lanes[kWidth];
    store_floats(lanes, largest);
    for (float v : lanes) take(v);
    for (; i < n; ++i) take(to_float(x[i]));
    for (i = 0; i < n; ++i) {
      const float v = to_float(x[i]);
      if (v == best || (best != best && v != v)) return i;
    }
    return 0;
  }

  static const DecoderKernels& table() {
    static const DecoderKernels kernels{norm,   add,       widen,       norm_and_rotate, gate,
                                        kGroup, write_key, write_value, attend,          merge,
                                        dense,  cap,       most_likely};
    return kernels;
  }
};

}  // namespace
}  // namespace oats
