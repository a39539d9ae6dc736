// Expands S to a dense matrix: for many columns, torch's dense product is faster. A warp expands one cell.
#include "cells.h"
#include "device.h"
#include "kernels.h"
#include "scan_inl.h"

namespace oats::cuda {
namespace {

template <class Number>
struct Expansion {
  const int64_t* starts;
  const uint32_t* masks;
  const Number* values;
  unsigned strip_blocks;
  int64_t cells, first_strip, rows;  // rows of the output
  Number* out;
  int64_t out_stride, columns;
};

// Stores eight numbers of a row, as 16-byte words if all are inside and aligned.
template <class Number>
__device__ __forceinline__ void store_8(const Expansion<Number>& e, int64_t row, int64_t column,
                                        const Number* numbers) {
  constexpr int kWord = 16 / sizeof(Number);
  if (row >= e.rows) return;
  Number* to = e.out + row * e.out_stride + column;
  if (column + 8 <= e.columns && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < 8; i += kWord) {
      uint4 word;
      memcpy(&word, numbers + i, sizeof word);
      *reinterpret_cast<uint4*>(to + i) = word;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (column + i < e.columns) to[i] = numbers[i];
}

template <class Number>
__global__ void __launch_bounds__(kThreads) expand_kernel(const Expansion<Number> e) {
  const unsigned warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t strip = blockIdx.x / e.strip_blocks,
                cell = static_cast<int64_t>(blockIdx.x % e.strip_blocks) * kWarps + warp;
  if (cell >= e.cells) return;
  const int64_t at = (e.first_strip + strip) * e.cells + cell;
  const Quarters q = scan_cell(__ldcs(e.masks + at * kLanes + lane), lane);
  const Number* values = e.values + e.starts[at];
  const unsigned t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    alignas(16) Number numbers[16];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint32_t quarter = __shfl_sync(kAllLanes, h ? q.upper : q.lower, 8 * s + lane / 4);
      const uint32_t nibble = nibble_of(quarter, t);
      const Number* next = values + first_value(quarter, t);
#pragma unroll
      for (int i = 0; i < 4; ++i) numbers[4 * s + i] = nibble >> i & 1 ? *next++ : Number{0};
    }
    const int64_t row = kCellRows * strip + 8 * h + lane / 4, column = kCellColumns * cell + 16 * t;
    store_8(e, row, column, numbers);
    store_8(e, row, column + 8, numbers + 8);
  }
}

template <class Number>
void run(const PackedWeight& weight, int64_t first, int64_t rows, void* out, int64_t out_stride,
         int64_t columns, const Queue& queue) {
  const Layout l = layout_of(weight.d_out, weight.d_in, weight.rank, weight.nnz, sizeof(Number));
  Expansion<Number> e{};
  e.starts = reinterpret_cast<const int64_t*>(weight.at + l.starts);
  e.masks = reinterpret_cast<const uint32_t*>(weight.at + l.masks);
  e.values = reinterpret_cast<const Number*>(weight.at + l.values);
  e.cells = l.cells;
  e.strip_blocks = static_cast<unsigned>(divide_up(l.cells, kWarps));
  e.first_strip = first / kCellRows;
  e.rows = rows;
  e.out = static_cast<Number*>(out);
  e.out_stride = out_stride;
  e.columns = columns;
  const dim3 grid(static_cast<unsigned>(divide_up(rows, kCellRows) * e.strip_blocks));
  launch(expand_kernel<Number>, grid, dim3(kThreads), queue, false, e);
}

}  // namespace

void expand(const PackedWeight& weight, int64_t first, int64_t rows, void* out, int64_t out_stride,
            int64_t columns, const Queue& queue) {
  if (rows == 0 || weight.d_in == 0) return;
  if (weight.dtype == Dtype::fp32)
    run<uint32_t>(weight, first, rows, out, out_stride, columns, queue);
  else
    run<uint16_t>(weight, first, rows, out, out_stride, columns, queue);
}

}  // namespace oats::cuda
