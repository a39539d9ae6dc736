// Loads and stores the shapes of the tile registers. A thread does so before it uses tiles.
//
// Written out, not as intrinsics: GCC 12 believes that those access 8 of the 64 bytes, and drops the writes
// to the rest. tests/core/emulated_tiles.h replaces this file, and the other tile instructions.
#ifndef OATS_TILE_STATE
#define OATS_TILE_STATE

#include "tile_kernels.h"

namespace oats {
namespace {

inline void load_state(const TileState& state) {
  asm volatile("ldtilecfg %0" : : "m"(state));
}

inline void store_state(TileState& state) {
  asm volatile("sttilecfg %0" : "=m"(state));
}

}  // namespace
}  // namespace oats

#endif
