#include "oats/rms_norm.h"

#include <algorithm>
#include <cmath>

#include "bf16.h"

namespace oats {

namespace {

// Fewer elements than this take less time than it takes to wake threads.
constexpr int64_t kElementsForThreads = 1 << 16;

// Partial sums: as many as fill vectors, which the compiler makes of them.
constexpr int kSums = 16;

struct Bf16 {
  using Element = uint16_t;
  static float load(uint16_t value) { return float_from_bf16(value); }
  static uint16_t round(float value) { return bf16_from_float(value); }
};
struct Fp32 {
  using Element = float;
  static float load(float value) { return value; }
  static float round(float value) { return value; }
};

template <class Number>
float mean_square(const typename Number::Element* x, int64_t columns) {
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= columns; i += kSums) {
    for (int j = 0; j < kSums; ++j) {
      const float value = Number::load(x[i + j]);
      sums[j] += value * value;
    }
  }
  for (; i < columns; ++i) {
    const float value = Number::load(x[i]);
    sums[0] += value * value;
  }
  float total = 0;
  for (const float sum : sums) total += sum;
  return total / static_cast<float>(columns);
}

template <class Number>
void rows_of(const typename Number::Element* x, int64_t rows, int64_t columns,
             const typename Number::Element* weight, float eps, RmsNorm kind, typename Number::Element* y,
             int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns >= kElementsForThreads)
  for (int64_t row = 0; row < rows; ++row) {
    const auto* in = x + row * columns;
    auto* out = y + row * columns;
    const float scale = 1.f / std::sqrt(mean_square<Number>(in, columns) + eps);
    if (kind == RmsNorm::round_then_scale) {
      for (int64_t i = 0; i < columns; ++i) {
        const float rounded = Number::load(Number::round(Number::load(in[i]) * scale));
        out[i] = Number::round(Number::load(weight[i]) * rounded);
      }
    } else {
      for (int64_t i = 0; i < columns; ++i) {
        out[i] = Number::round(Number::load(in[i]) * scale * (1.f + Number::load(weight[i])));
      }
    }
  }
}

}  // namespace

void rms_norm(const void* x, int64_t rows, int64_t columns, const void* weight, float eps, RmsNorm kind,
              Dtype dtype, void* y, int threads) {
  if (dtype == Dtype::bf16) {
    rows_of<Bf16>(static_cast<const uint16_t*>(x), rows, columns, static_cast<const uint16_t*>(weight), eps,
                  kind, static_cast<uint16_t*>(y), threads);
  } else {
    rows_of<Fp32>(static_cast<const float*>(x), rows, columns, static_cast<const float*>(weight), eps, kind,
                  static_cast<float*>(y), threads);
  }
}

}  // namespace oats
