// Thresholding of the sparse part: exactly `count` entries of each row survive.
#pragma once

#include <cstdint>

namespace oats {

// out = rows with all but the `count` entries of largest magnitude set to +0. Of equal magnitudes the
// lowest column is kept. Both are rows x columns, contiguous, finite; they may be the same buffer.
// Float is float or double.
template <class Float>
void keep_largest_in_rows(const Float* in, int64_t rows, int64_t columns, int64_t count, Float* out,
                          int threads);

}  // namespace oats
