// The loops of StripKernels, for any vector type. Each strip_kernels_<isa>.cpp includes this once, inside
// its own flags; the anonymous namespace keeps the linker from handing one ISA's instantiation to another.
//
// A `Traits` names the layout and four instructions:
//   lanes, group, registers         the layout, and how many vector registers may hold sums
//   Value, Mask, Vector, Weights    types of a stored value, a mask word, sums, expanded weights
//   zero(), load(sums), store(...)  sums
//   expand(values, mask)            the kept values in their lanes, zero elsewhere
//   weights(values)                 lanes * group dense values
//   multiply_add(sum, weights, activation)
//   to_float(Value), from_float(float)
//   transpose(weights[lanes])       a lanes x lanes square of units
//   store_units(units, weights)     `lanes` units
#pragma once

#include <cstdint>
#include <cstring>

#include "strip_kernels.h"

namespace oats {
namespace {

// How far ahead of the values the prefetch runs: far enough to hide memory, near enough to stay in
// L1 with eight strips in flight.
constexpr int kPrefetchBytes = 512;

template <class Traits>
struct StripLoops {
  using Value = typename Traits::Value;
  using Mask = typename Traits::Mask;
  using Vector = typename Traits::Vector;
  static constexpr int kLanes = Traits::lanes;
  static constexpr int kGroup = Traits::group;
  static constexpr int kCell = kLanes * kGroup;
  // Beyond sixteen columns an expansion is already a small part of the arithmetic.
  static constexpr int kMaxColumns = Traits::registers >= 16 ? 16 : 8;

  static int padded_columns(int columns) {
    if (columns <= 8) return columns;
    return columns <= 12 ? 12 : 16;
  }

  // Strips that go together: each has `Columns` independent sums, and all of them stay in registers.
  template <int Columns>
  static constexpr int strips_together() {
    int strips = 8;
    while (strips > 1 && strips * Columns > Traits::registers) strips /= 2;
    return strips;
  }

  template <int Strips, int Columns>
  static void sparse_block(const PackedHeader* weight, int64_t strip, const uint32_t* activations,
                           float* sums) {
    const char* base = reinterpret_cast<const char*>(weight);
    const int64_t groups = weight->groups;
    const auto* starts = reinterpret_cast<const uint64_t*>(base + weight->starts_at) + strip;
    const Mask* masks[Strips];
    const Value* values[Strips];
    Vector sum[Strips][Columns];
    for (int s = 0; s < Strips; ++s) {
      masks[s] = reinterpret_cast<const Mask*>(base + weight->masks_at) + (strip + s) * groups;
      values[s] = reinterpret_cast<const Value*>(base + weight->values_at) + starts[s];
      for (int c = 0; c < Columns; ++c) sum[s][c] = Traits::zero();
    }
    for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 8
      for (int s = 0; s < Strips; ++s) {
        const Mask mask = masks[s][g];
        const auto w = Traits::expand(values[s], mask);
        __builtin_prefetch(reinterpret_cast<const char*>(values[s]) + kPrefetchBytes);
        values[s] += __builtin_popcount(mask);
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) {
          sum[s][c] = Traits::multiply_add(sum[s][c], w, activations[g * Columns + c]);
        }
      }
    }
    for (int s = 0; s < Strips; ++s) {
      for (int c = 0; c < Columns; ++c) Traits::store(sums + (s * Columns + c) * kLanes, sum[s][c]);
    }
  }

