// The product with lanes that are outputs, for few columns. csrc/README.md has its phases. U needs all of
// V x; S x comes before that barrier, and hides that the shares of V x are uneven.
//
// Reading the weight bounds this: at batch 1 each byte of it is used once.
#include <algorithm>

#include "kernels/strip_kernels.h"
#include "products.h"

namespace oats {

namespace {

// Columns whose activations and sums are held at once. The weight is read again for the next panel.
constexpr int64_t kPanelColumns = 128;

// Memory for one projection.
struct Sums {
  Activations low_rank;  // V x: [block][units][columns]
  float* sums;           // [block][columns][strip][lanes]
  float* rank_sums;      // of V x, the same
};

struct Panel {
  const Call& call;
  const PackedHeader* w;        // of the first projection, for what all share
  int64_t first;                // row of the batch
  int columns;                  // rows of the batch
  const StripKernels& values;   // for S
  const StripKernels& factors;  // for U and V
  bool direct;                  // x itself is the activations of kernels that do not scale
  Activations x_values;         // x as `values` takes it
  Activations x_factors;
  Sums* sums;  // [projection]
  Panel* self;

  Panel(const Call& call, int64_t first, Workspace& workspace)
      : call(call),
        w(call.first()),
        first(first),
        // Panels are as even as possible: a narrow last one would read the weight again for little.
        columns(
            static_cast<int>(divide_up(call.batch - first, divide_up(call.batch - first, kPanelColumns)))),
        values(strip_kernels(w->isa, w->shape.dtype, w->shape.values, columns, call.one_byte())),
        factors(strip_kernels(w->isa, w->shape.dtype, w->shape.factors, columns)) {
    // One row of whole 4-byte units, aligned to 4, already is [groups][1].
    direct = columns == 1 && call.value_bytes() * w->layout.group == 4 &&
             w->shape.d_in % w->layout.group == 0 &&
             reinterpret_cast<uintptr_t>(call.row_of_x(first)) % alignof(uint32_t) == 0;
    workspace.provide([this](Cutter& memory) { cut(memory); });
  }

  void cut(Cutter& memory) {
    self = memory.take<Panel>(1);
    x_values = cut_inputs(values, memory);
    x_factors = factors.prepare == values.prepare ? x_values : cut_inputs(factors, memory);
    sums = memory.take<Sums>(call.count);
    for (int i = 0; i < call.count; ++i) {
      const PackedHeader* weight = call.projections[i].w;
      const Sums cut{{memory.take<uint32_t>(weight->rank_blocks() * block_units()),
                      memory.take<XScale>(weight->rank_blocks() * columns), kScaledColumns},
                     memory.take<float>(weight->strips * columns * w->layout.lanes),
                     memory.take<float>(weight->rank_strips * columns * w->layout.lanes)};
      if (sums) sums[i] = cut;
    }
  }

  Activations cut_inputs(const StripKernels& kernels, Cutter& memory) const {
    if (!kernels.scaled_activations) {
      if (direct) return {reinterpret_cast<uint32_t*>(const_cast<char*>(call.row_of_x(first)))};
      return {memory.take<uint32_t>(w->groups * columns)};
    }
    // They come in whole sets of kScaledColumns.
    const int32_t set = scale_columns(kernels);
    return {memory.take<uint32_t>(divide_up(w->shape.d_in, kScaledColumns) * kScaledUnits * columns),
            memory.take<XScale>(divide_up(w->shape.d_in, set) * columns), set};
  }

  // Units of V x for one block: whole sets, if they are scaled.
  int64_t block_units() const { return kStripsPerBlock * w->layout.lanes / w->layout.group * columns; }
  int64_t block_sums() const { return kStripsPerBlock * columns * w->layout.lanes; }
  // Inputs that share a scale.
  int32_t scale_columns(const StripKernels& kernels) const {
    return &kernels == &values && call.one_byte() ? kScaledColumns : w->shape.scale_columns;
  }
  bool prepares_for_values() const { return values.scaled_activations || !direct; }
  // V may take x as S does.
  bool prepares_for_factors() const {
    return factors.prepare != values.prepare && call.rank_blocks() > 0 &&
           (factors.scaled_activations || !direct);
  }

