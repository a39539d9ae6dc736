// What the three orders of the product share: the arguments of a call, how blocks are divided among threads,
// and memory to work in. csrc/README.md says how a call runs.
#pragma once

#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernels/strip_kernels.h"
#include "oats/operations.h"

namespace oats {

// One call. All projections have the same d_in, dtype and ISA. Blocks are numbered through all projections,
// those of U and S together and those of V by themselves.
struct Call {
  const Projection* projections;
  int count;
  const char* x;
  int64_t batch, x_stride;
  int team;  // threads
  ActivationCodes activations = activation_codes();

  // Whether activations are rounded to one byte: those of many rows, where the ISA has such kernels.
  bool one_byte() const {
    constexpr int64_t kExactRows = 16;
    const PackedHeader* w = first();
    return activations == ActivationCodes::int8 && batch > kExactRows && w->isa == Isa::amx_bf16 &&
           w->shape.dtype == Dtype::bf16 && w->shape.values != Storage::exact;
  }
  const PackedHeader* first() const { return projections[0].w; }
  int64_t value_bytes() const { return static_cast<int64_t>(dtype_bytes(first()->shape.dtype)); }
  const char* row_of_x(int64_t row) const { return x + row * x_stride * value_bytes(); }
  char* output(int i, int64_t row, int64_t feature) const {
    return projections[i].y + (row * projections[i].y_stride + feature) * value_bytes();
  }
  const char* bias_of(int i, int64_t feature) const {
    return projections[i].bias ? projections[i].bias + feature * value_bytes() : nullptr;
  }
  int64_t blocks() const { return total(&PackedHeader::blocks); }
  int64_t rank_blocks() const { return total(&PackedHeader::rank_blocks); }

  // Calls visit(projection, begin, end) for each projection that has some of blocks [begin, end); what it
  // gets are numbers of its own blocks.
  template <class Visit>
  void split(int64_t begin, int64_t end, const Visit& visit) const {
    split(begin, end, &PackedHeader::blocks, visit);
  }
  // The same for blocks of V.
  template <class Visit>
  void split_rank(int64_t begin, int64_t end, const Visit& visit) const {
    split(begin, end, &PackedHeader::rank_blocks, visit);
  }
  // Calls visit(projection, block) for each block of V that belongs to `part` of `parts`.
  template <class Visit>
  void for_rank_blocks(int part, int parts, const Visit& visit) const {
    split_rank(rank_blocks() * part / parts, rank_blocks() * (part + 1) / parts,
               [&](int i, int64_t begin, int64_t end) {
                 for (int64_t b = begin; b < end; ++b) visit(i, b);
               });
  }

 private:
  using BlocksOf = int64_t (PackedHeader::*)() const;

  int64_t total(BlocksOf blocks_of) const {
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) blocks += (projections[i].w->*blocks_of)();
    return blocks;
  }
  template <class Visit>
  void split(int64_t begin, int64_t end, BlocksOf blocks_of, const Visit& visit) const {
    for (int i = 0; i < count && end > 0; ++i) {
      const int64_t blocks = (projections[i].w->*blocks_of)();
      if (begin < blocks) visit(i, begin, end < blocks ? end : blocks);
      begin = begin > blocks ? begin - blocks : 0;
      end -= blocks;
    }
  }
};

enum class Matrix { s, u, v };

// A block of U or V, or of S if that has no mask.
inline DenseBlock dense_block(const PackedHeader* w, Matrix matrix, int64_t block) {
  const WeightShape& shape = w->shape;
  const bool is_s = matrix == Matrix::s, is_u = matrix == Matrix::u;
  const int64_t columns = is_u ? shape.rank : shape.d_in;
  const int64_t scale_groups = is_u ? w->rank_scale_groups : w->scale_groups;
  const Storage storage = is_s ? shape.values : shape.factors;
  const int64_t block_values =
      dense_block_values(is_s ? w->values_layout : w->factors_layout, columns, storage);
  const uint64_t at = is_s ? w->values_at : is_u ? w->u_at : w->v_at;
  const uint64_t scale_at = is_s ? w->values_scale_at : is_u ? w->u_scale_at : w->v_scale_at;
  return {part_at<char>(w, at) + block * block_values * storage_bits(storage, shape.dtype) / 8,
          part_at<uint16_t>(w, scale_at) + block * kStripsPerBlock * scale_groups * w->layout.lanes,
          shape.scale_columns,
          strips_of_block(matrix == Matrix::v ? w->rank_strips : w->strips, block),
          storage,
          w->codebook};
}

// Cuts memory into pieces aligned to 64. Without memory it only counts the bytes.
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

// Bytes that `cut` takes from a Cutter.
template <class Cut>
size_t bytes_of(const Cut& cut) {
  Cutter counter(nullptr);
  cut(counter);
  return counter.used();
}

// Memory that a thread keeps between its calls, up to a size that a process with many threads can afford.
class Workspace {
 public:
  static constexpr size_t kKept = 16 << 20;

  // Gives `cut` all the memory that it takes. `cut` is called twice, first to count.
  template <class Cut>
  void provide(const Cut& cut) {
    Cutter memory(reserve(bytes_of(cut)));
    cut(memory);
  }

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

// Calls visit(begin, end) for each of `steps` pieces of [begin, end), as even as possible.
template <class Visit>
void in_steps(int64_t begin, int64_t end, int64_t steps, const Visit& visit) {
  for (int64_t i = 0; i < steps; ++i)
    visit(begin + (end - begin) * i / steps, begin + (end - begin) * (i + 1) / steps);
}

// Calls run(part, parts) on each thread of a call.
template <class Run>
void in_team(const Call& call, const Run& run) {
  if (call.team == 1) {
    run(0, 1);
  } else {
#pragma omp parallel num_threads(call.team)
    run(omp_get_thread_num(), omp_get_num_threads());
  }
}

// A barrier for the parts of one call. A call with one part must not wait: its caller may have opened a
// parallel region of its own, whose other threads would never come.
inline void wait_for_all(int parts) {
  if (parts > 1) {
#pragma omp barrier
  }
}

// A part of a call's batch whose work is planned: stages that the parts of a team run one after the other,
// all of them waiting for each other in between.
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

// The block of U and S where part `i` of `n` begins. Parts have about the same number of bytes to read: of S
// and an even share of the blocks of V if `with_v`, else of S and U.
int64_t block_boundary(const Call& call, int i, int n, bool with_v);

// A piece of memory.
struct Piece {
  const char* begin;
  int64_t bytes;
};

// The memory that a part of a product by strips reads, in that order, up to about `most` bytes.
std::vector<Piece> pieces_of_part(const Call& call, int part, int parts, int64_t most);

// Lanes are outputs: one expansion of the weights serves all columns. For few columns, bound by memory.
void product_by_strips(const Call& call, Workspace& workspace);
PlannedProduct plan_by_strips(const Call& call, int64_t first, Workspace& workspace);

// Lanes are columns: zero units are skipped. For many columns, bound by arithmetic.
void product_by_columns(const Call& call, Workspace& workspace);
PlannedProduct plan_by_columns(const Call& call, int64_t first, Workspace& workspace);

// Tiles of the batch times tiles of expanded cells. Needs tile_kernels().
void product_by_tiles(const Call& call, Workspace& workspace);
PlannedProduct plan_by_tiles(const Call& call, int64_t first, Workspace& workspace);

// The plan of the next rows of a call, from `first` on, in the best order of work. The call outlives it, and
// its inputs are scaled already.
PlannedProduct plan_product(const Call& call, int64_t first, Workspace& workspace);

}  // namespace oats
