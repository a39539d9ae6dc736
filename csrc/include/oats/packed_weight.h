// A layer W = S + U V, on disk (canonical) and in memory (packed for one ISA).
//
// Packed, S is cut into strips of `lanes` outputs, and the inputs into groups of `group`. A *cell* is where
// a strip meets a group: it has one mask word of lanes * group bits (bit lane * group + i is output `lane`,
// input `i` of the group) and its kept values in that order. So one expansion fills a vector whose lanes are
// outputs: the input is a broadcast, there is no horizontal sum, and the same expansion serves every column
// of a batch. Four strips are a block, whose cells follow each other group by group: however many sums are
// in flight, a thread reads one stream of masks and one of values. U and V are cut into the same blocks,
// without masks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "oats/isa.h"

namespace oats {

enum class Dtype : uint32_t { fp32 = 0, bf16 = 1 };

inline size_t dtype_bytes(Dtype dtype) {
  return dtype == Dtype::fp32 ? 4 : 2;
}

// How the values of S, or of U and V, are stored: as they are, or as codes that a scale multiplies. A scale
// belongs to one row and `scale_columns` columns.
enum class Storage : uint32_t {
  exact = 0,
  int8 = 1,  // two's complement
  int4 = 2,  // S only: an index into a codebook of 16 int8
};

inline int storage_bits(Storage storage, Dtype dtype) {
  return storage == Storage::int8   ? 8
         : storage == Storage::int4 ? 4
                                    : 8 * static_cast<int>(dtype_bytes(dtype));
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// What all functions here need to know of a layer.
struct WeightShape {
  int64_t d_out, d_in, rank, nnz;
  Dtype dtype;            // of x, y, bias, and of what is stored exactly
  Storage values;         // of S
  Storage factors;        // of U and V
  int32_t scale_columns;  // 64 or 128; 0 where all is exact
};

// What a file holds: docs/format.md. Scales are bf16, rows x ceil(columns / scale_columns).
struct CanonicalWeight {
  WeightShape shape;
  const uint8_t* mask;     // d_out x ceil(d_in / 8), least significant bit first, padding bits zero
  const void* values;      // nnz, in the order of the mask; int4: two in a byte, the lower half first
  const void* low_rank_u;  // d_out x rank
  const void* low_rank_v;  // rank x d_in
  const uint16_t* values_scale;
  const uint16_t* low_rank_u_scale;
  const uint16_t* low_rank_v_scale;
  const int8_t* codebook;        // 16, of int4
  const int8_t* input_exponent;  // d_in, where there are codes: S and V multiply x times 2 to these
};

// Codes of int4 lie in runs of 128 in 64 bytes: the first half of them in the lower halves of the bytes.
constexpr int64_t kRun = 128;

// Strips in a block; the last block has what is left.
constexpr int64_t kStripsPerBlock = 4;

// How a strip is laid out; the kernels of an ISA, dtype and storage name theirs. All of an ISA and dtype have
// the same lanes.
struct StripLayout {
  int32_t lanes;  // outputs side by side in a vector
  int32_t group;  // inputs that one lane multiplies at once
  int32_t flip;   // XORed to each code: 0x80 where kernels read it as unsigned, 128 more
};

// Sits at the start of the packed buffer. Offsets are bytes from the header, each a multiple of 64.
struct PackedHeader {
  uint64_t magic;
  uint64_t bytes;  // of the whole buffer
  WeightShape shape;
  Isa isa;
  StripLayout layout;  // of what is stored exactly
  StripLayout values_layout, factors_layout;
  int8_t codebook[16];        // flipped
  int64_t strips;             // ceil(d_out / lanes)
  int64_t groups;             // ceil(d_in / group)
  int64_t value_groups;       // the same in the layout of the values
  int64_t rank_strips;        // ceil(rank / lanes)
  int64_t rank_groups;        // ceil(rank / group)
  int64_t scale_groups;       // ceil(d_in / scale_columns)
  int64_t rank_scale_groups;  // ceil(rank / scale_columns)
  uint64_t inputs_at;         // 2 to the exponents, as dtype; 0 where all is exact
  uint64_t starts_at;  // uint64[blocks + 1]: index of each block's first value; of int4 a multiple of kRun
  uint64_t masks_at;   // [block][value group][strip of the block] mask words
  uint64_t values_at;
  // In the layout of the factors.
  uint64_t v_at;  // [block of rank_strips][group][strip of the block][lanes][group]
  uint64_t u_at;  // [block of strips][group of the rank][strip of the block][lanes][group]
  // bf16 [block][scale group][strip of the block][lanes], where they are quantised.
  uint64_t values_scale_at, v_scale_at, u_scale_at;
  uint64_t check;  // of all above

  int64_t blocks() const { return divide_up(strips, kStripsPerBlock); }
  int64_t rank_blocks() const { return divide_up(rank_strips, kStripsPerBlock); }
  int value_bits() const { return storage_bits(shape.values, shape.dtype); }
};

// Strips of block `block` of a matrix that has `strips`.
inline int strips_of_block(int64_t strips, int64_t block) {
  const int64_t left = strips - block * kStripsPerBlock;
  return static_cast<int>(left < kStripsPerBlock ? left : kStripsPerBlock);
}

// Number of ones in the mask. Returns -1 where a padding bit is set.
int64_t mask_population(const uint8_t* mask, int64_t d_out, int64_t d_in);

// Bytes that pack() writes.
size_t packed_bytes(const WeightShape& shape, Isa isa);

// Lays `weight` out for `isa`. `out` is 64-byte aligned and has packed_bytes(...) bytes. The
// mask's population must be `nnz` (mask_population).
void pack(const CanonicalWeight& weight, Isa isa, void* out, int threads);

// Why `packed` cannot be used on this machine, or nullptr where it can.
const char* packed_problem(const void* packed, size_t bytes);

// The outputs of unpack(), of the sizes of CanonicalWeight. Those that the weight does not have are not
// written, and may be null.
struct UnpackedWeight {
  uint8_t* mask;
  void *values, *low_rank_u, *low_rank_v;
  uint16_t *values_scale, *low_rank_u_scale, *low_rank_v_scale;
  int8_t* codebook;
  int8_t* input_exponent;
};

// The inverse of pack().
void unpack(const void* packed, const UnpackedWeight& out, int threads);

// Rows of S as numbers of the weight's dtype: `out` is count x d_in, and `rows` are below d_out.
void read_sparse_rows(const void* packed, const int64_t* rows, int64_t count, void* out, int threads);

}  // namespace oats
