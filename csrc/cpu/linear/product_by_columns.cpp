// The product with lanes that are columns, for many columns. csrc/README.md has its phases. For S, a thread
// takes some rows: range after range of groups, it gathers the non-zero units once and multiplies them, slice
// by slice, word of groups by word of groups.
//
// Arithmetic bounds this, if the operands are near: the activations of a word of groups stay in L1 while all
// rows pass, units and sums stay in L2. Activations come from further away once for kBlockRows rows, sums
// once for kRangeGroups groups.
#include <algorithm>

#include "kernels/column_kernels.h"
#include "kernels/strip_kernels.h"
#include "products.h"

namespace oats {

namespace {

// Columns whose activations are held at once. Units are gathered again for the next panel.
constexpr int64_t kPanelColumns = 512;

// At 37.5 % density the units of a range take 320 KB and the sums of a slice 128 KB, of 1 MB of L2.
constexpr int64_t kBlockRows = 256;
constexpr int64_t kRangeGroups = 512;

// Columns of a panel that go through the kernels together.
struct Slice {
  int64_t first;  // column of the panel
  int vectors;
  int columns;  // without padding
};

struct Panel {
  const Call& call;
  const PackedHeader* w;         // of the first projection, for what all share
  const StripKernels& strips;    // for what does not depend on the storage
  const ColumnKernels& kernels;  // for what does not depend on the storage
  const ColumnKernels& values;   // for S
  const ColumnKernels& factors;  // for U and V
  int64_t first, columns;        // rows of the batch
  int64_t lanes, vectors, slices;
  int64_t block_rows, range_groups, range_words;
  uint32_t* activations;  // [slice][groups][columns of the slice]
  uint32_t** low_rank;    // [projection]: V x, [slice][rank units][columns of the slice]

  // Memory of one thread.
  struct Scratch {
    uint32_t* units;        // [row][range_groups + lanes]
    uint64_t* masks;        // [word][row]
    const uint32_t** next;  // [row]
    float* sums;            // [slice][row][columns of the slice]
  };
  char* scratch;
  size_t scratch_bytes;
  Panel* self;

  Panel(const Call& call, int64_t first, Workspace& workspace)
      : call(call),
        w(call.first()),
        strips(strip_kernels(w->isa, w->shape.dtype, Storage::exact)),
        kernels(column_kernels(w->isa, w->shape.dtype, Storage::exact)),
        values(column_kernels(w->isa, w->shape.dtype, w->shape.values)),
        factors(column_kernels(w->isa, w->shape.dtype, w->shape.factors)),
        first(first),
        columns(std::min(call.batch - first, kPanelColumns)),
        lanes(w->layout.lanes),
        vectors(divide_up(columns, lanes)),
        slices(divide_up(vectors, kernels.max_vectors)),
        block_rows(0),
        range_groups(std::min(kRangeGroups, w->groups)),
        range_words(divide_up(range_groups, kGroupsPerWord)) {
    for (int i = 0; i < call.count; ++i) {
      const int64_t rows = call.projections[i].w->blocks() * kStripsPerBlock * lanes;
      block_rows = std::max(block_rows, std::min(kBlockRows, rows));
    }
    scratch_bytes = bytes_of([this](Cutter& memory) { cut_scratch(memory); });
    workspace.provide([this](Cutter& memory) { cut(memory); });
  }

  void cut(Cutter& memory) {
    self = memory.take<Panel>(1);
    activations = memory.take<uint32_t>(w->groups * vectors * lanes);
    low_rank = memory.take<uint32_t*>(call.count);
    for (int i = 0; i < call.count; ++i) {
      auto* cut = memory.take<uint32_t>(rank_units(i) * vectors * lanes);
      if (low_rank) low_rank[i] = cut;
    }
    scratch = memory.take<char>(static_cast<int64_t>(scratch_bytes) * call.team);
  }

  int64_t rank_units(int i) const { return call.projections[i].w->rank_strips * lanes / w->layout.group; }

  Scratch cut_scratch(Cutter& memory) const {
    Scratch s;
    s.units = memory.take<uint32_t>(block_rows * (range_groups + lanes));
    s.masks = memory.take<uint64_t>(range_words * block_rows);
    s.next = memory.take<const uint32_t*>(block_rows);
    s.sums = memory.take<float>(block_rows * vectors * lanes);
    return s;
  }

  // As even as possible: a narrow last slice would have too few sums in flight.
  Slice slice_at(int64_t i) const {
    const int64_t begin = vectors * i / slices, end = vectors * (i + 1) / slices;
    return {begin * lanes, static_cast<int>(end - begin),
            static_cast<int>(std::min(columns, end * lanes) - begin * lanes)};
  }

  void prepare(int64_t begin, int64_t end) const {
    for (int64_t i = 0; i < slices; ++i) {
      const Slice slice = slice_at(i);
      strips.prepare(call.row_of_x(first + slice.first), call.x_stride, w->shape.d_in, slice.columns,
                     static_cast<int>(slice.vectors * lanes), begin, end,
                     {activations + slice.first * w->groups, nullptr});
    }
  }

