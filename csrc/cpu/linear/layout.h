// What pack(), unpack() and read_sparse_rows() share: the header, the order of the cells, and access to
// stored values by index.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "oats/packed_weight.h"

namespace oats {

// Bytes behind the last part: kernels load whole vectors, past the last byte that they use.
constexpr uint64_t kTail = 128;

// Computes every field. The codebook is XORed with `flip`.
PackedHeader checked_header(const WeightShape& shape, Isa isa, const int8_t* codebook, int32_t flip);

inline int64_t mask_row_bytes(int64_t d_in) {
  return divide_up(d_in, 8);
}

// Index of the first value of each row in canonical order, and nnz.
std::vector<int64_t> row_starts(const uint8_t* mask, int64_t d_out, int64_t d_in);

// Adds or removes the flip.
template <class T>
T flipped(T code, int32_t flip) {
  return static_cast<T>(code ^ static_cast<T>(flip));
}

// The flip of the stored values of S. int4 values are indices: their codebook is flipped instead.
inline int32_t values_flip(const PackedHeader& h) {
  return h.shape.values == Storage::int8 ? h.values_layout.flip : 0;
}

// Values of one or more whole bytes, by index.
template <class T>
struct Whole {
  T* at;
  T get(int64_t i) const { return at[i]; }
  void set(int64_t i, T value) const { at[i] = value; }
};

// Canonical int4: neighbours share a byte. set() needs a half that is zero.
struct Nibbles {
  uint8_t* at;
  uint8_t get(int64_t i) const { return at[i / 2] >> (i % 2 * 4) & 15; }
  void set(int64_t i, uint8_t value) const { at[i / 2] |= static_cast<uint8_t>(value << (i % 2 * 4)); }
};

// Packed int4, in runs; see kRun.
struct RunNibbles {
  uint8_t* at;
  static int64_t byte(int64_t i) { return i / kRun * (kRun / 2) + i % (kRun / 2); }
  static int shift(int64_t i) { return i % kRun < kRun / 2 ? 0 : 4; }
  uint8_t get(int64_t i) const { return at[byte(i)] >> shift(i) & 15; }
  void set(int64_t i, uint8_t value) const { at[byte(i)] |= static_cast<uint8_t>(value << shift(i)); }
};

// Calls f(from, to) with two arrays of values of `bits` bits. `From` and `To` are their types for 4 bits.
template <class From, class To, class F>
void with_stored(int bits, const void* from, void* to, const F& f) {
  const auto call = [&](auto type) {
    using T = decltype(type);
    f(Whole<const T>{static_cast<const T*>(from)}, Whole<T>{static_cast<T*>(to)});
  };
  switch (bits) {
    case 32:
      return call(uint32_t{});
    case 16:
      return call(uint16_t{});
    case 8:
      return call(uint8_t{});
    case 4:
      return f(From{static_cast<uint8_t*>(const_cast<void*>(from))}, To{static_cast<uint8_t*>(to)});
  }
}

// Calls f(cell, strip, group) for each cell of one block of a matrix of `strips` x `groups`, in packed order.
template <class F>
void over_cells(int64_t strips, int64_t groups, int64_t block, const F& f) {
  const int64_t first = block * kStripsPerBlock, last = first + strips_of_block(strips, block);
  int64_t cell = first * groups;
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t strip = first; strip < last; ++strip) f(cell++, strip, group);
  }
}

// Calls f(place) for each bit of a mask word that is set: `place` is lane * group + input of the group.
template <class F>
void over_places(uint64_t word, const F& f) {
  for (; word; word &= word - 1) f(__builtin_ctzll(word));
}

// Calls f(packed index, canonical index) for each value of S, in packed order within each block.
// word_of(cell, strip, group) returns the mask word of a cell; `rows` are row_starts().
template <class WordOf, class F>
void over_values(const PackedHeader& h, const uint64_t* starts, const std::vector<int64_t>& rows, int threads,
                 const WordOf& word_of, const F& f) {
  const StripLayout& layout = h.values_layout;
  const int64_t block_rows = kStripsPerBlock * layout.lanes;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < h.blocks(); ++b) {
    int64_t next = starts[b];
    std::vector<int64_t> cursor(rows.begin() + b * block_rows,
                                rows.begin() + std::min((b + 1) * block_rows, h.shape.d_out));
    over_cells(h.strips, h.value_groups, b, [&](int64_t cell, int64_t strip, int64_t group) {
      int64_t* lane_cursor = cursor.data() + strip * layout.lanes - b * block_rows;
      over_places(word_of(cell, strip, group),
                  [&](int place) { f(next++, lane_cursor[place / layout.group]++); });
    });
  }
}

// Calls f(packed index, canonical index) for each element of a rows x columns matrix without a mask.
template <class F>
void over_dense(const StripLayout& layout, int64_t rows, int64_t columns, int threads, const F& f) {
  const int64_t strips = divide_up(rows, layout.lanes), groups = divide_up(columns, layout.group);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < divide_up(strips, kStripsPerBlock); ++block) {
    over_cells(strips, groups, block, [&](int64_t cell, int64_t strip, int64_t group) {
      const int64_t first_row = strip * layout.lanes, first_column = group * layout.group;
      for (int64_t row = first_row; row < std::min(first_row + layout.lanes, rows); ++row) {
        for (int64_t column = first_column; column < std::min(first_column + layout.group, columns);
             ++column) {
          f((cell * layout.lanes + row - first_row) * layout.group + column - first_column,
            row * columns + column);
        }
      }
    });
  }
}

// Calls visit(layout, rows, columns, bits, offset of the packed part, canonical tensor) for U, V and the
// scales. `Weight` is CanonicalWeight or UnpackedWeight.
template <class Weight, class Visit>
void over_dense_parts(const PackedHeader& h, const Weight& w, const Visit& visit) {
  const WeightShape& s = h.shape;
  const int bits = storage_bits(s.factors, s.dtype);
  const StripLayout scales{h.layout.lanes, 1, 0};
  visit(h.factors_layout, s.d_out, s.rank, bits, h.u_at, w.low_rank_u);
  visit(h.factors_layout, s.rank, s.d_in, bits, h.v_at, w.low_rank_v);
  if (s.values != Storage::exact) {
    visit(scales, s.d_out, h.scale_groups, 16, h.values_scale_at, w.values_scale);
  }
  if (s.factors != Storage::exact) {
    visit(scales, s.d_out, h.rank_scale_groups, 16, h.u_scale_at, w.low_rank_u_scale);
    visit(scales, s.rank, h.scale_groups, 16, h.v_scale_at, w.low_rank_v_scale);
  }
}

}  // namespace oats
