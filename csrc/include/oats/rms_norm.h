// y = x / sqrt(mean(x²) + eps), times a weight, row by row (Zhang and Sennrich 2019, arXiv 1910.07467).
#pragma once

#include <cstdint>

#include "oats/packed_weight.h"

namespace oats {

// What is rounded, and what the weight is: as transformers' classes have it.
enum class RmsNorm {
  round_then_scale,   // weight times what was rounded to the dtype before (Llama)
  scale_by_one_plus,  // one plus the weight, and one rounding at the end (Gemma)
};

// x and y are rows x columns, weight has `columns`, all of `dtype`; y may be x.
void rms_norm(const void* x, int64_t rows, int64_t columns, const void* weight, float eps, RmsNorm kind,
              Dtype dtype, void* y, int threads);

}  // namespace oats
