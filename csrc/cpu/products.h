// The orders in which sparse_low_rank_linear() can work, and what they share.
#pragma once

#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "oats/packed_weight.h"
#include "oats/sparse_low_rank_linear.h"
#include "strip_kernels.h"

namespace oats {

// One call. The projections agree in d_in, dtype and layout; their blocks are numbered through, and so are
// the blocks of their V.
struct Call {
  const Projection* projections;
  int count;
  const char* x;
  int64_t batch, x_stride;
  int team;

  const PackedHeader* first() const { return projections[0].w; }
  int64_t value_bytes() const { return static_cast<int64_t>(dtype_bytes(first()->shape.dtype)); }
  const char* row_of_x(int64_t row) const { return x + row * x_stride * value_bytes(); }
  char* output(int i, int64_t row, int64_t feature) const {
    return projections[i].y + (row * projections[i].y_stride + feature) * value_bytes();
  }
  const char* bias_of(int i, int64_t feature) const {
    return projections[i].bias ? projections[i].bias + feature * value_bytes() : nullptr;
  }
  int64_t blocks() const {
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) blocks += projections[i].w->blocks();
    return blocks;
  }
  int64_t rank_blocks() const {
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) blocks += projections[i].w->rank_blocks();
    return blocks;
  }

  // visit(projection, its blocks [begin, end)) for what `begin` to `end` of all blocks is of each.
  template <class Visit>
  void split(int64_t begin, int64_t end, const Visit& visit) const {
    split(begin, end, [](const PackedHeader* w) { return w->blocks(); }, visit);
  }
  // The same for the blocks of V.
  template <class Visit>
  void split_rank(int64_t begin, int64_t end, const Visit& visit) const {
    split(begin, end, [](const PackedHeader* w) { return w->rank_blocks(); }, visit);
  }
  // visit(projection, block) for a part's share of the blocks of V.
  template <class Visit>
  void for_rank_blocks(int part, int parts, const Visit& visit) const {
    split_rank(rank_blocks() * part / parts, rank_blocks() * (part + 1) / parts,
               [&](int i, int64_t begin, int64_t end) {
                 for (int64_t b = begin; b < end; ++b) visit(i, b);
               });
  }

 private:
  template <class Blocks, class Visit>
  void split(int64_t begin, int64_t end, const Blocks& blocks_of, const Visit& visit) const {
    for (int i = 0; i < count && end > 0; ++i) {
      const int64_t blocks = blocks_of(projections[i].w);
      if (begin < blocks) visit(i, begin, end < blocks ? end : blocks);
      begin = begin > blocks ? begin - blocks : 0;
      end -= blocks;
    }
  }
};

// A block of U or of V.
inline FactorBlock factor_block(const PackedHeader* w, bool is_v, int64_t block) {
  const WeightShape& shape = w->shape;
  const char* base = reinterpret_cast<const char*>(w);
  const int64_t columns = is_v ? shape.d_in : shape.rank, group = w->factors_layout.group;
  const int64_t scale_groups = is_v ? w->scale_groups : w->rank_scale_groups;
  const int64_t first = block * kStripsPerBlock, lanes = w->layout.lanes;
  const int64_t strip_bytes =
      lanes * divide_up(columns, group) * group * storage_bits(shape.factors, shape.dtype) / 8;
  const auto* scales = reinterpret_cast<const uint16_t*>(base + (is_v ? w->v_scale_at : w->u_scale_at));
  return {base + (is_v ? w->v_at : w->u_at) + first * strip_bytes, scales + first * scale_groups * lanes,
          shape.scale_columns, strips_of_block(is_v ? w->rank_strips : w->strips, block)};
}

// Memory that a thread keeps between its calls, up to a size that a process with many threads can afford.
class Workspace {
 public:
  static constexpr size_t kKept = 16 << 20;

  char* reserve(size_t wanted) {
    if (wanted > bytes_) {
      memory_.reset();
      bytes_ = 0;
      wanted = (wanted + 4095) / 4096 * 4096;
      memory_.reset(std::aligned_alloc(64, wanted));
      if (!memory_) throw std::bad_alloc();
      bytes_ = wanted;
    }
    return static_cast<char*>(memory_.get());
  }

  void trim() {
    if (bytes_ > kKept) {
      memory_.reset();
      bytes_ = 0;
    }
  }

 private:
  std::unique_ptr<void, decltype(&std::free)> memory_{nullptr, &std::free};
  size_t bytes_ = 0;
};

// Cuts a workspace into aligned pieces: first with no memory to learn the size, then with it.
class Cutter {
 public:
  explicit Cutter(char* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }

  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

// visit(begin, end) for each of `steps` pieces of [begin, end), as even as can be.
template <class Visit>
void in_steps(int64_t begin, int64_t end, int64_t steps, const Visit& visit) {
  for (int64_t i = 0; i < steps; ++i)
    visit(begin + (end - begin) * i / steps, begin + (end - begin) * (i + 1) / steps);
}

// run(part, parts) on each thread of a call.
template <class Run>
void in_team(const Call& call, const Run& run) {
  if (call.team == 1) {
    run(0, 1);
  } else {
#pragma omp parallel num_threads(call.team)
    run(omp_get_thread_num(), omp_get_num_threads());
  }
}

// A barrier for the parts of one call. A call with one part may stand inside a parallel region of its caller,
// whose threads must not be waited for.
inline void wait_for_all(int parts) {
  if (parts > 1) {
#pragma omp barrier
  }
}

// A part of a call's batch whose work is planned: stages that the parts of a team run one after the other, all
// of them waiting for each other in between.
struct PlannedProduct {
  void (*run)(const void* plan, int stage, int part, int parts) = nullptr;
  const void* plan = nullptr;
  int stages = 0;
  int64_t rows = 0;  // of the batch
};

// Places a panel, of whatever order of work, where its `self` points, behind the call.
template <class Panel>
PlannedProduct planned(const Panel& panel) {
  return {[](const void* plan, int stage, int part, int parts) {
            static_cast<const Panel*>(plan)->run_stage(stage, part, parts);
          },
          new (panel.self) Panel(panel), panel.stages(), panel.rows_planned()};
}

// A panel's stages in a team.
template <class Panel>
void run_stages(const Panel& panel, int part, int parts) {
  for (int stage = 0; stage < panel.stages(); ++stage) {
    if (stage) wait_for_all(parts);
    panel.run_stage(stage, part, parts);
  }
}

// The block where part `i` of `n` begins, so that each has the same number of bytes to read: of S and U, or
// of S and of an even share of the blocks of V.
int64_t block_boundary(const Call& call, int i, int n, bool with_v);

// Lanes are outputs: an expansion of the weights serves all columns. Bound by memory where they are few.
void product_by_strips(const Call& call, Workspace& workspace);
PlannedProduct plan_by_strips(const Call& call, int64_t first, Workspace& workspace);

// Lanes are columns: zero units are skipped. Bound by arithmetic.
void product_by_columns(const Call& call, Workspace& workspace);
PlannedProduct plan_by_columns(const Call& call, int64_t first, Workspace& workspace);

// Tiles of the batch times tiles of expanded cells, where the ISA has tile_kernels().
void product_by_tiles(const Call& call, Workspace& workspace);
PlannedProduct plan_by_tiles(const Call& call, int64_t first, Workspace& workspace);

// The plan of the next rows of a call, from `first` on, in the best order of work. The call outlives it, and
// its inputs are scaled already.
PlannedProduct plan_product(const Call& call, int64_t first, Workspace& workspace);

}  // namespace oats
