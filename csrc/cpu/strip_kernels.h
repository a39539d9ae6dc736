// What one ISA offers for one dtype and storage: the pieces from which product_by_strips.cpp builds the
// product.
//
// Activations are laid out [groups][columns] of 4-byte units: a float where a group is one input, two bf16
// where it is two. Where they are scaled, 16-bit numbers of four inputs are two units, [groups][2][columns]:
// their upper bytes, and their lower ones, both signed. Sums are float, and those of a block are
// [columns][strips of the block][lanes].
#pragma once

#include <cstdint>

#include "oats/packed_weight.h"

namespace oats {

// Inputs whose products with codes are summed before a scale is applied; a multiple of it is scale_columns.
constexpr int64_t kScaledColumns = 64;
constexpr int64_t kScaledUnits = kScaledColumns / 2;

// Of kScaledColumns scaled activations of one column: codes are 128 more than they stand for.
struct XScale {
  float scale;
  int32_t minus_128_sums;  // -128 times the sum of the 16-bit numbers
};

struct Activations {
  uint32_t* units;
  XScale* scales;  // [kScaledColumns inputs][columns], where they are scaled
};

// A block of a dense factor.
struct FactorBlock {
  const void* cells;
  const uint16_t* scales;  // of codes, as in PackedHeader
  int32_t scale_columns;
  int strips;
};

struct StripKernels {
  StripLayout layout;
  bool scaled_activations;

  // Rows of x (`stride` elements apart) → activations, units [begin, end) of each column, where `begin` is a
  // multiple of kScaledUnits if they are scaled. Columns from `columns` up to `padded`, and inputs past d_in,
  // become zero.
  void (*prepare)(const void* x, int64_t stride, int64_t d_in, int columns, int padded, int64_t begin,
                  int64_t end, Activations activations);

  // sums = S x for one block.
  void (*sparse)(const PackedHeader* weight, int64_t block, Activations activations, int columns,
                 float* sums);

  // sums (+)= D x for one block of a dense factor that has `inputs` columns.
  void (*dense)(const FactorBlock& factor, int64_t inputs, Activations activations, int columns,
                bool accumulate, float* sums);

  // One block of sums of V x → activations of U: lanes become groups, and a block of four strips of 16 has
  // one scale.
  void (*sums_to_activations)(const float* sums, int strips, int columns, Activations activations);

  // One block of sums + bias → outputs. `bias` may be null; `valid` outputs of each column are written.
  void (*store)(const float* sums, int strips, int columns, const void* bias, int valid, void* y,
                int64_t y_stride);
};

const StripKernels& strip_kernels_scalar(Dtype dtype, Storage storage);
const StripKernels& strip_kernels_avx2(Dtype dtype, Storage storage);
const StripKernels& strip_kernels_avx512(Dtype dtype, Storage storage);
const StripKernels& strip_kernels_avx512_bf16(Dtype dtype, Storage storage);

// dispatch.cpp: operation x ISA → function.
const StripKernels& strip_kernels(Isa isa, Dtype dtype, Storage storage);

}  // namespace oats
