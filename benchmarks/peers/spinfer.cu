// Compiled with -I to csrc of a checkout of SpInfer (EuroSys 2025), which has the format and the kernel.
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "SpMM_API.cu"

extern "C" {

// Rows and columns must be multiples of 64. Room: rows * columns values; for each tile of 64 x 64 a bitmap of
// 64 words, and for a tile more than there are four medians, for three more an offset: the kernel looks
// ahead. Returns the most values in a tile.
int spinfer_compress(half* weight, int rows, int columns, half* values, int* offsets, int* medians,
                     uint64_t* bitmap) {
  half* own_values = nullptr;
  int *counts = nullptr, *own_medians = nullptr, *own_offsets = nullptr, most = 0;
  uint64_t* own_bitmap = nullptr;
  const int tiles = InitSparseMatrixA_bitmap(weight, rows, columns, 8, 16, 64, 8, 64, 64, &own_values,
                                             &counts, &own_medians, &own_offsets, &own_bitmap, most);
  std::copy_n(own_values, own_offsets[tiles], values);
  std::copy_n(own_offsets, tiles + 1, offsets);
  offsets[tiles + 1] = offsets[tiles + 2] = offsets[tiles];
  std::copy_n(own_medians, 4 * tiles, medians);
  std::copy_n(own_bitmap, 64 * tiles, bitmap);
  for (void* own :
       {(void*)own_values, (void*)counts, (void*)own_medians, (void*)own_offsets, (void*)own_bitmap})
    std::free(own);
  return most;
}

// y (batch, rows) = x (batch, columns) weightᵀ; batch 8, 16, 32 or 64; workspace: split * batch * rows.
int spinfer_multiply(const half* values, const int* offsets, const int* medians, const uint64_t* bitmap,
                     const int* most, const half* x, int batch, int rows, int columns, half* y,
                     half* workspace, int split, cudaStream_t stream) {
  return SpMM_SplitK_API_bitmap_v3(stream, nullptr, values, offsets, medians, bitmap, most, x, y, rows, batch,
                                   columns, workspace, split);
}

}  // extern "C"
