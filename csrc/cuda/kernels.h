// The operations on a CUDA device: addresses on the device, sizes, a stream; no torch, no Python. Each call
// returns as soon as its kernels are queued, allocates nothing, and can be captured in a CUDA graph. The
// device is the calling thread's current one. A launch that fails throws std::runtime_error.
#pragma once

#include <cstdint>

namespace oats::cuda {

struct Queue {
  void* stream;    // a cudaStream_t of the current device
  int capability;  // of that device, the major number
};

enum class Dtype { fp32, bf16, fp16 };

inline int dtype_bytes(Dtype dtype) {
  return dtype == Dtype::fp32 ? 4 : 2;
}

// A layer S + U V in the layout of tiles.h, at a multiple of 128 bytes.
struct PackedWeight {
  const char* at;
  int64_t d_out, d_in, rank, nnz;
  Dtype dtype;
};

// y = S x + U (V x) + bias for `batch` rows of x, at most kMaxColumns, in bf16 or fp16, summed in fp32; V x
// is rounded to the dtype. Rows of x and y are so many elements apart. Those of x begin at multiples of 16
// bytes, and have zeros up to a multiple of kTileColumns elements. `bias` (d_out) may be null. `workspace`
// has the bytes of workspace_of(), at a multiple of 128, and nothing else may use it before the call is done
// on the device. The same call gives the same bits on the same device.
void sparse_low_rank_linear(const PackedWeight& weight, const void* x, int64_t batch, int64_t x_stride,
                            const void* bias, void* y, int64_t y_stride, int64_t splits, void* workspace,
                            const Queue& queue);

// Writes rows [first, first + rows) of S, dense, to `out`: zeros up to column `columns`, at least d_in.
// `first` is a multiple of 16. Rows of `out` are out_stride elements apart.
void expand(const PackedWeight& weight, int64_t first, int64_t rows, void* out, int64_t out_stride,
            int64_t columns, const Queue& queue);

// As oats::keep_largest_in_rows, of float (4 bytes) or double (8), for 0 < count < columns. Where
// `squares` is not null, what is kept is also taken away from `in`, and squares[row] becomes the sum of the
// squares of what is left in the row; that takes more than kMaxGroup columns.
void keep_largest_in_rows(void* in, int64_t rows, int64_t columns, int64_t count, int value_bytes, void* out,
                          double* squares, const Queue& queue);

// Rows up to this long are each the work of one thread.
constexpr int kMaxGroup = 64;

}  // namespace oats::cuda
