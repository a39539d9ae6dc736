//   every thread:  its share of the activations; barrier
//   every thread:  its share of V x, for all tiles of columns; barrier
//   every thread:  for a block of its strips: gather the non-zero units of S once, then for each tile
//                  U (V x) + S x, word of groups by word of groups, and the outputs
//
// The activations of a word of groups stay in L1 while all rows of the block pass; the units of the block
// stay in L2 while all tiles pass.
#include <omp.h>

#include <algorithm>

#include "column_kernels.h"
#include "products.h"
#include "strip_kernels.h"

namespace oats {

namespace {

// Columns whose activations are held at once; units are gathered again for the next ones.
constexpr int64_t kPanelColumns = 512;

// A block's units: at 37.5 % density 0.6 of this is used, beside sums and activations in a 1 MB L2.
constexpr int64_t kBlockUnits = 140 << 10;
constexpr int64_t kMaxBlockRows = 128;

// Columns that go through the kernels together.
struct Tile {
  int64_t first;  // column of the panel
  int vectors;
  int columns;  // real ones
};

struct Panel {
  const Call& call;
  const PackedHeader* w;
  const StripKernels& strips;
  const ColumnKernels& kernels;
  int64_t first, columns;  // of the batch
  int64_t lanes, vectors, tiles;
  int64_t block_strips, words, rank_units;
  uint32_t* activations;  // [tile][groups][columns of the tile]
  uint32_t* low_rank;     // [tile][rank units][columns of the tile]

  struct Scratch {
    uint32_t* units;        // [row][groups + lanes]
    uint64_t* masks;        // [word][row]
    const uint32_t** next;  // [row]
    float* sums;            // [row][columns of the tile]
  };
  char* scratch;
  size_t scratch_bytes;

  Panel(const Call& call, int64_t first, Workspace& workspace)
      : call(call),
        w(call.w),
        strips(strip_kernels(w->isa, w->dtype)),
        kernels(column_kernels(w->isa, w->dtype)),
        first(first),
        columns(std::min(call.batch - first, kPanelColumns)),
        lanes(w->layout.lanes),
        vectors(divide_up(columns, lanes)),
        tiles(divide_up(vectors, kernels.max_vectors)),
        block_strips(
            std::clamp<int64_t>(kBlockUnits / (lanes * (w->groups + lanes)), 1, kMaxBlockRows / lanes)),
        words(divide_up(w->groups, kGroupsPerWord)),
        rank_units(w->rank_strips * lanes / w->layout.group) {
    Cutter one(nullptr);
    cut_scratch(one);
    scratch_bytes = one.used();
    Cutter size(nullptr);
    cut(size);
    Cutter memory(workspace.reserve(size.used()));
    cut(memory);
  }

  void cut(Cutter& memory) {
    activations = memory.take<uint32_t>(w->groups * vectors * lanes);
    low_rank = memory.take<uint32_t>(rank_units * vectors * lanes);
    scratch = memory.take<char>(static_cast<int64_t>(scratch_bytes) * call.team);
  }

  Scratch cut_scratch(Cutter& memory) const {
    const int64_t rows = block_strips * lanes, tile_columns = kernels.max_vectors * lanes;
    Scratch s;
    s.units = memory.take<uint32_t>(rows * (w->groups + lanes));
    s.masks = memory.take<uint64_t>(words * rows);
    s.next = memory.take<const uint32_t*>(rows);
    s.sums = memory.take<float>(rows * tile_columns);
    return s;
  }

  // Tiles as even as can be: a narrow last one would run with too few sums in flight.
  Tile tile(int64_t i) const {
    const int64_t begin = vectors * i / tiles, end = vectors * (i + 1) / tiles;
    return {begin * lanes, static_cast<int>(end - begin),
            static_cast<int>(std::min(columns, end * lanes) - begin * lanes)};
  }

  void prepare(int64_t begin, int64_t end) const {
    for (int64_t i = 0; i < tiles; ++i) {
      const Tile t = tile(i);
      strips.prepare(call.row_of_x(first + t.first), call.x_stride, w->d_in, t.columns,
                     static_cast<int>(t.vectors * lanes), begin, end, activations + t.first * w->groups);
    }
  }

