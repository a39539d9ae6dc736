// The product on tiles, the matrix registers of AMX, for batches. csrc/README.md has its phases. For S, a
// thread takes some blocks: range after range of inputs, it expands the cells once and multiplies all rows by
// them. V x is rounded into tiles.
//
// The expanded cells of a range (64 KB), its tiles of inputs and the sums of the blocks stay in L2. With few
// row tiles (TileKernels::few_row_tiles), each tile of cells is multiplied as soon as it is expanded.
#include <algorithm>
#include <cstring>

#include "kernels/strip_kernels.h"
#include "kernels/tile_kernels.h"
#include "products.h"

namespace oats {

namespace {

// Rows of x whose tiles are held at once. Cells are expanded again for the next panel.
constexpr int64_t kPanelRows = 512;

// Blocks whose sums wait in L2: 512 KB for a whole panel.
constexpr int64_t kTogether = 4;

struct Panel {
  const Call& call;
  const PackedHeader* w;       // of the first projection, for what all share
  const StripKernels& strips;  // for what does not depend on the storage
  const TileKernels& values;   // for S
  const TileKernels& factors;  // for U and V
  int64_t first, rows;         // rows of the batch
  int64_t lanes, row_tiles;
  int tile_rows;
  int64_t tile_units;   // units in a tile of inputs
  uint32_t* inputs;     // x, in tiles
  uint32_t** low_rank;  // [projection]: V x, in tiles

  // Memory of one thread.
  struct Scratch {
    uint32_t* cells;
    float* sums;  // [block][row][strip][lanes]
  };
  char* scratch;
  size_t scratch_bytes;
  Panel* self;

  Panel(const Call& call, int64_t first, int64_t rows, Workspace& workspace)
      : call(call),
        w(call.first()),
        strips(strip_kernels(w->isa, w->shape.dtype, Storage::exact)),
        values(*tile_kernels(w->isa, w->shape.dtype, w->shape.values)),
        factors(*tile_kernels(w->isa, w->shape.dtype, w->shape.factors)),
        first(first),
        rows(rows),
        lanes(w->layout.lanes),
        row_tiles(divide_up(rows, kTileRows)),
        // As even as possible: the more rows a tile has, the longer a product takes.
        tile_rows(static_cast<int>(divide_up(rows, row_tiles))),
        tile_units(tile_rows * kTileGroups) {
    scratch_bytes = bytes_of([this](Cutter& memory) { cut_scratch(memory); });
    workspace.provide([this](Cutter& memory) { cut(memory); });
  }

  void cut(Cutter& memory) {
    self = memory.take<Panel>(1);
    inputs = memory.take<uint32_t>(divide_up(w->groups, kTileGroups) * row_tiles * tile_units);
    low_rank = memory.take<uint32_t*>(call.count);
    for (int i = 0; i < call.count; ++i) {
      const int64_t groups = call.projections[i].w->rank_groups;
      auto* cut = memory.take<uint32_t>(divide_up(groups, kTileGroups) * row_tiles * tile_units);
      if (low_rank) low_rank[i] = cut;
    }
    scratch = memory.take<char>(static_cast<int64_t>(scratch_bytes) * call.team);
  }

  Scratch cut_scratch(Cutter& memory) const {
    Scratch s;
    s.cells = memory.take<uint32_t>(kRangeTiles * kTileGroups * kStripsPerBlock * lanes);
    s.sums = memory.take<float>(kTogether * block_sums());
    return s;
  }

  int64_t padded_rows() const { return row_tiles * tile_rows; }
  int64_t block_sums() const { return padded_rows() * kStripsPerBlock * lanes; }

  // Where a tile begins in inputs that have `groups` groups.
  int64_t tile_at(int64_t groups, int64_t tile, int64_t row_tile) const {
    const int64_t range = tile / kRangeTiles * kRangeTiles;
    const int64_t in_range = std::min(kRangeTiles, divide_up(groups, kTileGroups) - range);
    return (range * row_tiles + row_tile * in_range + tile - range) * tile_units;
  }

  // Calls visit(begin, end) for each range of `groups` groups.
  template <class Visit>
  static void for_ranges(int64_t groups, const Visit& visit) {
    constexpr int64_t kRange = kRangeTiles * kTileGroups;
    for (int64_t g = 0; g < groups; g += kRange) visit(g, std::min(groups, g + kRange));
  }

  void prepare(int64_t begin, int64_t end) const {
    const int64_t tile_bytes = kTileGroups * 4;
    const int64_t row_bytes = w->shape.d_in * call.value_bytes();
    for (int64_t row = 0; row < padded_rows(); ++row) {
      const char* x = row < rows ? call.row_of_x(first + row) : nullptr;
      for (int64_t tile = begin; tile < end; ++tile) {
        char* out = reinterpret_cast<char*>(inputs + tile_at(w->groups, tile, row / tile_rows) +
                                            row % tile_rows * kTileGroups);
        const int64_t there = x ? std::min(row_bytes - tile * tile_bytes, tile_bytes) : 0;
        if (there == tile_bytes) {
          std::memcpy(out, x + tile * tile_bytes, tile_bytes);
        } else {
          if (there) std::memcpy(out, x + tile * tile_bytes, there);
          std::memset(out + there, 0, tile_bytes - there);
        }
      }
    }
  }

  // sums (+)= groups [begin, end) of cells times the same groups of inputs, which have `groups` groups.
  void multiply(const uint32_t* cells, int cell_strips, const uint32_t* in, int64_t groups, int64_t begin,
                int64_t end, bool accumulate, float* sums) const {
    values.multiply(cells, cell_strips, divide_up(end - begin, kTileGroups),
                    in + tile_at(groups, begin / kTileGroups, 0), row_tiles, tile_rows, accumulate, sums);
  }

