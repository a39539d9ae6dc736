// Products on matrix tiles (AMX), for batches: a tile of up to 16 rows of x times a tile of cells.
//
// Sixteen groups of one strip, expanded, are sixteen rows of 16 outputs x 2 inputs: just the right-hand tile
// of the instruction. Its left-hand tile is 16 rows of x with 32 inputs each, and the tile of sums has a row
// of x in each row and an output in each lane. So nothing is transposed, and cells of V and U are read where
// they lie.
//
// `inputs` are tiles of x, or of V x: [row tile][tile of the range][rows of a tile][16 units of two bf16],
// range after range of kRangeTiles; multiply() takes one range at a time. Sums are [row of the batch][strip
// of the block][lanes].
#pragma once

#include <cstdint>

#include "strip_kernels.h"

namespace oats {

constexpr int64_t kTileRows = 16;    // at most
constexpr int64_t kTileGroups = 16;  // groups of cells, or units of a row of x
constexpr int64_t kRangeTiles = 16;

// The tile registers' state, as the instructions read and write it.
struct alignas(64) TileState {
  uint8_t bytes[64];
};

struct TileKernels {
  int64_t min_batch;      // fewer rows are faster by strips
  int64_t few_row_tiles;  // up to which expand_and_multiply() takes a block

  // Makes tiles of `rows` rows usable in this thread; returns what was set before, for restore().
  TileState (*configure)(int rows);
  void (*restore)(const TileState& before);

  // The cells of groups [begin, end) of one block of S → cells[group][strip][lanes], with zeros up to a whole
  // tile. `value` is the index in the block of the first value of group `begin`, a multiple of a tile;
  // returns that of `end`. Codes become what they stand for.
  int64_t (*expand)(const PackedHeader* weight, int64_t block, int64_t begin, int64_t end, int64_t value,
                    uint32_t* cells);

  // sums += S x of one block, for at most few_row_tiles.
  void (*expand_and_multiply)(const PackedHeader* weight, int64_t block, const uint32_t* inputs,
                              int64_t row_tiles, int rows, float* sums);

  // The cells of groups [begin, end) of a factor, in the same form: those of the factor itself where it has
  // them as they must be, else `room`, filled.
  const uint32_t* (*factor)(const FactorBlock& factor, int64_t begin, int64_t end, uint32_t* room);

  // sums (+)= cells times inputs, for `tiles` tiles of groups and all row tiles.
  void (*multiply)(const uint32_t* cells, int strips, int64_t tiles, const uint32_t* inputs,
                   int64_t row_tiles, int rows, bool accumulate, float* sums);

  // Sums of one strip, `rows` rows that are `stride` apart → eight units of each of as many rows of a tile.
  void (*sums_to_inputs)(const float* sums, int64_t stride, int rows, uint32_t* inputs);
};

// dispatch.cpp: nullptr where the ISA has no tiles of that dtype. Only expand() and factor() differ between
// storages: those of S, and of U and V.
const TileKernels* tile_kernels(Isa isa, Dtype dtype, Storage storage);

const TileKernels& tile_kernels_amx_bf16(Storage storage);

}  // namespace oats
