// One step of a decoder-only transformer: tokens in, logits out. docs/engine.md draws it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "oats/packed_weight.h"

namespace oats {

// y = W x + b. The weight is packed, or dense: rows of d_in elements of the decoder's dtype, one after
// another.
struct DecoderLinear {
  const PackedHeader* packed = nullptr;
  const void* dense = nullptr;
  const void* bias = nullptr;
  int64_t d_out = 0, d_in = 0;

  bool exists() const { return packed || dense; }
};

// x / sqrt(mean(x²) + eps) times the weight, or times one plus the weight. Without a weight there is none.
struct DecoderNorm {
  const void* weight = nullptr;
  float eps = 0;
  bool one_plus = false;
};

enum class Gate : int32_t { none = 0, silu, gelu, gelu_tanh, relu };

// One of a mixture: down(gate(g) * up).
struct DecoderExpert {
  std::vector<DecoderLinear> gate_up;  // as of a layer
  DecoderLinear down;
};

// A mixture. A row goes through the experts that have its largest logits; their outputs are added, times the
// softmax of the logits. A shared expert is the last one: it gets all rows, times the sigmoid of its logit.
struct DecoderExperts {
  std::vector<DecoderLinear> router;  // logits of the experts; that of the shared one
  std::vector<DecoderExpert> each;    // none: there is no mixture
  int64_t chosen = 0;                 // experts of a row, without the shared one
  bool normalised = true;             // the softmax is of the chosen ones only
  bool shared = false;

  int64_t per_row() const { return chosen + (shared ? 1 : 0); }
};

struct DecoderLayer {
  DecoderNorm before_attention, after_attention, before_mlp, after_mlp;  // those after: before the addition
  DecoderNorm q_norm, k_norm;                                            // of each head
  std::vector<DecoderLinear> qkv;  // q, k, v; or one that returns them one after another
  DecoderLinear attention_out;
  std::vector<DecoderLinear> gate_up;  // gate, up; or one that returns both; or one, where nothing gates
  DecoderLinear down;
  DecoderExperts experts;                            // if there are any, they are in the place of these two
  int64_t heads = 0, kv_heads = 0, head_dim = 0;     // head_dim is a multiple of 16
  float attention_scale = 1, attention_softcap = 0;  // no cap where 0
  int64_t window = 0;       // tokens that one sees, itself included; 0: all before it
  int32_t rope = -1;        // which of the decoder's; -1: none
  int32_t cache = 0;        // which of the step's caches, and
  int32_t cache_layer = 0;  // which of its layers
  Gate gate = Gate::silu;
  bool gated = true;
};

// Rotary embedding of the first 2 * frequencies dimensions of a head: the angle of pair i, dimensions i and
// i + frequencies, at a position is position * frequencies[i].
struct Rope {
  std::vector<float> frequencies;
  float scale = 1;  // of sines and cosines
};

struct DecoderModel {
  Dtype dtype = Dtype::bf16;
  int64_t hidden = 0, vocabulary = 0;
  const void* embedding = nullptr;                 // vocabulary x hidden; or
  const PackedHeader* packed_embedding = nullptr;  // rows of a packed weight
  float embedding_scale = 1, residual_scale = 1, logits_scale = 1, logits_softcap = 0;
  std::vector<DecoderLayer> layers;
  std::vector<Rope> ropes;
  DecoderNorm final_norm;
  DecoderLinear head;
};

// Tokens of a cache page. A group is what 4 bytes hold. Keys of a page and a head are
// [head_dim / group][tokens][group], so that a vector holds tokens; values are [tokens / group][head_dim]
// [group].
constexpr int64_t kPageTokens = 64;

struct KvCache {
  void* pages = nullptr;     // [layer][page][keys, values][kv_heads][kPageTokens * head_dim]
  int64_t layer_stride = 0;  // elements from layer to layer, and
  int64_t page_stride = 0;   // from page to page
};

// A run of tokens of one sequence: rows [first_row, first_row + rows) of the step, at positions `start` and
// on.
struct DecoderSequence {
  int64_t first_row, rows, start;
  const int32_t* const* pages;  // of each cache: page of tokens [64 i, 64 i + 64); -1 where it is gone
  const Rope* ropes = nullptr;  // in place of the model's, as many and as long; or null
};

struct DecoderStep {
  const int64_t* tokens;  // one a row
  int64_t rows;
  const DecoderSequence* sequences;
  int64_t sequence_count;
  const KvCache* caches;
  const int64_t* logits_rows;  // rows whose logits are wanted
  int64_t logits_count;
  void* logits;  // logits_count x vocabulary, the model's dtype
};

// Index of the largest of n logits, the first of equal ones.
int64_t most_likely(const void* logits, int64_t n, Dtype dtype);

class Decoder {
 public:
  explicit Decoder(DecoderModel model);
  ~Decoder();

  // Writes keys and values of the tokens into their pages, and the logits.
  void step(const DecoderStep& step, int threads);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace oats
