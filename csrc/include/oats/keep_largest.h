// The threshold of the sparse part: exactly `count` entries of each row stay.
#pragma once

#include <cstdint>

namespace oats {

// Copies `in` to `out` and sets all but the `count` entries of largest magnitude of each row to +0. Of equal
// magnitudes the lowest column stays. Both are rows x columns, contiguous and finite, and may be the same
// buffer. Float is float or double.
template <class Float>
void keep_largest_in_rows(const Float* in, int64_t rows, int64_t columns, int64_t count, Float* out,
                          int threads);

}  // namespace oats
