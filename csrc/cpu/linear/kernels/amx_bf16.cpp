// AMX with BF16: the kernels on tiles. On these CPUs vdpbf16ps takes two cycles for 32 products, and
// tdpbf16ps sixteen for 8192: zeros are multiplied too, and it still pays.
#include "avx512_bf16_inl.h"
#include "tile_kernels.h"

namespace oats {
namespace {

// Every row of every tile has so many bytes.
constexpr int kRowBytes = 64;

TileState configure(int rows) {
  // Tiles 6 and 7 hold cells, the others have the rows of x.
  return shape_tiles([rows](int tile) { return tile >= 6 ? static_cast<int>(kTileGroups) : rows; });
}

// Tiles 0 to 3 are sums: of one row tile and up to four strips, or of two row tiles and up to two strips.
// Four independent sums, so that a product does not wait for the one before it (52 cycles).
template <int RowTiles, int Strips>
struct Sums {
  static_assert(RowTiles <= 2 && RowTiles * Strips <= 4);

  static constexpr int row_tile(int tile) { return RowTiles == 1 ? 0 : tile / 2; }
  static constexpr int strip(int tile) { return RowTiles == 1 ? tile : tile % 2; }
  static constexpr bool has(int tile) { return row_tile(tile) < RowTiles && strip(tile) < Strips; }

  static void load(const float* sums, int rows, int64_t stride) {
    const auto at = [&](int tile) { return sums + row_tile(tile) * rows * stride + strip(tile) * 16; };
    _tile_loadd(0, at(0), stride * 4);
    if constexpr (has(1)) _tile_loadd(1, at(1), stride * 4);
    if constexpr (has(2)) _tile_loadd(2, at(2), stride * 4);
    if constexpr (has(3)) _tile_loadd(3, at(3), stride * 4);
  }

  static void store(float* sums, int rows, int64_t stride) {
    const auto at = [&](int tile) { return sums + row_tile(tile) * rows * stride + strip(tile) * 16; };
    _tile_stored(0, at(0), stride * 4);
    if constexpr (has(1)) _tile_stored(1, at(1), stride * 4);
    if constexpr (has(2)) _tile_stored(2, at(2), stride * 4);
    if constexpr (has(3)) _tile_stored(3, at(3), stride * 4);
  }