  template <int Strips, int Columns>
  static void dense_block(const Value* factor, int64_t groups, const uint32_t* activations, bool accumulate,
                          float* sums) {
    Vector sum[Strips][Columns];
    for (int s = 0; s < Strips; ++s) {
      for (int c = 0; c < Columns; ++c) {
        sum[s][c] = accumulate ? Traits::load(sums + (s * Columns + c) * kLanes) : Traits::zero();
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 8
      for (int s = 0; s < Strips; ++s) {
        const auto w = Traits::weights(factor + (s * groups + g) * kCell);
#pragma GCC unroll 16
        for (int c = 0; c < Columns; ++c) {
          sum[s][c] = Traits::multiply_add(sum[s][c], w, activations[g * Columns + c]);
        }
      }
    }
    for (int s = 0; s < Strips; ++s) {
      for (int c = 0; c < Columns; ++c) Traits::store(sums + (s * Columns + c) * kLanes, sum[s][c]);
    }
  }

  // Calls block(integral_constant<Strips>, strip) over [begin, end), in the widest steps that fit.
  template <int Strips, int Columns, class Block>
  static void over_strips(int64_t begin, int64_t end, const Block& block) {
    int64_t strip = begin;
    for (; strip + Strips <= end; strip += Strips) block.template run<Strips, Columns>(strip);
    if constexpr (Strips > 1) {
      if (strip < end) over_strips<Strips / 2, Columns>(strip, end, block);
    }
  }

  template <class Block>
  static void over_columns(int columns, int64_t begin, int64_t end, const Block& block) {
    switch (columns) {
#define OATS_COLUMNS(n)                                        \
  case n:                                                      \
    if constexpr (n <= kMaxColumns) {                          \
      over_strips<strips_together<n>(), n>(begin, end, block); \
    }                                                          \
    break;
      OATS_COLUMNS(1)
      OATS_COLUMNS(2)
      OATS_COLUMNS(3)
      OATS_COLUMNS(4)
      OATS_COLUMNS(5)
      OATS_COLUMNS(6)
      OATS_COLUMNS(7)
      OATS_COLUMNS(8)
      OATS_COLUMNS(12)
      OATS_COLUMNS(16)
#undef OATS_COLUMNS
    }
  }

  struct SparseBlock {
    const PackedHeader* weight;
    const uint32_t* activations;
    int64_t begin;
    float* sums;
    template <int Strips, int Columns>
    void run(int64_t strip) const {
      sparse_block<Strips, Columns>(weight, strip, activations, sums + (strip - begin) * Columns * kLanes);
    }
  };

  struct DenseBlock {
    const Value* factor;
    int64_t groups;
    const uint32_t* activations;
    int64_t begin;
    bool accumulate;
    float* sums;
    template <int Strips, int Columns>
    void run(int64_t strip) const {
      dense_block<Strips, Columns>(factor + strip * groups * kCell, groups, activations, accumulate,
                                   sums + (strip - begin) * Columns * kLanes);
    }
  };

  static void sparse(const PackedHeader* weight, int64_t begin, int64_t end, const uint32_t* activations,
                     int columns, float* sums) {
    over_columns(columns, begin, end, SparseBlock{weight, activations, begin, sums});
  }

  static void dense(const void* factor, int64_t groups, int64_t begin, int64_t end,
                    const uint32_t* activations, int columns, bool accumulate, float* sums) {
    over_columns(columns, begin, end,
                 DenseBlock{static_cast<const Value*>(factor), groups, activations, begin, accumulate, sums});
  }

  static uint32_t unit(const Value* x, int64_t available) {
    if constexpr (kGroup == 1) {
      const float value = Traits::to_float(x[0]);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      return bits;
    } else {
      static_assert(kGroup == 2 && sizeof(Value) == 2);
      return x[0] | (available > 1 ? static_cast<uint32_t>(x[1]) << 16 : 0u);
    }
  }

  // Square by square: a row of x is read, and a row of activations written, sixteen units at a time.
  static void prepare(const void* x, int64_t stride, int64_t d_in, int columns, int padded, int64_t begin,
                      int64_t end, uint32_t* activations) {
    const auto* rows = static_cast<const Value*>(x);
    int c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      int64_t g = begin;
      for (; g + kLanes <= end && (g + kLanes) * kGroup <= d_in; g += kLanes) {
        typename Traits::Weights square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = Traits::weights(rows + (c + i) * stride + g * kGroup);
        Traits::transpose(square);
        for (int i = 0; i < kLanes; ++i) Traits::store_units(activations + (g + i) * padded + c, square[i]);
      }
      prepare_units(rows, stride, d_in, c, c + kLanes, padded, g, end, activations);
    }
    prepare_units(rows, stride, d_in, c, columns, padded, begin, end, activations);
    for (c = columns; c < padded; ++c) {
      for (int64_t g = begin; g < end; ++g) activations[g * padded + c] = 0;
    }
  }

  static void prepare_units(const Value* rows, int64_t stride, int64_t d_in, int c_begin, int c_end,
                            int padded, int64_t begin, int64_t end, uint32_t* activations) {
    for (int c = c_begin; c < c_end; ++c) {
      const Value* row = rows + c * stride;
      for (int64_t g = begin; g < end; ++g) {
        activations[g * padded + c] = unit(row + g * kGroup, d_in - g * kGroup);
      }
    }
  }

  static void sums_to_activations(const float* sums, int columns, uint32_t* activations) {
    for (int c = 0; c < columns; ++c) {
      for (int g = 0; g < kLanes / kGroup; ++g) {
        const float* lane = sums + c * kLanes + g * kGroup;
        if constexpr (kGroup == 1) {
          std::memcpy(activations + g * columns + c, lane, 4);
        } else {
          activations[g * columns + c] =
              Traits::from_float(lane[0]) | static_cast<uint32_t>(Traits::from_float(lane[1])) << 16;
        }
      }
    }
  }

  static void store(const float* sums, int columns, const void* bias, int valid, void* y, int64_t y_stride) {
    const auto* b = static_cast<const Value*>(bias);
    for (int c = 0; c < columns; ++c) {
      Value* out = static_cast<Value*>(y) + c * y_stride;
      const float* sum = sums + c * kLanes;
      for (int i = 0; i < valid; ++i) {
        out[i] = Traits::from_float(b ? sum[i] + Traits::to_float(b[i]) : sum[i]);
      }
    }
  }

  static const StripKernels& table() {
    static const StripKernels kernels{{kLanes, kGroup}, kMaxColumns, padded_columns,      prepare,
                                      sparse,           dense,       sums_to_activations, store};
    return kernels;
  }
};

// fp32 and bf16 as stored.
struct Fp32Value {
  using Value = float;
  static float to_float(float v) { return v; }
  static float from_float(float v) { return v; }
};

struct Bf16Value {
  using Value = uint16_t;
  static float to_float(uint16_t v) {
    const uint32_t bits = static_cast<uint32_t>(v) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  }
  // Round to nearest, ties to even; NaN stays NaN.
  static uint16_t from_float(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(v != v ? 0x7fc0 : rounded);
  }
};

}  // namespace
}  // namespace oats
