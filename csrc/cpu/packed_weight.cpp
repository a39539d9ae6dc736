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

constexpr uint64_t kMagic = 0x32305354414f;  // "OATS02", little endian

// Kernels load and prefetch past the last value of the last strip.
constexpr uint64_t kTail = 128;

constexpr int kMaxLanes = 16;

uint64_t aligned(uint64_t bytes) {
  return (bytes + 63) / 64 * 64;
}
int64_t mask_row_bytes(int64_t d_in) {
  return divide_up(d_in, 8);
}

bool bit(const uint8_t* row, int64_t i) {
  return row[i / 8] >> (i % 8) & 1;
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
  return h;
}

template <class F>
void with_value_type(Dtype dtype, const F& f) {
  dtype == Dtype::fp32 ? f(uint32_t{}) : f(uint16_t{});
}

// Index of the cell of a strip and a group in a matrix of `strips` x `groups`.
int64_t cell_index(int64_t strips, int64_t groups, int64_t strip, int64_t group) {
  const int64_t block = strip / kStripsPerBlock;
  return block * kStripsPerBlock * groups + group * strips_of_block(strips, block) + strip % kStripsPerBlock;
}

// Calls f(packed index, element index) for each element of a rows x columns factor.
template <class F>
void over_factor(const StripLayout& layout, int64_t rows, int64_t columns, const F& f) {
  const int64_t strips = divide_up(rows, layout.lanes), groups = divide_up(columns, layout.group);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t strip = row / layout.lanes, lane = row % layout.lanes;
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t cell = cell_index(strips, groups, strip, column / layout.group);
      f((cell * layout.lanes + lane) * layout.group + column % layout.group, row * columns + column);
    }
  }
}

// Calls f(mask word index, bit, row, column) for each place of one block, in packed order.
template <class F>
void over_block(const PackedHeader& h, int64_t block, const F& f) {
  const int64_t first = block * kStripsPerBlock, last = first + strips_of_block(h.strips, block);
  int64_t word = first * h.groups;
  for (int64_t g = 0; g < h.groups; ++g) {
    for (int64_t strip = first; strip < last; ++strip, ++word) {
      for (int lane = 0; lane < h.layout.lanes; ++lane) {
        const int64_t row = strip * h.layout.lanes + lane;
        for (int i = 0; i < h.layout.group; ++i) {
          const int64_t column = g * h.layout.group + i;
          if (row < h.d_out && column < h.d_in) f(word, lane * h.layout.group + i, row, column);
        }
      }
    }
  }
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
  auto* masks = reinterpret_cast<uint8_t*>(base + h.masks_at);
  with_value_type(w.dtype, [&](auto type) {
    using Value = decltype(type);
    const auto* from = static_cast<const Value*>(w.values);
    auto* to = reinterpret_cast<Value*>(base + h.values_at);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < h.blocks(); ++b) {
      uint64_t next = starts[b];
      int64_t cursor[kStripsPerBlock * kMaxLanes];
      for (int64_t i = 0; i < block_rows; ++i) cursor[i] = rows[std::min(b * block_rows + i, w.d_out)];
      over_block(h, b, [&](int64_t word, int place, int64_t row, int64_t column) {
        if (!bit(w.mask + row * mask_row_bytes(w.d_in), column)) return;
        masks[word * word_bytes + place / 8] |= static_cast<uint8_t>(1u << place % 8);
        to[next++] = from[cursor[row % block_rows]++];
      });
    }
    const auto* u = static_cast<const Value*>(w.low_rank_u);
    const auto* v = static_cast<const Value*>(w.low_rank_v);
    auto* u_to = reinterpret_cast<Value*>(base + h.u_at);
    auto* v_to = reinterpret_cast<Value*>(base + h.v_at);
    over_factor(h.layout, w.d_out, w.rank, [&](int64_t packed, int64_t plain) { u_to[packed] = u[plain]; });
    over_factor(h.layout, w.rank, w.d_in, [&](int64_t packed, int64_t plain) { v_to[packed] = v[plain]; });
  });
}

const char* packed_problem(const void* packed, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(packed) % 64) return "the packed buffer is not aligned to 64 bytes";
  PackedHeader h;
  if (bytes < sizeof h) return "the packed buffer is smaller than its header";
  std::memcpy(&h, packed, sizeof h);
  if (h.magic != kMagic) return "this is not a packed weight";
  const int isa = static_cast<int>(h.isa);
  if (isa < 0 || isa >= kIsaCount || h.d_out < 0 || h.d_in < 0 || h.rank < 0 || h.nnz < 0 ||
      (h.dtype != Dtype::fp32 && h.dtype != Dtype::bf16)) {
    return "the packed buffer has a damaged header";
  }
  if (h.isa > best_isa()) return "the weight was packed for an instruction set that this CPU lacks";
  const PackedHeader expected = header_for(h.d_out, h.d_in, h.rank, h.nnz, h.dtype, h.isa);
  if (std::memcmp(&h, &expected, sizeof h)) return "the packed buffer has a damaged header";
  if (h.bytes != bytes) return "the packed buffer has been truncated or extended";
  return nullptr;
}

void unpack(const void* packed, uint8_t* mask, void* values, void* low_rank_u, void* low_rank_v) {
  PackedHeader h;
  std::memcpy(&h, packed, sizeof h);
  const char* base = static_cast<const char*>(packed);
  const int64_t row_bytes = mask_row_bytes(h.d_in), word_bytes = h.layout.lanes * h.layout.group / 8;
  const auto* masks = reinterpret_cast<const uint8_t*>(base + h.masks_at);
  const auto* starts = reinterpret_cast<const uint64_t*>(base + h.starts_at);
  std::memset(mask, 0, h.d_out * row_bytes);
  for (int64_t b = 0; b < h.blocks(); ++b) {
    over_block(h, b, [&](int64_t word, int place, int64_t row, int64_t column) {
      if (masks[word * word_bytes + place / 8] >> place % 8 & 1) {
        mask[row * row_bytes + column / 8] |= static_cast<uint8_t>(1u << column % 8);
      }
    });
  }
  const std::vector<int64_t> rows = row_starts(mask, h.d_out, h.d_in);
  with_value_type(h.dtype, [&](auto type) {
    using Value = decltype(type);
    const auto* from = reinterpret_cast<const Value*>(base + h.values_at);
    auto* to = static_cast<Value*>(values);
    std::vector<int64_t> cursor(rows.begin(), rows.end());
    for (int64_t b = 0; b < h.blocks(); ++b) {
      uint64_t next = starts[b];
      over_block(h, b, [&](int64_t, int, int64_t row, int64_t column) {
        if (bit(mask + row * row_bytes, column)) to[cursor[row]++] = from[next++];
      });
    }
    auto* u = static_cast<Value*>(low_rank_u);
    auto* v = static_cast<Value*>(low_rank_v);
    const auto* u_from = reinterpret_cast<const Value*>(base + h.u_at);
    const auto* v_from = reinterpret_cast<const Value*>(base + h.v_at);
    over_factor(h.layout, h.d_out, h.rank,
                [&](int64_t packed_at, int64_t plain) { u[plain] = u_from[packed_at]; });
    over_factor(h.layout, h.rank, h.d_in,
                [&](int64_t packed_at, int64_t plain) { v[plain] = v_from[packed_at]; });
  });
}

}  // namespace oats
