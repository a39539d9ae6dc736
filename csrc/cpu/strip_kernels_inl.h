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

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "strip_kernels.h"

namespace oats {
namespace {

// How far ahead of the values the prefetch runs: past the chunk that is being multiplied, so that the next
// one is in L1 when its expansion begins.
constexpr int kPrefetchBytes = 6144;

// Groups whose cells, once expanded for the first columns, wait in L1 for the others.
constexpr int64_t kGroupsPerChunk = 48;

template <int N>
using Constant = std::integral_constant<int, N>;

template <class Traits>
struct StripLoops {
  using Value = typename Traits::Value;
  using Mask = typename Traits::Mask;
  using Vector = typename Traits::Vector;
  using Weights = typename Traits::Weights;
  static constexpr int kLanes = Traits::lanes;
  static constexpr int kGroup = Traits::group;
  static constexpr int kCell = kLanes * kGroup;
  // Columns whose sums, for all strips of a block, fit into registers.
  static constexpr int kMaxColumns = Traits::registers / kStripsPerBlock;

  // Where the cells of a product come from, one by one. Passed by value: that keeps them in registers.
  struct Kept {
    const Mask* mask;
    const Value* values;
    Weights next() {
      const Mask m = *mask++;
      const Weights cell = Traits::expand(values, m);
      __builtin_prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes);
      values += __builtin_popcount(m);
      return cell;
    }
  };
  // The same, and leaves them expanded.
  struct Expanding {
    Kept kept;
    uint32_t* cells;
    Weights next() {
      const Weights cell = kept.next();
      Traits::store_units(std::exchange(cells, cells + kLanes), cell);
      return cell;
    }
  };
  struct Expanded {
    const uint32_t* cells;
    Weights next() { return Traits::load_units(std::exchange(cells, cells + kLanes)); }
  };
  struct Factor {
    const Value* cells;
    Weights next() { return Traits::weights(std::exchange(cells, cells + kCell)); }
  };

  static Kept kept(const PackedHeader* weight, int64_t block) {
    const char* base = reinterpret_cast<const char*>(weight);
    return {reinterpret_cast<const Mask*>(base + weight->masks_at) + block * kStripsPerBlock * weight->groups,
            reinterpret_cast<const Value*>(base + weight->values_at) +
                reinterpret_cast<const uint64_t*>(base + weight->starts_at)[block]};
  }

  // sums (+)= cells times `Columns` columns, whose units are `stride` apart from group to group. Returns the
  // source behind the cells used.
  template <int Strips, int Columns, class Source>
  static Source multiply(Source source, int64_t groups, const uint32_t* activations, int64_t stride,
                         bool accumulate, float* sums) {
    Vector sum[Columns][Strips];
    for (int c = 0; c < Columns; ++c) {
      for (int s = 0; s < Strips; ++s) {
        sum[c][s] = accumulate ? Traits::load(sums + (c * Strips + s) * kLanes) : Traits::zero();
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      Weights cells[Strips];
#pragma GCC unroll 8
      for (int s = 0; s < Strips; ++s) cells[s] = source.next();
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) {
#pragma GCC unroll 8
        for (int s = 0; s < Strips; ++s) {
          sum[c][s] = Traits::multiply_add(sum[c][s], cells[s], activations[g * stride + c]);
        }
      }
    }
    for (int c = 0; c < Columns; ++c) {
      for (int s = 0; s < Strips; ++s) Traits::store(sums + (c * Strips + s) * kLanes, sum[c][s]);
    }
    return source;
  }

  // Calls f(Constant<Strips>).
  template <class F>
  static void with_strips(int strips, const F& f) {
    switch (strips) {
      case 1:
        return f(Constant<1>{});
      case 2:
        return f(Constant<2>{});
      case 3:
        return f(Constant<3>{});
      case 4:
        return f(Constant<4>{});
    }
  }