  void prepare(int part, int parts) const {
    const auto run = [&](const StripKernels& kernels, Activations x) {
      const int64_t step = kernels.scaled_activations ? x.scale_columns / 2 : 1;
      const int64_t steps = divide_up(w->groups, step);
      kernels.prepare(call.row_of_x(first), call.x_stride, w->shape.d_in, columns, columns,
                      steps * part / parts * step, std::min(steps * (part + 1) / parts * step, w->groups), x);
    };
    if (prepares_for_values()) run(values, x_values);
    if (prepares_for_factors()) run(factors, x_factors);
  }

  void low_rank_inputs(int i, int64_t block) const {
    const DenseBlock v = dense_block(call.projections[i].w, Matrix::v, block);
    float* out = sums[i].rank_sums + block * block_sums();
    factors.dense(v, w->shape.d_in, x_factors, columns, false, out);
    const Activations low_rank = sums[i].low_rank;
    factors.sums_to_activations(
        out, v.strips, columns,
        {low_rank.units + block * block_units(), low_rank.scales + block * columns, kScaledColumns});
  }

  void sparse(int i, int64_t block) const {
    const PackedHeader* weight = call.projections[i].w;
    float* out = sums[i].sums + block * block_sums();
    if (weight->shape.masked) {
      values.sparse(weight, block, x_values, columns, out);
    } else {
      values.dense(dense_block(weight, Matrix::s, block), w->shape.d_in, x_values, columns, false, out);
    }
  }

  void finish(int i, int64_t block) const {
    const PackedHeader* weight = call.projections[i].w;
    float* out = sums[i].sums + block * block_sums();
    const int strips = strips_of_block(weight->strips, block);
    if (weight->shape.rank) {
      factors.dense(dense_block(weight, Matrix::u, block), weight->shape.rank, sums[i].low_rank, columns,
                    true, out);
    }
    const int64_t row = block * kStripsPerBlock * w->layout.lanes;
    const int64_t valid = std::min(strips * static_cast<int64_t>(w->layout.lanes), weight->shape.d_out - row);
    values.store(out, strips, columns, call.bias_of(i, row), static_cast<int>(valid),
                 call.output(i, first, row), call.projections[i].y_stride);
  }

  bool prepares() const { return prepares_for_values() || prepares_for_factors(); }
  int64_t rows_planned() const { return columns; }
  int stages() const { return prepares() + 1 + (call.rank_blocks() > 0); }

  void run_stage(int stage, int part, int parts) const {
    if (prepares() && stage-- == 0) return prepare(part, parts);
    const auto finish_blocks = [&](int i, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) finish(i, b);
    };
    const int64_t blocks = call.blocks();
    if (stage == 1) {
      return call.split(blocks * part / parts, blocks * (part + 1) / parts, finish_blocks);
    }
    const int64_t begin = block_boundary(call, part, parts, true),
                  end = block_boundary(call, part + 1, parts, true);
    call.for_rank_blocks(part, parts, [&](int i, int64_t block) { low_rank_inputs(i, block); });
    call.split(begin, end, [&](int i, int64_t first_block, int64_t last) {
      for (int64_t b = first_block; b < last; ++b) sparse(i, b);
    });
    if (call.rank_blocks() == 0) call.split(begin, end, finish_blocks);
  }
};

}  // namespace

void product_by_strips(const Call& call, Workspace& workspace) {
  for (int64_t first = 0; first < call.batch;) {
    const Panel panel(call, first, workspace);
    in_team(call, [&](int part, int parts) { run_stages(panel, part, parts); });
    first += panel.columns;
  }
}

PlannedProduct plan_by_strips(const Call& call, int64_t first, Workspace& workspace) {
  return planned(Panel(call, first, workspace));
}

}  // namespace oats
