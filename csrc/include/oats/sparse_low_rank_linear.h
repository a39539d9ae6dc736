// y = S x + U (V x) + b, in one call.
#pragma once

#include <cstdint>

#include "oats/packed_weight.h"

namespace oats {

// For each of `batch` rows of x: y = S x + U (V x) + bias, accumulated in fp32. x, y and bias have the
// weight's dtype. Rows of x are `x_stride` elements apart, rows of y `y_stride`; the elements of a row are
// contiguous. `bias` (d_out) may be null. The same call gives the same bits whatever `threads` is.
// A NaN or infinity in x reaches the outputs that have a weight for it; at small batches it may reach others
// too, as 0 * NaN in a dense product does.
void sparse_low_rank_linear(const void* packed, const void* x, int64_t batch, int64_t x_stride,
                            const void* bias, void* y, int64_t y_stride, int threads);

}  // namespace oats
