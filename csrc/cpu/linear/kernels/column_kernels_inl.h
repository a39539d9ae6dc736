// The loops of ColumnKernels, for any vector type. A slice of columns fills up to eight vectors; each
// non-zero unit of a row of S is multiplied into one sum for each of them. Loads of activations bound this:
// two rows go together and share them.
//
// strip_kernels_inl.h says how this file is included and what `Traits` have. Here they also have:
//   compress(units, weights)       stores the non-zero units in order; returns their lanes as bits
// `Stored` are the Traits of what is stored. Those of codes also have:
//   CellScales, cell_scales(bf16)  the scales of the rows of a cell
//   exact(weights, CellScales, weights[group / Traits::group])
//                                  a cell of codes as exact weights
#pragma once

#include <algorithm>
#include <type_traits>

#include "column_kernels.h"
#include "strip_kernels_inl.h"

namespace oats {
namespace {

template <class Traits, class Stored = Traits>
struct ColumnLoops {
  using Value = typename Traits::Value;
  using StoredLoops = StripLoops<Stored>;
  using Vector = typename Traits::Vector;
  using Weights = typename Traits::Weights;
  static constexpr int kLanes = Traits::lanes;
  static constexpr int kGroup = Traits::group;
  // Units of a lane in a cell as it is stored.
  static constexpr int kUnits = Stored::group / Traits::group;
  // sparse_rows() holds the sums of two rows in registers.
  static constexpr int kMaxVectors = Traits::registers >= 16 ? 8 : 6;

  // The bits of `lanes` groups in a row's mask word.
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  using Piece = std::conditional_t<kLanes == 16, uint16_t, uint8_t>;

  // Cache lines of one word's activations.
  template <int Vectors>
  static constexpr int kWordLines = kGroupsPerWord * Vectors * kLanes / 16;

  static int64_t gather(const PackedHeader* weight, int64_t block, int64_t begin, int64_t end, int64_t value,
                        uint32_t* units, int64_t unit_stride, uint64_t* masks, int64_t mask_stride) {
    const int strips = strips_of_block(weight->strips, block), rows = strips * kLanes;
    const auto* mask = StoredLoops::masks(weight, block) + begin / kUnits * strips;
    typename StoredLoops::Values values(weight, block, value);
    uint32_t* next[kStripsPerBlock * kLanes];
    for (int row = 0; row < rows; ++row) next[row] = units + row * unit_stride;
    std::memset(masks + (end - begin - 1) / kGroupsPerWord * mask_stride, 0, rows * sizeof(uint64_t));
    for (int64_t g = begin; g < end; g += kLanes) {
      alignas(64) uint32_t cells[kLanes * kStripsPerBlock * kLanes];
      const int64_t groups = std::min<int64_t>(end - g, kLanes);
      gather_cells(weight, block, g, groups, mask, values, cells);
      mask += divide_up(groups, kUnits) * strips;
      std::fill_n(cells + groups * rows, (kLanes - groups) * rows, 0u);
      uint64_t* word = masks + (g - begin) / kGroupsPerWord * mask_stride;
      const int64_t piece = g % kGroupsPerWord / kLanes;
      for (int strip = 0; strip < strips; ++strip) {
        Weights square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = Traits::load_units(cells + i * rows + strip * kLanes);
        Traits::transpose(square);
        for (int lane = 0; lane < kLanes; ++lane) {
          const int row = strip * kLanes + lane;
          const uint32_t used = Traits::compress(next[row], square[lane]);
          next[row] += __builtin_popcount(used);
          reinterpret_cast<Piece*>(word + row)[piece] = static_cast<Piece>(used);
        }
      }
    }
    return values.index();
  }

  // Stores a cell of codes as exact units, `stride` from group to group, for at most `groups` groups.
  template <class Scale>
  static void store_exact(typename StoredLoops::Weights codes, const Scale& scale, uint32_t* units,
                          int64_t stride, int64_t groups) {
    Weights exact[kUnits];
    Stored::exact(codes, scale, exact);
#pragma GCC unroll 2
    for (int u = 0; u < kUnits; ++u) {
      if (u < groups) Traits::store_units(units + u * stride, exact[u]);
    }
  }

