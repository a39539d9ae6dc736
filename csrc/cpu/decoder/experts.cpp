#include "experts.h"

#include <algorithm>
#include <cmath>

namespace oats {

void choose_experts(const float* logits, const DecoderExperts& experts, int32_t* chosen, float* shares) {
  const int64_t count = static_cast<int64_t>(experts.each.size()) - (experts.shared ? 1 : 0);
  int64_t found = 0;
  for (int64_t e = 0; e < count; ++e) {
    int64_t at = found;
    while (at > 0 && logits[e] > logits[chosen[at - 1]]) --at;
    if (at == experts.chosen) continue;
    found = std::min(found + 1, experts.chosen);
    std::copy_backward(chosen + at, chosen + found - 1, chosen + found);
    chosen[at] = static_cast<int32_t>(e);
  }
  const float largest = logits[chosen[0]];
  float sum = 0;
  for (int64_t i = 0; i < found; ++i) sum += shares[i] = std::exp(logits[chosen[i]] - largest);
  if (!experts.normalised) {
    sum = 0;
    for (int64_t e = 0; e < count; ++e) sum += std::exp(logits[e] - largest);
  }
  for (int64_t i = 0; i < found; ++i) shares[i] /= sum;
  if (experts.shared) {
    chosen[found] = static_cast<int32_t>(count);
    shares[found] = 1.f / (1.f + std::exp(-logits[count]));
  }
}

void RowsOfExperts::fill(const int32_t* chosen, const float* chosen_shares, int64_t count, int64_t per_row,
                         int64_t experts) {
  std::fill_n(begin, experts + 1, int64_t{0});
  for (int64_t i = 0; i < count * per_row; ++i) ++begin[chosen[i] + 1];
  for (int64_t e = 0; e < experts; ++e) begin[e + 1] += begin[e];
  for (int64_t i = 0; i < count * per_row; ++i) {
    const int64_t place = begin[chosen[i]]++;
    rows[place] = i / per_row;
    shares[place] = chosen_shares[i];
  }
  // Each has moved to where the next one begins.
  std::copy_backward(begin, begin + experts, begin + experts + 1);
  begin[0] = 0;
}

}  // namespace oats
