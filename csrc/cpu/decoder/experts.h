// Which experts a row of a mixture goes through, and which rows an expert gets.
#pragma once

#include <cstdint>

#include "oats/decoder.h"

namespace oats {

// The experts of a row with these logits, and what their outputs are multiplied by: experts.per_row() each,
// from the largest logit on, of equal ones the first; the shared one is the last.
void choose_experts(const float* logits, const DecoderExperts& experts, int32_t* chosen, float* shares);

// The same for all rows, sorted by expert: expert e has places [begin[e], begin[e + 1]), in the order of the
// rows.
struct RowsOfExperts {
  int64_t* begin;  // [experts + 1]
  int64_t* rows;
  float* shares;

  // chosen, chosen_shares: [count][per_row].
  void fill(const int32_t* chosen, const float* chosen_shares, int64_t count, int64_t per_row,
            int64_t experts);
};

}  // namespace oats
