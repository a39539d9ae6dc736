#include "oats/packed_weight.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "bf16.h"
#include "strip_kernels.h"

namespace oats {

namespace {

constexpr uint64_t kMagic = 0x35305354414f;  // "OATS05", little endian

// Kernels load and prefetch past the last value of the last strip.
constexpr uint64_t kTail = 128;

// Sizes up to here cannot overflow in header_for().
constexpr int64_t kMaxDimension = int64_t{1} << 30;

uint64_t aligned(uint64_t bytes) {
  return (bytes + 63) / 64 * 64;
}
int64_t mask_row_bytes(int64_t d_in) {
  return divide_up(d_in, 8);
}

// Asks for pages of 2 MB where a buffer spans some; only memory that was not touched before gets them. A
// thread then reads 10 % more a second (docs/kernels.md).
void prefer_huge_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  // Advice: a kernel without it refuses, and nothing depends on it.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// FNV-1a over what stands before it: sizes that fit the same buffer, but another mask, are told apart.
uint64_t header_check(const PackedHeader& h) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&h);
  uint64_t check = 0xcbf29ce484222325;
  for (size_t i = 0; i < offsetof(PackedHeader, check); ++i) check = (check ^ bytes[i]) * 0x100000001b3;
  return check;
}

static_assert(std::has_unique_object_representations_v<PackedHeader>, "headers are compared byte by byte");

PackedHeader header_for(const WeightShape& shape, Isa isa) {
  const StripLayout layout = strip_kernels(isa, shape.dtype, Storage::exact).layout;
  const StripLayout& factors = strip_kernels(isa, shape.dtype, shape.factors).layout;
  PackedHeader h{};
  h.magic = kMagic;
  h.shape = shape;
  h.isa = isa;
  h.layout = layout;
  h.values_layout = strip_kernels(isa, shape.dtype, shape.values).layout;
  h.factors_layout = factors;
  h.strips = divide_up(shape.d_out, layout.lanes);
  h.groups = divide_up(shape.d_in, layout.group);
  h.value_groups = divide_up(shape.d_in, h.values_layout.group);
  h.rank_strips = divide_up(shape.rank, layout.lanes);
  h.rank_groups = divide_up(shape.rank, layout.group);
  if (shape.scale_columns) {
    h.scale_groups = divide_up(shape.d_in, shape.scale_columns);
    h.rank_scale_groups = divide_up(shape.rank, shape.scale_columns);
  }
  uint64_t end = 0;
  const auto place = [&end](uint64_t bytes) {
    const uint64_t at = end;
    end += aligned(bytes);
    return at;
  };
  const auto place_scales = [&](Storage storage, int64_t strips, int64_t groups) {
    return place(storage == Storage::exact ? 0 : strips * layout.lanes * groups * sizeof(uint16_t));
  };
  const auto place_factor = [&](int64_t strips, int64_t columns) {
    const int64_t bits = storage_bits(shape.factors, shape.dtype);
    return place(strips * layout.lanes * divide_up(columns, factors.group) * factors.group * bits / 8);
  };
  place(sizeof(PackedHeader));
  if (shape.scale_columns) h.inputs_at = place(shape.d_in * dtype_bytes(shape.dtype));
  h.starts_at = place((h.blocks() + 1) * sizeof(uint64_t));
  h.values_scale_at = place_scales(shape.values, h.strips, h.scale_groups);
  h.masks_at = place(h.strips * h.value_groups * layout.lanes * h.values_layout.group / 8);
  // Of int4, each block begins with a run.
  const int64_t spare = shape.values == Storage::int4 ? kRun * h.blocks() : 0;
  h.values_at = place(divide_up((shape.nnz + spare) * h.value_bits(), 8));
  h.v_scale_at = place_scales(shape.factors, h.rank_strips, h.scale_groups);
  h.v_at = place_factor(h.rank_strips, shape.d_in);
  h.u_scale_at = place_scales(shape.factors, h.strips, h.rank_scale_groups);
  h.u_at = place_factor(h.strips, shape.rank);
  h.bytes = end + kTail;
  return h;
}

// What is XORed to the stored values: int4 are indices.
int32_t values_flip(const PackedHeader& h) {
  return h.shape.values == Storage::int8 ? h.values_layout.flip : 0;
}

// The inverse of itself.
template <class T>
T flipped(T code, int32_t flip) {
  return static_cast<T>(code ^ static_cast<T>(flip));
}