  // Sums += one tile of groups times one tile of inputs for each row tile. Row tiles are `next` units apart.
  [[gnu::always_inline]] static void add(const uint32_t* cells, int64_t stride, const uint32_t* inputs,
                                         int64_t next) {
    const int64_t bytes = stride * 4;
    _tile_loadd(4, inputs, kRowBytes);
    if constexpr (RowTiles == 2) _tile_loadd(5, inputs + next, kRowBytes);
    _tile_loadd(6, cells, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (RowTiles == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (Strips >= 2) {
      _tile_loadd(7, cells + 16, bytes);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (RowTiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (Strips >= 3) {
      _tile_loadd(6, cells + 32, bytes);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (Strips >= 4) {
      _tile_loadd(7, cells + 48, bytes);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
};

template <int RowTiles, int Strips>
void multiply_part(const uint32_t* cells, int64_t stride, int64_t tiles, const uint32_t* inputs, int rows,
                   bool accumulate, float* sums) {
  const int64_t input_tile = rows * kTileGroups;
  if (accumulate) {
    Sums<RowTiles, Strips>::load(sums, rows, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t t = 0; t < tiles; ++t) {
    Sums<RowTiles, Strips>::add(cells + t * kTileGroups * stride, stride, inputs + t * input_tile,
                                tiles * input_tile);
  }
  Sums<RowTiles, Strips>::store(sums, rows, stride);
}

void multiply(const uint32_t* cells, int strips, int64_t tiles, const uint32_t* inputs, int64_t row_tiles,
              int rows, bool accumulate, float* sums) {
  const int64_t stride = strips * 16, row_tile_inputs = tiles * rows * kTileGroups;
  int64_t row_tile = 0;
  const auto part = [&](auto height, auto width, int strip) {
    multiply_part<height, width>(cells + strip * 16, stride, tiles, inputs + row_tile * row_tile_inputs, rows,
                                 accumulate, sums + row_tile * rows * stride + strip * 16);
  };
  for (; row_tile + 2 <= row_tiles; row_tile += 2) {
    int strip = 0;
    for (; strip + 2 <= strips; strip += 2) part(Constant<2>{}, Constant<2>{}, strip);
    if (strip < strips) part(Constant<2>{}, Constant<1>{}, strip);
  }
  if (row_tile < row_tiles) {
    with_constant<kStripsPerBlock>(strips, [&](auto width) { part(Constant<1>{}, width, 0); });
  }
}

void sums_to_inputs(const float* sums, int64_t stride, int rows, uint32_t* inputs) {
  for (int row = 0; row < rows; ++row) {
    for (int i = 0; i < 8; ++i) {
      const float* pair = sums + row * stride + 2 * i;
      inputs[row * kTileGroups + i] = Avx512Bf16::pair(pair[0], pair[1]);
    }
  }
}

template <class Stored>
struct TileLoops {
  using Columns = ColumnLoops<Avx512Bf16, Stored>;
  using Strips = StripLoops<Stored>;
  static constexpr int kLanes = Avx512Bf16::lanes;

  static int64_t expand(const PackedHeader* weight, int64_t block, int64_t begin, int64_t end, int64_t value,
                        uint32_t* cells) {
    const int strips = strips_of_block(weight->strips, block);
    const auto* mask = Strips::masks(weight, block) + begin / Columns::kUnits * strips;
    typename Strips::Values values(weight, block, value);
    for (int64_t g = begin; g < end; g += kTileGroups) {
      const int64_t groups = std::min(end - g, kTileGroups);
      Columns::gather_cells(weight, block, g, groups, mask, values, cells);
      mask += divide_up(groups, Columns::kUnits) * strips;
      finish_tile(cells, groups, strips);
      cells += kTileGroups * strips * kLanes;
    }
    return values.index();
  }

  // The most row tiles that expand_and_multiply() takes.
  static constexpr int kFewRowTiles = Strips::kCodes ? 1 : 2;

  // Multiplies cells as soon as they fill a tile: the products of one tile run beside the expansion of the
  // next.
  static void expand_and_multiply(const PackedHeader* weight, int64_t block, const uint32_t* inputs,
                                  int64_t row_tiles, int rows, float* sums) {
    if constexpr (kFewRowTiles > 1) {
      if (row_tiles == 2) return by_pairs(weight, block, inputs, rows, sums);
    }
    with_constant<kStripsPerBlock>(strips_of_block(weight->strips, block), [&](auto strips) {
      constexpr int kStrips = decltype(strips)::value;
      alignas(64) uint32_t cells[2][kTileGroups * kStrips * kLanes];
      const auto* mask = Strips::masks(weight, block);
      typename Strips::Values values(weight, block, 0);
      Sums<1, kStrips>::load(sums, rows, kStrips * kLanes);
      for (int64_t g = 0, t = 0; g < weight->groups; g += kTileGroups, ++t, inputs += rows * kTileGroups) {
        const int64_t groups = std::min(weight->groups - g, kTileGroups);
        uint32_t* const tile = cells[t % 2];
        Columns::gather_cells(weight, block, g, groups, mask, values, tile);
        mask += divide_up(groups, Columns::kUnits) * kStrips;
        finish_tile(tile, groups, kStrips);
        Sums<1, kStrips>::add(tile, kStrips * kLanes, inputs, 0);
      }
      Sums<1, kStrips>::store(sums, rows, kStrips * kLanes);
    });
  }

  // The same for two row tiles. Their sums leave room for two strips, so this passes over the block once for
  // each pair of strips.
  static void by_pairs(const PackedHeader* weight, int64_t block, const uint32_t* inputs, int rows,
                       float* sums) {
    const int strips = strips_of_block(weight->strips, block);
    for (int first = 0; first < strips; first += 2) {
      if (first + 1 < strips) {
        some_strips<2>(weight, block, strips, first, inputs, rows, sums);
      } else {
        some_strips<1>(weight, block, strips, first, inputs, rows, sums);
      }
    }
  }

  template <int Width>
  static void some_strips(const PackedHeader* weight, int64_t block, int strips, int first,
                          const uint32_t* inputs, int rows, float* sums) {
    alignas(64) uint32_t cells[2][kTileGroups * Width * kLanes];
    const auto* mask = Strips::masks(weight, block);
    const auto* values = typename Strips::Values(weight, block, 0).source(mask, 0, nullptr).values;
    const int64_t tiles = divide_up(weight->groups, kTileGroups), tile_units = rows * kTileGroups;
    Sums<2, Width>::load(sums + first * kLanes, rows, strips * kLanes);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t groups = std::min(weight->groups - t * kTileGroups, kTileGroups);
      uint32_t* const tile = cells[t % 2];
      uint32_t* next = tile;
      for (int64_t g = 0; g < groups; ++g) {
        for (int s = 0; s < strips; ++s) {
          const auto m = *mask++;
          if (s >= first && s < first + Width) {
            Avx512Bf16::store_units(next, Avx512Bf16::expand(values, m));
            __builtin_prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes);
            next += kLanes;
          }
          values += __builtin_popcount(m);
        }
      }
      finish_tile(tile, groups, Width);
      const int64_t range = t / kRangeTiles * kRangeTiles, in_range = std::min(kRangeTiles, tiles - range);
      Sums<2, Width>::add(tile, Width * kLanes, inputs + (range + t) * tile_units, in_range * tile_units);
    }
    Sums<2, Width>::store(sums + first * kLanes, rows, strips * kLanes);
  }

  // Fills the tile up with zeros. The asm tells the compiler that a tile load reads these stores.
  static void finish_tile(uint32_t* tile, int64_t groups, int strips) {
    std::fill(tile + groups * strips * kLanes, tile + kTileGroups * strips * kLanes, 0u);
    asm volatile("" : : "r"(tile) : "memory");
  }

  static const uint32_t* dense(const DenseBlock& matrix, int64_t begin, int64_t end, uint32_t* room) {
    const int64_t units = matrix.strips * kLanes;  // in a group
    if constexpr (Strips::kCodes) {
      Columns::exact_cells(matrix, 0, matrix.strips, begin, end, room, units);
    } else {
      const uint32_t* stored = static_cast<const uint32_t*>(matrix.cells) + begin * units;
      if ((end - begin) % kTileGroups == 0) return stored;
      std::copy_n(stored, (end - begin) * units, room);
    }
    const int64_t padded = divide_up(end - begin, kTileGroups) * kTileGroups;
    std::fill(room + (end - begin) * units, room + padded * units, 0u);
    return room;
  }

  static const TileKernels& table(int64_t min_batch) {
    static const TileKernels kernels{min_batch,           kFewRowTiles, configure, restore_tiles, expand,
                                     expand_and_multiply, dense,        multiply,  sums_to_inputs};
    return kernels;
  }
};

}  // namespace

const TileKernels& tile_kernels_amx_bf16(Storage storage) {
  return storage == Storage::exact ? TileLoops<Avx512Bf16>::table(2) : TileLoops<Avx512Codes>::table(112);
}

}  // namespace oats
