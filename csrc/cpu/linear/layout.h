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

// The flip of stored values. If they are indices, their codebook is flipped instead.
inline int32_t stored_flip(Storage storage, const StripLayout& layout) {
  return has_codebook(storage) ? 0 : layout.flip;
}

// Values of one or more whole bytes, by index.
template <class T>
struct Whole {
  static constexpr int kBits = 8 * sizeof(T);

  T* at;
  T get(int64_t i) const { return at[i]; }
  void set(int64_t i, T value) const { at[i] = value; }
};

// Canonical codes below 8 bits: a stream of bits, the lowest first. set() needs bits that are zero.
template <int Bits>
struct BitStream {
  static constexpr int kBits = Bits;

  uint8_t* at;
  uint8_t get(int64_t i) const {
    const int64_t byte = i * Bits / 8, shift = i * Bits % 8;
    const int next = shift + Bits > 8 ? at[byte + 1] << 8 : 0;
    return (at[byte] | next) >> shift & ((1 << Bits) - 1);
  }
  void set(int64_t i, uint8_t code) const {
    const int64_t byte = i * Bits / 8, shift = i * Bits % 8;
    const int bits = code << shift;
    at[byte] |= static_cast<uint8_t>(bits);
    if (shift + Bits > 8) at[byte + 1] |= static_cast<uint8_t>(bits >> 8);
  }
};

// Packed codes below 8 bits; see run_codes().
template <int Bits>
struct Runs {
  static constexpr int64_t kCodes = Bits == 3 ? 512 : 512 / Bits, kBytes = kCodes * Bits / 8;

  uint8_t* at;
  // Calls f(byte, shift, bits of the code there, lowest bit of the code there) for each piece of code `i`.
  template <class F>
  void pieces(int64_t i, const F& f) const {
    uint8_t* run = at + i / kCodes * kBytes + i % 64;
    const int part = static_cast<int>(i % kCodes / 64);
    if constexpr (Bits != 3) {
      f(run[0], part * Bits, Bits, 0);
    } else if (part < 6) {
      f(run[part / 2 * 64], part % 2 * 3, 3, 0);
    } else if (part == 6) {
      f(run[0], 6, 2, 0);
      f(run[64], 6, 1, 2);
    } else {
      f(run[64], 7, 1, 0);
      f(run[128], 6, 2, 1);
    }
  }
  uint8_t get(int64_t i) const {
    int code = 0;
    pieces(i, [&](uint8_t byte, int shift, int bits, int lowest) {
      code |= (byte >> shift & ((1 << bits) - 1)) << lowest;
    });
    return static_cast<uint8_t>(code);
  }
  // Needs bits that are zero.
  void set(int64_t i, uint8_t code) const {
    pieces(i, [&](uint8_t& byte, int shift, int bits, int lowest) {
      byte |= static_cast<uint8_t>((code >> lowest & ((1 << bits) - 1)) << shift);
    });
  }
};

// Calls f(from, to) with two arrays of values of `bits` bits. `From` and `To` are their types below 8 bits.
template <template <int> class From, template <int> class To, class F>
void with_stored(int bits, const void* from, void* to, const F& f) {
  const auto whole = [&](auto type) {
    using T = decltype(type);
    f(Whole<const T>{static_cast<const T*>(from)}, Whole<T>{static_cast<T*>(to)});
  };
  auto* codes = static_cast<uint8_t*>(const_cast<void*>(from));
  auto* out = static_cast<uint8_t*>(to);
  switch (bits) {
    case 32:
      return whole(uint32_t{});
    case 16:
      return whole(uint16_t{});
    case 8:
      return whole(uint8_t{});
    case 4:
      return f(From<4>{codes}, To<4>{out});
    case 3:
      return f(From<3>{codes}, To<3>{out});
    case 2:
      return f(From<2>{codes}, To<2>{out});
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

// Calls f(packed index, canonical index) for each element of a rows x columns matrix without a mask, whose
// blocks begin `block_values` values apart.
template <class F>
void over_dense(const StripLayout& layout, int64_t rows, int64_t columns, int64_t block_values, int threads,
                const F& f) {
  const int64_t strips = divide_up(rows, layout.lanes), groups = divide_up(columns, layout.group);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < divide_up(strips, kStripsPerBlock); ++block) {
    const int64_t first =
        block * block_values - block * kStripsPerBlock * groups * layout.lanes * layout.group;
    over_cells(strips, groups, block, [&](int64_t cell, int64_t strip, int64_t group) {
      const int64_t first_row = strip * layout.lanes, first_column = group * layout.group;
      for (int64_t row = first_row; row < std::min(first_row + layout.lanes, rows); ++row) {
        for (int64_t column = first_column; column < std::min(first_column + layout.group, columns);
             ++column) {
          f(first + (cell * layout.lanes + row - first_row) * layout.group + column - first_column,
            row * columns + column);
        }
      }
    });
  }
}

// A part of the weight without a mask.
template <class Pointer>
struct DensePart {
  StripLayout layout;
  int64_t rows, columns;
  Storage storage;
  Dtype dtype;     // if it is exact
  uint64_t at;     // of the packed part
  Pointer tensor;  // the canonical one

  int bits() const { return storage_bits(storage, dtype); }
  int32_t flip() const { return stored_flip(storage, layout); }
  // Calls f(packed index, canonical index) for each element.
  template <class F>
  void for_each(int threads, const F& f) const {
    over_dense(layout, rows, columns, dense_block_values(layout, columns, storage), threads, f);
  }
};

// Calls visit(DensePart) for S if it has no mask, U, V and the scales. `Weight` is CanonicalWeight or
// UnpackedWeight.
template <class Weight, class Visit>
void over_dense_parts(const PackedHeader& h, const Weight& w, const Visit& visit) {
  using Part = DensePart<decltype(w.values)>;
  const WeightShape& s = h.shape;
  const StripLayout scales{h.layout.lanes, 1, 0};
  const auto scale = [&](int64_t rows, int64_t columns, uint64_t at, auto tensor) {
    visit(Part{scales, rows, columns, Storage::exact, Dtype::bf16, at, tensor});
  };
  if (!s.masked) visit(Part{h.values_layout, s.d_out, s.d_in, s.values, s.dtype, h.values_at, w.values});
  visit(Part{h.factors_layout, s.d_out, s.rank, s.factors, s.dtype, h.u_at, w.low_rank_u});
  visit(Part{h.factors_layout, s.rank, s.d_in, s.factors, s.dtype, h.v_at, w.low_rank_v});
  if (s.values != Storage::exact) scale(s.d_out, h.scale_groups, h.values_scale_at, w.values_scale);
  if (s.factors != Storage::exact) {
    scale(s.d_out, h.rank_scale_groups, h.u_scale_at, w.low_rank_u_scale);
    scale(s.rank, h.scale_groups, h.v_scale_at, w.low_rank_v_scale);
  }
}

}  // namespace oats
