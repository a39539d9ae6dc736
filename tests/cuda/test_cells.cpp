// Exhaustive checks of csrc/cuda/cells.h on the host; tests/kernels/test_cuda.py builds and runs it.
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cells.h"

namespace {

using namespace oats::cuda;

int64_t checks = 0;

__attribute__((format(printf, 2, 3))) void check(bool holds, const char* format, ...) {
  ++checks;
  if (holds) return;
  std::va_list arguments;
  va_start(arguments, format);
  std::fputs("FAILED: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::exit(1);
}

// A lane's four weights, from the definition: bit by bit.
void check_place_quad() {
  for (uint32_t nibble = 0; nibble < 16; ++nibble) {
    for (uint32_t index = 0; index < 4; ++index) {
      // Distinct values, and others around them that must not get in.
      uint16_t values[6];
      for (int i = 0; i < 6; ++i) values[i] = static_cast<uint16_t>(0xff01 + 0x0111 * i);
      uint16_t expected[4] = {};
      int next = static_cast<int>(index % 2);
      for (int e = 0; e < 4; ++e)
        if (nibble >> e & 1) expected[e] = values[next++];
      const auto word = [&](int i) { return values[2 * i] | static_cast<uint32_t>(values[2 * i + 1]) << 16; };
      const Quad quad = place_quad(word(0), word(1), word(2), index, nibble);
      const uint16_t found[4] = {static_cast<uint16_t>(quad.first), static_cast<uint16_t>(quad.first >> 16),
                                 static_cast<uint16_t>(quad.second),
                                 static_cast<uint16_t>(quad.second >> 16)};
      for (int e = 0; e < 4; ++e)
        check(found[e] == expected[e], "nibble %u, index %u, weight %d: %x", nibble, index, e, found[e]);
    }
  }
}

// Every mask of a quarter, at the least and the largest number of values before it.
void check_first_value() {
  for (uint32_t mask = 0; mask < 1 << 16; ++mask) {
    for (const uint32_t before : {0u, static_cast<uint32_t>(kCellElements - 16)}) {
      uint32_t index = before;
      for (int t = 0; t < 4; ++t) {
        const uint32_t quarter = mask | before << 16;
        check(first_value(quarter, t) == index, "mask %x, lane %d", mask, t);
        check(nibble_of(quarter, t) == (mask >> 4 * t & 15), "mask %x, nibble %d", mask, t);
        for (int e = 0; e < 4; ++e) index += mask >> (4 * t + e) & 1;
      }
    }
  }
}

// Wherever a cell begins in its first chunk, and whatever its size, the ring holds what is read.
void check_ring() {
  for (uint32_t begin = 0; begin < 3 * kChunkValues; ++begin) {
    for (uint32_t count = 0; count <= kCellElements; ++count) {
      const uint32_t end = begin + count, all = chunks_of(end), read = chunks_read(end);
      if (read - begin / kChunkValues > kRingChunks || read * kChunkValues < end + 4 ||
          all * kChunkValues < end || all * kChunkValues >= end + kChunkValues)
        check(false, "values %u, %u", begin, count);
    }
  }
  // Three words from the last value of the ring are in it and its mirror.
  check(kRingWords - 1 + 2 < kRingWords + kMirrorWords, "mirror");
  check(chunks_read(0xf0000000u) == 0xf0000000u / kChunkValues + 1, "far chunks");
}

void check_shares() {
  for (const int64_t scale : {int64_t{1}, int64_t{1} << 40}) {
    for (int64_t count = 0; count <= 200; ++count) {
      for (int64_t parts = 1; parts <= 70; ++parts) {
        const Shares shares = shares_of(count * scale, parts);
        int64_t at = 0;
        for (int64_t part = 0; part < parts; ++part) {
          const Range r = shares.of(part);
          const int64_t size = r.last - r.first, even = count * scale / parts;
          check(r.first == at && (size == even || size == even + 1), "share %ld of %ld of %ld",
                static_cast<long>(part), static_cast<long>(parts), static_cast<long>(count));
          at = r.last;
        }
        check(at == count * scale, "shares of %ld", static_cast<long>(count));
      }
    }
  }
}

void check_splits() {
  for (int64_t strips = 0; strips <= 2000; strips += strips < 20 ? 1 : 37) {
    for (int64_t cells = 0; cells <= 1000; cells += cells < 40 ? 1 : 13) {
      for (const int64_t multiprocessors : {1, 4, 108, 132, 400}) {
        const int64_t splits = splits_for(strips, cells, multiprocessors);
        check(splits >= 1 && splits <= 65535, "splits");
        if (splits == 1) continue;
        check(cells / (splits * kWarps) >= 2, "a warp of %ld splits has few cells",
              static_cast<long>(splits));
        check((splits - 1) * strips < 2 * multiprocessors, "more splits than needed");
      }
    }
  }
}

void check_layout() {
  const int64_t sizes[] = {0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 4096, 53248, 131072};
  for (const int64_t d_out : sizes)
    for (const int64_t d_in : sizes)
      for (const int64_t rank : {int64_t{0}, int64_t{1}, int64_t{8}, int64_t{409}})
        for (const int bytes : {2, 4}) {
          const int64_t nnz = d_out * d_in;
          const Layout l = layout_of(d_out, d_in, rank, nnz, bytes);
          const int64_t begin[] = {l.starts, l.masks, l.values, l.u, l.v, l.bytes};
          const int64_t size[] = {8 * (l.strips * l.cells + 1), 128 * l.strips * l.cells,
                                  bytes * nnz + kChunkBytes, bytes * d_out * l.u_stride,
                                  bytes * rank * l.v_stride};
          for (int i = 0; i < 5; ++i) {
            check(begin[i] % 128 == 0 && begin[i] + size[i] <= begin[i + 1], "part %d of %ld x %ld", i,
                  static_cast<long>(d_out), static_cast<long>(d_in));
            check(begin[i + 1] - begin[i] - size[i] < 128, "part %d is too large", i);
          }
          check(l.strips * kCellRows >= d_out && l.cells * kCellColumns >= d_in, "cells");
          check(l.u_stride >= rank && l.u_stride % 64 == 0 && l.v_stride >= d_in && l.v_stride % 64 == 0,
                "strides");
          for (const int64_t batch : {1, 8, 9, 16, 17, 32})
            for (const int64_t splits : {1, 3}) {
              const Workspace w = workspace_of(d_out, rank, batch, splits);
              check(w.t_stride == l.u_stride, "rows of t");
              check(w.t + 2 * batch * w.t_stride <= w.counters && w.counters % 128 == 0, "t");
              if (splits == 1) {
                check(w.bytes == w.counters, "no splits");
                continue;
              }
              check(w.counters + 4 * l.strips <= w.partials && w.partials % 128 == 0, "counters");
              const int64_t outputs = kCellRows * 8 * column_groups(batch);
              check(8 * column_groups(batch) >= batch, "columns");
              check(w.partials + 4 * splits * l.strips * outputs <= w.bytes, "partials");
            }
        }
}

}  // namespace

int main() {
  check_place_quad();
  check_first_value();
  check_ring();
  check_shares();
  check_splits();
  check_layout();
  std::printf("%ld checks\n", static_cast<long>(checks));
}
