// Rows of S as dense numbers, for embeddings. A row's mask bits and values lie apart, among those of the
// other rows of its block; so reading one row walks the mask words of the whole block, and counts their ones
// to know where its values are. That bounds it: the masks of a block, once for each row. Without a mask the
// places are known.
#include <cstring>

#include "elements.h"
#include "layout.h"

namespace oats {

namespace {

template <class Io>
void read_row(const PackedHeader& h, const void* packed, int64_t row, typename Io::Element* out) {
  using Element = typename Io::Element;
  const StripLayout& layout = h.values_layout;
  const int64_t strip = row / layout.lanes, lane = row % layout.lanes, block = strip / kStripsPerBlock;
  const int64_t in_block = strip % kStripsPerBlock, strips = strips_of_block(h.strips, block);
  const int64_t word_bytes = layout.lanes * layout.group / 8, shift = lane * layout.group;
  const auto* inputs = h.inputs_at ? part_at<Element>(packed, h.inputs_at) : nullptr;
  const auto* scales = part_at<uint16_t>(packed, h.values_scale_at) +
                       (block * kStripsPerBlock * h.scale_groups + in_block) * layout.lanes + lane;
  // The value at place `i` of the stored ones.
  const auto stored = [&](int64_t i) -> float {
    auto* values = const_cast<uint8_t*>(part_at<uint8_t>(packed, h.values_at));
    const auto level = [&](auto codes) { return flipped(h.codebook[codes.get(i)], layout.flip); };
    switch (h.shape.values) {
      case Storage::exact:
        return Io::to_float(reinterpret_cast<const Element*>(values)[i]);
      case Storage::int8:
        return flipped(static_cast<int8_t>(values[i]), layout.flip);
      case Storage::int4:
        return level(Runs<4>{values});
      case Storage::int3:
        return level(Runs<3>{values});
      case Storage::int2:
        return level(Runs<2>{values});
    }
    return 0;
  };
  const auto set = [&](int64_t i, int64_t column) {
    float value = stored(i);
    if (h.shape.values != Storage::exact)
      value *= Bf16Element::to_float(scales[column / h.shape.scale_columns * strips * layout.lanes]);
    out[column] = Io::from_float(inputs ? value * Io::to_float(inputs[column]) : value);
  };
  if (!h.shape.masked) {
    const int64_t first = block * dense_block_values(layout, h.shape.d_in, h.shape.values);
    for (int64_t column = 0; column < h.shape.d_in; ++column) {
      const int64_t cell = column / layout.group * strips + in_block;
      set(first + (cell * layout.lanes + lane) * layout.group + column % layout.group, column);
    }
    return;
  }
  std::fill_n(out, h.shape.d_in, Element{});
  const char* mask =
      part_at<char>(packed, h.masks_at + block * kStripsPerBlock * h.value_groups * word_bytes);
  int64_t next = part_at<int64_t>(packed, h.starts_at)[block];
  for (int64_t group = 0; group < h.value_groups; ++group) {
    for (int64_t s = 0; s < strips; ++s, mask += word_bytes) {
      uint64_t word = 0;
      std::memcpy(&word, mask, word_bytes);
      if (s == in_block) {
        int64_t i = next + __builtin_popcountll(word & ((uint64_t{1} << shift) - 1));
        over_places(word >> shift & ((1u << layout.group) - 1),
                    [&](int place) { set(i++, group * layout.group + place); });
      }
      next += __builtin_popcountll(word);
    }
  }
}

}  // namespace

void read_sparse_rows(const void* packed, const int64_t* rows, int64_t count, void* out, int threads) {
  PackedHeader h;
  std::memcpy(&h, packed, sizeof h);
  const auto read = [&](auto io) {
    using Io = decltype(io);
    auto* first = static_cast<typename Io::Element*>(out);
    // A row takes some microseconds, less than it takes to wake threads.
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 8)
    for (int64_t i = 0; i < count; ++i) read_row<Io>(h, packed, rows[i], first + i * h.shape.d_in);
  };
  h.shape.dtype == Dtype::fp32 ? read(Fp32Element{}) : read(Bf16Element{});
}

}  // namespace oats
