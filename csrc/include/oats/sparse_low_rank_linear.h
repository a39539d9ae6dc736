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

// For each of `batch` rows of x, and each of `count` projections: y = S x + U (V x) + bias, accumulated in
// fp32. x, y and bias have the weights' dtype, which is the same for all, as is d_in. Rows of x are
// `x_stride` elements apart; the elements of a row are contiguous. The same call gives the same bits whatever
// `threads` is, and whatever the other projections are. A NaN or infinity in x reaches the outputs that have
// a weight for it; at small batches, and on tiles (AMX) at all, it may reach others too, as 0 * NaN in a
// dense product does.
void sparse_low_rank_linear(const Projection* projections, int count, const void* x, int64_t batch,
                            int64_t x_stride, int threads);

}  // namespace oats
