// Kernels whose lanes are columns, for many columns: what an ISA offers for one dtype and storage, from which
// product_by_columns.cpp builds the product.
//
// A cell holds `lanes` outputs, so hardly any cell is all zero and strips cannot skip work. Here a vector
// holds `lanes` columns of the batch, and one unit of one row of S (an fp32 weight, or a pair of bf16) meets
// it as a broadcast: a zero unit is skipped. At 37.5 % density 61 % of the bf16 units are left. The units of
// a row are gathered from the cells once for all columns.
//
// Activations are [groups][columns] units, as in strip_kernels.h. Sums are float, [row][columns]. `columns`
// is vectors * lanes: one slice of the panel (see csrc/README.md).
#pragma once

#include <cstdint>

#include "strip_kernels.h"

namespace oats {

// The activations of so many groups stay in L1 while all rows of a step pass. Each row has one mask word for
// them, one bit a group.
constexpr int64_t kGroupsPerWord = 64;

struct ColumnKernels {
  int max_vectors;      // of a slice
  int64_t min_columns;  // by strips is faster for fewer

  // Gathers the non-zero units of one block of an S with a mask, in groups [begin, end), row by row. Row r
  // gets its units, in order, from units[r * unit_stride] on; up to `lanes` units behind them are
  // overwritten. Bit g % 64 of masks[g / 64 * mask_stride + r] says whether group begin + g has a unit. Codes
  // become exact weights. `value` is the index in the block of the first value of group `begin`, which is a
  // multiple of 64; returns the index for group `end`.
  int64_t (*gather)(const PackedHeader* weight, int64_t block, int64_t begin, int64_t end, int64_t value,
                    uint32_t* units, int64_t unit_stride, uint64_t* masks, int64_t mask_stride);

  // sums += S x over one word of groups, for an even number of rows. Moves next[row] behind the units used.
  void (*sparse)(const uint64_t* masks, const uint32_t** next, int rows, const uint32_t* activations,
                 int vectors, float* sums);

  // sums += D x for the `lanes` rows of one strip of a matrix D without a mask, over groups [begin, end): at
  // most kGroupsPerWord, from a multiple of it on. `activations` begin with group `begin`.
  void (*dense)(const DenseBlock& matrix, int strip, int64_t begin, int64_t end, const uint32_t* activations,
                int vectors, float* sums);

  // Turns the sums of `lanes` rows of V x into activations for U.
  void (*sums_to_activations)(const float* sums, int vectors, uint32_t* activations);

  // Writes the sums of one strip plus bias to the first `valid` outputs of the first `columns` columns.
  void (*store)(const float* sums, int vectors, int columns, const void* bias, int valid, void* y,
                int64_t y_stride);
};

struct Kernels {
  StripKernels strips;
  ColumnKernels columns;
};

// In kernels/<isa>.cpp.
const Kernels& kernels_scalar(Dtype dtype, Storage storage);
const Kernels& kernels_avx2(Dtype dtype, Storage storage);
const Kernels& kernels_avx512(Dtype dtype, Storage storage);
const Kernels& kernels_avx512_bf16(Dtype dtype, Storage storage);

// In dispatch.cpp. Storages differ in gather() and dense() only: take those of the storage of the matrix.
const ColumnKernels& column_kernels(Isa isa, Dtype dtype, Storage storage);

}  // namespace oats