  // Expands up to kLanes groups from `g` on to exact units: cells[group][strip][lanes].
  static void gather_cells(const PackedHeader* weight, int64_t block, int64_t g, int64_t groups,
                           const typename StoredLoops::Mask* mask, typename StoredLoops::Values& values,
                           uint32_t* cells) {
    const int strips = strips_of_block(weight->strips, block);
    if constexpr (StoredLoops::kCodes) {
      alignas(64) int8_t codes[kLanes / kUnits * kStripsPerBlock * StoredLoops::kCell + StoredLoops::kSpare];
      const uint16_t* scales = StoredLoops::value_scales(weight, block, g / kUnits);
      typename Stored::CellScales scale[kStripsPerBlock];
      for (int s = 0; s < strips; ++s) scale[s] = Stored::cell_scales(scales + s * kLanes);
      const typename StoredLoops::Kept begin = values.source(mask, divide_up(groups, kUnits) * strips, codes);
      typename StoredLoops::Kept source = begin;
      for (int64_t i = 0; i < groups; i += kUnits) {
        for (int s = 0; s < strips; ++s) {
          typename StoredLoops::Weights cell[1];
          source.next(cell);
          store_exact(cell[0], scale[s], cells + (i * strips + s) * kLanes, strips * kLanes, groups - i);
        }
      }
      values.used(begin, source);
    } else {
      const typename StoredLoops::Kept begin = values.source(mask, 0, nullptr);
      typename StoredLoops::Kept source = begin;
      for (int64_t i = 0; i < groups * strips; ++i) {
        Weights cell[1];
        source.next(cell);
        Traits::store_units(cells + i * kLanes, cell[0]);
      }
      values.used(begin, source);
    }
  }

  template <int Vectors>
  static void multiply_add(Vector (&sums)[Vectors], uint32_t unit, const uint32_t* activations) {
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) {
      sums[i] = Traits::multiply_add(sums[i], Traits::load_units(activations + i * kLanes), unit);
    }
  }

  // Two rows at a time. Loads bound this loop, so a group in which both rows have a unit loads its
  // activations once for both. Groups in which only one row has a unit go in pairs, so that 2 * Vectors sums
  // are in flight: a product takes 4 to 6 cycles, and two start in each cycle.
  template <int Vectors>
  static void sparse_rows(const uint64_t* masks, const uint32_t** next, int rows, const uint32_t* activations,
                          float* sums) {
    constexpr int kColumns = Vectors * kLanes;
    for (int row = 0; row < rows; row += 2, sums += 2 * kColumns) {
      const uint64_t mask0 = masks[row], mask1 = masks[row + 1];
      const uint32_t *units0 = next[row], *units1 = next[row + 1];
      next[row] += __builtin_popcountll(mask0);
      next[row + 1] += __builtin_popcountll(mask1);
      const auto unit = [](const uint32_t* units, uint64_t mask, int group) {
        return units[__builtin_popcountll(mask & ((uint64_t{1} << group) - 1))];
      };
      Vector sum0[Vectors], sum1[Vectors];
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) {
        sum0[i] = Traits::load(sums + i * kLanes);
        sum1[i] = Traits::load(sums + kColumns + i * kLanes);
      }
      // Prefetch the units and sums of the next rows from L2.
      if (row + 2 < rows) {
        for (int i = 0; i < 3; ++i) {
          __builtin_prefetch(next[row + 2] + i * kLanes);
          __builtin_prefetch(next[row + 3] + i * kLanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 2 * Vectors; ++i) __builtin_prefetch(sums + 2 * kColumns + i * kLanes, 1);
      }
      // Prefetch the activations of the next word from L3 to L2, a few lines with each row.
      const uint32_t* next_word = activations + kGroupsPerWord * kColumns;
      for (int i = row * kWordLines<Vectors> / rows; i < (row + 2) * kWordLines<Vectors> / rows; ++i) {
        __builtin_prefetch(next_word + i * 16, 0, 2);
      }
      for (uint64_t both = mask0 & mask1; both; both &= both - 1) {
        const int group = __builtin_ctzll(both);
        const uint32_t a = unit(units0, mask0, group), b = unit(units1, mask1, group);
        const uint32_t* x = activations + group * kColumns;
#pragma GCC unroll 8
        for (int i = 0; i < Vectors; ++i) {
          const auto columns = Traits::load_units(x + i * kLanes);
          sum0[i] = Traits::multiply_add(sum0[i], columns, a);
          sum1[i] = Traits::multiply_add(sum1[i], columns, b);
        }
      }
      uint64_t only0 = mask0 & ~mask1, only1 = mask1 & ~mask0;
      for (; only0 && only1; only0 &= only0 - 1, only1 &= only1 - 1) {
        const int g0 = __builtin_ctzll(only0), g1 = __builtin_ctzll(only1);
        multiply_add(sum0, unit(units0, mask0, g0), activations + g0 * kColumns);
        multiply_add(sum1, unit(units1, mask1, g1), activations + g1 * kColumns);
      }
      for (; only0; only0 &= only0 - 1) {
        const int group = __builtin_ctzll(only0);
        multiply_add(sum0, unit(units0, mask0, group), activations + group * kColumns);
      }
      for (; only1; only1 &= only1 - 1) {
        const int group = __builtin_ctzll(only1);
        multiply_add(sum1, unit(units1, mask1, group), activations + group * kColumns);
      }
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) {
        Traits::store(sums + i * kLanes, sum0[i]);
        Traits::store(sums + kColumns + i * kLanes, sum1[i]);
      }
    }
  }

