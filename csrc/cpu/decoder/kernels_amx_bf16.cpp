// Dense products of many columns on tiles. tdpbf16ps multiplies 16 outputs x 32 inputs, read from where the
// weight lies, with 32 inputs x 16 columns, which prepare() lays out.
#include <immintrin.h>

#include <algorithm>

#include "../elements.h"
#include "../linear/kernels/avx512_inl.h"
#include "../linear/kernels/tile_kernels.h"
#include "kernels.h"

namespace oats {
namespace {

constexpr int64_t kSide = 16;    // outputs or columns of a tile
constexpr int64_t kInputs = 32;  // inputs of a tile
constexpr int64_t kTile = kSide * kSide;
constexpr int64_t kRowBytes = 64;

// What is multiplied before the next inputs: of a block of outputs, times all columns of a panel. Its weights
// (256 KB), inputs (1 MB) and sums (256 KB) fit into L2.
constexpr int64_t kBlock = 128;  // outputs
constexpr int64_t kPanel = 32;   // tiles of columns
constexpr int64_t kRange = 32;   // tiles of inputs

int64_t input_units(int64_t columns, int64_t d_in) {
  return divide_up(columns, kSide) * divide_up(d_in, kInputs) * kTile;
}

// Tiles [column tile][tile of inputs][pair of inputs][column]; a part has its share of the tiles of inputs.
void prepare(const void* x, int64_t columns, int64_t x_stride, int64_t d_in, int part, int parts,
             uint32_t* out) {
  const int64_t tiles = divide_up(d_in, kInputs);
  for (int64_t first = 0; first < columns; first += kSide, out += tiles * kTile) {
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
      const auto valid = static_cast<__mmask32>(~0u >> (kInputs - std::min(kInputs, d_in - t * kInputs)));
      const uint16_t* from = static_cast<const uint16_t*>(x) + first * x_stride + t * kInputs;
      __m512i square[kSide];
      for (int64_t i = 0; i < kSide; ++i) {
        square[i] = first + i < columns ? _mm512_maskz_loadu_epi16(valid, from + i * x_stride)
                                        : _mm512_setzero_si512();
      }
      transpose_units(square);
      for (int64_t i = 0; i < kSide; ++i) _mm512_storeu_si512(out + t * kTile + i * kSide, square[i]);
    }
  }
}

// Two tiles of outputs, where their weights lie. A last tile of fewer than 32 inputs is copied to `tail`,
// with zeros behind it.
struct Rows {
  const uint16_t* weight;
  int64_t stride;  // bytes
  int64_t tiles;
  const uint16_t* tail;  // or null
};

// sums [column][output tile] of one or two tiles of columns (+)= tiles [begin, end) of inputs.
template <int Wide>
void multiply_tiles(const Rows& rows, int64_t begin, int64_t end, const uint32_t* inputs, float* sums,
                    int64_t next) {
  if (begin == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kRowBytes);
    _tile_loadd(1, sums + kTile, kRowBytes);
    if constexpr (Wide == 2) {
      _tile_loadd(2, sums + next, kRowBytes);
      _tile_loadd(3, sums + next + kTile, kRowBytes);
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    const bool is_tail = rows.tail && t + 1 == rows.tiles;
    const char* weight = reinterpret_cast<const char*>(is_tail ? rows.tail : rows.weight + t * kInputs);
    const int64_t stride = is_tail ? kRowBytes : rows.stride;
    _tile_loadd(4, weight, stride);
    _tile_loadd(5, weight + kSide * stride, stride);
    _tile_loadd(6, inputs + t * kTile, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (Wide == 2) {
      _tile_loadd(7, inputs + (rows.tiles + t) * kTile, kRowBytes);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + kTile, kRowBytes);
  if constexpr (Wide == 2) {
    _tile_stored(2, sums + next, kRowBytes);
    _tile_stored(3, sums + next + kTile, kRowBytes);
  }
}

// One tile of sums, [output][column], to `columns` rows of y.
void finish(const float* sums, const uint16_t* bias, int64_t columns, uint16_t* y, int64_t y_stride) {
  __m512 square[kSide];
  for (int64_t i = 0; i < kSide; ++i) square[i] = _mm512_loadu_ps(sums + i * kSide);
  transpose_units(square);
  const __m512 b = bias ? load_values(bias) : _mm512_setzero_ps();
  for (int64_t i = 0; i < columns; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i * y_stride),
                        (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(square[i], b)));
  }
}

// A block's outputs [row, row + outputs), whole pairs of tiles, for one panel of columns.
void multiply_block(const DecoderLinear& linear, int64_t row, int64_t outputs, const uint32_t* inputs,
                    int64_t columns, float* sums, uint16_t* y, int64_t y_stride) {
  const int64_t d_in = linear.d_in, tiles = divide_up(d_in, kInputs), full = d_in / kInputs;
  const int64_t column_tiles = divide_up(columns, kSide), of_column = outputs * kSide;
  const auto* weight = static_cast<const uint16_t*>(linear.dense);
  alignas(64) uint16_t tails[kBlock * kInputs];
  if (full < tiles) {
    const auto valid = static_cast<__mmask32>(~0u >> (kInputs - (d_in - full * kInputs)));
    for (int64_t i = 0; i < outputs; ++i) {
      _mm512_store_si512(tails + i * kInputs,
                         _mm512_maskz_loadu_epi16(valid, weight + (row + i) * d_in + full * kInputs));
    }
    asm volatile("" : : "r"(tails) : "memory");  // tile loads read it, which GCC does not know
  }
  for (int64_t begin = 0; begin < tiles; begin += kRange) {
    const int64_t end = std::min(begin + kRange, tiles);
    for (int64_t c = 0; c < column_tiles; c += 2) {
      const uint32_t* of_columns = inputs + c * tiles * kTile;
      for (int64_t i = 0; i < outputs; i += 2 * kSide) {
        const Rows rows{weight + (row + i) * d_in, d_in * 2, tiles,
                        full < tiles ? tails + i * kInputs : nullptr};
        float* out = sums + c * of_column + i * kSide;
        if (c + 1 < column_tiles) {
          multiply_tiles<2>(rows, begin, end, of_columns, out, of_column);
        } else {
          multiply_tiles<1>(rows, begin, end, of_columns, out, of_column);
        }
      }
    }
  }
  const auto* bias = static_cast<const uint16_t*>(linear.bias);
  for (int64_t c = 0; c < column_tiles; ++c) {
    for (int64_t i = 0; i < outputs; i += kSide) {
      finish(sums + c * of_column + i * kSide, bias ? bias + row + i : nullptr,
             std::min(kSide, columns - c * kSide), y + c * kSide * y_stride + row + i, y_stride);
    }
  }
}

int64_t multiply(const DecoderLinear& linear, int64_t begin, int64_t end, const uint32_t* inputs,
                 int64_t columns, float* sums, void* y, int64_t y_stride) {
  const TileKernels& tiles = tile_kernels_amx_bf16(Storage::exact);
  const TileState before = tiles.configure(kSide);
  const int64_t last = begin + (end - begin) / (2 * kSide) * (2 * kSide);
  for (int64_t first = 0; first < columns; first += kPanel * kSide) {
    for (int64_t row = begin; row < last; row += kBlock) {
      multiply_block(linear, row, std::min(kBlock, last - row), inputs + input_units(first, linear.d_in),
                     std::min(columns - first, kPanel * kSide), sums,
                     static_cast<uint16_t*>(y) + first * y_stride, y_stride);
    }
  }
  tiles.restore(before);
  return last;
}

}  // namespace

const DecoderKernels& decoder_kernels_amx_bf16(Dtype dtype) {
  static const DenseTiles tiles{32, kBlock * kPanel * kSide, input_units, prepare, multiply};
  static const DecoderKernels kernels = [] {
    DecoderKernels all = decoder_kernels_avx512_bf16(Dtype::bf16);
    all.dense_tiles = &tiles;
    return all;
  }();
  return dtype == Dtype::bf16 ? kernels : decoder_kernels_avx512_bf16(dtype);
}

}  // namespace oats
