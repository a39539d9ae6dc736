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
  const int64_t useful = std::min<int64_t>(w->blocks(), static_cast<int64_t>(w->bytes) / kBytesPerThread);
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

int64_t block_boundary(const PackedHeader* w, int i, int n, bool with_v) {
  const auto* starts = reinterpret_cast<const uint64_t*>(reinterpret_cast<const char*>(w) + w->starts_at);
  const auto value_bytes = static_cast<int64_t>(dtype_bytes(w->dtype));
  const int64_t cell = w->layout.lanes * w->layout.group;
  const int64_t fixed = w->groups * cell / 8 + (with_v ? 0 : w->rank_groups * cell * value_bytes);
  const auto bytes_before = [&](int64_t block) {
    return static_cast<int64_t>(starts[block]) * value_bytes +
           std::min(block * kStripsPerBlock, w->strips) * fixed;
  };
  const auto v_bytes_before = [&](int part) {
    const int64_t strips = std::min(w->rank_blocks() * part / n * kStripsPerBlock, w->rank_strips);
    return with_v ? strips * w->groups * cell * value_bytes : 0;
  };
  if (i == n) return w->blocks();
  const int64_t total = bytes_before(w->blocks()) + v_bytes_before(n);
  // A part whose blocks of V are already more than its share leaves the boundary where it is.
  int64_t wanted = 0;
  for (int part = 1; part <= i; ++part) wanted = std::max(wanted, total / n * part - v_bytes_before(part));
  int64_t low = 0, high = w->blocks();
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    bytes_before(middle) < wanted ? low = middle + 1 : high = middle;
  }
  return low;
}

}  // namespace oats
