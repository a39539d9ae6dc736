// y = S x + U (V x) + b, for one layer or for several that read the same x, in one call.
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

}  // namespace oats
