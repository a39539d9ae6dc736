// The other half of what one ISA offers for one dtype: products of many columns, whose lanes are columns.
//
// A strip's vectors hold sixteen outputs, so nearly none is zero. Here a vector holds sixteen columns of the
// batch, and a *unit* of one row of S (one fp32 weight, or a bf16 pair) meets it as a broadcast: a unit that
// is zero is skipped. At 37.5 % density 61 % of the pairs are left. The units of a row are gathered from the
// cells once for all columns.
//
// Activations are [groups][columns] units, as in strip_kernels.h; sums are float, [row][columns]; `columns`
// is vectors * lanes.
#pragma once

#include <cstdint>

#include "strip_kernels.h"

namespace oats {

// Groups whose activations stay in L1 while all rows of a block pass: one bit each in a word of a row's mask.
constexpr int64_t kGroupsPerWord = 64;

struct ColumnKernels {
  int max_vectors;      // of columns, in one tile
  int64_t min_columns;  // fewer are faster by strips

  // Non-zero units of a block, groups [begin, end), row by row: units[row * unit_stride] and on receive them
  // in order (and up to `lanes` units of anything behind them), bit g % 64 of masks[(g / 64) * mask_stride +
  // row] says whether group begin + g has one. Codes become what they stand for. `value` is the index in the
  // block of the first value of group `begin`, a multiple of 64; returns that of `end`.
  int64_t (*gather)(const PackedHeader* weight, int64_t block, int64_t begin, int64_t end, int64_t value,
                    uint32_t* units, int64_t unit_stride, uint64_t* masks, int64_t mask_stride);

  // sums += S x over one word of groups, for `rows` rows (an even number); next[row] moves behind the units
  // used.
  void (*sparse)(const uint64_t* masks, const uint32_t** next, int rows, const uint32_t* activations,
                 int vectors, float* sums);

  // sums += D x over groups [begin, end), at most a word of them from a multiple of kGroupsPerWord on, for
  // the `lanes` rows of one strip of a dense factor. `activations` are those of group `begin`.
  void (*dense)(const FactorBlock& factor, int strip, int64_t begin, int64_t end, const uint32_t* activations,
                int vectors, float* sums);

  // Sums of `lanes` rows of V x → activations of U.
  void (*sums_to_activations)(const float* sums, int vectors, uint32_t* activations);

  // Sums of one strip's rows + bias → outputs; `valid` rows and `columns` columns are written.
  void (*store)(const float* sums, int vectors, int columns, const void* bias, int valid, void* y,
                int64_t y_stride);
};

const ColumnKernels& column_kernels_scalar(Dtype dtype, Storage storage);
const ColumnKernels& column_kernels_avx2(Dtype dtype, Storage storage);
const ColumnKernels& column_kernels_avx512(Dtype dtype, Storage storage);
const ColumnKernels& column_kernels_avx512_bf16(Dtype dtype, Storage storage);

// dispatch.cpp. Only gather() and dense() differ between storages: those of S, and of U and V.
const ColumnKernels& column_kernels(Isa isa, Dtype dtype, Storage storage);

}  // namespace oats
