// What one instruction set offers the decoder, for one dtype: the loops of the phases in step.cpp.
#pragma once

#include <cstdint>

#include "oats/decoder.h"

namespace oats {

// Rows of queries that share keys: query rows of a sequence times heads of a group.
constexpr int kQueryRows = 32;

// The pages that a unit of attention reads are cut into at most so many ranges. Their number depends on the
// sequence only, so a result does not depend on how many threads share the work.
constexpr int64_t kMostRanges = 16;

// Of a head, at most; a multiple of 16.
constexpr int64_t kMostHeadDim = 512;

// What one row of queries has seen: the largest score, the sum of the weights relative to it, and the
// weighted sum of the values, head_dim floats.
struct PartialAttention {
  float largest, sum;
};

struct AttentionUnit {
  const void* queries;       // [rows][head_dim / group] units
  int rows;                  // at most kQueryRows
  const int64_t* positions;  // of each
  int64_t begin, end;        // tokens
  int64_t head_dim, window;
  float scale, softcap;
  const int32_t* pages;       // of the sequence
  const char* cache;          // keys of the head in page 0
  int64_t page_bytes;         // from page to page
  int64_t values_bytes;       // from the keys of the head to its values
  PartialAttention* partial;  // [rows]
  float* sums;                // [rows][head_dim]
};

// Products of dense weights with many columns, on tiles.
struct DenseTiles {
  int64_t min_columns;    // with fewer, DecoderKernels::dense is faster
  int64_t weights, sums;  // units and floats that multiply() works in
  // Units that prepare() writes.
  int64_t (*input_units)(int64_t columns, int64_t d_in);
  // A part's share of x in tiles.
  void (*prepare)(const void* x, int64_t columns, int64_t x_stride, int64_t d_in, int part, int parts,
                  uint32_t* inputs);
  // Outputs from `begin` on, as many as fill tiles; returns the first that is left.
  int64_t (*multiply)(const DecoderLinear& linear, int64_t begin, int64_t end, const uint32_t* inputs,
                      int64_t columns, uint32_t* weights, float* sums, void* y, int64_t y_stride);
};

struct DecoderKernels {
  // y = the norm of n floats, times 2 to `exponents` (powers, in the dtype) where they are not null.
  void (*norm)(const float* x, int64_t n, const DecoderNorm& norm, const void* powers, void* y);
  // x += scale * norm(y), or scale * y where the norm has no weight.
  void (*add)(float* x, int64_t n, const void* y, const DecoderNorm& norm, float scale);
  // x = scale * y.
  void (*widen)(const void* y, int64_t n, float scale, float* x);
  // The norm of a head, in place; then its rotation: pairs (i, i + n) by cosine and sine. head_dim elements.
  void (*norm_and_rotate)(void* x, int64_t head_dim, const DecoderNorm& norm, const float* cosine,
                          const float* sine, int64_t n);
  // y = gate(g) * up, or gate(g) where up is null; times powers as in norm.
  void (*gate)(Gate kind, const void* g, const void* up, int64_t n, const void* powers, void* y);
  int group;  // tokens of a unit of values
  // One key of a head into its page.
  void (*write_key)(const void* key, int64_t head_dim, void* page, int64_t token);
  // One value, and the next one of its group where that is there already.
  void (*write_value)(const void* value, const void* next, int64_t head_dim, void* page, int64_t token);
  void (*attend)(const AttentionUnit& unit);
  // y = the sums of `ranges` partial results, `stride` apart, merged; the partial results are used up.
  void (*merge)(PartialAttention* partials, const float* sums, int64_t ranges, int64_t partial_stride,
                int64_t sums_stride, int64_t head_dim, const void* powers, void* y);
  // Outputs [begin, end) of a dense weight, for `columns` rows of x.
  void (*dense)(const DecoderLinear& linear, int64_t begin, int64_t end, const void* x, int64_t columns,
                int64_t x_stride, void* y, int64_t y_stride);
  // y = softcap * tanh(scale * y / softcap), or scale * y.
  void (*cap)(void* y, int64_t n, float scale, float softcap);
  // Index of the largest of n numbers; the first of equal ones, and of NaNs where there are any.
  int64_t (*most_likely)(const void* logits, int64_t n);
  const DenseTiles* dense_tiles = nullptr;  // if there are tiles for the dtype
};

const DecoderKernels& decoder_kernels_scalar(Dtype dtype);
const DecoderKernels& decoder_kernels_avx2(Dtype dtype);
const DecoderKernels& decoder_kernels_avx512(Dtype dtype);
const DecoderKernels& decoder_kernels_avx512_bf16(Dtype dtype);
const DecoderKernels& decoder_kernels_amx_bf16(Dtype dtype);

// Parts of the last.
const DenseTiles& dense_tiles_amx_bf16();
void attend_amx_bf16(const AttentionUnit& unit);

const DecoderKernels& decoder_kernels(Isa isa, Dtype dtype);

}  // namespace oats
