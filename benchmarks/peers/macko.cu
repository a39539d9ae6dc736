// Compiled with -I to src/macko_spmv/cuda of a checkout of MACKO (arXiv 2511.13061), which has the format and
// the kernel.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "cpu_compressor.cuh"
#include "kernels.cuh"

extern "C" {

// Returns how many values there are, padding included. Room: rows * columns + 8 values, half as many bytes of
// deltas.
int macko_compress(const __half* weight, int rows, int columns, int* row_begins, unsigned char* deltas,
                   __half* values) {
  int* own_begins = nullptr;
  unsigned char* own_deltas = nullptr;
  __half* own_values = nullptr;
  int count = 0, padded = 0;
  compress_rows_cpu(weight, rows, columns, &own_begins, &own_deltas, &own_values, &count, &padded);
  std::copy_n(own_begins, rows + 1, row_begins);
  std::copy_n(own_deltas, padded / 2, deltas);
  std::copy_n(own_values, padded, values);
  std::free(own_begins);
  std::free(own_deltas);
  std::free(own_values);
  return padded;
}

// y (rows) = weight x; rows must be a multiple of 32.
int macko_multiply(const __half* values, const unsigned char* deltas, const int* row_begins, const __half* x,
                   int rows, int columns, __half* y, cudaStream_t stream) {
  const dim3 block(WARP_SIZE, BLOCK_SIZE);
  macko_spmv<false>
      <<<rows / BLOCK_SIZE, block, 0, stream>>>(values, deltas, row_begins, x, rows, columns, 1, 0, y);
  return cudaGetLastError();
}

}  // extern "C"
