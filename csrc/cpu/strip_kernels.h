// What one ISA offers for one dtype and storage: the pieces from which product_by_strips.cpp builds the
// product.
//
// Activations are laid out [groups][columns] of 4-byte units: a float where a group is one input, two bf16 or
// two int16 where it is two. int16 have a scale for each column and kScaledColumns inputs. Sums are float,
// and those of a block are [columns][strips of the block][lanes].
#pragma once

#include <cstdint>

#include "oats/packed_weight.h"

namespace oats {

// Inputs whose products with codes are summed before a scale is applied; a multiple of it is scale_columns.
constexpr int64_t kScaledColumns = 64;

struct Activations {
  uint32_t* units;
  float* scales;  // [kScaledColumns inputs][columns]; of int16 only
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

  // Rows of x (`stride` elements apart) → activations, groups [begin, end), where `begin` is a multiple of
  // kScaledColumns inputs if they are scaled. Columns from `columns` up to `padded`, and inputs past d_in,
  // become zero.
  void (*prepare)(const void* x, int64_t stride, int64_t d_in, int columns, int padded, int64_t begin,
                  int64_t end, Activations activations);

  // sums = S x for one block.
  void (*sparse)(const PackedHeader* weight, int64_t block, Activations activations, int columns,
                 float* sums);

  // sums (+)= D x for one block of a dense factor that is `groups` groups wide.
  void (*dense)(const FactorBlock& factor, int64_t groups, Activations activations, int columns,
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

// dispatch.cpp: operation x ISA → function. All storages of an ISA and dtype have one layout.
const StripKernels& strip_kernels(Isa isa, Dtype dtype, Storage storage);

}  // namespace oats