  static uint32_t unit_of(const uint32_t* unit) { return *unit; }
  static uint32_t unit_of(const Value* values) { return StripLoops<Traits>::unit(values, kGroup); }

  // `Rows` rows of a matrix without a mask share each load of activations. A cell holds stored values or
  // units.
  template <int Vectors, int Rows, class Cell>
  static void dense_rows(const Cell* strip, int strips, int64_t begin, int64_t end,
                         const uint32_t* activations, float* sums) {
    constexpr int kColumns = Vectors * kLanes;
    constexpr int kPerUnit = std::is_same_v<Cell, Value> ? kGroup : 1;
    for (int first = 0; first < kLanes; first += Rows) {
      Vector sum[Rows][Vectors];
      for (int r = 0; r < Rows; ++r) {
        for (int i = 0; i < Vectors; ++i)
          sum[r][i] = Traits::load(sums + (first + r) * kColumns + i * kLanes);
      }
      for (int64_t g = begin; g < end; ++g) {
        const Cell* row = strip + (g * strips * kLanes + first) * kPerUnit;
        const uint32_t* x = activations + (g - begin) * kColumns;
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          multiply_add(sum[r], unit_of(row + r * kPerUnit), x);
        }
      }
      for (int r = 0; r < Rows; ++r) {
        for (int i = 0; i < Vectors; ++i)
          Traits::store(sums + (first + r) * kColumns + i * kLanes, sum[r][i]);
      }
    }
  }

  static void sparse(const uint64_t* masks, const uint32_t** next, int rows, const uint32_t* activations,
                     int vectors, float* sums) {
    with_constant<kMaxVectors>(vectors,
                               [&](auto width) { sparse_rows<width>(masks, next, rows, activations, sums); });
  }

  // Expands the codes of strips [first, last) of a matrix without a mask, in groups [begin, end), to exact
  // units, `stride` from group to group. `begin` is a multiple of kScaledColumns inputs.
  static void exact_cells(const DenseBlock& matrix, int first, int last, int64_t begin, int64_t end,
                          uint32_t* out, int64_t stride) {
    constexpr int64_t kScaled = kScaledColumns / kGroup, kStored = kScaled / kUnits;
    constexpr int64_t kCell = StoredLoops::kCell;
    alignas(64) int8_t room[kStored * kStripsPerBlock * kCell + StoredLoops::kSpare];
    for (int64_t g = begin; g < end; g += kScaled) {
      const int64_t groups = divide_up(std::min(kScaled, end - g), kUnits);
      const int8_t* codes = StoredLoops::dense_codes(matrix, g / kUnits, groups, room);
      if (codes < room || codes >= room + sizeof room) {
        for (int64_t i = 0; i < groups * matrix.strips * kCell; i += 64)
          __builtin_prefetch(codes + kPrefetchBytes + i);
      }
      const uint16_t* scales = matrix.scales + g * kGroup / matrix.scale_columns * matrix.strips * kLanes;
      for (int s = first; s < last; ++s) {
        const auto scale = Stored::cell_scales(scales + s * kLanes);
        uint32_t* cells = out + (g - begin) * stride + (s - first) * kLanes;
        for (int64_t i = 0; i < groups; ++i) {
          store_exact(Stored::weights(codes + (i * matrix.strips + s) * kCell), scale,
                      cells + i * kUnits * stride, stride, end - g - i * kUnits);
        }
      }
    }
  }

  static void dense(const DenseBlock& matrix, int strip, int64_t begin, int64_t end,
                    const uint32_t* activations, int vectors, float* sums) {
    const auto multiply = [&](const auto* cells, int strips, int64_t first, int64_t last) {
      with_constant<kMaxVectors>(vectors, [&](auto width) {
        dense_rows<width, width * 4 <= Traits::registers ? 4 : 2>(cells, strips, first, last, activations,
                                                                  sums);
      });
    };
    if constexpr (StoredLoops::kCodes) {
      alignas(64) uint32_t exact[kGroupsPerWord * kLanes];
      exact_cells(matrix, strip, strip + 1, begin, end, exact, kLanes);
      multiply(exact, 1, 0, end - begin);
    } else {
      multiply(static_cast<const Value*>(matrix.cells) + strip * StoredLoops::kCell, matrix.strips, begin,
               end);
    }
  }

  static void sums_to_activations(const float* sums, int vectors, uint32_t* activations) {
    const int columns = vectors * kLanes;
    for (int g = 0; g < kLanes / kGroup; ++g) {
      const float* row = sums + g * kGroup * columns;
      uint32_t* out = activations + g * columns;
      if constexpr (kGroup == 1) {
        std::memcpy(out, row, columns * sizeof(float));
      } else {
        for (int c = 0; c < columns; ++c) {
          out[c] = Traits::pair(row[c], row[columns + c]);
        }
      }
    }
  }

  static void store(const float* sums, int vectors, int columns, const void* bias, int valid, void* y,
                    int64_t y_stride) {
    alignas(64) float turned[kLanes * kLanes];
    for (int first = 0; first < columns; first += kLanes) {
      Vector square[kLanes];
      for (int row = 0; row < kLanes; ++row)
        square[row] = Traits::load(sums + row * vectors * kLanes + first);
      Traits::transpose(square);
      for (int c = 0; c < kLanes; ++c) Traits::store(turned + c * kLanes, square[c]);
      StripLoops<Traits>::store(turned, 1, std::min(columns - first, kLanes), bias, valid,
                                static_cast<Value*>(y) + first * y_stride, y_stride);
    }
  }

  static constexpr ColumnKernels kKernels{kMaxVectors, Traits::min_columns, gather, sparse,
                                          dense,       sums_to_activations, store};
};