// `header_for` with the codebook, to which `flip` is XORed, and the check over all.
PackedHeader checked_header(const WeightShape& shape, Isa isa, const int8_t* codebook, int32_t flip) {
  PackedHeader h = header_for(shape, isa);
  if (shape.values == Storage::int4) {
    for (int i = 0; i < 16; ++i) h.codebook[i] = flipped(codebook[i], flip);
  }
  h.check = header_check(h);
  return h;
}

// Stored values by index.
template <class T>
struct Whole {
  T* at;
  T get(int64_t i) const { return at[i]; }
  void set(int64_t i, T value) const { at[i] = value; }
};
struct Nibbles {
  uint8_t* at;
  uint8_t get(int64_t i) const { return at[i / 2] >> (i % 2 * 4) & 15; }
  // Into a half that is zero.
  void set(int64_t i, uint8_t value) const { at[i / 2] |= static_cast<uint8_t>(value << (i % 2 * 4)); }
};

// The same, in runs.
struct PackedNibbles {
  uint8_t* at;
  static int64_t byte(int64_t i) { return i / kRun * (kRun / 2) + i % (kRun / 2); }
  static int shift(int64_t i) { return i % kRun < kRun / 2 ? 0 : 4; }
  uint8_t get(int64_t i) const { return at[byte(i)] >> shift(i) & 15; }
  void set(int64_t i, uint8_t value) const { at[byte(i)] |= static_cast<uint8_t>(value << shift(i)); }
};

