// The shapes of a thread's tiles, the matrix registers of AMX.
#pragma once

#include <cstdint>

namespace oats {

// As ldtilecfg and sttilecfg read and write them.
struct alignas(64) TileState {
  uint8_t bytes[64];
};

#ifdef OATS_TILE_STATE
// In tests/core/emulated_tiles.h, which also replaces the other tile instructions.
inline void load_state(const TileState& state);
inline void store_state(TileState& state);
inline void release_state();
#else
// Written out, not as intrinsics: GCC 12 believes that those access 8 of the 64 bytes, and drops the writes
// to the rest.
inline void load_state(const TileState& state) {
  asm volatile("ldtilecfg %0" : : "m"(state));
}
inline void store_state(TileState& state) {
  asm volatile("sttilecfg %0" : "=m"(state));
}
inline void release_state() {
  asm volatile("tilerelease");
}
#endif

// Shapes the eight tiles: each row has 64 bytes, and tile t has rows_of(t) rows. Returns the state before.
template <class RowsOf>
TileState shape_tiles(const RowsOf& rows_of) {
  TileState before;
  store_state(before);
  // Intel SDM, volume 1, table 18-2: the palette at 0, then, for each tile, bytes of a row at 16 and rows at
  // 48.
  TileState wanted{};
  wanted.bytes[0] = 1;
  for (int tile = 0; tile < 8; ++tile) {
    wanted.bytes[16 + 2 * tile] = 64;
    wanted.bytes[48 + tile] = static_cast<uint8_t>(rows_of(tile));
  }
  load_state(wanted);
  return before;
}

inline void restore_tiles(const TileState& before) {
  // Tiles in use slow down every switch between threads, so they are released.
  before.bytes[0] ? load_state(before) : release_state();
}

}  // namespace oats