  // Calls f(Constant<Columns>, first column) over `columns`, in steps as even as can be: a narrow last one
  // would run with too few sums in flight.
  template <class F>
  static void over_columns(int columns, const F& f) {
    const int steps = (columns + kMaxColumns - 1) / kMaxColumns;
    for (int i = 0; i < steps; ++i) {
      const int first = (columns * i + steps - 1) / steps;
      switch ((columns * (i + 1) + steps - 1) / steps - first) {
        case 1:
          f(Constant<1>{}, first);
          break;
        case 2:
          f(Constant<2>{}, first);
          break;
#define OATS_COLUMNS(n)                                      \
  case n:                                                    \
    if constexpr (n <= kMaxColumns) f(Constant<n>{}, first); \
    break;
          OATS_COLUMNS(3)
          OATS_COLUMNS(4)
          OATS_COLUMNS(5)
          OATS_COLUMNS(6)
#undef OATS_COLUMNS
      }
    }
  }

  static void sparse(const PackedHeader* weight, int64_t block, const uint32_t* activations, int columns,
                     float* sums) {
    const int64_t groups = weight->groups;
    with_strips(strips_of_block(weight->strips, block), [&](auto strips) {
      // The chunks below set the sums, but a layer without inputs has none.
      if (groups == 0) std::fill_n(sums, columns * strips * kLanes, 0.f);
      Kept source = kept(weight, block);
      if (columns <= kMaxColumns) {
        over_columns(columns, [&](auto width, int) {
          multiply<strips, width>(source, groups, activations, columns, false, sums);
        });
        return;
      }
      alignas(64) uint32_t cells[kGroupsPerChunk * kStripsPerBlock * kLanes];
      for (int64_t g = 0; g < groups; g += kGroupsPerChunk) {
        const int64_t count = std::min(kGroupsPerChunk, groups - g);
        over_columns(columns, [&](auto width, int first) {
          const uint32_t* units = activations + g * columns + first;
          float* out = sums + first * strips * kLanes;
          if (first == 0) {
            source =
                multiply<strips, width>(Expanding{source, cells}, count, units, columns, g > 0, out).kept;
          } else {
            multiply<strips, width>(Expanded{cells}, count, units, columns, g > 0, out);
          }
        });
      }
    });
  }

  static void dense(const void* factor, int strips, int64_t groups, const uint32_t* activations, int columns,
                    bool accumulate, float* sums) {
    with_strips(strips, [&](auto strips) {
      over_columns(columns, [&](auto width, int first) {
        multiply<strips, width>(Factor{static_cast<const Value*>(factor)}, groups, activations + first,
                                columns, accumulate, sums + first * strips * kLanes);
      });
    });
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

  static void sums_to_activations(const float* sums, int strips, int columns, uint32_t* activations) {
    const int groups = strips * kLanes / kGroup;
    for (int c = 0; c < columns; ++c) {
      for (int g = 0; g < groups; ++g) {
        const float* lane = sums + (c * groups + g) * kGroup;
        if constexpr (kGroup == 1) {
          std::memcpy(activations + g * columns + c, lane, 4);
        } else {
          activations[g * columns + c] =
              Traits::from_float(lane[0]) | static_cast<uint32_t>(Traits::from_float(lane[1])) << 16;
        }
      }
    }
  }

  static void store(const float* sums, int strips, int columns, const void* bias, int valid, void* y,
                    int64_t y_stride) {
    const auto* b = static_cast<const Value*>(bias);
    for (int c = 0; c < columns; ++c) {
      Value* out = static_cast<Value*>(y) + c * y_stride;
      const float* sum = sums + c * strips * kLanes;
      for (int i = 0; i < valid; ++i) {
        out[i] = Traits::from_float(b ? sum[i] + Traits::to_float(b[i]) : sum[i]);
      }
    }
  }

  static const StripKernels& table() {
    static const StripKernels kernels{{kLanes, kGroup}, prepare, sparse, dense, sums_to_activations, store};
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
