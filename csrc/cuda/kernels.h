// The operations on a CUDA device. They take addresses on the device, sizes and a stream; they know neither
// torch nor Python. A call returns when its kernels are queued, allocates nothing, and can be captured in a
// CUDA graph. It uses the current device of the calling thread. A launch that fails throws
// std::runtime_error.
#pragma once

#include <cstdint>

namespace oats::cuda {

struct Queue {
  void* stream;    // a cudaStream_t of the current device
  int capability;  // of that device, the major number
};

enum class Dtype { fp32, bf16, fp16 };

// A layer S + U V in the layout of cells.h, aligned to 128 bytes.
struct PackedWeight {
  const char* at;
  int64_t d_out, d_in, rank, nnz;
  Dtype dtype;
};

// Computes y = S x + U (V x) + bias for `batch` rows of x, at most kMaxColumns, in bf16 or fp16, summed in
// fp32; V x is rounded to the dtype. Rows of x and y are x_stride and y_stride elements apart. Rows of x are
// aligned to 16 bytes and have zeros up to a multiple of kCellColumns elements. `bias` (d_out) may be null.
// `workspace` has the bytes of workspace_of() and is aligned to 128; nothing else may use it before the
// device has finished the call. The same call gives the same bits on the same device.
void sparse_low_rank_linear(const PackedWeight& weight, const void* x, int64_t batch, int64_t x_stride,
                            const void* bias, void* y, int64_t y_stride, int64_t splits, void* workspace,
                            const Queue& queue);

// Writes rows [first, first + rows) of S, dense, to `out`, with zeros from d_in up to `columns`. `first` is a
// multiple of kCellRows. Rows of `out` are out_stride elements apart.
void expand(const PackedWeight& weight, int64_t first, int64_t rows, void* out, int64_t out_stride,
            int64_t columns, const Queue& queue);

// As oats::keep_largest_in_rows, for float (4 bytes) or double (8) and 0 < count < columns. If `squares` is
// not null, this also sets to zero in `in` what it keeps, and squares[row] becomes the sum of the squares of
// what is left; then there must be more than kMaxGroup columns.
void keep_largest_in_rows(void* in, int64_t rows, int64_t columns, int64_t count, int value_bytes, void* out,
                          double* squares, const Queue& queue);

// One thread does a row of up to this length.
constexpr int kMaxGroup = 64;

}  // namespace oats::cuda
