// How a warp finds the values of a cell.
#pragma once

#include "cells.h"
#include "device.h"

namespace oats::cuda {

// The two quarters of a mask word. The upper half of each is the number of values before it in the cell.
struct Quarters {
  uint32_t lower, upper;
  uint32_t count;  // values in the cell, the same in every lane
};

// `mask` is word `lane` of the cell. All lanes of the warp take part.
__device__ __forceinline__ Quarters scan_cell(uint32_t mask, unsigned lane) {
  // Sums both halves at once: neither exceeds 512.
  const uint32_t counts =
      static_cast<uint32_t>(population(mask & 0xffff)) | static_cast<uint32_t>(population(mask >> 16)) << 16;
  uint32_t sums = counts;
#pragma unroll
  for (unsigned distance = 1; distance < kLanes; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sums, distance);
    if (lane >= distance) sums += other;
  }
  const uint32_t totals = __shfl_sync(kAllLanes, sums, kLanes - 1);
  const uint32_t before = sums - counts, lower_total = totals & 0xffff;
  return {(mask & 0xffff) | before << 16, mask >> 16 | (lower_total + (before >> 16)) << 16,
          lower_total + (totals >> 16)};
}

}  // namespace oats::cuda
