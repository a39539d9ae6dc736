// Radix selection on the magnitude bits, which order like the magnitudes. A row is passed over four times:
// for its largest magnitude, for a histogram from that downwards, for the entries of the bin that holds the
// threshold (only those are sorted), and to write what stays.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "oats/operations.h"

namespace oats {

namespace {

// 64 bins for each of the 32 octaves below the largest magnitude. All that is smaller shares the last bin.
constexpr uint32_t kBins = 2048;

// Rows up to this length, such as the groups of an N:M pattern, need no histogram.
constexpr int64_t kShortRow = 64;

template <class Float>
using BitsOf = std::conditional_t<sizeof(Float) == 4, uint32_t, uint64_t>;

template <class Float>
BitsOf<Float> magnitude(Float value) {
  BitsOf<Float> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits << 1 >> 1;
}

template <class Float>
uint32_t bin_of(BitsOf<Float> largest, BitsOf<Float> magnitude) {
  constexpr int kFractionBits = std::numeric_limits<Float>::digits - 1;
  return static_cast<uint32_t>(
      std::min<BitsOf<Float>>((largest - magnitude) >> (kFractionBits - 6), kBins - 1));
}

template <class Float>
struct Threshold {
  BitsOf<Float> magnitude;
  int64_t ties;   // how many entries of exactly this magnitude stay
  bool all_ties;  // whether all of them do
};

// The threshold that `wanted` of the candidates reach; at least 1.
template <class Float>
Threshold<Float> threshold_among(std::vector<BitsOf<Float>>& candidates, int64_t wanted) {
  using Bits = BitsOf<Float>;
  std::nth_element(candidates.begin(), candidates.begin() + (wanted - 1), candidates.end(),
                   std::greater<Bits>());
  const Bits threshold = candidates[wanted - 1];
  int64_t larger = 0, equal = 0;
  for (const Bits m : candidates) {
    larger += m > threshold;
    equal += m == threshold;
  }
  return {threshold, wanted - larger, wanted - larger == equal};
}

template <class Float>
Threshold<Float> find_threshold(const Float* row, int64_t columns, int64_t count,
                                std::vector<BitsOf<Float>>& candidates) {
  using Bits = BitsOf<Float>;
  if (columns <= kShortRow) {
    candidates.resize(columns);
    for (int64_t i = 0; i < columns; ++i) candidates[i] = magnitude(row[i]);
    return threshold_among<Float>(candidates, count);
  }
  Bits largest = 0;
  for (int64_t i = 0; i < columns; ++i) largest = std::max(largest, magnitude(row[i]));

  // Two histograms in turn, so that the increment of a bin does not wait for the one just before it.
  uint32_t even[kBins] = {}, odd[kBins] = {};
  int64_t i = 0;
  for (; i + 2 <= columns; i += 2) {
    ++even[bin_of<Float>(largest, magnitude(row[i]))];
    ++odd[bin_of<Float>(largest, magnitude(row[i + 1]))];
  }
  if (i < columns) ++even[bin_of<Float>(largest, magnitude(row[i]))];

  int64_t above = 0;
  uint32_t bin = 0;
  while (above + even[bin] + odd[bin] < count) {
    above += even[bin] + odd[bin];
    ++bin;
  }
  candidates.resize(even[bin] + odd[bin]);
  size_t found = 0;
  for (i = 0; i < columns; ++i) {
    const Bits m = magnitude(row[i]);
    if (bin_of<Float>(largest, m) == bin) candidates[found++] = m;
  }
  return threshold_among<Float>(candidates, count - above);
}

template <class Float>
void keep_row(const Float* row, int64_t columns, const Threshold<Float>& threshold, Float* out) {
  if (threshold.all_ties) {
    for (int64_t i = 0; i < columns; ++i)
      out[i] = magnitude(row[i]) >= threshold.magnitude ? row[i] : Float{0};
    return;
  }
  int64_t ties = threshold.ties;
  for (int64_t i = 0; i < columns; ++i) {
    const BitsOf<Float> m = magnitude(row[i]);
    const bool keep = m > threshold.magnitude || (m == threshold.magnitude && ties-- > 0);
    out[i] = keep ? row[i] : Float{0};
  }
}

}  // namespace

template <class Float>
void keep_largest_in_rows(const Float* in, int64_t rows, int64_t columns, int64_t count, Float* out,
                          int threads) {
  if (count <= 0) {
    std::fill(out, out + rows * columns, Float{0});
    return;
  }
  if (count >= columns) {
    if (out != in) std::memcpy(out, in, rows * columns * sizeof(Float));
    return;
  }
  const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, rows)));
  // Allocated before the region: inside, a failure could not be reported.
  std::vector<std::vector<BitsOf<Float>>> candidates(team, std::vector<BitsOf<Float>>(columns));
#pragma omp parallel num_threads(team)
  {
    std::vector<BitsOf<Float>>& mine = candidates[omp_get_thread_num()];
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const Threshold<Float> threshold = find_threshold(in + r * columns, columns, count, mine);
      keep_row(in + r * columns, columns, threshold, out + r * columns);
    }
  }
}

template void keep_largest_in_rows<float>(const float*, int64_t, int64_t, int64_t, float*, int);
template void keep_largest_in_rows<double>(const double*, int64_t, int64_t, int64_t, double*, int);

}  // namespace oats
