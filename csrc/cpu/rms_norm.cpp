// A thread normalises whole rows. It reads a row twice, once for the mean of the squares and once to scale
// it; the second read comes from the cache.
#include <algorithm>
#include <cmath>

#include "elements.h"
#include "oats/operations.h"

namespace oats {

namespace {

// It takes longer to wake threads than to normalise fewer elements than this.
constexpr int64_t kElementsForThreads = 1 << 16;

// Independent partial sums, so that the compiler can keep them in vectors.
constexpr int kSums = 16;

template <class Io>
float mean_square(const typename Io::Element* x, int64_t columns) {
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= columns; i += kSums) {
    for (int j = 0; j < kSums; ++j) {
      const float value = Io::to_float(x[i + j]);
      sums[j] += value * value;
    }
  }
  for (; i < columns; ++i) {
    const float value = Io::to_float(x[i]);
    sums[0] += value * value;
  }
  float total = 0;
  for (const float sum : sums) total += sum;
  return total / static_cast<float>(columns);
}

template <class Io>
void rows_of(const typename Io::Element* x, int64_t rows, int64_t columns, const typename Io::Element* weight,
             float eps, RmsNorm kind, typename Io::Element* y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * columns >= kElementsForThreads)
  for (int64_t row = 0; row < rows; ++row) {
    const auto* in = x + row * columns;
    auto* out = y + row * columns;
    const float scale = 1.f / std::sqrt(mean_square<Io>(in, columns) + eps);
    if (kind == RmsNorm::round_then_scale) {
      for (int64_t i = 0; i < columns; ++i) {
        const float rounded = Io::to_float(Io::from_float(Io::to_float(in[i]) * scale));
        out[i] = Io::from_float(Io::to_float(weight[i]) * rounded);
      }
    } else {
      for (int64_t i = 0; i < columns; ++i) {
        out[i] = Io::from_float(Io::to_float(in[i]) * scale * (1.f + Io::to_float(weight[i])));
      }
    }
  }
}

}  // namespace

void rms_norm(const void* x, int64_t rows, int64_t columns, const void* weight, float eps, RmsNorm kind,
              Dtype dtype, void* y, int threads) {
  const auto run = [&](auto io) {
    using Io = decltype(io);
    using T = typename Io::Element;
    rows_of<Io>(static_cast<const T*>(x), rows, columns, static_cast<const T*>(weight), eps, kind,
                static_cast<T*>(y), threads);
  };
  dtype == Dtype::fp32 ? run(Fp32Element{}) : run(Bf16Element{});
}

}  // namespace oats