// Calls f(array of `values`, array of `others`) for the stored type of `bits`, of which `From` and `To` are
// those of 4 bits.
template <class From, class To, class F>
void with_stored(int bits, const void* values, void* others, const F& f) {
  const auto call = [&](auto* from, auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    f(Whole<const T>{from}, Whole<T>{to});
  };
  switch (bits) {
    case 32:
      return call(static_cast<const uint32_t*>(values), static_cast<uint32_t*>(others));
    case 16:
      return call(static_cast<const uint16_t*>(values), static_cast<uint16_t*>(others));
    case 8:
      return call(static_cast<const uint8_t*>(values), static_cast<uint8_t*>(others));
    case 4:
      return f(From{static_cast<uint8_t*>(const_cast<void*>(values))}, To{static_cast<uint8_t*>(others)});
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

// Calls f(packed index, element index) for each element of a rows x columns factor, in packed order.
template <class F>
void over_factor(const StripLayout& layout, int64_t rows, int64_t columns, int threads, const F& f) {
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

// Calls f(place) for each one of a cell's mask word.
template <class F>
void over_places(uint64_t word, const F& f) {
  for (; word; word &= word - 1) f(__builtin_ctzll(word));
}

// First value of each row in the canonical order.
std::vector<int64_t> row_starts(const uint8_t* mask, int64_t d_out, int64_t d_in) {
  std::vector<int64_t> starts(d_out + 1, 0);
  for (int64_t row = 0; row < d_out; ++row) {
    starts[row + 1] = starts[row] + mask_population(mask + row * mask_row_bytes(d_in), 1, d_in);
  }
  return starts;
}

}  // namespace

int64_t mask_population(const uint8_t* mask, int64_t d_out, int64_t d_in) {
  const int64_t row_bytes = mask_row_bytes(d_in);
  const int padding = static_cast<int>(row_bytes * 8 - d_in);
  int64_t total = 0;
  for (int64_t row = 0; row < d_out; ++row, mask += row_bytes) {
    if (padding && mask[row_bytes - 1] >> (8 - padding)) return -1;
    int64_t byte = 0;
    for (; byte + 8 <= row_bytes; byte += 8) {
      uint64_t word;
      std::memcpy(&word, mask + byte, 8);
      total += __builtin_popcountll(word);
    }
    for (; byte < row_bytes; ++byte) total += __builtin_popcount(mask[byte]);
  }
  return total;
}

size_t packed_bytes(const WeightShape& shape, Isa isa) {
  return header_for(shape, isa).bytes;
}

void pack(const CanonicalWeight& w, Isa isa, void* out, int threads) {
  const WeightShape& shape = w.shape;
  const PackedHeader h =
      checked_header(shape, isa, w.codebook, strip_kernels(isa, shape.dtype, shape.values).layout.flip);
  char* base = static_cast<char*>(out);
  prefer_huge_pages(out, h.bytes);
  std::memset(out, 0, h.bytes);
  std::memcpy(out, &h, sizeof h);

  const std::vector<int64_t> rows = row_starts(w.mask, shape.d_out, shape.d_in);
  const int64_t block_rows = kStripsPerBlock * h.layout.lanes;
  auto* starts = reinterpret_cast<uint64_t*>(base + h.starts_at);
  starts[0] = 0;
  for (int64_t b = 0; b < h.blocks(); ++b) {
    const int64_t count = rows[std::min((b + 1) * block_rows, shape.d_out)] - rows[b * block_rows];
    starts[b + 1] = starts[b] + (shape.values == Storage::int4 ? divide_up(count, kRun) * kRun : count);
  }
  const StripLayout& layout = h.values_layout;
  const int64_t word_bytes = layout.lanes * layout.group / 8;
  const int64_t row_bytes = mask_row_bytes(shape.d_in);
  const int32_t flip = values_flip(h);
  char* masks = base + h.masks_at;
  with_stored<Nibbles, PackedNibbles>(h.value_bits(), w.values, base + h.values_at, [&](auto from, auto to) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < h.blocks(); ++b) {
      int64_t next = starts[b];
      std::vector<int64_t> cursor(rows.begin() + b * block_rows,
                                  rows.begin() + std::min((b + 1) * block_rows, shape.d_out));
      over_cells(h.strips, h.value_groups, b, [&](int64_t cell, int64_t strip, int64_t group) {
        const int64_t first_row = strip * layout.lanes, column = group * layout.group;
        const int64_t lanes = std::min<int64_t>(layout.lanes, shape.d_out - first_row);
        const uint8_t* byte = w.mask + first_row * row_bytes + column / 8;
        uint64_t word = 0;
        for (int64_t lane = 0; lane < lanes; ++lane, byte += row_bytes) {
          const uint64_t bits = (*byte >> column % 8) & ((1u << layout.group) - 1);
          word |= bits << (lane * layout.group);
        }
        std::memcpy(masks + cell * word_bytes, &word, word_bytes);
        int64_t* lane_cursor = cursor.data() + first_row - b * block_rows;
        over_places(word, [&](int place) {
          to.set(next++, flipped(from.get(lane_cursor[place / layout.group]++), flip));
        });
      });
    }
  });
  const auto pack_factor = [&](int64_t m, int64_t n, int bits, const StripLayout& cells, const void* plain,
                               uint64_t at) {
    with_stored<Nibbles, Nibbles>(bits, plain, base + at, [&](auto from, auto to) {
      over_factor(cells, m, n, threads,
                  [&](int64_t packed, int64_t i) { to.set(packed, flipped(from.get(i), cells.flip)); });
    });
  };
  const auto pack_scales = [&](Storage storage, int64_t m, int64_t groups, const uint16_t* plain,
                               uint64_t at) {
    if (storage != Storage::exact) pack_factor(m, groups, 16, {h.layout.lanes, 1, 0}, plain, at);
  };
  const int factor_bits = storage_bits(shape.factors, shape.dtype);
  // Zero, where a block is larger than the matrix.
  std::memset(base + h.v_at, h.factors_layout.flip, h.u_scale_at - h.v_at);
  std::memset(base + h.u_at, h.factors_layout.flip, h.bytes - kTail - h.u_at);
  pack_factor(shape.d_out, shape.rank, factor_bits, h.factors_layout, w.low_rank_u, h.u_at);
  pack_factor(shape.rank, shape.d_in, factor_bits, h.factors_layout, w.low_rank_v, h.v_at);
  if (h.inputs_at) {
    for (int64_t i = 0; i < shape.d_in; ++i) {
      const float power = std::ldexp(1.f, w.input_exponent[i]);
      uint32_t bits;
      std::memcpy(&bits, &power, 4);
      const size_t bytes = dtype_bytes(shape.dtype);
      // bf16 is the upper half of fp32.
      bits >>= 32 - 8 * bytes;
      std::memcpy(base + h.inputs_at + i * bytes, &bits, bytes);
    }
  }
  pack_scales(shape.values, shape.d_out, h.scale_groups, w.values_scale, h.values_scale_at);
  pack_scales(shape.factors, shape.d_out, h.rank_scale_groups, w.low_rank_u_scale, h.u_scale_at);
  pack_scales(shape.factors, shape.rank, h.scale_groups, w.low_rank_v_scale, h.v_scale_at);
}

namespace {

// Whether the sizes and kinds in a header can be computed with.
bool possible(const WeightShape& s) {
  const auto within = [](int64_t size, int64_t largest) { return 0 <= size && size <= largest; };
  const bool quantised = s.values != Storage::exact || s.factors != Storage::exact;
  return within(s.d_out, kMaxDimension) && within(s.d_in, kMaxDimension) && within(s.rank, kMaxDimension) &&
         within(s.nnz, s.d_out * s.d_in) && s.dtype <= Dtype::bf16 && s.values <= Storage::int4 &&
         s.factors <= Storage::int8 &&
         (quantised ? s.scale_columns == 64 || s.scale_columns == 128 : s.scale_columns == 0);
}

}  // namespace

