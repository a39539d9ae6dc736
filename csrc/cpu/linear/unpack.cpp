// Packed → canonical. First the mask, because the place of a value follows from the number of ones before it;
// then the values, U, V and the scales, in parallel over blocks.
#include <cstring>

#include "layout.h"

namespace oats {

namespace {

// Calls f(from, to) with packed and canonical values. Codes below 8 bits go to whole bytes first: rows of two
// threads may share a byte.
template <class F>
void unpack_values(int bits, int64_t count, const void* packed, void* out, const F& f) {
  with_stored<Runs, BitStream>(bits, packed, out, [&](auto from, auto to) {
    using Out = decltype(to);
    if constexpr (Out::kBits < 8) {
      std::vector<uint8_t> codes(count);
      f(from, Whole<uint8_t>{codes.data()});
      std::fill_n(to.at, divide_up(count * Out::kBits, 8), uint8_t{0});
      for (int64_t i = 0; i < count; ++i) to.set(i, codes[i]);
    } else {
      f(from, to);
    }
  });
}

void unpack_masked(const PackedHeader& h, const void* packed, const UnpackedWeight& out, int threads) {
  const WeightShape& shape = h.shape;
  const StripLayout& layout = h.values_layout;
  const int64_t row_bytes = mask_row_bytes(shape.d_in), word_bytes = layout.lanes * layout.group / 8;
  const char* masks = part_at<char>(packed, h.masks_at);
  const auto word_of = [&](int64_t cell, int64_t, int64_t) {
    uint64_t word = 0;
    std::memcpy(&word, masks + cell * word_bytes, word_bytes);
    return word;
  };
  std::fill_n(out.mask, shape.d_out * row_bytes, uint8_t{0});
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < h.blocks(); ++b) {
    over_cells(h.strips, h.value_groups, b, [&](int64_t cell, int64_t strip, int64_t group) {
      over_places(word_of(cell, strip, group), [&](int place) {
        const int64_t row = strip * layout.lanes + place / layout.group;
        const int64_t column = group * layout.group + place % layout.group;
        out.mask[row * row_bytes + column / 8] |= static_cast<uint8_t>(1u << column % 8);
      });
    });
  }

  const std::vector<int64_t> rows = row_starts(out.mask, shape.d_out, shape.d_in);
  const auto* starts = part_at<uint64_t>(packed, h.starts_at);
  const int32_t flip = stored_flip(shape.values, layout);
  unpack_values(
      h.value_bits(), shape.nnz, part_at<char>(packed, h.values_at), out.values, [&](auto from, auto to) {
        over_values(h, starts, rows, threads, word_of,
                    [&](int64_t packed_at, int64_t i) { to.set(i, flipped(from.get(packed_at), flip)); });
      });
}

}  // namespace

void unpack(const void* packed, const UnpackedWeight& out, int threads) {
  PackedHeader h;
  std::memcpy(&h, packed, sizeof h);
  const WeightShape& shape = h.shape;
  if (shape.masked) unpack_masked(h, packed, out, threads);
  over_dense_parts(h, out, [&](const auto& part) {
    unpack_values(part.bits(), part.rows * part.columns, part_at<char>(packed, part.at), part.tensor,
                  [&](auto from, auto to) {
                    part.for_each(threads, [&](int64_t packed_at, int64_t i) {
                      to.set(i, flipped(from.get(packed_at), part.flip()));
                    });
                  });
  });
  if (has_codebook(shape.values)) {
    for (int i = 0; i < 1 << h.value_bits(); ++i)
      out.codebook[i] = flipped(h.codebook[i], h.values_layout.flip);
  }
  if (h.inputs_at) {
    const size_t bytes = dtype_bytes(shape.dtype);
    for (int64_t i = 0; i < shape.d_in; ++i) {
      uint32_t bits = 0;
      std::memcpy(&bits, part_at<char>(packed, h.inputs_at + i * bytes), bytes);
      // The exponent field of the fp32 whose upper half a bf16 is.
      out.input_exponent[i] = static_cast<int8_t>(static_cast<int>(bits << (32 - 8 * bytes) >> 23) - 127);
    }
  }
}

}  // namespace oats
