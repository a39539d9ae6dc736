//   every thread:  its share of V x, then S x for its strips
//   one barrier:   U needs all of V x; S x before it hides that the shares of V x are uneven
//   every thread:  U (V x) and the bias for its strips, then the outputs
#include <omp.h>

#include <algorithm>

#include "products.h"
#include "strip_kernels.h"

namespace oats {

namespace {

// Columns whose activations and sums are held at once; the weights are read again for each tile.
constexpr int64_t kTileColumns = 128;

struct Tile {
  const Call& call;
  const PackedHeader* w;
  const StripKernels& kernels;
  int64_t first;  // of the batch
  int columns;
  bool direct;            // x already is what the kernels read
  uint32_t* activations;  // [groups][columns]
  uint32_t* low_rank;     // [rank units][columns]
  float* sums;            // [block][columns][strip][lanes]
  float* rank_sums;       // the same for V x

  Tile(const Call& call, int64_t first, Workspace& workspace)
      : call(call),
        w(call.w),
        kernels(strip_kernels(w->isa, w->dtype)),
        first(first),
        columns(static_cast<int>(std::min(call.batch - first, kTileColumns))) {
    // One row of whole groups of 4 bytes is already [groups][1].
    direct = columns == 1 && call.value_bytes() * w->layout.group == 4 && w->d_in % w->layout.group == 0;
    Cutter size(nullptr);
    cut(size);
    Cutter memory(workspace.reserve(size.used()));
    cut(memory);
  }

  void cut(Cutter& memory) {
    activations = memory.take<uint32_t>(direct ? 0 : w->groups * columns);
    low_rank = memory.take<uint32_t>(w->rank_strips * units_per_strip() * columns);
    sums = memory.take<float>(w->strips * columns * w->layout.lanes);
    rank_sums = memory.take<float>(w->rank_strips * columns * w->layout.lanes);
  }

  int64_t units_per_strip() const { return w->layout.lanes / w->layout.group; }
  int64_t block_sums() const { return kStripsPerBlock * columns * w->layout.lanes; }
  const uint32_t* inputs() const {
    return direct ? reinterpret_cast<const uint32_t*>(call.row_of_x(first)) : activations;
  }
  // A block of a dense factor that is `groups` groups wide.
  const char* factor(uint64_t at, int64_t groups, int64_t block) const {
    const int64_t cell = w->layout.lanes * w->layout.group * call.value_bytes();
    return reinterpret_cast<const char*>(w) + at + block * kStripsPerBlock * groups * cell;
  }

  void prepare(int64_t begin, int64_t end) const {
    kernels.prepare(call.row_of_x(first), call.x_stride, w->d_in, columns, columns, begin, end, activations);
  }

  void low_rank_inputs(int64_t block) const {
    float* out = rank_sums + block * block_sums();
    const int strips = strips_of_block(w->rank_strips, block);
    kernels.dense(factor(w->v_at, w->groups, block), strips, w->groups, inputs(), columns, false, out);
    kernels.sums_to_activations(out, strips, columns,
                                low_rank + block * kStripsPerBlock * units_per_strip() * columns);
  }

  void sparse(int64_t block) const {
    kernels.sparse(w, block, inputs(), columns, sums + block * block_sums());
  }

  void finish(int64_t block) const {
    float* out = sums + block * block_sums();
    const int strips = strips_of_block(w->strips, block);
    if (w->rank) {
      kernels.dense(factor(w->u_at, w->rank_groups, block), strips, w->rank_groups, low_rank, columns, true,
                    out);
    }
    const int64_t row = block * kStripsPerBlock * w->layout.lanes;
    const int64_t valid = std::min(strips * static_cast<int64_t>(w->layout.lanes), w->d_out - row);
    kernels.store(out, strips, columns, call.bias_of(row), static_cast<int>(valid), call.output(first, row),
                  call.y_stride);
  }

  void run_part(int part, int parts) const {
    if (!direct) {
      prepare(w->groups * part / parts, w->groups * (part + 1) / parts);
      wait_for_all(parts);
    }
    const int64_t rank_blocks = w->rank_blocks(), end = block_boundary(w, part + 1, parts, true);
    const int64_t begin = block_boundary(w, part, parts, true);
    for (int64_t b = rank_blocks * part / parts; b < rank_blocks * (part + 1) / parts; ++b)
      low_rank_inputs(b);
    for (int64_t b = begin; b < end; ++b) sparse(b);
    if (w->rank == 0) {
      for (int64_t b = begin; b < end; ++b) finish(b);
      return;
    }
    wait_for_all(parts);
    for (int64_t b = w->blocks() * part / parts; b < w->blocks() * (part + 1) / parts; ++b) finish(b);
  }
};

}  // namespace

void product_by_strips(const Call& call, Workspace& workspace) {
  for (int64_t first = 0; first < call.batch; first += kTileColumns) {
    const Tile tile(call, first, workspace);
    if (call.team == 1) {
      tile.run_part(0, 1);
    } else {
#pragma omp parallel num_threads(call.team)
      tile.run_part(omp_get_thread_num(), omp_get_num_threads());
    }
  }
}

}  // namespace oats