const char* packed_problem(const void* packed, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(packed) % 64) return "the packed buffer is not aligned to 64 bytes";
  PackedHeader h;
  if (bytes < sizeof h) return "the packed buffer is smaller than its header";
  std::memcpy(&h, packed, sizeof h);
  if (h.magic != kMagic) return "this is not a packed weight";
  const int isa = static_cast<int>(h.isa);
  if (isa < 0 || isa >= kIsaCount || !possible(h.shape)) return "the packed buffer has a damaged header";
  if (h.isa > best_isa()) return "the weight was packed for an instruction set that this CPU lacks";
  const PackedHeader expected = checked_header(h.shape, h.isa, h.codebook, 0);
  if (std::memcmp(&h, &expected, sizeof h)) return "the packed buffer has a damaged header";
  if (h.bytes != bytes) return "the packed buffer has been truncated or extended";
  return nullptr;
}

void unpack(const void* packed, const UnpackedWeight& out, int threads) {
  PackedHeader h;
  std::memcpy(&h, packed, sizeof h);
  const WeightShape& shape = h.shape;
  const char* base = static_cast<const char*>(packed);
  const StripLayout& layout = h.values_layout;
  const int64_t row_bytes = mask_row_bytes(shape.d_in), word_bytes = layout.lanes * layout.group / 8;
  const int64_t block_rows = kStripsPerBlock * layout.lanes;
  const int32_t flip = values_flip(h);
  const char* masks = base + h.masks_at;
  const auto* starts = reinterpret_cast<const uint64_t*>(base + h.starts_at);
  const auto word_of = [&](int64_t cell) {
    uint64_t word = 0;
    std::memcpy(&word, masks + cell * word_bytes, word_bytes);
    return word;
  };
  std::fill_n(out.mask, shape.d_out * row_bytes, uint8_t{0});
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < h.blocks(); ++b) {
    over_cells(h.strips, h.value_groups, b, [&](int64_t cell, int64_t strip, int64_t group) {
      over_places(word_of(cell), [&](int place) {
        const int64_t row = strip * layout.lanes + place / layout.group;
        const int64_t column = group * layout.group + place % layout.group;
        out.mask[row * row_bytes + column / 8] |= static_cast<uint8_t>(1u << column % 8);
      });
    });
  }
  const std::vector<int64_t> rows = row_starts(out.mask, shape.d_out, shape.d_in);
  const auto unpack_values = [&](auto from, auto to) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < h.blocks(); ++b) {
      int64_t next = starts[b];
      std::vector<int64_t> cursor(rows.begin() + b * block_rows,
                                  rows.begin() + std::min((b + 1) * block_rows, shape.d_out));
      over_cells(h.strips, h.value_groups, b, [&](int64_t cell, int64_t strip, int64_t) {
        int64_t* lane_cursor = cursor.data() + strip * layout.lanes - b * block_rows;
        over_places(word_of(cell), [&](int place) {
          to.set(lane_cursor[place / layout.group]++, flipped(from.get(next++), flip));
        });
      });
    }
  };
  const auto unpack_stored = [&](auto from, auto to) {
    if constexpr (std::is_same_v<decltype(to), Nibbles>) {
      // Rows of two threads may meet in one byte.
      std::vector<uint8_t> codes(shape.nnz + 1);
      unpack_values(from, Whole<uint8_t>{codes.data()});
      for (int64_t i = 0; i < shape.nnz; i += 2) {
        to.at[i / 2] = static_cast<uint8_t>(codes[i] | codes[i + 1] << 4);
      }
    } else {
      unpack_values(from, to);
    }
  };
  with_stored<PackedNibbles, Nibbles>(h.value_bits(), base + h.values_at, out.values, unpack_stored);
  const auto unpack_factor = [&](int64_t m, int64_t n, int bits, const StripLayout& cells, uint64_t at,
                                 void* plain) {
    with_stored<Nibbles, Nibbles>(bits, base + at, plain, [&](auto from, auto to) {
      over_factor(cells, m, n, threads,
                  [&](int64_t packed_at, int64_t i) { to.set(i, flipped(from.get(packed_at), cells.flip)); });
    });
  };
  const auto unpack_scales = [&](Storage storage, int64_t m, int64_t groups, uint64_t at, uint16_t* plain) {
    if (storage != Storage::exact) unpack_factor(m, groups, 16, {h.layout.lanes, 1, 0}, at, plain);
  };
  const int factor_bits = storage_bits(shape.factors, shape.dtype);
  unpack_factor(shape.d_out, shape.rank, factor_bits, h.factors_layout, h.u_at, out.low_rank_u);
  unpack_factor(shape.rank, shape.d_in, factor_bits, h.factors_layout, h.v_at, out.low_rank_v);
  unpack_scales(shape.values, shape.d_out, h.scale_groups, h.values_scale_at, out.values_scale);
  unpack_scales(shape.factors, shape.d_out, h.rank_scale_groups, h.u_scale_at, out.low_rank_u_scale);
  unpack_scales(shape.factors, shape.rank, h.scale_groups, h.v_scale_at, out.low_rank_v_scale);
  if (shape.values == Storage::int4) {
    for (int i = 0; i < 16; ++i) out.codebook[i] = flipped(h.codebook[i], layout.flip);
  }
  if (h.inputs_at) {
    for (int64_t i = 0; i < shape.d_in; ++i) {
      const size_t bytes = dtype_bytes(shape.dtype);
      uint32_t bits = 0;
      std::memcpy(&bits, base + h.inputs_at + i * bytes, bytes);
      out.input_exponent[i] = static_cast<int8_t>(static_cast<int>(bits << (32 - 8 * bytes) >> 23) - 127);
    }
  }
}

