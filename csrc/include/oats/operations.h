// What the core computes. Nothing here checks its arguments.
#pragma once

#include <cstdint>

#include "oats/packed_weight.h"

namespace oats {

// One layer of a call. `bias` (d_out) may be null; rows of y are `y_stride` elements apart.
struct Projection {
  const PackedHeader* w;
  const char* bias;
  char* y;
  int64_t y_stride;
};

// Computes y = S x + U (V x) + bias for each of `batch` rows of x and each of `count` projections, summed in
// fp32. All projections have the same d_in and dtype, which is also that of x, y and bias. Rows of x are
// `x_stride` elements apart; the elements of a row are contiguous. The same call gives the same bits for any
// `threads` and any other projections. A NaN or infinity in x reaches all outputs that have a weight for it.
// At small batches, and on tiles (AMX) at any batch, it may also reach others, as 0 * NaN does in a dense
// product.
void sparse_low_rank_linear(const Projection* projections, int count, const void* x, int64_t batch,
                            int64_t x_stride, int threads);

// How products with codes take activations where many rows of bf16 meet them: as 16-bit integers, which
// rounds less than bf16 does, or as int8, which is faster. A scale belongs to one row and `scale_columns`
// inputs.
enum class ActivationCodes { exact, int8 };

// Of the process; products that are under way keep what they have.
void set_activation_codes(ActivationCodes codes);
ActivationCodes activation_codes();

// Copies `in` to `out` and sets all but the `count` entries of largest magnitude of each row to +0. Of equal
// magnitudes the lowest column stays. Both are rows x columns, contiguous and finite, and may be the same
// buffer. Float is float or double.
template <class Float>
void keep_largest_in_rows(const Float* in, int64_t rows, int64_t columns, int64_t count, Float* out,
                          int threads);

// What is rounded, and what the weight means, as in the classes of transformers.
enum class RmsNorm {
  round_then_scale,   // rounds the normalised x to the dtype, then multiplies by the weight (Llama)
  scale_by_one_plus,  // multiplies by one plus the weight, and rounds once at the end (Gemma)
};

// y = x / sqrt(mean(x²) + eps), times a weight, row by row (Zhang and Sennrich 2019, arXiv 1910.07467). x and
// y are rows x columns, weight is (columns), all of `dtype`. y may be x.
void rms_norm(const void* x, int64_t rows, int64_t columns, const void* weight, float eps, RmsNorm kind,
              Dtype dtype, void* y, int threads);

}  // namespace oats
