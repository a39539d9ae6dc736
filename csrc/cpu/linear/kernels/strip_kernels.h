// Kernels whose lanes are outputs, for few columns: what an ISA offers for one dtype and storage, from which
// product_by_strips.cpp builds the product.
//
// Activations are 4-byte units, [groups][columns]. A unit is one float (a group is one input) or two bf16 (a
// group is two inputs). Scaled activations are 16-bit integers; a group is four inputs and has two units,
// [groups][2][columns]: the upper bytes of the four integers, then their lower bytes, all signed. On tiles
// (amx_int8.cpp) the units of a set of kScaledColumns inputs have another order.
//
// Sums are float. Those of a block are [columns][strips of the block][lanes].
#pragma once

#include <cstdint>

#include "oats/packed_weight.h"

namespace oats {

// WeightShape::scale_columns is a multiple of this, up to kMostScaledColumns.
constexpr int64_t kScaledColumns = 64;
constexpr int64_t kScaledUnits = kScaledColumns / 2;
constexpr int64_t kMostScaledColumns = 128;

// Belongs to Activations::scale_columns scaled activations of one column.
struct XScale {
  float scale;
  int32_t minus_128_sums;  // -128 times the sum of the integers: codes are flipped, so 128 too large
};

struct Activations {
  uint32_t* units;
  // If they are scaled: [ceil(inputs / scale_columns)][columns]. Sums of so many products meet both scales.
  XScale* scales = nullptr;
  int32_t scale_columns = 0;
};

// One block of U, of V, or of an S without a mask.
struct DenseBlock {
  const void* cells;
  const uint16_t* scales;  // of the block, as in PackedHeader; unused if the matrix is exact
  int32_t scale_columns;
  int strips;
  Storage storage;
  const int8_t* codebook;  // 16, if the storage has one
};

struct StripKernels {
  StripLayout layout;
  bool scaled_activations;

  // Lays out units [begin, end) of each column from rows of x, `stride` elements apart. Inputs past d_in and
  // columns from `columns` up to `padded` become zero. If activations are scaled, `begin` and `end`
  // are whole sets that share a scale, or the last unit, and `padded` is `columns`.
  void (*prepare)(const void* x, int64_t stride, int64_t d_in, int columns, int padded, int64_t begin,
                  int64_t end, Activations activations);

  // sums = S x for one block of an S with a mask.
  void (*sparse)(const PackedHeader* weight, int64_t block, Activations activations, int columns,
                 float* sums);

  // sums (+)= D x for one block of a matrix D without a mask that has `inputs` columns.
  void (*dense)(const DenseBlock& matrix, int64_t inputs, Activations activations, int columns,
                bool accumulate, float* sums);

  // Turns one block of sums of V x into activations for U: lanes become inputs. If they are scaled, the block
  // gets one scale for each column: kScaledColumns inputs share it.
  void (*sums_to_activations)(const float* sums, int strips, int columns, Activations activations);

  // Writes one block of sums plus bias to the first `valid` outputs of each column. `bias` may be null.
  void (*store)(const float* sums, int strips, int columns, const void* bias, int valid, void* y,
                int64_t y_stride);
};

// In kernels/amx_int8.cpp: for bf16 and codes. `one_byte`: activations are rounded to one byte, not two.
const StripKernels& byte_tile_kernels(bool one_byte);

// In dispatch.cpp. All kernels of an ISA, dtype and storage read the same cells; which one is the best
// depends on the number of columns, and so does the layout of activations. `one_byte` asks for kernels that
// round activations to one byte.
const StripKernels& strip_kernels(Isa isa, Dtype dtype, Storage storage, int64_t columns = 1,
                                  bool one_byte = false);

}  // namespace oats
