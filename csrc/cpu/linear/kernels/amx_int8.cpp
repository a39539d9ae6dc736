// AMX with INT8: products with codes for some columns, up to where the conversion to bf16 pays. Sixteen
// groups of cells of one strip are the right-hand tile of tdpbsud: 16 rows of 16 outputs x 4 inputs. The
// left-hand tile has two rows for each of up to eight columns: the upper and the lower bytes of
// kScaledColumns inputs. So few columns need one product for each strip, and one tile store: those cost as
// much as products. Activations that are rounded to one byte have one row for each column.
//
// Scaled activations of this file are [ceil(inputs / kScaledColumns)][columns][bytes of one][kScaledColumns].
#include "avx512_bf16_inl.h"
#include "tile_state.h"

namespace oats {
namespace {

template <int Bytes>
struct ByteTiles {
  using Strips = StripLoops<Avx512Codes>;
  static constexpr int kLanes = Strips::kLanes, kCell = Strips::kCell;
  static constexpr int64_t kTileGroups = 16, kMostGroups = Strips::kMostScaledGroups;
  static constexpr int64_t kColumnBytes = Bytes * kScaledColumns;  // of the inputs of one tile
  static constexpr int kMostColumns = 16 / Bytes;                  // of a row tile

  // How the columns are cut into row tiles, as even as possible. The last ends with the last column; what it
  // shares with the one before is computed twice.
  struct Cut {
    int tiles, columns;
    explicit Cut(int all)
        : tiles((all + kMostColumns - 1) / kMostColumns), columns((all + tiles - 1) / tiles) {}
  };

  // While this lives, tile 0 has `Bytes` rows for each column of a row tile, and tiles 4 to 7 have its sums
  // with four strips. Tiles 2 and 3 hold cells.
  struct Shaped {
    TileState before;
    explicit Shaped(const Cut& cut)
        : before(shape_tiles(
              [rows = Bytes * cut.columns](int tile) { return tile == 2 || tile == 3 ? 16 : rows; })) {}
    ~Shaped() { restore_tiles(before); }
    Shaped(const Shaped&) = delete;
    Shaped& operator=(const Shaped&) = delete;
  };

  // Memory that is fetched between the products, some lines at each: a CPU has few lines under way.
  struct Ahead {
    const char* at = nullptr;
    int lines = 0;
    void fetch() {
      for (int i = 0; i < lines; ++i, at += 64) __builtin_prefetch(at);
    }
  };

  // sums += a block of `groups` groups times all columns. cells_of(g, count) returns the cells of groups from
  // `g` on, valid until it is called again. What lies behind the last meets zeros, up to a whole tile.
  // scales_of(g) are the scales of group `g`, and ahead_of(g) is what is fetched while it is multiplied.
  template <int Strips, class CellsOf, class ScalesOf, class AheadOf>
  static void add_block(int64_t groups, Activations x, int columns, const CellsOf& cells_of,
                        const ScalesOf& scales_of, const AheadOf& ahead_of, float* sums) {
    const Cut cut(columns);
    const Shaped shaped(cut);
    const int64_t set = StripLoops<Avx512Codes>::scaled_groups(x);
    for (int64_t g = 0; g < groups; g += set) {
      const int64_t count = std::min(set, groups - g);
      const auto* cells = reinterpret_cast<const char*>(cells_of(g, count));
      Ahead ahead = ahead_of(g);
      ahead.lines = (ahead.lines + cut.tiles - 1) / cut.tiles;
      for (int tile = 0; tile < cut.tiles; ++tile)
        multiply<Strips>(cells, g, count, scales_of(g), x, columns, cut, tile, ahead, sums);
    }
  }

  // sums += cells of `groups` groups from `g` on, at most one set that shares a scale, times one row tile.
  template <int Strips>
  static void multiply(const char* cells, int64_t g, int64_t groups, const uint16_t* scales, Activations x,
                       int columns, Cut cut, int tile, Ahead& ahead, float* sums) {
    const XScale* x_scales = x.scales + g * Avx512Codes::group / x.scale_columns * columns;
    const int done = tile * cut.columns, end = std::min(done + cut.columns, columns);
    const int first = end - cut.columns;
    alignas(64) int32_t products[Strips][16 * kLanes];
    tile_products<Strips>(cells, groups, bytes_of(x, g / kTileGroups, columns, first), columns * kColumnBytes,
                          ahead, products);
    __m512 scale[Strips];
    for (int s = 0; s < Strips; ++s) scale[s] = Avx512Codes::scales(scales + s * kLanes);
    for (int column = done; column < end; ++column) {
      const XScale of_x = x_scales[column];
#pragma GCC unroll 4
      for (int s = 0; s < Strips; ++s) {
        const int32_t* product = products[s] + (column - first) * Bytes * kLanes;
        __m512i sum = _mm512_add_epi32(_mm512_load_si512(product + (Bytes - 1) * kLanes),
                                       _mm512_set1_epi32(of_x.minus_128_sums));
        if constexpr (Bytes == 2)
          sum = _mm512_add_epi32(sum, _mm512_slli_epi32(_mm512_load_si512(product), 8));
        float* out = sums + (column * Strips + s) * kLanes;
        _mm512_storeu_ps(out,
                         _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), Avx512Codes::times(scale[s], of_x.scale),
                                         _mm512_loadu_ps(out)));
      }
    }
  }