template <class Traits, class Stored = Traits>
constexpr Kernels kKernels{StripLoops<Stored>::kKernels, ColumnLoops<Traits, Stored>::kKernels};

// The Traits for codes of an ISA that makes floats of all values. Its Traits load int8 and bf16 values too,
// and have add_scaled(), decode() and multiply(weights, scales).
template <class Traits>
struct FloatCodes : Traits {
  using Value = int8_t;
  using Vector = typename Traits::Vector;
  using Sum = Vector;
  using CellScales = Vector;

  static Vector scales(const uint16_t* bf16) { return Traits::weights(bf16); }
  static Vector cell_scales(const uint16_t* bf16) { return Traits::weights(bf16); }
  static void exact(const Vector& codes, const Vector& scale, Vector (&out)[1]) {
    out[0] = Traits::multiply(codes, scale);
  }
};

template <template <class> class Traits>
const Kernels& float_kernels(Dtype dtype, Storage storage) {
  using Fp32 = Traits<Fp32Element>;
  using Bf16 = Traits<Bf16Element>;
  if (storage == Storage::exact) return dtype == Dtype::fp32 ? kKernels<Fp32> : kKernels<Bf16>;
  return dtype == Dtype::fp32 ? kKernels<Fp32, FloatCodes<Fp32>> : kKernels<Bf16, FloatCodes<Bf16>>;
}

}  // namespace
}  // namespace oats
