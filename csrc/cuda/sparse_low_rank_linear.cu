// y = S x + U (V x) + b for few columns. Reading the weight bounds this.
//
// A block computes one strip of 16 outputs; its eight warps, and the blocks of a split, share the inputs. A
// warp goes through its cells of S: it scans the mask, expands the values into the operands of the tensor
// cores, and multiplies. Even for one column that beats multiplying and adding, because the expansion is what
// costs; and with up to 32 columns one expansion serves all. Values arrive in a ring in shared memory, by
// asynchronous copies that run up to eight chunks ahead. The next mask is loaded while a cell is multiplied.
//
// V x is a launch of its own, because each block of U needs all of it. On compute capability 9 the second
// launch does not wait for the end of the first: it begins with S x, and waits before U (V x).
//
// Sums over warps, and over the blocks of a split, always have one order: the last block of a strip adds what
// the others left in the workspace.
#include "cells.h"
#include "device.h"
#include "kernels.h"
#include "scan_inl.h"

namespace oats::cuda {
namespace {

// 16-bit numbers, row after row. Each row is aligned to 16 bytes and filled up with zeros to whole cells.
struct Rows {
  const uint16_t* at;
  int64_t stride, rows;
};

struct Product {
  Rows x, u, v, t;  // t = V x
  const int64_t* starts;
  const uint32_t* masks;
  const uint16_t* values;
  const uint16_t* bias;
  uint16_t* y;
  int64_t y_stride;
  int64_t d_out, strips, cells;
  Shares of_v, of_s, of_u;  // cells of a strip, for each warp
  uint16_t* t_out;
  float* partials;
  uint32_t* counters;
};

// Sums of a warp, for 16 outputs and kGroups groups of 8 columns.
template <int kGroups>
struct Sums {
  float c[kGroups][4] = {};
};

// The sums of all warps of a block.
template <int kGroups>
using BlockSums = float[kWarps][8 * kGroups * kCellRows];

using Rings = uint32_t[kWarps][kRingWords + kMirrorWords];

template <int kGroups>
union alignas(16) Shared {
  Rings rings;
  BlockSums<kGroups> sums;
};

// Where a lane reads in one row, cell after cell. Instead of a row that does not exist it reads the first
// one: so no load has a condition, and the sums go nowhere.
class LaneRow {
 public:
  __device__ __forceinline__ void start(const Rows& m, int64_t row, int64_t cell, unsigned lane) {
    at_ = reinterpret_cast<const uint4*>(m.at + (row < m.rows ? row : 0) * m.stride + kCellColumns * cell +
                                         16 * (lane % 4));
  }

  // Reads the sixteen numbers of the next cell: words 2 s and 2 s + 1 are for step s. `kOnce` says that they
  // need not stay in the cache.
  template <bool kOnce>
  __device__ __forceinline__ void read(uint32_t (&out)[8]) {
    const uint4 a = kOnce ? __ldcs(at_) : at_[0], b = kOnce ? __ldcs(at_ + 1) : at_[1];
    at_ += kCellColumns / 8;
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
    out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
  }

 private:
  const uint4* at_;
};

template <int kGroups>
struct LaneColumns {
  LaneRow rows[kGroups];

  __device__ __forceinline__ LaneColumns(const Rows& x, int64_t cell, unsigned lane) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) rows[j].start(x, 8 * j + lane / 4, cell, lane);
  }

  __device__ __forceinline__ void read(uint32_t (&out)[kGroups][8]) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) rows[j].template read<false>(out[j]);
  }
};

// The values of consecutive cells of one warp, through its ring. Values are counted from the start of the
// chunk that holds the first one.
class ValueStream {
 public:
  __device__ __forceinline__ ValueStream(uint32_t* ring, const uint16_t* values, uint32_t end, unsigned lane)
      : to_(ring + 4 * lane), from_(values + 8 * lane), chunks_(chunks_of(end)), lane_(lane) {}

