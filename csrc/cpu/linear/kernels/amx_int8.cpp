// AMX with INT8: products with codes for some columns, up to where the conversion to bf16 pays. Sixteen
// groups of cells of one strip are the right-hand tile of tdpbsud: 16 rows of 16 outputs x 4 inputs. The
// left-hand tile has two rows for each of up to eight columns: the upper and the lower bytes of
// kScaledColumns inputs. So few columns need one product for each strip, and one tile store: those cost as
// much as products.
//
// Scaled activations of this file are [ceil(inputs / kScaledColumns)][columns][upper, lower][kScaledColumns].
#include "avx512_bf16_inl.h"
#include "tile_state.h"

namespace oats {
namespace {

struct ByteTiles {
  using Strips = StripLoops<Avx512Codes>;
  static constexpr int kLanes = Strips::kLanes, kCell = Strips::kCell;
  static constexpr int64_t kTileGroups = 16, kMostGroups = Strips::kMostScaledGroups;
  static constexpr int64_t kColumnBytes = 2 * kScaledColumns;  // of the inputs of one tile
  static constexpr int kMostColumns = 8;                       // of a row tile

  // How the columns are cut into row tiles, as even as possible. The last ends with the last column; what it
  // shares with the one before is computed twice.
  struct Cut {
    int tiles, columns;
    explicit Cut(int all)
        : tiles((all + kMostColumns - 1) / kMostColumns), columns((all + tiles - 1) / tiles) {}
  };

  // While this lives, tile 0 has two rows for each column of a row tile, and tiles 4 to 7 have its sums with
  // four strips. Tiles 2 and 3 hold cells.
  struct Shaped {
    TileState before;
    explicit Shaped(const Cut& cut)
        : before(shape_tiles(
              [rows = 2 * cut.columns](int tile) { return tile == 2 || tile == 3 ? 16 : rows; })) {}
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

  // sums += cells times all columns, for `groups` groups from `g` on, at most one set that shares a scale.
  // The cells behind the last meet zeros, up to a whole tile. `scales` are those of the strips.
  template <int Strips>
  static void multiply(const void* cells, int64_t g, int64_t groups, const uint16_t* scales, Activations x,
                       int columns, Cut cut, Ahead ahead, float* sums) {
    const char* inputs = bytes_of(x, g / kTileGroups, columns, 0);
    const XScale* x_scales = x.scales + g * Avx512Codes::group / x.scale_columns * columns;
    alignas(64) int32_t products[Strips][2 * kMostColumns * kLanes];
    for (int tile = 0, done = 0; tile < cut.tiles; ++tile) {
      const int end = std::min((tile + 1) * cut.columns, columns), first = end - cut.columns;
      tile_products<Strips>(static_cast<const char*>(cells), groups, inputs + first * kColumnBytes,
                            columns * kColumnBytes, tile == 0 ? ahead : Ahead{}, products);
      __m512 scale[Strips];
      for (int s = 0; s < Strips; ++s) scale[s] = Avx512Codes::scales(scales + s * kLanes);
      for (int column = done; column < end; ++column) {
        const XScale of_x = x_scales[column];
#pragma GCC unroll 4
        for (int s = 0; s < Strips; ++s) {
          const int32_t* upper = products[s] + (column - first) * 2 * kLanes;
          const Avx512Codes::Sum sum{
              _mm512_load_si512(upper),
              _mm512_add_epi32(_mm512_load_si512(upper + kLanes), _mm512_set1_epi32(of_x.minus_128_sums))};
          float* out = sums + (column * Strips + s) * kLanes;
          _mm512_storeu_ps(out, Avx512Codes::add_scaled(_mm512_loadu_ps(out), sum,
                                                        Avx512Codes::times(scale[s], of_x.scale)));
        }
      }
      done = end;
    }
  }

  // Products of the upper and of the lower bytes of each column, in turns.
  template <int Strips>
  static void tile_products(const char* cells, int64_t groups, const char* inputs, int64_t next, Ahead ahead,
                            int32_t (*products)[2 * kMostColumns * kLanes]) {
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
    const Cut cut(columns);
    const Shaped shaped(cut);
    with_constant<kStripsPerBlock>(strips_of_block(weight->strips, block), [&](auto strips) {
      const int64_t groups = weight->value_groups, range = Strips::scaled_groups(x);
      const auto* mask = Strips::masks(weight, block);
      Strips::Values values(weight, block, 0);
      std::fill_n(sums, columns * strips * kLanes, 0.f);
      alignas(64) int8_t codes[kMostGroups * strips * kCell + Strips::kSpare];
      alignas(64) uint32_t cells[kMostGroups * strips * kLanes] = {};
      for (int64_t g = 0; g < groups; g += range) {
        const int64_t count = std::min(range, groups - g);
        const Strips::Kept begin = values.source(mask + g * strips, count * strips, codes);
        Strips::Expanding source{begin, cells};
        for (int64_t i = 0; i < count; ++i) {
          __m512i unused[strips];
          source.next(unused);
        }
        values.used(begin, source.kept);
        multiply<strips>(cells, g, count, Strips::value_scales(weight, block, g), x, columns, cut, {}, sums);
      }
    });
  }

  static void dense(const DenseBlock& matrix, int64_t inputs, Activations x, int columns, bool accumulate,
                    float* sums) {
    const Cut cut(columns);
    const Shaped shaped(cut);
    with_constant<kStripsPerBlock>(matrix.strips, [&](auto strips) {
      const int64_t groups = divide_up(inputs, Avx512Codes::group), range = Strips::scaled_groups(x);
      if (!accumulate) std::fill_n(sums, columns * strips * kLanes, 0.f);
      alignas(64) int8_t codes[kMostGroups * strips * kCell + Strips::kSpare];
      const int bits = storage_bits(matrix.storage, Dtype::bf16);
      const int distance = bits < 8 ? kPrefetchBytes / 2 : kPrefetchBytes;
      for (int64_t g = 0; g < groups; g += range) {
        const int64_t count = std::min(range, groups - g);
        const Ahead ahead{static_cast<const char*>(matrix.cells) + g * strips * kCell * bits / 8 + distance,
                          bits * 2};
        const int8_t* cells = Strips::dense_codes(matrix, g, count, codes, false);
        if (!has_codebook(matrix.storage) && count % kTileGroups != 0) {
          std::memcpy(codes, cells, static_cast<size_t>(count * strips * kCell));
          cells = codes;
        }
        multiply<strips>(cells, g, count,
                         matrix.scales + g * Avx512Codes::group / matrix.scale_columns * strips * kLanes, x,
                         columns, cut, ahead, sums);
      }
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
        out.scales[i * columns + c] = Avx512Codes::quantise_bytes(
            rows + c * stride + first, count, bytes_of(out, first / kScaledColumns, columns, c),
            columns * kColumnBytes);
      }
    }
  }

  static void sums_to_activations(const float* sums, int strips, int columns, Activations out) {
    for (int c = 0; c < columns; ++c) {
      out.scales[c] = Avx512Codes::quantise_bytes(sums + c * strips * kLanes, strips * kLanes,
                                                  bytes_of(out, 0, columns, c), 0);
    }
  }

  static constexpr StripKernels kKernels{Strips::kLayout,     true,         prepare, sparse, dense,
                                         sums_to_activations, Strips::store};
};

}  // namespace

const StripKernels& byte_tile_kernels() {
  return ByteTiles::kKernels;
}

}  // namespace oats
