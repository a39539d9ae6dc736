// Which tiles there are, and of what size: 64 bytes that a thread loads before it uses tiles.
//
// Not the intrinsics: GCC 12 takes them to read and write eight of the bytes, and leaves out what writes the
// rest. tests/core/emulated_tiles.h stands in for this file and for the other tile instructions.
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
