// y = x / sqrt(mean(x²) + eps), times a weight, row by row (Zhang and Sennrich 2019, arXiv 1910.07467).
#pragma once

#include <cstdint>

#include "oats/packed_weight.h"

namespace oats {

// What is rounded, and what the weight means, as in the classes of transformers.
enum class RmsNorm {
  round_then_scale,   // rounds the normalised x to the dtype, then multiplies by the weight (Llama)
  scale_by_one_plus,  // multiplies by one plus the weight, and rounds once at the end (Gemma)
};

// x and y are rows x columns, weight is (columns), all of `dtype`. y may be x.
void rms_norm(const void* x, int64_t rows, int64_t columns, const void* weight, float eps, RmsNorm kind,
              Dtype dtype, void* y, int threads);

}  // namespace oats
