// The tile instructions that kernels_amx_bf16.cpp uses, on any CPU: included before it by `make
// test-sanitize`, which so sees each access to memory, and runs these kernels where there is no AMX. By the
// Intel SDM, volume 2.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#define OATS_TILE_STATE
#include "tile_kernels.h"

namespace oats {
namespace {

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

inline thread_local Tiles emulated_tiles;

inline void load_state(const TileState& state) {
  emulated_tiles.state = state;
  std::memset(emulated_tiles.tile, 0, sizeof emulated_tiles.tile);
}

inline void store_state(TileState& state) {
  state = emulated_tiles.state;
}

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

inline float emulated_bf16(const uint8_t* bytes) {
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<char*>(&bits) + 2, bytes, 2);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void emulated_dpbf16ps(int sums, int a, int b) {
  Tiles& t = emulated_tiles;
  for (const int each : {sums, a, b}) t.require_tile(each);
  t.require(t.rows(sums) == t.rows(a) && t.bytes(sums) == t.bytes(b) && t.bytes(a) == 4 * t.rows(b),
            "a product of tiles whose sizes do not fit");
  for (int row = 0; row < t.rows(sums); ++row) {
    for (int column = 0; column < t.bytes(sums) / 4; ++column) {
      float sum;
      std::memcpy(&sum, t.tile[sums].row[row] + 4 * column, 4);
      for (int k = 0; k < t.rows(b); ++k) {
        for (int half = 0; half < 4; half += 2) {
          sum += emulated_bf16(t.tile[a].row[row] + 4 * k + half) *
                 emulated_bf16(t.tile[b].row[k] + 4 * column + half);
        }
      }
      std::memcpy(t.tile[sums].row[row] + 4 * column, &sum, 4);
    }
  }
}

}  // namespace
}  // namespace oats

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_release
#define _tile_loadd(t, base, stride) emulated_loadd(t, base, stride)
#define _tile_stored(t, base, stride) emulated_stored(t, base, stride)
#define _tile_zero(t) emulated_zero(t)
#define _tile_dpbf16ps(sums, a, b) emulated_dpbf16ps(sums, a, b)
#define _tile_release() load_state(TileState{})
