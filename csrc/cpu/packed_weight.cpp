#include "oats/packed_weight.h"

#include <algorithm>
#include <cstring>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "strip_kernels.h"

namespace oats {

namespace {

constexpr uint64_t kMagic = 0x33305354414f;  // "OATS03", little endian

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

PackedHeader header_for(int64_t d_out, int64_t d_in, int64_t rank, int64_t nnz, Dtype dtype, Isa isa) {
  const StripLayout layout = strip_kernels(isa, dtype).layout;
  const uint64_t value_bytes = dtype_bytes(dtype);
  const int64_t cell = static_cast<int64_t>(layout.lanes) * layout.group;
  PackedHeader h{};
  h.magic = kMagic;
  h.d_out = d_out;
  h.d_in = d_in;
  h.rank = rank;
  h.nnz = nnz;
  h.dtype = dtype;
  h.isa = isa;
  h.layout = layout;
  h.strips = divide_up(d_out, layout.lanes);
  h.groups = divide_up(d_in, layout.group);
  h.rank_strips = divide_up(rank, layout.lanes);
  h.rank_groups = divide_up(rank, layout.group);
  h.starts_at = aligned(sizeof(PackedHeader));
  h.masks_at = h.starts_at + aligned((h.blocks() + 1) * sizeof(uint64_t));
  h.values_at = h.masks_at + aligned(h.strips * h.groups * cell / 8);
  h.v_at = h.values_at + aligned(nnz * value_bytes);
  h.u_at = h.v_at + aligned(h.rank_strips * h.groups * cell * value_bytes);
  h.bytes = h.u_at + aligned(h.strips * h.rank_groups * cell * value_bytes) + kTail;
  h.check = header_check(h);
  return h;
}

template <class F>
void with_value_type(Dtype dtype, const F& f) {
  dtype == Dtype::fp32 ? f(uint32_t{}) : f(uint16_t{});
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
void over_places(uint32_t word, const F& f) {
  for (; word; word &= word - 1) f(__builtin_ctz(word));
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

size_t packed_bytes(int64_t d_out, int64_t d_in, int64_t rank, int64_t nnz, Dtype dtype, Isa isa) {
  return header_for(d_out, d_in, rank, nnz, dtype, isa).bytes;
}

void pack(const CanonicalWeight& w, Isa isa, void* out, int threads) {
  const PackedHeader h = header_for(w.d_out, w.d_in, w.rank, w.nnz, w.dtype, isa);
  char* base = static_cast<char*>(out);
  prefer_huge_pages(out, h.bytes);
  std::memset(out, 0, h.bytes);
  std::memcpy(out, &h, sizeof h);

  const std::vector<int64_t> rows = row_starts(w.mask, w.d_out, w.d_in);
  const int64_t block_rows = kStripsPerBlock * h.layout.lanes;
  auto* starts = reinterpret_cast<uint64_t*>(base + h.starts_at);
  for (int64_t b = 0; b <= h.blocks(); ++b) starts[b] = rows[std::min(b * block_rows, w.d_out)];
  const int64_t word_bytes = h.layout.lanes * h.layout.group / 8;
  const int64_t row_bytes = mask_row_bytes(w.d_in);
  char* masks = base + h.masks_at;
  with_value_type(w.dtype, [&](auto type) {
    using Value = decltype(type);
    const auto* from = static_cast<const Value*>(w.values);
    auto* to = reinterpret_cast<Value*>(base + h.values_at);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < h.blocks(); ++b) {
      Value* next = to + starts[b];
      std::vector<int64_t> cursor(rows.begin() + b * block_rows,
                                  rows.begin() + std::min((b + 1) * block_rows, w.d_out));
      over_cells(h.strips, h.groups, b, [&](int64_t cell, int64_t strip, int64_t group) {
        const int64_t first_row = strip * h.layout.lanes, column = group * h.layout.group;
        const int64_t lanes = std::min<int64_t>(h.layout.lanes, w.d_out - first_row);
        const uint8_t* byte = w.mask + first_row * row_bytes + column / 8;
        uint32_t word = 0;
        for (int64_t lane = 0; lane < lanes; ++lane, byte += row_bytes) {
          const uint32_t bits = (*byte >> column % 8) & ((1u << h.layout.group) - 1);
          word |= bits << (lane * h.layout.group);
        }
        std::memcpy(masks + cell * word_bytes, &word, word_bytes);
        int64_t* lane_cursor = cursor.data() + first_row - b * block_rows;
        over_places(word, [&](int place) { *next++ = from[lane_cursor[place / h.layout.group]++]; });
      });
    }
    const auto* u = static_cast<const Value*>(w.low_rank_u);
    const auto* v = static_cast<const Value*>(w.low_rank_v);
    auto* u_to = reinterpret_cast<Value*>(base + h.u_at);
    auto* v_to = reinterpret_cast<Value*>(base + h.v_at);
    over_factor(h.layout, w.d_out, w.rank, threads,
                [&](int64_t packed, int64_t plain) { u_to[packed] = u[plain]; });
    over_factor(h.layout, w.rank, w.d_in, threads,
                [&](int64_t packed, int64_t plain) { v_to[packed] = v[plain]; });
  });
}

const char* packed_problem(const void* packed, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(packed) % 64) return "the packed buffer is not aligned to 64 bytes";
  PackedHeader h;
  if (bytes < sizeof h) return "the packed buffer is smaller than its header";
  std::memcpy(&h, packed, sizeof h);
  if (h.magic != kMagic) return "this is not a packed weight";
  const int isa = static_cast<int>(h.isa);
  const auto possible = [](int64_t size, int64_t largest) { return 0 <= size && size <= largest; };
  if (isa < 0 || isa >= kIsaCount || !possible(h.d_out, kMaxDimension) || !possible(h.d_in, kMaxDimension) ||
      !possible(h.rank, kMaxDimension) || !possible(h.nnz, h.d_out * h.d_in) ||
      (h.dtype != Dtype::fp32 && h.dtype != Dtype::bf16)) {
    return "the packed buffer has a damaged header";
  }
  if (h.isa > best_isa()) return "the weight was packed for an instruction set that this CPU lacks";
  const PackedHeader expected = header_for(h.d_out, h.d_in, h.rank, h.nnz, h.dtype, h.isa);
  if (std::memcmp(&h, &expected, sizeof h)) return "the packed buffer has a damaged header";
  if (h.bytes != bytes) return "the packed buffer has been truncated or extended";
  return nullptr;
}

void unpack(const void* packed, uint8_t* mask, void* values, void* low_rank_u, void* low_rank_v,
            int threads) {
  PackedHeader h;
  std::memcpy(&h, packed, sizeof h);
  const char* base = static_cast<const char*>(packed);
  const int64_t row_bytes = mask_row_bytes(h.d_in), word_bytes = h.layout.lanes * h.layout.group / 8;
  const int64_t block_rows = kStripsPerBlock * h.layout.lanes;
  const char* masks = base + h.masks_at;
  const auto* starts = reinterpret_cast<const uint64_t*>(base + h.starts_at);
  const auto word_of = [&](int64_t cell) {
    uint32_t word = 0;
    std::memcpy(&word, masks + cell * word_bytes, word_bytes);
    return word;
  };
  std::fill_n(mask, h.d_out * row_bytes, uint8_t{0});
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < h.blocks(); ++b) {
    over_cells(h.strips, h.groups, b, [&](int64_t cell, int64_t strip, int64_t group) {
      over_places(word_of(cell), [&](int place) {
        const int64_t row = strip * h.layout.lanes + place / h.layout.group;
        const int64_t column = group * h.layout.group + place % h.layout.group;
        mask[row * row_bytes + column / 8] |= static_cast<uint8_t>(1u << column % 8);
      });
    });
  }
  const std::vector<int64_t> rows = row_starts(mask, h.d_out, h.d_in);
  with_value_type(h.dtype, [&](auto type) {
    using Value = decltype(type);
    const auto* from = reinterpret_cast<const Value*>(base + h.values_at);
    auto* to = static_cast<Value*>(values);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < h.blocks(); ++b) {
      const Value* next = from + starts[b];
      std::vector<int64_t> cursor(rows.begin() + b * block_rows,
                                  rows.begin() + std::min((b + 1) * block_rows, h.d_out));
      over_cells(h.strips, h.groups, b, [&](int64_t cell, int64_t strip, int64_t) {
        int64_t* lane_cursor = cursor.data() + strip * h.layout.lanes - b * block_rows;
        over_places(word_of(cell), [&](int place) { to[lane_cursor[place / h.layout.group]++] = *next++; });
      });
    }
    auto* u = static_cast<Value*>(low_rank_u);
    auto* v = static_cast<Value*>(low_rank_v);
    const auto* u_from = reinterpret_cast<const Value*>(base + h.u_at);
    const auto* v_from = reinterpret_cast<const Value*>(base + h.v_at);
    over_factor(h.layout, h.d_out, h.rank, threads,
                [&](int64_t packed_at, int64_t plain) { u[plain] = u_from[packed_at]; });
    over_factor(h.layout, h.rank, h.d_in, threads,
                [&](int64_t packed_at, int64_t plain) { v[plain] = v_from[packed_at]; });
  });
}

}  // namespace oats
