// Kernels on tiles, the matrix registers of AMX, for batches: a tile of up to 16 rows of x times a tile of
// cells.
//
// Sixteen cells of one strip, expanded, are sixteen rows of 16 outputs x 2 inputs. That is exactly the
// right-hand tile of tdpbf16ps. The left-hand tile is up to 16 rows of x with 32 inputs each. The tile of
// sums has one row for each row of x and one output in each lane. So nothing is transposed, and the cells of
// U and V are loaded from where they lie.
//
// The batch is cut into row tiles, the groups into tiles of 16 groups, and those into ranges of kRangeTiles
// tiles. `inputs` are the tiles of x, or of V x, range after range: [row tile][tile of the range][rows of a
// tile][16 units of two bf16]. Sums are float, [row of the batch][strip of the block][lanes].
#pragma once

#include <cstdint>

#include "strip_kernels.h"
#include "tile_state.h"

namespace oats {

constexpr int64_t kTileRows = 16;    // the most
constexpr int64_t kTileGroups = 16;  // groups of cells, or units of a row of x
constexpr int64_t kRangeTiles = 16;

struct TileKernels {
  int64_t min_batch;      // by strips is faster for fewer rows
  int64_t few_row_tiles;  // the most that expand_and_multiply() takes

  // Shapes the tiles of this thread for `rows` rows. Returns the state before, for restore().
  TileState (*configure)(int rows);
  void (*restore)(const TileState& before);

  // Expands groups [begin, end) of one block of S to cells[group][strip][lanes], with zeros up to a whole
  // tile. Codes become exact weights. `value` is the index in the block of the first value of group `begin`,
  // which is a multiple of kTileGroups; returns the index for group `end`.
  int64_t (*expand)(const PackedHeader* weight, int64_t block, int64_t begin, int64_t end, int64_t value,
                    uint32_t* cells);

  // sums += S x for one block.
  void (*expand_and_multiply)(const PackedHeader* weight, int64_t block, const uint32_t* inputs,
                              int64_t row_tiles, int rows, float* sums);

  // Groups [begin, end) of a matrix without a mask, in the same form: its own cells if they are exact and
  // fill whole tiles, else `room`, filled.
  const uint32_t* (*dense)(const DenseBlock& matrix, int64_t begin, int64_t end, uint32_t* room);

  // sums (+)= cells times inputs, for one range of `tiles` tiles and all row tiles.
  void (*multiply)(const uint32_t* cells, int strips, int64_t tiles, const uint32_t* inputs,
                   int64_t row_tiles, int rows, bool accumulate, float* sums);

  // Rounds the sums of one strip, `rows` rows that are `stride` apart, to eight units in each row of a tile.
  void (*sums_to_inputs)(const float* sums, int64_t stride, int rows, uint32_t* inputs);
};

// In kernels/amx_bf16.cpp.
const TileKernels& tile_kernels_amx_bf16(Storage storage);

// In dispatch.cpp. nullptr if the ISA has no tiles for that dtype. Storages differ in min_batch,
// few_row_tiles, expand(), expand_and_multiply() and dense() only.
const TileKernels* tile_kernels(Isa isa, Dtype dtype, Storage storage);

}  // namespace oats