  // sums (+)= one block of a matrix without a mask times inputs, which have `groups` groups. `kernels` are
  // those of its storage.
  void dense(const TileKernels& kernels, const DenseBlock& matrix, int64_t groups, const uint32_t* in,
             bool accumulate, const Scratch& mine, float* sums) const {
    for_ranges(groups, [&](int64_t begin, int64_t end) {
      multiply(kernels.dense(matrix, begin, end, mine.cells), matrix.strips, in, groups, begin, end,
               accumulate || begin > 0, sums);
    });
  }

  void low_rank_inputs(int i, int64_t block, const Scratch& mine) const {
    const PackedHeader* weight = call.projections[i].w;
    const DenseBlock v = dense_block(weight, Matrix::v, block);
    if (w->groups == 0) std::fill_n(mine.sums, block_sums(), 0.f);
    dense(factors, v, w->groups, inputs, false, mine, mine.sums);
    const int64_t half = kTileGroups / 2;  // units of one strip
    for (int64_t t = 0; t < row_tiles; ++t) {
      for (int s = 0; s < v.strips; ++s) {
        const int64_t strip = block * kStripsPerBlock + s;
        uint32_t* out = low_rank[i] + tile_at(weight->rank_groups, strip / 2, t);
        values.sums_to_inputs(mine.sums + (t * tile_rows * v.strips + s) * lanes, v.strips * lanes, tile_rows,
                              out + strip % 2 * half);
        if (strip % 2 == 0 && s + 1 == v.strips) {
          for (int row = 0; row < tile_rows; ++row) std::fill_n(out + row * kTileGroups + half, half, 0u);
        }
      }
    }
  }

  // Blocks [begin, end) of a projection, at most kTogether.
  void outputs(int i, int64_t begin, int64_t end, const Scratch& mine) const {
    const PackedHeader* weight = call.projections[i].w;
    const auto sums = [&](int64_t block) { return mine.sums + (block - begin) * block_sums(); };
    for (int64_t b = begin; b < end; ++b) {
      if (weight->shape.rank) {
        dense(factors, dense_block(weight, Matrix::u, b), weight->rank_groups, low_rank[i], false, mine,
              sums(b));
      } else {
        std::fill_n(sums(b), block_sums(), 0.f);
      }
    }
    if (!weight->shape.masked) {
      for_ranges(w->groups, [&](int64_t g, int64_t range_end) {
        for (int64_t b = begin; b < end; ++b) {
          const DenseBlock matrix = dense_block(weight, Matrix::s, b);
          multiply(values.dense(matrix, g, range_end, mine.cells), matrix.strips, inputs, w->groups, g,
                   range_end, true, sums(b));
        }
      });
    } else if (row_tiles <= values.few_row_tiles) {
      for (int64_t b = begin; b < end; ++b) {
        values.expand_and_multiply(weight, b, inputs, row_tiles, tile_rows, sums(b));
      }
    } else {
      int64_t next_value[kTogether] = {};
      for_ranges(w->groups, [&](int64_t g, int64_t range_end) {
        for (int64_t b = begin; b < end; ++b) {
          next_value[b - begin] = values.expand(weight, b, g, range_end, next_value[b - begin], mine.cells);
          multiply(mine.cells, strips_of_block(weight->strips, b), inputs, w->groups, g, range_end, true,
                   sums(b));
        }
      });
    }
    for (int64_t b = begin; b < end; ++b) {
      const int64_t feature = b * kStripsPerBlock * lanes;
      const int block_strips = strips_of_block(weight->strips, b);
      strips.store(sums(b), block_strips, static_cast<int>(rows), call.bias_of(i, feature),
                   static_cast<int>(std::min(block_strips * lanes, weight->shape.d_out - feature)),
                   call.output(i, first, feature), call.projections[i].y_stride);
    }
  }

  int64_t rows_planned() const { return rows; }
  int stages() const { return 2 + (call.rank_blocks() > 0); }

  void run_stage(int stage, int part, int parts) const {
    if (stage == 0) {
      const int64_t tiles = divide_up(w->groups, kTileGroups);
      return prepare(tiles * part / parts, tiles * (part + 1) / parts);
    }
    Cutter memory(scratch + part * scratch_bytes);
    const Scratch mine = cut_scratch(memory);
    const TileState before = values.configure(tile_rows);
    if (stage + 1 < stages()) {
      call.for_rank_blocks(part, parts, [&](int i, int64_t block) { low_rank_inputs(i, block, mine); });
      values.restore(before);
      return;
    }
    call.split(block_boundary(call, part, parts, false), block_boundary(call, part + 1, parts, false),
               [&](int i, int64_t begin, int64_t end) {
                 in_steps(begin, end, divide_up(end - begin, kTogether),
                          [&](int64_t first_block, int64_t last) { outputs(i, first_block, last, mine); });
               });
    values.restore(before);
  }
};

}  // namespace

void product_by_tiles(const Call& call, Workspace& workspace) {
  in_steps(0, call.batch, divide_up(call.batch, kPanelRows), [&](int64_t first, int64_t end) {
    const Panel panel(call, first, end - first, workspace);
    in_team(call, [&](int part, int parts) { run_stages(panel, part, parts); });
  });
}

PlannedProduct plan_by_tiles(const Call& call, int64_t first, Workspace& workspace) {
  return planned(Panel(call, first, std::min(call.batch - first, kPanelRows), workspace));
}

}  // namespace oats