  // sums [row][columns of the tile] += a strip's rows of a factor times `inputs`, `step` groups at a time so
  // that their activations stay in L1 for all strips.
  void dense(const char* factor, int64_t groups, int64_t begin, int64_t end, const uint32_t* inputs,
             const Tile& t, float* sums) const {
    const int64_t strip_bytes = groups * lanes * w->layout.group * call.value_bytes();
    const int64_t width = t.vectors * lanes;
    for (int64_t g = 0; g < groups; g += kGroupsPerWord) {
      for (int64_t s = begin; s < end; ++s) {
        kernels.dense(factor + s * strip_bytes, g, std::min(groups, g + kGroupsPerWord), inputs + g * width,
                      t.vectors, sums + (s - begin) * lanes * width);
      }
    }
  }

  // `begin` and `end` are at most a block apart.
  void low_rank_inputs(int64_t begin, int64_t end, const Scratch& scratch) const {
    const char* v = reinterpret_cast<const char*>(w) + w->v_at;
    for (int64_t i = 0; i < tiles; ++i) {
      const Tile t = tile(i);
      const int64_t width = t.vectors * lanes;
      std::fill_n(scratch.sums, (end - begin) * lanes * width, 0.f);
      dense(v, w->groups, begin, end, activations + t.first * w->groups, t, scratch.sums);
      for (int64_t s = begin; s < end; ++s) {
        kernels.sums_to_activations(scratch.sums + (s - begin) * lanes * width, t.vectors,
                                    low_rank + t.first * rank_units + s * lanes / w->layout.group * width);
      }
    }
  }

  void block(int64_t begin, int64_t end, const Scratch& scratch) const {
    const char* u = reinterpret_cast<const char*>(w) + w->u_at;
    const int64_t rows = (end - begin) * lanes, unit_stride = w->groups + lanes;
    for (int64_t s = begin; s < end; ++s) {
      uint32_t* units[16];
      const int64_t row = (s - begin) * lanes;
      for (int64_t lane = 0; lane < lanes; ++lane) units[lane] = scratch.units + (row + lane) * unit_stride;
      kernels.gather(w, s, units, scratch.masks + row, rows);
    }
    for (int64_t i = 0; i < tiles; ++i) {
      const Tile t = tile(i);
      const int64_t width = t.vectors * lanes;
      std::fill_n(scratch.sums, rows * width, 0.f);
      for (int64_t row = 0; row < rows; ++row) scratch.next[row] = scratch.units + row * unit_stride;
      dense(u, w->rank_groups, begin, end, low_rank + t.first * rank_units, t, scratch.sums);
      for (int64_t word = 0; word < words; ++word) {
        kernels.sparse(scratch.masks + word * rows, scratch.next, static_cast<int>(rows),
                       activations + t.first * w->groups + word * kGroupsPerWord * width, t.vectors,
                       scratch.sums);
      }
      for (int64_t s = begin; s < end; ++s) {
        const int64_t row = s * lanes;
        kernels.store(scratch.sums + (s - begin) * lanes * width, t.vectors, t.columns, call.bias_of(row),
                      static_cast<int>(std::min(lanes, w->d_out - row)), call.output(first + t.first, row),
                      call.y_stride);
      }
    }
  }

  void run_part(int part, int parts) const {
    Cutter memory(scratch + part * scratch_bytes);
    const Scratch mine = cut_scratch(memory);
    prepare(w->groups * part / parts, w->groups * (part + 1) / parts);
    wait_for_all(parts);
    if (w->rank) {
      const int64_t end = w->rank_strips * (part + 1) / parts;
      for (int64_t s = w->rank_strips * part / parts; s < end; s += block_strips) {
        low_rank_inputs(s, std::min(end, s + block_strips), mine);
      }
      wait_for_all(parts);
    }
    const int64_t begin = strip_boundary(w, part, parts), end = strip_boundary(w, part + 1, parts);
    for (int64_t s = begin; s < end; s += block_strips) block(s, std::min(end, s + block_strips), mine);
  }
};

}  // namespace

void product_by_columns(const Call& call, Workspace& workspace) {
  for (int64_t first = 0; first < call.batch; first += kPanelColumns) {
    const Panel panel(call, first, workspace);
    if (call.team == 1) {
      panel.run_part(0, 1);
    } else {
#pragma omp parallel num_threads(call.team)
      panel.run_part(omp_get_thread_num(), omp_get_num_threads());
    }
  }
}

}  // namespace oats
