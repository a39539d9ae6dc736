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
constexpr int64_t kTileColumns = 256;

// Strips that go through all columns of a tile before the next ones: with d_in = 4096 they are half of a 1 MB
// L2.
constexpr int64_t kStripsPerBlock = 8;

// Columns of a tile that go through the kernels together.
struct Chunk {
  int64_t first;  // column of the tile; all chunks before it are full, so also their padded columns
  int columns;    // real ones
  int padded;     // as the kernels see them
};

struct Tile {
  const Call& call;
  const PackedHeader* w;
  const StripKernels& kernels;
  int64_t first, columns;  // of the batch
  int64_t chunks;
  bool direct;            // x already is what the kernels read
  uint32_t* activations;  // [chunk][groups][padded]
  uint32_t* low_rank;     // [chunk][rank units][padded]
  float* sums;            // [block of strips][chunk][strip][padded][lanes]
  float* rank_sums;       // [chunk][rank strip][padded][lanes]

  Tile(const Call& call, int64_t first, Workspace& workspace)
      : call(call), w(call.w), kernels(strip_kernels(w->isa, w->dtype)), first(first) {
    columns = std::min(call.batch - first, kTileColumns);
    chunks = divide_up(columns, kernels.max_columns);
    // One row of whole groups of 4 bytes is already [groups][1].
    direct = columns == 1 && call.value_bytes() * w->layout.group == 4 && w->d_in % w->layout.group == 0;
    Cutter size(nullptr);
    cut(size);
    Cutter memory(workspace.reserve(size.used()));
    cut(memory);
  }

  void cut(Cutter& memory) {
    const int64_t padded = padded_total();
    activations = memory.take<uint32_t>(direct ? 0 : w->groups * padded);
    low_rank = memory.take<uint32_t>(rank_units() * padded);
    sums = memory.take<float>(w->strips * padded * w->layout.lanes);
    rank_sums = memory.take<float>(w->rank_strips * padded * w->layout.lanes);
  }

  Chunk chunk(int64_t i) const {
    const int64_t from = i * kernels.max_columns;
    const int left = static_cast<int>(std::min<int64_t>(columns - from, kernels.max_columns));
    return {from, left, kernels.padded_columns(left)};
  }
  int64_t padded_total() const {
    const Chunk last = chunk(chunks - 1);
    return last.first + last.padded;
  }
  const uint32_t* inputs(const Chunk& c) const {
    return direct ? reinterpret_cast<const uint32_t*>(call.row_of_x(first))
                  : activations + c.first * w->groups;
  }
  int64_t rank_units() const { return w->rank_strips * w->layout.lanes / w->layout.group; }

  void prepare(int64_t begin, int64_t end) const {
    for (int64_t i = 0; i < chunks; ++i) {
      const Chunk c = chunk(i);
      kernels.prepare(call.row_of_x(first + c.first), call.x_stride, w->d_in, c.columns, c.padded, begin, end,
                      activations + c.first * w->groups);
    }
  }

  void low_rank_inputs(int64_t begin, int64_t end) const {
    const char* v = reinterpret_cast<const char*>(w) + w->v_at;
    const int64_t units_per_strip = w->layout.lanes / w->layout.group;
    for (int64_t i = 0; i < chunks && begin < end; ++i) {
      const Chunk c = chunk(i);
      float* out = rank_sums + (c.first * w->rank_strips + begin * c.padded) * w->layout.lanes;
      kernels.dense(v, w->groups, begin, end, inputs(c), c.padded, false, out);
      for (int64_t s = begin; s < end; ++s) {
        kernels.sums_to_activations(out + (s - begin) * c.padded * w->layout.lanes, c.padded,
                                    low_rank + c.first * rank_units() + s * units_per_strip * c.padded);
      }
    }
  }

  float* block_sums(int64_t begin, int64_t end, const Chunk& c) const {
    return sums + (begin * padded_total() + c.first * (end - begin)) * w->layout.lanes;
  }

  template <class F>
  void over_blocks(int64_t begin, int64_t end, const F& f) const {
    for (int64_t b = begin; b < end; b += kStripsPerBlock) {
      const int64_t e = std::min(end, b + kStripsPerBlock);
      for (int64_t i = 0; i < chunks; ++i) f(b, e, chunk(i));
    }
  }

  void sparse(int64_t begin, int64_t end) const {
    over_blocks(begin, end, [&](int64_t b, int64_t e, const Chunk& c) {
      kernels.sparse(w, b, e, inputs(c), c.padded, block_sums(b, e, c));
    });
  }

  void finish(int64_t begin, int64_t end) const {
    const char* u = reinterpret_cast<const char*>(w) + w->u_at;
    const int64_t lanes = w->layout.lanes;
    over_blocks(begin, end, [&](int64_t b, int64_t e, const Chunk& c) {
      float* out = block_sums(b, e, c);
      if (w->rank) {
        kernels.dense(u, w->rank_groups, b, e, low_rank + c.first * rank_units(), c.padded, true, out);
      }
      for (int64_t s = b; s < e; ++s) {
        const int64_t row = s * lanes;
        kernels.store(out + (s - b) * c.padded * lanes, c.columns, call.bias_of(row),
                      static_cast<int>(std::min(lanes, w->d_out - row)), call.output(first + c.first, row),
                      call.y_stride);
      }
    });
  }

  void run_part(int part, int parts) const {
    if (!direct) {
      prepare(w->groups * part / parts, w->groups * (part + 1) / parts);
      wait_for_all(parts);
    }
    const int64_t begin = strip_boundary(w, part, parts), end = strip_boundary(w, part + 1, parts);
    low_rank_inputs(w->rank_strips * part / parts, w->rank_strips * (part + 1) / parts);
    sparse(begin, end);
    if (w->rank) wait_for_all(parts);
    finish(begin, end);
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
