// Canonical → packed. First the header, the start of each block and 2^input_exponent; then, in parallel over
// blocks, the masks, the values, U, V and the scales. Reads of the canonical tensors jump from row to row;
// writes are sequential.
#include <cmath>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels/strip_kernels.h"
#include "layout.h"

namespace oats {

namespace {

// Asks for pages of 2 MB where the buffer spans some: a thread then reads 10 % more bytes a second
// (docs/kernels.md). Only memory that was never touched gets them, so this comes before the first write.
void prefer_huge_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  // This is advice: nothing depends on whether the kernel takes it.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// 2^exponent as a number of `bytes` bytes. bf16 is the upper half of fp32.
void store_power(int exponent, size_t bytes, char* out) {
  const float power = std::ldexp(1.f, exponent);
  uint32_t bits;
  std::memcpy(&bits, &power, 4);
  bits >>= 32 - 8 * bytes;
  std::memcpy(out, &bits, bytes);
}

// The starts, mask words and values of an S that has a mask.
void pack_masked(const CanonicalWeight& w, const PackedHeader& h, char* base, int threads) {
  const WeightShape& shape = w.shape;
  const std::vector<int64_t> rows = row_starts(w.mask, shape.d_out, shape.d_in);
  const int64_t block_rows = kStripsPerBlock * h.layout.lanes;
  auto* starts = reinterpret_cast<uint64_t*>(base + h.starts_at);
  starts[0] = 0;
  for (int64_t b = 0; b < h.blocks(); ++b) {
    const int64_t count = rows[std::min((b + 1) * block_rows, shape.d_out)] - rows[b * block_rows];
    starts[b + 1] = starts[b] + round_up(count, run_codes(shape.values));
  }
  const StripLayout& layout = h.values_layout;
  const int64_t word_bytes = layout.lanes * layout.group / 8, row_bytes = mask_row_bytes(shape.d_in);
  // Gathers the mask word of a cell from one byte of each of its rows, and stores it.
  const auto word_of = [&](int64_t cell, int64_t strip, int64_t group) {
    const int64_t first_row = strip * layout.lanes, column = group * layout.group;
    const int64_t lanes = std::min<int64_t>(layout.lanes, shape.d_out - first_row);
    const uint8_t* byte = w.mask + first_row * row_bytes + column / 8;
    uint64_t word = 0;
    for (int64_t lane = 0; lane < lanes; ++lane, byte += row_bytes) {
      const uint64_t bits = (*byte >> column % 8) & ((1u << layout.group) - 1);
      word |= bits << (lane * layout.group);
    }
    std::memcpy(base + h.masks_at + cell * word_bytes, &word, word_bytes);
    return word;
  };
  const int32_t flip = stored_flip(shape.values, layout);
  with_stored<BitStream, Runs>(h.value_bits(), w.values, base + h.values_at, [&](auto from, auto to) {
    over_values(h, starts, rows, threads, word_of,
                [&](int64_t packed, int64_t i) { to.set(packed, flipped(from.get(i), flip)); });
  });
}

}  // namespace

void pack(const CanonicalWeight& w, Isa isa, void* out, int threads) {
  const WeightShape& shape = w.shape;
  const PackedHeader h =
      checked_header(shape, isa, w.codebook, strip_kernels(isa, shape.dtype, shape.values).layout.flip);
  char* base = static_cast<char*>(out);
  prefer_huge_pages(out, h.bytes);
  std::memset(out, 0, h.bytes);
  std::memcpy(out, &h, sizeof h);

  if (h.inputs_at) {
    const size_t bytes = dtype_bytes(shape.dtype);
    for (int64_t i = 0; i < shape.d_in; ++i)
      store_power(w.input_exponent[i], bytes, base + h.inputs_at + i * bytes);
  }
  if (shape.masked) pack_masked(w, h, base, threads);
  // Strips and groups may reach past the matrix: there, a zero.
  const auto fill = [&](uint64_t begin, uint64_t end, Storage storage, const StripLayout& layout) {
    std::memset(base + begin, stored_flip(storage, layout), end - begin);
  };
  if (!shape.masked) fill(h.values_at, h.v_scale_at, shape.values, h.values_layout);
  fill(h.v_at, h.u_scale_at, shape.factors, h.factors_layout);
  fill(h.u_at, h.bytes - kTail, shape.factors, h.factors_layout);
  over_dense_parts(h, w, [&](const auto& part) {
    with_stored<BitStream, Runs>(part.bits(), part.tensor, base + part.at, [&](auto from, auto to) {
      part.for_each(threads,
                    [&](int64_t packed, int64_t i) { to.set(packed, flipped(from.get(i), part.flip())); });
    });
  });
}

}  // namespace oats