  // sums [row][columns of the slice] += blocks [begin, end) of a matrix without a mask times `inputs`,
  // kGroupsPerWord groups at a time, so that their activations stay in L1 for all strips.
  void dense(const PackedHeader* weight, Matrix matrix, int64_t begin, int64_t end, const uint32_t* inputs,
             const Slice& slice, float* sums) const {
    const int64_t groups = matrix == Matrix::u ? weight->rank_groups : weight->groups;
    const int64_t width = slice.vectors * lanes;
    const ColumnKernels& stored = matrix == Matrix::s ? values : factors;
    for (int64_t g = 0; g < groups; g += kGroupsPerWord) {
      for (int64_t b = begin; b < end; ++b) {
        const DenseBlock cells = dense_block(weight, matrix, b);
        for (int s = 0; s < cells.strips; ++s) {
          stored.dense(cells, s, g, std::min(groups, g + kGroupsPerWord), inputs + g * width, slice.vectors,
                       sums + ((b - begin) * kStripsPerBlock + s) * lanes * width);
        }
      }
    }
  }

  void low_rank_inputs(int projection, int64_t block, const Scratch& scratch) const {
    const PackedHeader* weight = call.projections[projection].w;
    const int64_t rows = strips_of_block(weight->rank_strips, block) * lanes;
    for (int64_t i = 0; i < slices; ++i) {
      const Slice slice = slice_at(i);
      const int64_t width = slice.vectors * lanes;
      std::fill_n(scratch.sums, rows * width, 0.f);
      dense(weight, Matrix::v, block, block + 1, activations + slice.first * w->groups, slice, scratch.sums);
      for (int64_t row = 0; row < rows; row += lanes) {
        const int64_t unit = (block * kStripsPerBlock * lanes + row) / w->layout.group;
        kernels.sums_to_activations(
            scratch.sums + row * width, slice.vectors,
            low_rank[projection] + slice.first * rank_units(projection) + unit * width);
      }
    }
  }

  // Blocks [begin, end) of a projection, at most block_rows rows.
  void outputs(int projection, int64_t begin, int64_t end, const Scratch& scratch) const {
    const PackedHeader* weight = call.projections[projection].w;
    const int64_t packed_rows = kStripsPerBlock * lanes, unit_stride = range_groups + lanes;
    const int64_t first_row = begin * packed_rows;
    const int64_t rows = std::min(end * kStripsPerBlock, weight->strips) * lanes - first_row;
    int64_t next_value[kBlockRows] = {};  // [block]
    for (int64_t i = 0; i < slices; ++i) {
      const Slice slice = slice_at(i);
      float* sums = scratch.sums + slice.first * rows;
      std::fill_n(sums, rows * slice.vectors * lanes, 0.f);
      dense(weight, Matrix::u, begin, end, low_rank[projection] + slice.first * rank_units(projection), slice,
            sums);
      if (!weight->shape.masked)
        dense(weight, Matrix::s, begin, end, activations + slice.first * w->groups, slice, sums);
    }
    for (int64_t g = 0; weight->shape.masked && g < w->groups; g += range_groups) {
      const int64_t range_end = std::min(w->groups, g + range_groups);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t row = (b - begin) * packed_rows;
        next_value[b - begin] =
            values.gather(weight, b, g, range_end, next_value[b - begin], scratch.units + row * unit_stride,
                          unit_stride, scratch.masks + row, rows);
      }
      for (int64_t i = 0; i < slices; ++i) {
        const Slice slice = slice_at(i);
        const int64_t width = slice.vectors * lanes;
        for (int64_t row = 0; row < rows; ++row) scratch.next[row] = scratch.units + row * unit_stride;
        for (int64_t word = 0; word < divide_up(range_end - g, kGroupsPerWord); ++word) {
          kernels.sparse(scratch.masks + word * rows, scratch.next, static_cast<int>(rows),
                         activations + slice.first * w->groups + (g + word * kGroupsPerWord) * width,
                         slice.vectors, scratch.sums + slice.first * rows);
        }
      }
    }
    for (int64_t i = 0; i < slices; ++i) {
      const Slice slice = slice_at(i);
      for (int64_t row = 0; row < rows; row += lanes) {
        const int64_t feature = first_row + row;
        kernels.store(scratch.sums + (slice.first * rows + row * slice.vectors * lanes), slice.vectors,
                      slice.columns, call.bias_of(projection, feature),
                      static_cast<int>(std::min(lanes, weight->shape.d_out - feature)),
                      call.output(projection, first + slice.first, feature),
                      call.projections[projection].y_stride);
      }
    }
  }

  int64_t rows_planned() const { return columns; }
  int stages() const { return 2 + (call.rank_blocks() > 0); }

  void run_stage(int stage, int part, int parts) const {
    if (stage == 0) return prepare(w->groups * part / parts, w->groups * (part + 1) / parts);
    Cutter memory(scratch + part * scratch_bytes);
    const Scratch mine = cut_scratch(memory);
    if (stage + 1 < stages()) {
      return call.for_rank_blocks(part, parts,
                                  [&](int i, int64_t block) { low_rank_inputs(i, block, mine); });
    }
    call.split(block_boundary(call, part, parts, false), block_boundary(call, part + 1, parts, false),
               [&](int i, int64_t begin, int64_t end) {
                 const int64_t rows = (end - begin) * kStripsPerBlock * lanes;
                 in_steps(begin, end, divide_up(rows, block_rows),
                          [&](int64_t first_block, int64_t last) { outputs(i, first_block, last, mine); });
               });
  }
};

}  // namespace

void product_by_columns(const Call& call, Workspace& workspace) {
  for (int64_t first = 0; first < call.batch; first += kPanelColumns) {
    const Panel panel(call, first, workspace);
    in_team(call, [&](int part, int parts) { run_stages(panel, part, parts); });
  }
}

PlannedProduct plan_by_columns(const Call& call, int64_t first, Workspace& workspace) {
  return planned(Panel(call, first, workspace));
}

}  // namespace oats
