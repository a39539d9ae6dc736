// A layer's weight W = S + U V in its two forms: canonical, as files hold it, and packed, as the kernels of
// one ISA read it. csrc/README.md draws the packed form, says why it is so, and explains its words: strip,
// group, cell, block.
#pragma once

#include <cstddef>
#include <cstdint>

#include "oats/isa.h"

namespace oats {

enum class Dtype : uint32_t { fp32 = 0, bf16 = 1 };

inline size_t dtype_bytes(Dtype dtype) {
  return dtype == Dtype::fp32 ? 4 : 2;
}

// How the values of S, or those of U and V, are stored: exactly, or as codes. A code stands for an int8 times
// a scale. One scale serves one row and `scale_columns` columns.
enum class Storage : uint32_t {
  exact = 0,
  int8 = 1,  // the int8 itself, two's complement
  // S only: an index into a codebook of 2^bits int8.
  int4 = 2,
  int3 = 3,
  int2 = 4,
};

inline bool has_codebook(Storage storage) {
  return storage >= Storage::int4;
}

inline int storage_bits(Storage storage, Dtype dtype) {
  constexpr int kBits[] = {0, 8, 4, 3, 2};
  return storage == Storage::exact ? 8 * static_cast<int>(dtype_bytes(dtype))
                                   : kBits[static_cast<int>(storage)];
}

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t round_up(int64_t a, int64_t multiple) {
  return divide_up(a, multiple) * multiple;
}

struct WeightShape {
  int64_t d_out, d_in, rank, nnz;
  Dtype dtype;            // of x, y, bias and all exact values
  Storage values;         // of S
  Storage factors;        // of U and V
  int16_t scale_columns;  // 64 or 128; 0 if S, U and V are all exact
  int16_t masked;         // 0: every element of S is stored, and there is no mask; else 1
};

// The tensors of a file (docs/format.md). Scales are bf16, rows x ceil(columns / scale_columns).
struct CanonicalWeight {
  WeightShape shape;
  const uint8_t* mask;     // d_out x ceil(d_in / 8), least significant bit first, padding bits zero
  const void* values;      // nnz, in the order of the mask; codes below 8 bits: a stream of bits, the lowest
                           // of each code and each byte first
  const void* low_rank_u;  // d_out x rank
  const void* low_rank_v;  // rank x d_in
  const uint16_t* values_scale;
  const uint16_t* low_rank_u_scale;
  const uint16_t* low_rank_v_scale;
  const int8_t* codebook;        // 2^bits, if S has one
  const int8_t* input_exponent;  // d_in, if there are codes: S and V multiply x[i] * 2^input_exponent[i]
};

// Codes below 8 bits lie in runs of whole vectors of 64 bytes, so that a few shifts and shuffles decode 64
// codes at once:
//   int4, 128 codes: byte i has code i in its lower half, code 64 + i in its upper half.
//   int2, 256 codes: byte i has codes i, 64 + i, 128 + i and 192 + i, from its lowest bits on.
//   int3, 512 codes: byte i of vector v (of 3) has code 128 v + i in bits 0 to 2, and code 128 v + 64 + i in
//     bits 3 to 5. Bits 6 and 7 of the three bytes i, from v = 0 on, are codes 384 + i and 448 + i.
constexpr int64_t run_codes(Storage storage) {
  return storage == Storage::int4 ? 128 : storage == Storage::int3 ? 512 : storage == Storage::int2 ? 256 : 1;
}
constexpr int64_t kLongestRun = 512;

// The last block has the strips that are left.
constexpr int64_t kStripsPerBlock = 4;

// How a strip is cut. Each ISA, dtype and storage has its own; `lanes` depends on ISA and dtype only.
struct StripLayout {
  int32_t lanes;  // outputs of a strip, side by side in a vector
  int32_t group;  // inputs that one lane multiplies at once
  int32_t flip;   // XORed to each code: 0x80 if the kernels read codes as unsigned bytes, 128 too large
};

// Stands at the start of the packed buffer. Each `..._at` is a number of bytes from the header, a multiple of
// 64.
struct PackedHeader {
  uint64_t magic;
  uint64_t bytes;  // of the whole buffer
  WeightShape shape;
  Isa isa;
  StripLayout layout;          // for exact storage
  StripLayout values_layout;   // for the storage of S
  StripLayout factors_layout;  // for the storage of U and V
  int8_t codebook[16];         // XORed with values_layout.flip, and repeated if it has fewer than 16
  int64_t strips;              // ceil(d_out / lanes)
  int64_t groups;              // ceil(d_in / layout.group)
  int64_t value_groups;        // ceil(d_in / values_layout.group)
  int64_t rank_strips;         // ceil(rank / lanes)
  int64_t rank_groups;         // ceil(rank / layout.group)
  int64_t scale_groups;        // ceil(d_in / scale_columns)
  int64_t rank_scale_groups;   // ceil(rank / scale_columns)
  uint64_t inputs_at;          // dtype [d_in]: 2^input_exponent; 0 if S, U and V are all exact
  uint64_t starts_at;          // uint64 [blocks + 1]: index of each block's first value, if S has a mask
  uint64_t masks_at;           // [block][value group][strip of the block]: one mask word a cell
  uint64_t values_at;          // in the order of the mask words and their bits; without a mask as U
  uint64_t v_at;               // [block of rank_strips][group][strip of the block][lane][input of the group]
  uint64_t u_at;               // [block of strips][group of the rank][strip of the block][lane][...]
  // bf16 [block][scale group][strip of the block][lane]; empty if the storage is exact.
  uint64_t values_scale_at, v_scale_at, u_scale_at;
  uint64_t check;  // of all bytes above

