// The header of a packed weight: where each part lies, and whether a buffer may be used. A header holds
// nothing that its shape, ISA and codebook do not determine, so a buffer is checked by computing the header
// again and comparing the bytes.
#include "layout.h"

#include <cstring>

#include "kernels/strip_kernels.h"

namespace oats {

namespace {

constexpr uint64_t kMagic = 0x36305354414f;  // "OATS06", little endian

// No size computed here overflows if the dimensions are at most this.
constexpr int64_t kMaxDimension = int64_t{1} << 30;

// FNV-1a over the bytes before the check. The other fields can be computed again from shape, isa and
// codebook; this catches damage to those three.
uint64_t header_check(const PackedHeader& h) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&h);
  uint64_t check = 0xcbf29ce484222325;
  for (size_t i = 0; i < offsetof(PackedHeader, check); ++i) check = (check ^ bytes[i]) * 0x100000001b3;
  return check;
}

static_assert(std::has_unique_object_representations_v<PackedHeader>, "headers are compared byte by byte");

// All fields but the codebook and the check.
PackedHeader header_for(const WeightShape& shape, Isa isa) {
  PackedHeader h{};
  h.magic = kMagic;
  h.shape = shape;
  h.isa = isa;
  h.layout = strip_kernels(isa, shape.dtype, Storage::exact).layout;
  h.values_layout = strip_kernels(isa, shape.dtype, shape.values).layout;
  h.factors_layout = strip_kernels(isa, shape.dtype, shape.factors).layout;
  const int64_t lanes = h.layout.lanes;
  h.strips = divide_up(shape.d_out, lanes);
  h.groups = divide_up(shape.d_in, h.layout.group);
  h.value_groups = divide_up(shape.d_in, h.values_layout.group);
  h.rank_strips = divide_up(shape.rank, lanes);
  h.rank_groups = divide_up(shape.rank, h.layout.group);
  if (shape.scale_columns) {
    h.scale_groups = divide_up(shape.d_in, shape.scale_columns);
    h.rank_scale_groups = divide_up(shape.rank, shape.scale_columns);
  }
  uint64_t end = 0;
  const auto place = [&end](uint64_t bytes) {
    const uint64_t at = end;
    end += divide_up(bytes, 64) * 64;
    return at;
  };
  const auto place_scales = [&](Storage storage, int64_t strips, int64_t groups) {
    return place(storage == Storage::exact ? 0 : strips * lanes * groups * sizeof(uint16_t));
  };
  const auto place_dense = [&](const StripLayout& layout, Storage storage, int64_t strips, int64_t columns) {
    const int64_t whole = strips / kStripsPerBlock, left = strips % kStripsPerBlock;
    const int64_t last = left * lanes * divide_up(columns, layout.group) * layout.group;
    const int64_t values =
        whole * dense_block_values(layout, columns, storage) + round_up(last, run_codes(storage));
    return place(divide_up(values * storage_bits(storage, shape.dtype), 8));
  };
  place(sizeof(PackedHeader));
  if (shape.scale_columns) h.inputs_at = place(shape.d_in * dtype_bytes(shape.dtype));
  h.starts_at = place(shape.masked ? (h.blocks() + 1) * sizeof(uint64_t) : 0);
  h.values_scale_at = place_scales(shape.values, h.strips, h.scale_groups);
  h.masks_at = place(shape.masked ? h.strips * h.value_groups * lanes * h.values_layout.group / 8 : 0);
  if (shape.masked) {
    // Each block begins with a new run.
    const int64_t spare = has_codebook(shape.values) ? run_codes(shape.values) * h.blocks() : 0;
    h.values_at = place(divide_up((shape.nnz + spare) * h.value_bits(), 8));
  } else {
    h.values_at = place_dense(h.values_layout, shape.values, h.strips, shape.d_in);
  }
  h.v_scale_at = place_scales(shape.factors, h.rank_strips, h.scale_groups);
  h.v_at = place_dense(h.factors_layout, shape.factors, h.rank_strips, shape.d_in);
  h.u_scale_at = place_scales(shape.factors, h.strips, h.rank_scale_groups);
  h.u_at = place_dense(h.factors_layout, shape.factors, h.strips, shape.rank);
  h.bytes = end + kTail;
  return h;
}

// Whether header_for() can compute with these sizes and kinds.
bool possible(const WeightShape& s) {
  const auto within = [](int64_t size, int64_t largest) { return 0 <= size && size <= largest; };
  const bool codes = s.values != Storage::exact || s.factors != Storage::exact;
  return within(s.d_out, kMaxDimension) && within(s.d_in, kMaxDimension) && within(s.rank, kMaxDimension) &&
         within(s.nnz, s.d_out * s.d_in) && (s.masked == 1 || (s.masked == 0 && s.nnz == s.d_out * s.d_in)) &&
         s.dtype <= Dtype::bf16 && s.values <= Storage::int2 && s.factors <= Storage::int8 &&
         (codes ? s.scale_columns == 64 || s.scale_columns == 128 : s.scale_columns == 0);
}

}  // namespace

PackedHeader checked_header(const WeightShape& shape, Isa isa, const int8_t* codebook, int32_t flip) {
  PackedHeader h = header_for(shape, isa);
  if (has_codebook(shape.values)) {
    const int entries = 1 << h.value_bits();
    for (int i = 0; i < 16; ++i) h.codebook[i] = flipped(codebook[i % entries], flip);
  }
  h.check = header_check(h);
  return h;
}

size_t packed_bytes(const WeightShape& shape, Isa isa) {
  return header_for(shape, isa).bytes;
}

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

std::vector<int64_t> row_starts(const uint8_t* mask, int64_t d_out, int64_t d_in) {
  std::vector<int64_t> starts(d_out + 1, 0);
  for (int64_t row = 0; row < d_out; ++row) {
    starts[row + 1] = starts[row] + mask_population(mask + row * mask_row_bytes(d_in), 1, d_in);
  }
  return starts;
}

}  // namespace oats