  // Puts values [begin, end) into the ring. Values before `begin` may be overwritten. Each call continues
  // where the last one ended.
  __device__ __forceinline__ void advance(uint32_t begin, uint32_t end) {
    const uint32_t before_3 = before_2_;
    before_2_ = before_1_;
    before_1_ = asked_;
    __syncwarp();  // other lanes may still read what is overwritten now
    const uint32_t room = begin / kChunkValues + kRingChunks, limit = room < chunks_ ? room : chunks_;
#pragma unroll 1
    for (; asked_ < limit; ++asked_) {
      const uint32_t slot = asked_ % kRingChunks;
      copy_16_bytes(to_ + slot * (kChunkBytes / 4), from_);
      if (slot == 0 && lane_ == 0) copy_16_bytes(to_ + kRingWords, from_);
      from_ += kChunkValues;
    }
    commit_copies();
    const uint32_t wanted = chunks_read(end), needed = wanted < chunks_ ? wanted : chunks_;
    // Each call commits one group of copies. Most values were asked for several calls ago.
    if (needed <= before_3)
      wait_for_copies<3>();
    else if (needed <= before_2_)
      wait_for_copies<2>();
    else if (needed <= before_1_)
      wait_for_copies<1>();
    else
      wait_for_copies<0>();
    __syncwarp();
  }

 private:
  uint32_t* to_;
  const uint16_t* from_;
  uint32_t chunks_;
  unsigned lane_;
  uint32_t asked_ = 0, before_1_ = 0, before_2_ = 0;
};

template <class T, int kGroups>
__device__ __forceinline__ void add_sparse(Sums<kGroups>& sums, const Product& p, int64_t strip,
                                           const Range& cells, uint32_t* ring, unsigned lane) {
  if (cells.first >= cells.last) return;
  const int64_t first = strip * p.cells + cells.first, last = strip * p.cells + cells.last;
  const int64_t chunk = p.starts[first] / kChunkValues * kChunkValues;
  uint32_t begin = static_cast<uint32_t>(p.starts[first] - chunk);
  ValueStream stream(ring, p.values + chunk, static_cast<uint32_t>(p.starts[last] - chunk), lane);
  LaneColumns<kGroups> columns(p.x, cells.first, lane);
  const uint32_t* masks = p.masks + first * kLanes + lane;
  uint32_t mask = __ldcs(masks);
#pragma unroll 1
  for (int left = static_cast<int>(last - first); left > 0; --left) {
    masks += kLanes;
    const uint32_t next = __ldcs(masks);  // behind the last mask there are values
    uint32_t x[kGroups][8];
    columns.read(x);
    const Quarters q = scan_cell(mask, lane);
    stream.advance(begin, begin + q.count);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const unsigned from = 8 * s + lane / 4, t = lane % 4;
      Quad half[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t quarter = __shfl_sync(kAllLanes, h ? q.upper : q.lower, from);
        const uint32_t index = begin + first_value(quarter, t);
        const uint32_t* words = ring + (index >> 1) % kRingWords;
        half[h] = place_quad(words[0], words[1], words[2], index, nibble_of(quarter, t));
      }
      const uint32_t a[4] = {half[0].first, half[1].first, half[0].second, half[1].second};
#pragma unroll
      for (int j = 0; j < kGroups; ++j) T::mma(sums.c[j], a, x[j][2 * s], x[j][2 * s + 1]);
    }
    begin += q.count;
    mask = next;
  }
  wait_for_copies<0>();  // the memory of the ring is used for sums next
}

