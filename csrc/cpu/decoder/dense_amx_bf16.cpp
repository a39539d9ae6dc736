// Dense products of many columns on tiles. tdpbf16ps multiplies 16 columns x 32 inputs with 32 inputs x 16
// outputs. Weights are turned into such tiles a block at a time; then all columns pass.
#include <immintrin.h>

#include <algorithm>

#include "../linear/kernels/avx512_inl.h"
#include "../linear/kernels/tile_kernels.h"
#include "kernels.h"

namespace oats {
namespace {

constexpr int64_t kSide = 16;    // columns or outputs of a tile
constexpr int64_t kInputs = 32;  // inputs of a tile
constexpr int64_t kTile = kSide * kSide;
constexpr int64_t kRowBytes = 64;

// What is multiplied before the next inputs: all columns of a panel times a block of outputs. Weights (256
// KB), columns (1 MB) and sums (256 KB) fit into L2.
constexpr int64_t kBlock = 128;  // outputs
constexpr int64_t kPanel = 512;  // columns
constexpr int64_t kRange = 32;   // tiles of inputs

__mmask32 first_inputs(int64_t count) {
  return static_cast<__mmask32>(~0u >> (kInputs - std::min(kInputs, count)));
}

int64_t input_units(int64_t columns, int64_t d_in) {
  return divide_up(columns, kSide) * divide_up(d_in, kInputs) * kTile;
}

// [tile of columns][tile of inputs][column][pair of inputs], with zeros at the ends. A part has its share of
// the tiles of inputs.
void prepare(const void* x, int64_t columns, int64_t x_stride, int64_t d_in, int part, int parts,
             uint32_t* out) {
  const int64_t tiles = divide_up(d_in, kInputs);
  for (int64_t column = 0; column < divide_up(columns, kSide) * kSide; ++column) {
    const uint16_t* row = static_cast<const uint16_t*>(x) + column * x_stride;
    uint32_t* to = out + (column / kSide * tiles * kSide + column % kSide) * kSide;
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
      const __mmask32 valid = column < columns ? first_inputs(d_in - t * kInputs) : 0;
      _mm512_storeu_si512(to + t * kTile, _mm512_maskz_loadu_epi16(valid, row + t * kInputs));
    }
  }
}

// Fetches the weights of some outputs and inputs, a line at a time.
struct Fetch {
  const char* row;
  int64_t stride, bytes, rows, at = 0;

  void line() {
    if (rows == 0) return;
    __builtin_prefetch(row + at, 0, 2);
    at += 64;
    if (at < bytes) return;
    at = 0;
    row += stride;
    --rows;
  }
};

struct Block {
  const DecoderLinear& linear;
  int64_t row, outputs;  // whole pairs of tiles

  const uint16_t* weight(int64_t output, int64_t tile) const {
    return static_cast<const uint16_t*>(linear.dense) + (row + output) * linear.d_in + tile * kInputs;
  }

  Fetch fetch(int64_t begin, int64_t end) const {
    return {reinterpret_cast<const char*>(weight(0, begin)), linear.d_in * 2,
            (std::min(end * kInputs, linear.d_in) - begin * kInputs) * 2, outputs};
  }

