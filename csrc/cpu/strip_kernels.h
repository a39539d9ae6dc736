// What one ISA offers for one dtype: the pieces from which sparse_low_rank_linear.cpp builds the product.
//
// Activations are laid out [groups][columns] of 4-byte units: a float where a group is one input, two
// bf16 where it is two. Sums are float, [strips][columns][lanes].
#pragma once

#include <cstdint>

#include "oats/packed_weight.h"

namespace oats {

struct StripKernels {
  StripLayout layout;
  int max_columns;  // columns that one expansion of the weights serves

  // Rounds a number of columns up to one that the kernels are compiled for.
  int (*padded_columns)(int columns);

  // Rows of x (`stride` elements apart) → activations, groups [begin, end). Columns from `columns` up to
  // `padded`, and inputs past d_in, become zero.
  void (*prepare)(const void* x, int64_t stride, int64_t d_in, int columns, int padded, int64_t begin,
                  int64_t end, uint32_t* activations);

  // sums = S x, strips [begin, end). `columns` is a value of padded_columns().
  void (*sparse)(const PackedHeader* weight, int64_t begin, int64_t end, const uint32_t* activations,
                 int columns, float* sums);

  // sums (+)= D x for strips [begin, end) of a dense factor, `groups` groups wide.
  void (*dense)(const void* factor, int64_t groups, int64_t begin, int64_t end, const uint32_t* activations,
                int columns, bool accumulate, float* sums);

  // One strip of sums of V x → activations of U: lanes become groups.
  void (*sums_to_activations)(const float* sums, int columns, uint32_t* activations);

  // One strip of sums + bias → outputs. `bias` may be null; `valid` lanes and `columns` columns are written.
  void (*store)(const float* sums, int columns, const void* bias, int valid, void* y, int64_t y_stride);
};

const StripKernels& strip_kernels_scalar(Dtype dtype);
const StripKernels& strip_kernels_avx2(Dtype dtype);
const StripKernels& strip_kernels_avx512(Dtype dtype);
const StripKernels& strip_kernels_avx512_bf16(Dtype dtype);

// dispatch.cpp: operation x ISA → function.
const StripKernels& strip_kernels(Isa isa, Dtype dtype);

}  // namespace oats