template <class T, int kGroups>
__device__ __forceinline__ void add_dense(Sums<kGroups>& sums, const Rows& weight, const Rows& x,
                                          int64_t strip, const Range& cells, unsigned lane) {
  LaneRow lower_row, upper_row;
  lower_row.start(weight, kCellRows * strip + lane / 4, cells.first, lane);
  upper_row.start(weight, kCellRows * strip + lane / 4 + 8, cells.first, lane);
  LaneColumns<kGroups> columns(x, cells.first, lane);
  for (int left = static_cast<int>(cells.last - cells.first); left > 0; --left) {
    uint32_t x_part[kGroups][8], lower[8], upper[8];
    lower_row.read<true>(lower);
    upper_row.read<true>(upper);
    columns.read(x_part);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint32_t a[4] = {lower[2 * s], upper[2 * s], lower[2 * s + 1], upper[2 * s + 1]};
#pragma unroll
      for (int j = 0; j < kGroups; ++j) T::mma(sums.c[j], a, x_part[j][2 * s], x_part[j][2 * s + 1]);
    }
  }
}

// Leaves the sums of the warps in shared memory, those of column n and output r at n * 16 + r.
template <int kGroups>
__device__ __forceinline__ void gather(BlockSums<kGroups>& all, const Sums<kGroups>& sums, unsigned warp,
                                       unsigned lane) {
  __syncthreads();  // the rings are over
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned column = 8 * j + 2 * (lane % 4) + i % 2, output = lane / 4 + 8 * (i / 2);
      all[warp][column * kCellRows + output] = sums.c[j][i];
    }
  }
  __syncthreads();
}

template <int kGroups>
__device__ __forceinline__ float over_warps(const BlockSums<kGroups>& all, int i) {
  float total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += all[w][i];
  return total;
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads) rank_kernel(const Product p) {
  __shared__ BlockSums<kGroups> all;
  start_dependent_launch();
  const unsigned warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  if (p.counters != nullptr) {
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.strips; i += threads)
      p.counters[i] = 0;
  }
  // There are as many strips as fill whole cells of t. Behind the last row of V, t is zero.
  const int64_t strip = blockIdx.x, first = kCellRows * strip;
  if (first >= p.t.stride) return;
  Sums<kGroups> sums;
  if (first < p.v.rows) add_dense<T>(sums, p.v, p.x, strip, p.of_v.of(warp), lane);
  gather<kGroups>(all, sums, warp, lane);
  for (int i = static_cast<int>(threadIdx.x); i < 8 * kGroups * kCellRows; i += kThreads) {
    const int64_t column = i / kCellRows, output = first + i % kCellRows;
    if (column < p.x.rows)
      p.t_out[column * p.t.stride + output] =
          output < p.v.rows ? T::round(over_warps<kGroups>(all, i)) : uint16_t{0};
  }
}

template <class T>
__device__ __forceinline__ void write(const Product& p, int64_t strip, int i, float sum) {
  const int64_t column = i / kCellRows, output = kCellRows * strip + i % kCellRows;
  if (column >= p.x.rows || output >= p.d_out) return;
  if (p.bias != nullptr) sum += T::widen(p.bias[output]);
  p.y[column * p.y_stride + output] = T::round(sum);
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads) product_kernel(const Product p) {
  __shared__ Shared<kGroups> shared;
  __shared__ uint32_t arrived;
  constexpr int kOutputs = 8 * kGroups * kCellRows;
  const unsigned warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t strip = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
  const int64_t part = split * kWarps + warp;
  Sums<kGroups> sums;
  add_sparse<T>(sums, p, strip, p.of_s.of(part), shared.rings[warp], lane);
  wait_for_previous_launch();
  add_dense<T>(sums, p.u, p.t, strip, p.of_u.of(part), lane);
  gather<kGroups>(shared.sums, sums, warp, lane);
  if (splits == 1) {
    for (int i = static_cast<int>(threadIdx.x); i < kOutputs; i += kThreads)
      write<T>(p, strip, i, over_warps<kGroups>(shared.sums, i));
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < kOutputs; i += kThreads)
    p.partials[(split * p.strips + strip) * kOutputs + i] = over_warps<kGroups>(shared.sums, i);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) arrived = atomicAdd(p.counters + strip, 1u);
  __syncthreads();
  if (arrived != splits - 1) return;
  __threadfence();
  for (int i = static_cast<int>(threadIdx.x); i < kOutputs; i += kThreads) {
    float total = 0;
    // Not through the first-level cache, which does not see what other multiprocessors write.
    for (int64_t s = 0; s < splits; ++s) total += __ldcg(p.partials + (s * p.strips + strip) * kOutputs + i);
    write<T>(p, strip, i, total);
  }
}