  // Tiles [begin, end) of inputs as [tile of outputs][tile of inputs][pair of inputs][output].
  void turn(int64_t begin, int64_t end, uint32_t* out) const {
    for (int64_t i = 0; i < outputs; i += kSide) {
      for (int64_t t = begin; t < end; ++t, out += kTile) {
        const __mmask32 valid = first_inputs(linear.d_in - t * kInputs);
        __m512i square[kSide];
        for (int64_t j = 0; j < kSide; ++j) square[j] = _mm512_maskz_loadu_epi16(valid, weight(i + j, t));
        transpose_units(square);
        for (int64_t j = 0; j < kSide; ++j) _mm512_storeu_si512(out + j * kSide, square[j]);
      }
    }
    asm volatile("" : : "r"(out) : "memory");  // tile loads read it, which GCC does not know
  }
};

// sums [column][32 outputs] of `Tall` tiles of columns (+)= columns times weights, `count` tiles of inputs.
// The second tile of columns is `next` units behind the first; a tile of outputs is `count` tiles.
template <int Tall>
void multiply_tiles(const uint32_t* columns, int64_t next, const uint32_t* weights, int64_t count,
                    bool accumulate, float* sums, Fetch& fetch, int64_t lines) {
  constexpr int64_t kSumBytes = 2 * kSide * 4, kBelow = 2 * kTile;
  if (accumulate) {
    _tile_loadd(0, sums, kSumBytes);
    _tile_loadd(1, sums + kSide, kSumBytes);
    if constexpr (Tall == 2) {
      _tile_loadd(2, sums + kBelow, kSumBytes);
      _tile_loadd(3, sums + kBelow + kSide, kSumBytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t t = 0; t < count; ++t) {
    _tile_loadd(4, columns + t * kTile, kRowBytes);
    _tile_loadd(6, weights + t * kTile, kRowBytes);
    _tile_loadd(7, weights + (count + t) * kTile, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Tall == 2) {
      _tile_loadd(5, columns + next + t * kTile, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    for (int64_t line = 0; line < lines; ++line) fetch.line();
  }
  _tile_stored(0, sums, kSumBytes);
  _tile_stored(1, sums + kSide, kSumBytes);
  if constexpr (Tall == 2) {
    _tile_stored(2, sums + kBelow, kSumBytes);
    _tile_stored(3, sums + kBelow + kSide, kSumBytes);
  }
}

// Sums of 32 outputs, with their bias, to `columns` rows of y.
void finish(const float* sums, const uint16_t* bias, int64_t columns, uint16_t* y, int64_t y_stride) {
  const __m512 low = bias ? load_values(bias) : _mm512_setzero_ps();
  const __m512 high = bias ? load_values(bias + kSide) : _mm512_setzero_ps();
  for (int64_t i = 0; i < columns; ++i, sums += 2 * kSide) {
    _mm512_storeu_si512(y + i * y_stride,
                        (__m512i)_mm512_cvtne2ps_pbh(_mm512_add_ps(_mm512_loadu_ps(sums + kSide), high),
                                                     _mm512_add_ps(_mm512_loadu_ps(sums), low)));
  }
}

// A block for one panel of columns. `next` is the block that comes after it, or this one again.
void multiply_block(const Block& block, const Block& next, const uint32_t* inputs, int64_t columns,
                    uint32_t* weights, float* sums, uint16_t* y, int64_t y_stride) {
  const int64_t tiles = divide_up(block.linear.d_in, kInputs), column_tiles = divide_up(columns, kSide);
  const int64_t pairs = block.outputs / (2 * kSide), steps = divide_up(column_tiles, 2) * pairs;
  const auto* bias = static_cast<const uint16_t*>(block.linear.bias);
  for (int64_t begin = 0; begin < tiles; begin += kRange) {
    const int64_t end = std::min(begin + kRange, tiles), count = end - begin;
    block.turn(begin, end, weights);
    Fetch fetch = end < tiles ? block.fetch(end, std::min(end + kRange, tiles))
                              : next.fetch(0, std::min(kRange, tiles));
    const int64_t lines = divide_up(fetch.rows * divide_up(fetch.bytes, 64), steps * count);
    for (int64_t c = 0; c < column_tiles; c += 2) {
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const uint32_t* of_columns = inputs + (c * tiles + begin) * kTile;
        const uint32_t* of_outputs = weights + pair * 2 * count * kTile;
        float* out = sums + (pair * column_tiles + c) * 2 * kTile;
        if (c + 1 < column_tiles) {
          multiply_tiles<2>(of_columns, tiles * kTile, of_outputs, count, begin > 0, out, fetch, lines);
        } else {
          multiply_tiles<1>(of_columns, tiles * kTile, of_outputs, count, begin > 0, out, fetch, lines);
        }
        if (end < tiles) continue;
        const int64_t row = block.row + pair * 2 * kSide;
        finish(out, bias ? bias + row : nullptr, std::min(2 * kSide, columns - c * kSide),
               y + c * kSide * y_stride + row, y_stride);
      }
    }
  }
}

int64_t multiply(const DecoderLinear& linear, int64_t begin, int64_t end, const uint32_t* inputs,
                 int64_t columns, uint32_t* weights, float* sums, void* y, int64_t y_stride) {
  const TileKernels& tiles = tile_kernels_amx_bf16(Storage::exact);
  const TileState before = tiles.configure(kSide);
  const int64_t last = begin + (end - begin) / (2 * kSide) * (2 * kSide);
  const auto block = [&](int64_t row) { return Block{linear, row, std::min(kBlock, last - row)}; };
  for (int64_t first = 0; first < columns; first += kPanel) {
    for (int64_t row = begin; row < last; row += kBlock) {
      multiply_block(block(row), block(row + kBlock < last ? row + kBlock : row),
                     inputs + input_units(first, linear.d_in), std::min(columns - first, kPanel), weights,
                     sums, static_cast<uint16_t*>(y) + first * y_stride, y_stride);
    }
  }
  tiles.restore(before);
  return last;
}

}  // namespace

const DenseTiles& dense_tiles_amx_bf16() {
  static const DenseTiles tiles{32, kBlock * kRange * kSide, kBlock * kPanel, input_units, prepare, multiply};
  return tiles;
}

}  // namespace oats