  // Products of each row of the tile: of two bytes, the upper ones come first.
  template <int Strips>
  static void tile_products(const char* cells, int64_t groups, const char* inputs, int64_t next, Ahead& ahead,
                            int32_t (*products)[16 * kLanes]) {
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (; groups > 0; groups -= kTileGroups, inputs += next, cells += kTileGroups * Strips * kCell) {
      _tile_loadd(0, inputs, kScaledColumns);
      _tile_loadd(2, cells, Strips * kCell);
      _tile_dpbsud(4, 0, 2);
      ahead.fetch();
      if constexpr (Strips >= 2) {
        _tile_loadd(3, cells + kCell, Strips * kCell);
        _tile_dpbsud(5, 0, 3);
        ahead.fetch();
      }
      if constexpr (Strips >= 3) {
        _tile_loadd(2, cells + 2 * kCell, Strips * kCell);
        _tile_dpbsud(6, 0, 2);
        ahead.fetch();
      }
      if constexpr (Strips >= 4) {
        _tile_loadd(3, cells + 3 * kCell, Strips * kCell);
        _tile_dpbsud(7, 0, 3);
        ahead.fetch();
      }
    }
    _tile_stored(4, products[0], kLanes * 4);
    if constexpr (Strips >= 2) _tile_stored(5, products[1], kLanes * 4);
    if constexpr (Strips >= 3) _tile_stored(6, products[2], kLanes * 4);
    if constexpr (Strips >= 4) _tile_stored(7, products[3], kLanes * 4);
    // The compiler does not see that these wrote the products.
    asm volatile("" : : "r"(products) : "memory");
  }

  static void sparse(const PackedHeader* weight, int64_t block, Activations x, int columns, float* sums) {
    with_constant<kStripsPerBlock>(strips_of_block(weight->strips, block), [&](auto strips) {
      const auto* mask = Strips::masks(weight, block);
      typename Strips::Values values(weight, block, 0);
      alignas(64) int8_t codes[kMostGroups * strips * kCell + Strips::kSpare];
      alignas(64) uint32_t cells[kMostGroups * strips * kLanes] = {};
      const auto cells_of = [&](int64_t g, int64_t groups) {
        const typename Strips::Kept begin = values.source(mask + g * strips, groups * strips, codes);
        typename Strips::Expanding source{begin, cells};
        for (int64_t i = 0; i < groups; ++i) {
          __m512i unused[strips];
          source.next(unused);
        }
        values.used(begin, source.kept);
        return cells;
      };
      std::fill_n(sums, columns * strips * kLanes, 0.f);
      add_block<strips>(
          weight->value_groups, x, columns, cells_of,
          [&](int64_t g) { return Strips::value_scales(weight, block, g); }, [](int64_t) { return Ahead{}; },
          sums);
    });
  }

  static void dense(const DenseBlock& matrix, int64_t inputs, Activations x, int columns, bool accumulate,
                    float* sums) {
    with_constant<kStripsPerBlock>(matrix.strips, [&](auto strips) {
      alignas(64) int8_t codes[kMostGroups * strips * kCell + Strips::kSpare];
      const auto cells_of = [&](int64_t g, int64_t groups) {
        const int8_t* cells = Strips::dense_codes(matrix, g, groups, codes, false);
        if (has_codebook(matrix.storage) || groups % kTileGroups == 0) return cells;
        // A tile would reach behind the matrix.
        std::memcpy(codes, cells, static_cast<size_t>(groups * strips * kCell));
        return static_cast<const int8_t*>(codes);
      };
      const int bits = storage_bits(matrix.storage, Dtype::bf16);
      const int distance = bits < 8 ? kPrefetchBytes / 2 : kPrefetchBytes;
      if (!accumulate) std::fill_n(sums, columns * strips * kLanes, 0.f);
      add_block<strips>(
          divide_up(inputs, Avx512Codes::group), x, columns, cells_of,
          [&](int64_t g) {
            return matrix.scales + g * Avx512Codes::group / matrix.scale_columns * strips * kLanes;
          },
          [&](int64_t g) {
            return Ahead{static_cast<const char*>(matrix.cells) + g * strips * kCell * bits / 8 + distance,
                         bits * 2};
          },
          sums);
    });
  }

  static char* bytes_of(Activations x, int64_t set, int columns, int column) {
    return reinterpret_cast<char*>(x.units) + (set * columns + column) * kColumnBytes;
  }

  static void prepare(const void* x, int64_t stride, int64_t d_in, int columns, int, int64_t begin,
                      int64_t end, Activations out) {
    const auto* rows = static_cast<const uint16_t*>(x);
    const int64_t set = out.scale_columns;
    for (int64_t i = begin * 2 / set; i * set < end * 2; ++i) {
      const int64_t first = i * set, count = std::min(set, d_in - first);
      for (int c = 0; c < columns; ++c) {
        out.scales[i * columns + c] = Avx512Codes::quantise_bytes<Bytes>(
            rows + c * stride + first, count, bytes_of(out, first / kScaledColumns, columns, c),
            columns * kColumnBytes);
      }
    }
  }

  static void sums_to_activations(const float* sums, int strips, int columns, Activations out) {
    for (int c = 0; c < columns; ++c) {
      out.scales[c] = Avx512Codes::quantise_bytes<Bytes>(sums + c * strips * kLanes, strips * kLanes,
                                                         bytes_of(out, 0, columns, c), 0);
    }
  }

  static constexpr StripKernels kKernels{Strips::kLayout,     true,         prepare, sparse, dense,
                                         sums_to_activations, Strips::store};
};

}  // namespace

const StripKernels& byte_tile_kernels(bool one_byte) {
  return one_byte ? ByteTiles<1>::kKernels : ByteTiles<2>::kKernels;
}

}  // namespace oats