template <class T, int kGroups>
void run(const Product& p, int64_t splits, const Queue& queue) {
  const int64_t t_strips = p.t.stride / kCellRows;
  const bool first = t_strips > 0 || splits > 1;
  if (first) {
    const dim3 grid(static_cast<unsigned>(t_strips > 0 ? t_strips : 1));
    launch(rank_kernel<T, kGroups>, grid, dim3(kThreads), queue, false, p);
  }
  const dim3 grid(static_cast<unsigned>(p.strips), static_cast<unsigned>(splits));
  launch(product_kernel<T, kGroups>, grid, dim3(kThreads), queue, first, p);
}

template <class T>
void run(const Product& p, int64_t splits, const Queue& queue) {
  switch (column_groups(p.x.rows)) {
    case 1:
      return run<T, 1>(p, splits, queue);
    case 2:
      return run<T, 2>(p, splits, queue);
    default:
      return run<T, 4>(p, splits, queue);
  }
}

}  // namespace

void sparse_low_rank_linear(const PackedWeight& weight, const void* x, int64_t batch, int64_t x_stride,
                            const void* bias, void* y, int64_t y_stride, int64_t splits, void* workspace,
                            const Queue& queue) {
  if (batch == 0 || weight.d_out == 0) return;
  if (batch > kMaxColumns || weight.dtype == Dtype::fp32)
    throw std::invalid_argument("this product takes up to 32 rows of 16-bit numbers");
  // A warp counts the values of its cells in 32 bits.
  if (weight.d_in >= int64_t{1} << 27) throw std::invalid_argument("a layer of 2^27 inputs or more");
  const Layout l = layout_of(weight.d_out, weight.d_in, weight.rank, weight.nnz, 2);
  const Workspace w = workspace_of(weight.d_out, weight.rank, batch, splits);
  const auto part = [&](int64_t offset) { return reinterpret_cast<const uint16_t*>(weight.at + offset); };
  char* work = static_cast<char*>(workspace);
  Product p{};
  p.x = {static_cast<const uint16_t*>(x), x_stride, batch};
  p.u = {part(l.u), l.u_stride, weight.d_out};
  p.v = {part(l.v), l.v_stride, weight.rank};
  p.t_out = reinterpret_cast<uint16_t*>(work + w.t);
  p.t = {p.t_out, w.t_stride, batch};
  p.of_v = shares_of(l.cells, kWarps);
  p.of_s = shares_of(l.cells, kWarps * splits);
  p.of_u = shares_of(l.u_stride / kCellColumns, kWarps * splits);
  p.starts = reinterpret_cast<const int64_t*>(weight.at + l.starts);
  p.masks = reinterpret_cast<const uint32_t*>(weight.at + l.masks);
  p.values = part(l.values);
  p.bias = static_cast<const uint16_t*>(bias);
  p.y = static_cast<uint16_t*>(y);
  p.y_stride = y_stride;
  p.d_out = weight.d_out;
  p.strips = l.strips;
  p.cells = l.cells;
  if (splits > 1) {
    p.counters = reinterpret_cast<uint32_t*>(work + w.counters);
    p.partials = reinterpret_cast<float*>(work + w.partials);
  }
  if (weight.dtype == Dtype::bf16)
    run<Bf16>(p, splits, queue);
  else
    run<Fp16>(p, splits, queue);
}

}  // namespace oats::cuda
