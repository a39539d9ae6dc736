// Kernels whose lanes are outputs, for few columns: what an ISA offers for one dtype and storage, from which
// product_by_strips.cpp builds the product.
//
// Activations are 4-byte units, [groups][columns]. A unit is one float (a group is one input) or two bf16 (a
// group is two inputs). Scaled activations are 16-bit integers; a group is four inputs and has two units,
// [groups][2][columns]: the upper bytes of the four integers, then their lower bytes, all signed.
//
// Sums are float. Those of a block are [columns][strips of the block][lanes].
#pragma once

#include <cstdint>

#include "oats/packed_weight.h"

namespace oats {

// After so many inputs, sums of products with codes meet their scale. WeightShape::scale_columns is a
// multiple.
constexpr int64_t kScaledColumns = 64;
constexpr int64_t kScaledUnits = kScaledColumns / 2;

// Belongs to kScaledColumns scaled activations of one column.
struct XScale {
  float scale;
  int32_t minus_128_sums;  // -128 times the sum of the integers: codes are flipped, so 128 too large
};

struct Activations {
  uint32_t* units;
  XScale* scales;  // [ceil(inputs / kScaledColumns)][columns], if they are scaled
};

// One block of U or of V.
struct FactorBlock {
  const void* cells;
  const uint16_t* scales;  // of the block, as in PackedHeader; unused if the factor is exact
  int32_t scale_columns;
  int strips;
};

struct StripKernels {
  StripLayout layout;
  bool scaled_activations;

  // Lays out units [begin, end) of each column from rows of x, `stride` elements apart. Inputs past d_in and
  // columns from `columns` up to `padded` become zero. `begin` is a multiple of kScaledUnits if activations
  // are scaled; then `padded` is `columns`.
  void (*prepare)(const void* x, int64_t stride, int64_t d_in, int columns, int padded, int64_t begin,
                  int64_t end, Activations activations);

  // sums = S x for one block.
  void (*sparse)(const PackedHeader* weight, int64_t block, Activations activations, int columns,
                 float* sums);

  // sums (+)= D x for one block of a dense factor D that has `inputs` columns.
  void (*dense)(const FactorBlock& factor, int64_t inputs, Activations activations, int columns,
                bool accumulate, float* sums);

  // Turns one block of sums of V x into activations for U: lanes become inputs. If they are scaled, the block
  // gets one scale for each column.
  void (*sums_to_activations)(const float* sums, int strips, int columns, Activations activations);

  // Writes one block of sums plus bias to the first `valid` outputs of each column. `bias` may be null.
  void (*store)(const float* sums, int strips, int columns, const void* bias, int valid, void* y,
                int64_t y_stride);
};

// In dispatch.cpp.
const StripKernels& strip_kernels(Isa isa, Dtype dtype, Storage storage);

}  // namespace oats
