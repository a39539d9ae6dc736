// Attention of many queries on tiles. A group of keys or values in a page is what tdpbf16ps takes as its
// right side, so both are read from where they lie.
#include <immintrin.h>

#include "../linear/kernels/tile_kernels.h"
#include "kernels_inl.h"

namespace oats {
namespace {

constexpr int64_t kSide = 16;                    // of a tile: queries, tokens or dimensions
constexpr int64_t kPairs = 16;                   // inputs of a tile are so many pairs
constexpr int64_t kPageBytes = kPageTokens * 4;  // of scores of one query, of a pair of dimensions of keys
constexpr int64_t kPagePairs = kPageTokens / 2;

using Loops = DecoderLoops<uint16_t>;

// With fewer queries, reading the cache takes as long as the products.
constexpr int kFewRows = 6;

// scores [32][kPageTokens] = queries times the keys of a page.
void scores_of(const uint32_t* queries, int64_t pairs, const uint32_t* keys, float* scores) {
  const int64_t query_bytes = pairs * 4;
  for (int64_t t = 0; t < kPageTokens; t += 2 * kSide) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < pairs; i += kPairs) {
      _tile_loadd(4, queries + i, query_bytes);
      _tile_loadd(5, queries + kSide * pairs + i, query_bytes);
      _tile_loadd(6, keys + i * kPageTokens + t, kPageBytes);
      _tile_loadd(7, keys + i * kPageTokens + t + kSide, kPageBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    float* const below = scores + kSide * kPageTokens;
    _tile_stored(0, scores + t, kPageBytes);
    _tile_stored(1, scores + t + kSide, kPageBytes);
    _tile_stored(2, below + t, kPageBytes);
    _tile_stored(3, below + t + kSide, kPageBytes);
  }
}

// sums [32][head_dim] += weights times the first `steps` times 32 values of a page.
void add_values(const float* weights, int64_t steps, const uint32_t* values, int64_t head_dim, float* sums) {
  const int64_t row_bytes = head_dim * 4;
  float* const below = sums + kSide * head_dim;
  const auto* const weights_below = weights + kSide * kPageTokens;
  for (int64_t d = 0; d < head_dim; d += 2 * kSide) {
    _tile_loadd(0, sums + d, row_bytes);
    _tile_loadd(1, sums + d + kSide, row_bytes);
    _tile_loadd(2, below + d, row_bytes);
    _tile_loadd(3, below + d + kSide, row_bytes);
    for (int64_t i = 0; i < steps; ++i) {
      _tile_loadd(4, weights + i * kPairs, kPageBytes);
      _tile_loadd(5, weights_below + i * kPairs, kPageBytes);
      _tile_loadd(6, values + i * kPairs * head_dim + d, row_bytes);
      _tile_loadd(7, values + i * kPairs * head_dim + d + kSide, row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums + d, row_bytes);
    _tile_stored(1, sums + d + kSide, row_bytes);
    _tile_stored(2, below + d, row_bytes);
    _tile_stored(3, below + d + kSide, row_bytes);
  }
}

}  // namespace

void attend_amx_bf16(const AttentionUnit& unit) {
  static_assert(kQueryRows == 2 * kSide);
  if (unit.rows <= kFewRows || unit.head_dim % (2 * kPairs)) return Loops::attend(unit);
  alignas(64) float scores[kQueryRows * kPageTokens] = {};
  // The values of a page that is not full, with zeros behind them: a token's weight is zero there, but what
  // lies in the page may be no number.
  alignas(64) uint32_t last_values[kPagePairs * kMostHeadDim];
  const TileKernels& tiles = tile_kernels_amx_bf16(Storage::exact);
  const TileState before = tiles.configure(static_cast<int>(kSide));
  Loops::begin_attention(unit);
  for (int64_t page = unit.begin / kPageTokens; page * kPageTokens < unit.end; ++page) {
    if (unit.pages[page] < 0) continue;  // it left the window
    const char* keys = unit.cache + unit.pages[page] * unit.page_bytes;
    const auto* values = reinterpret_cast<const uint32_t*>(keys + unit.values_bytes);
    const int64_t begin = page * kPageTokens, pairs = divide_up(std::min(unit.end - begin, kPageTokens), 2);
    scores_of(static_cast<const uint32_t*>(unit.queries), unit.head_dim / 2,
              reinterpret_cast<const uint32_t*>(keys), scores);
    for (int r = 0; r < unit.rows; ++r) Loops::to_weights(unit, r, begin, scores + r * kPageTokens);
    const int64_t steps = divide_up(pairs, kPairs);
    if (pairs % kPairs) {
      std::copy_n(values, pairs * unit.head_dim, last_values);
      std::fill(last_values + pairs * unit.head_dim, last_values + steps * kPairs * unit.head_dim, 0u);
      values = last_values;
    }
    // Tile loads read both, which GCC does not know.
    asm volatile("" : : "r"(scores), "r"(values) : "memory");
    add_values(scores, steps, values, unit.head_dim, unit.sums);
  }
  tiles.restore(before);
}

}  // namespace oats