namespace {

float float_of(uint16_t bf16) {
  return float_from_bf16(bf16);
}
float float_of(float value) {
  return value;
}
void set_float(float* out, float value) {
  *out = value;
}
void set_float(uint16_t* out, float value) {
  *out = bf16_from_float(value);
}

template <class Element>
void read_row(const PackedHeader& h, const char* base, int64_t row, Element* out) {
  const StripLayout& layout = h.values_layout;
  const int64_t strip = row / layout.lanes, lane = row % layout.lanes, block = strip / kStripsPerBlock;
  const int64_t in_block = strip % kStripsPerBlock, strips = strips_of_block(h.strips, block);
  const int64_t word_bytes = layout.lanes * layout.group / 8, shift = lane * layout.group;
  const auto* inputs = h.inputs_at ? reinterpret_cast<const Element*>(base + h.inputs_at) : nullptr;
  const auto* scales = reinterpret_cast<const uint16_t*>(base + h.values_scale_at) +
                       (block * kStripsPerBlock * h.scale_groups + in_block) * layout.lanes + lane;
  const char* values = base + h.values_at;
  const auto value_at = [&](int64_t i, int64_t column) {
    if (h.shape.values == Storage::exact) return float_of(reinterpret_cast<const Element*>(values)[i]);
    const float scale = float_of(scales[column / h.shape.scale_columns * strips * layout.lanes]);
    if (h.shape.values == Storage::int8) {
      return scale * flipped(reinterpret_cast<const int8_t*>(values)[i], layout.flip);
    }
    const PackedNibbles codes{reinterpret_cast<uint8_t*>(const_cast<char*>(values))};
    return scale * flipped(h.codebook[codes.get(i)], layout.flip);
  };
  std::fill_n(out, h.shape.d_in, Element{});
  const char* mask = base + h.masks_at + block * kStripsPerBlock * h.value_groups * word_bytes;
  int64_t next = reinterpret_cast<const int64_t*>(base + h.starts_at)[block];
  for (int64_t group = 0; group < h.value_groups; ++group) {
    for (int64_t s = 0; s < strips; ++s, mask += word_bytes) {
      uint64_t word = 0;
      std::memcpy(&word, mask, word_bytes);
      if (s == in_block) {
        int64_t i = next + __builtin_popcountll(word & ((uint64_t{1} << shift) - 1));
        over_places(word >> shift & ((1u << layout.group) - 1), [&](int place) {
          const int64_t column = group * layout.group + place;
          const float value = value_at(i++, column);
          set_float(out + column, inputs ? value * float_of(inputs[column]) : value);
        });
      }
      next += __builtin_popcountll(word);
    }
  }
}

}  // namespace

void read_sparse_rows(const void* packed, const int64_t* rows, int64_t count, void* out, int threads) {
  PackedHeader h;
  std::memcpy(&h, packed, sizeof h);
  const auto* base = static_cast<const char*>(packed);
  const auto read = [&](auto* first) {
  // A row is some microseconds, less than it takes to wake threads.
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 8)
    for (int64_t i = 0; i < count; ++i) read_row(h, base, rows[i], first + i * h.shape.d_in);
  };
  if (h.shape.dtype == Dtype::fp32) {
    read(static_cast<float*>(out));
  } else {
    read(static_cast<uint16_t*>(out));
  }
}

}  // namespace oats
