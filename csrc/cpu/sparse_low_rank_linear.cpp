#include "oats/sparse_low_rank_linear.h"

#include <algorithm>

#include "column_kernels.h"
#include "products.h"

namespace oats {

namespace {

// Below this many packed bytes a thread, waking it costs more than it saves.
constexpr int64_t kBytesPerThread = 32 << 10;

}  // namespace

void sparse_low_rank_linear(const void* packed, const void* x, int64_t batch, int64_t x_stride,
                            const void* bias, void* y, int64_t y_stride, int threads) {
  static thread_local Workspace workspace;
  const auto* w = static_cast<const PackedHeader*>(packed);
  if (w->d_out == 0 || batch == 0) return;
  const int64_t useful = std::min<int64_t>(w->strips, static_cast<int64_t>(w->bytes) / kBytesPerThread);
  const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
  const Call call{w,
                  static_cast<const char*>(x),
                  batch,
                  x_stride,
                  static_cast<const char*>(bias),
                  static_cast<char*>(y),
                  y_stride,
                  team};
  if (batch < column_kernels(w->isa, w->dtype).min_columns) {
    product_by_strips(call, workspace);
  } else {
    product_by_columns(call, workspace);
  }
  workspace.trim();
}

int64_t strip_boundary(const PackedHeader* w, int i, int n) {
  const auto* starts = reinterpret_cast<const uint64_t*>(reinterpret_cast<const char*>(w) + w->starts_at);
  const uint64_t value_bytes = dtype_bytes(w->dtype);
  const uint64_t cell = w->layout.lanes * w->layout.group;
  const uint64_t fixed = w->groups * cell / 8 + w->rank_groups * cell * value_bytes;
  const auto bytes_before = [&](int64_t strip) { return starts[strip] * value_bytes + strip * fixed; };
  if (i == n) return w->strips;
  const uint64_t wanted = bytes_before(w->strips) / n * i;
  int64_t low = 0, high = w->strips;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    bytes_before(middle) < wanted ? low = middle + 1 : high = middle;
  }
  return low;
}

}  // namespace oats