  int64_t blocks() const { return divide_up(strips, kStripsPerBlock); }
  int64_t rank_blocks() const { return divide_up(rank_strips, kStripsPerBlock); }
  int value_bits() const { return storage_bits(shape.values, shape.dtype); }
};

// One part of a packed weight.
template <class T>
const T* part_at(const void* packed, uint64_t at) {
  return reinterpret_cast<const T*>(static_cast<const char*>(packed) + at);
}

// Strips in block `block` of a matrix that has `strips` strips.
inline int strips_of_block(int64_t strips, int64_t block) {
  const int64_t left = strips - block * kStripsPerBlock;
  return static_cast<int>(left < kStripsPerBlock ? left : kStripsPerBlock);
}

// Values that one block of a matrix without a mask takes: whole runs.
inline int64_t dense_block_values(const StripLayout& layout, int64_t columns, Storage storage) {
  return round_up(kStripsPerBlock * layout.lanes * divide_up(columns, layout.group) * layout.group,
                  run_codes(storage));
}

// Number of ones in the mask; -1 if a padding bit is set.
int64_t mask_population(const uint8_t* mask, int64_t d_out, int64_t d_in);

// Bytes that pack() writes.
size_t packed_bytes(const WeightShape& shape, Isa isa);

// Lays `weight` out for `isa`. `out` has packed_bytes(...) bytes and is aligned to 64. `nnz` must be the
// mask's population.
void pack(const CanonicalWeight& weight, Isa isa, void* out, int threads);

// Says why this machine cannot use `packed`; nullptr if it can.
const char* packed_problem(const void* packed, size_t bytes);

// Where unpack() writes: the tensors of CanonicalWeight, in the same sizes. A tensor that the weight does not
// have is not written and may be null.
struct UnpackedWeight {
  uint8_t* mask;
  void *values, *low_rank_u, *low_rank_v;
  uint16_t *values_scale, *low_rank_u_scale, *low_rank_v_scale;
  int8_t* codebook;
  int8_t* input_exponent;
};

// The inverse of pack().
void unpack(const void* packed, const UnpackedWeight& out, int threads);

// Rows of S as numbers of the weight's dtype: `out` is count x d_in, each of `rows` is below d_out.
void read_sparse_rows(const void* packed, const int64_t* rows, int64_t count, void* out, int threads);

}  // namespace oats
