// Emulates the tile instructions of the core, after the Intel SDM, volume 2. `make test-sanitize` includes
// this before each file that uses them: it sees each access to memory, and runs these kernels on
// CPUs without AMX.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#define OATS_TILE_STATE
#include "linear/kernels/tile_state.h"

namespace oats {

struct Tiles {
  TileState state{};
  struct {
    uint8_t row[16][64];
  } tile[8];

  int rows(int t) const { return state.bytes[48 + t]; }
  int bytes(int t) const { return state.bytes[16 + 2 * t] | state.bytes[17 + 2 * t] << 8; }
  void require(bool holds, const char* what) const {
    if (holds) return;
    std::fprintf(stderr, "tiles: %s\n", what);
    std::abort();
  }
  void require_tile(int t) const {
    require(state.bytes[0] == 1 && rows(t) > 0 && rows(t) <= 16 && bytes(t) > 0 && bytes(t) <= 64,
            "a tile is used that is not configured");
  }
};

// One for all files: what configures the tiles lies in another file than the decoder's kernels.
inline thread_local Tiles emulated_tiles;

inline void load_state(const TileState& state) {
  emulated_tiles.state = state;
  std::memset(emulated_tiles.tile, 0, sizeof emulated_tiles.tile);
}

inline void store_state(TileState& state) {
  state = emulated_tiles.state;
}

inline void release_state() {
  load_state(TileState{});
}

namespace {

inline void emulated_loadd(int t, const void* base, int64_t stride) {
  emulated_tiles.require_tile(t);
  std::memset(&emulated_tiles.tile[t], 0, sizeof emulated_tiles.tile[t]);
  for (int row = 0; row < emulated_tiles.rows(t); ++row) {
    std::memcpy(emulated_tiles.tile[t].row[row], static_cast<const char*>(base) + row * stride,
                emulated_tiles.bytes(t));
  }
}

inline void emulated_stored(int t, void* base, int64_t stride) {
  emulated_tiles.require_tile(t);
  for (int row = 0; row < emulated_tiles.rows(t); ++row) {
    std::memcpy(static_cast<char*>(base) + row * stride, emulated_tiles.tile[t].row[row],
                emulated_tiles.bytes(t));
  }
}

inline void emulated_zero(int t) {
  emulated_tiles.require_tile(t);
  std::memset(&emulated_tiles.tile[t], 0, sizeof emulated_tiles.tile[t]);
}

// Not sanitized, because nine tenths of a run would be spent here; the loads and stores of tiles are.
__attribute__((no_sanitize_address, no_sanitize_undefined, optimize("O3"))) inline void emulated_multiply(
    const uint8_t (*a)[64], const uint8_t (*b)[64], int rows, int depth, int columns, uint8_t (*sums)[64]) {
  for (int row = 0; row < rows; ++row) {
    float sum[16];
    __builtin_memcpy(sum, sums[row], sizeof sum);
    for (int k = 0; k < depth; ++k) {
      for (int half = 0; half < 2; ++half) {
        // bf16 is the upper half of fp32.
        const int up = half ? 0 : 16;
        uint32_t x, w[16], bits[16];
        float value, weight[16];
        __builtin_memcpy(&x, a[row] + 4 * k, 4);
        __builtin_memcpy(w, b[k], sizeof w);
        x = x << up & 0xffff0000u;
        __builtin_memcpy(&value, &x, 4);
        for (int c = 0; c < 16; ++c) bits[c] = w[c] << up & 0xffff0000u;
        __builtin_memcpy(weight, bits, sizeof bits);
        for (int c = 0; c < columns; ++c) sum[c] += value * weight[c];
      }
    }
    __builtin_memcpy(sums[row], sum, sizeof sum);
  }
}

// The same for bytes: signed ones of `a`, unsigned ones of `b`.
__attribute__((no_sanitize_address, no_sanitize_undefined, optimize("O3"))) inline void
emulated_multiply_bytes(const uint8_t (*a)[64], const uint8_t (*b)[64], int rows, int depth, int columns,
                        uint8_t (*sums)[64]) {
  for (int row = 0; row < rows; ++row) {
    int32_t sum[16];
    __builtin_memcpy(sum, sums[row], sizeof sum);
    for (int k = 0; k < depth; ++k) {
      for (int c = 0; c < columns; ++c) {
        for (int i = 0; i < 4; ++i) sum[c] += static_cast<int8_t>(a[row][4 * k + i]) * b[k][4 * c + i];
      }
    }
    __builtin_memcpy(sums[row], sum, sizeof sum);
  }
}

inline Tiles& tiles_that_fit(int sums, int a, int b) {
  Tiles& t = emulated_tiles;
  for (const int each : {sums, a, b}) t.require_tile(each);
  t.require(t.rows(sums) == t.rows(a) && t.bytes(sums) == t.bytes(b) && t.bytes(a) == 4 * t.rows(b),
            "a product of tiles whose sizes do not fit");
  return t;
}

inline void emulated_dpbsud(int sums, int a, int b) {
  Tiles& t = tiles_that_fit(sums, a, b);
  emulated_multiply_bytes(t.tile[a].row, t.tile[b].row, t.rows(sums), t.rows(b), t.bytes(sums) / 4,
                          t.tile[sums].row);
}

inline void emulated_dpbf16ps(int sums, int a, int b) {
  Tiles& t = tiles_that_fit(sums, a, b);
  emulated_multiply(t.tile[a].row, t.tile[b].row, t.rows(sums), t.rows(b), t.bytes(sums) / 4,
                    t.tile[sums].row);
}

}  // namespace
}  // namespace oats

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadd(t, base, stride) emulated_loadd(t, base, stride)
#define _tile_stored(t, base, stride) emulated_stored(t, base, stride)
#define _tile_zero(t) emulated_zero(t)
#define _tile_dpbf16ps(sums, a, b) emulated_dpbf16ps(sums, a, b)
#define _tile_dpbsud(sums, a, b) emulated_dpbsud(sums, a, b)
