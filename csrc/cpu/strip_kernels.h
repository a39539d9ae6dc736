// What one ISA offers for one dtype: the pieces from which product_by_strips.cpp builds the product.
//
// Activations are laid out [groups][columns] of 4-byte units: a float where a group is one input, two
// bf16 where it is two. Sums are float, and those of a block are [columns][strips of the block][lanes].
#pragma once

#include <cstdint>

#include "oats/packed_weight.h"

namespace oats {

struct StripKernels {
  StripLayout layout;

  // Rows of x (`stride` elements apart) → activations, groups [begin, end). Columns from `columns` up to
  // `padded`, and inputs past d_in, become zero.
  void (*prepare)(const void* x, int64_t stride, int64_t d_in, int columns, int padded, int64_t begin,
                  int64_t end, uint32_t* activations);

  // sums = S x for one block.
  void (*sparse)(const PackedHeader* weight, int64_t block, const uint32_t* activations, int columns,
                 float* sums);

  // sums (+)= D x for one block of a dense factor that is `groups` groups wide.
  void (*dense)(const void* factor, int strips, int64_t groups, const uint32_t* activations, int columns,
                bool accumulate, float* sums);

  // One block of sums of V x → activations of U: lanes become groups.
  void (*sums_to_activations)(const float* sums, int strips, int columns, uint32_t* activations);

  // One block of sums + bias → outputs. `bias` may be null; `valid` outputs of each column are written.
  void (*store)(const float* sums, int strips, int columns, const void* bias, int valid, void* y,
                int64_t y_stride);
};

const StripKernels& strip_kernels_scalar(Dtype dtype);
const StripKernels& strip_kernels_avx2(Dtype dtype);
const StripKernels& strip_kernels_avx512(Dtype dtype);
const StripKernels& strip_kernels_avx512_bf16(Dtype dtype);

// dispatch.cpp: operation x ISA → function.
const StripKernels& strip_kernels(Isa isa, Dtype dtype);

}  // namespace oats
