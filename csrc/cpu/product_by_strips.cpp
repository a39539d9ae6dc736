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

// What one projection needs beside its weight.
struct Sums {
  uint32_t* low_rank;  // [rank units][columns]
  float* sums;         // [block][columns][strip][lanes]
  float* rank_sums;    // the same for V x
};

struct Tile {
  const Call& call;
  const PackedHeader* w;  // for what all projections share
  const StripKernels& kernels;
  int64_t first;  // of the batch
  int columns;
  bool direct;            // x already is what the kernels read
  uint32_t* activations;  // [groups][columns]
  Sums* sums;             // of each projection

  Tile(const Call& call, int64_t first, Workspace& workspace)
      : call(call),
        w(call.first()),
        kernels(strip_kernels(w->isa, w->dtype)),
        first(first),
        columns(static_cast<int>(std::min(call.batch - first, kTileColumns))) {
    // One row of whole groups of 4 bytes is already [groups][1], where it is aligned to them.
    direct = columns == 1 && call.value_bytes() * w->layout.group == 4 && w->d_in % w->layout.group == 0 &&
             reinterpret_cast<uintptr_t>(call.row_of_x(first)) % alignof(uint32_t) == 0;
    Cutter size(nullptr);
    cut(size);
    Cutter memory(workspace.reserve(size.used()));
    cut(memory);
  }

  void cut(Cutter& memory) {
    activations = memory.take<uint32_t>(direct ? 0 : w->groups * columns);
    sums = memory.take<Sums>(call.count);
    for (int i = 0; i < call.count; ++i) {
      const PackedHeader* weight = call.projections[i].w;
      const Sums cut{memory.take<uint32_t>(weight->rank_strips * units_per_strip() * columns),
                     memory.take<float>(weight->strips * columns * w->layout.lanes),
                     memory.take<float>(weight->rank_strips * columns * w->layout.lanes)};
      if (sums) sums[i] = cut;
    }
  }

  int64_t units_per_strip() const { return w->layout.lanes / w->layout.group; }
  int64_t block_sums() const { return kStripsPerBlock * columns * w->layout.lanes; }
  const uint32_t* inputs() const {
    return direct ? reinterpret_cast<const uint32_t*>(call.row_of_x(first)) : activations;
  }
  // A block of a dense factor of `weight` that is `groups` groups wide.
  const char* factor(const PackedHeader* weight, uint64_t at, int64_t groups, int64_t block) const {
    const int64_t cell = w->layout.lanes * w->layout.group * call.value_bytes();
    return reinterpret_cast<const char*>(weight) + at + block * kStripsPerBlock * groups * cell;
  }

  void prepare(int64_t begin, int64_t end) const {
    kernels.prepare(call.row_of_x(first), call.x_stride, w->d_in, columns, columns, begin, end, activations);
  }

  void low_rank_inputs(int i, int64_t block) const {
    const PackedHeader* weight = call.projections[i].w;
    float* out = sums[i].rank_sums + block * block_sums();
    const int strips = strips_of_block(weight->rank_strips, block);
    kernels.dense(factor(weight, weight->v_at, w->groups, block), strips, w->groups, inputs(), columns, false,
                  out);
    kernels.sums_to_activations(out, strips, columns,
                                sums[i].low_rank + block * kStripsPerBlock * units_per_strip() * columns);
  }

  void sparse(int i, int64_t block) const {
    kernels.sparse(call.projections[i].w, block, inputs(), columns, sums[i].sums + block * block_sums());
  }

  void finish(int i, int64_t block) const {
    const PackedHeader* weight = call.projections[i].w;
    float* out = sums[i].sums + block * block_sums();
    const int strips = strips_of_block(weight->strips, block);
    if (weight->rank) {
      kernels.dense(factor(weight, weight->u_at, weight->rank_groups, block), strips, weight->rank_groups,
                    sums[i].low_rank, columns, true, out);
    }
    const int64_t row = block * kStripsPerBlock * w->layout.lanes;
    const int64_t valid = std::min(strips * static_cast<int64_t>(w->layout.lanes), weight->d_out - row);
    kernels.store(out, strips, columns, call.bias_of(i, row), static_cast<int>(valid),
                  call.output(i, first, row), call.projections[i].y_stride);
  }

  void run_part(int part, int parts) const {
    if (!direct) {
      prepare(w->groups * part / parts, w->groups * (part + 1) / parts);
      wait_for_all(parts);
    }
    const auto finish_blocks = [&](int i, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) finish(i, b);
    };
    const int64_t rank_blocks = call.rank_blocks(), blocks = call.blocks();
    const int64_t begin = block_boundary(call, part, parts, true),
                  end = block_boundary(call, part + 1, parts, true);
    call.split_rank(rank_blocks * part / parts, rank_blocks * (part + 1) / parts,
                    [&](int i, int64_t first_block, int64_t last) {
                      for (int64_t b = first_block; b < last; ++b) low_rank_inputs(i, b);
                    });
    call.split(begin, end, [&](int i, int64_t first_block, int64_t last) {
      for (int64_t b = first_block; b < last; ++b) sparse(i, b);
    });
    if (rank_blocks == 0) {
      call.split(begin, end, finish_blocks);
      return;
    }
    wait_for_all(parts);
    call.split(blocks * part / parts, blocks * (part + 1) / parts, finish_blocks);
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
