// Tests the core's decoder without Python, for `make test-sanitize`: dense models of odd sizes, against the
// formulas in double. Every buffer has exactly its size, and pages begin as NaN, so that a read beside a
// buffer, or of a token that is not there, shows.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "numbers.h"
#include "oats/decoder.h"
#include "oats/isa.h"

namespace {

using oats::DecoderLayer;
using oats::DecoderLinear;
using oats::DecoderNorm;

int failures = 0, checks = 0;

using Row = std::vector<double>;

struct Sizes {
  int64_t hidden, mlp, vocabulary, heads, kv_heads, head_dim;
};

constexpr Sizes kSizes[] = {{37, 51, 29, 4, 2, 16}, {66, 35, 70, 3, 1, 48}, {64, 96, 101, 2, 2, 80}};
constexpr int64_t kWindows[] = {20, 0};  // of the layers
constexpr int64_t kLayers = 2, kPages = 8;

// One token or more of each of two sequences.
struct Counts {
  int64_t first, second;
};
constexpr Counts kSteps[] = {{70, 0}, {1, 5}, {80, 1}, {1, 1}, {0, 129}, {1, 1}};

template <class Value>
class Case {
 public:
  explicit Case(const Sizes& sizes) : sizes_(sizes) {
    const int64_t q = sizes.heads * sizes.head_dim, kv = sizes.kv_heads * sizes.head_dim;
    model.dtype = std::is_same_v<Value, float> ? oats::Dtype::fp32 : oats::Dtype::bf16;
    model.hidden = sizes.hidden;
    model.vocabulary = sizes.vocabulary;
    model.embedding = normal(sizes.vocabulary * sizes.hidden, 1);
    model.final_norm = norm(sizes.hidden);
    model.head = linear(sizes.vocabulary, sizes.hidden, false);
    model.logits_softcap = 5;
    model.ropes.emplace_back();
    for (int64_t i = 0; i < sizes.head_dim / 2; ++i) {
      model.ropes[0].frequencies.push_back(static_cast<float>(
          std::pow(100., -2 * static_cast<double>(i) / static_cast<double>(sizes.head_dim))));
    }
    for (int64_t i = 0; i < kLayers; ++i) {
      DecoderLayer layer;
      layer.before_attention = norm(sizes.hidden);
      layer.before_mlp = norm(sizes.hidden);
      layer.q_norm = norm(sizes.head_dim);
      layer.k_norm = norm(sizes.head_dim);
      layer.qkv = {linear(q, sizes.hidden, true), linear(kv, sizes.hidden, true),
                   linear(kv, sizes.hidden, true)};
      layer.attention_out = linear(sizes.hidden, q, false);
      layer.gate_up = {linear(sizes.mlp, sizes.hidden, false), linear(sizes.mlp, sizes.hidden, false)};
      layer.down = linear(sizes.hidden, sizes.mlp, true);
      layer.heads = sizes.heads;
      layer.kv_heads = sizes.kv_heads;
      layer.head_dim = sizes.head_dim;
      layer.attention_scale = 0.25f;
      layer.window = kWindows[i];
      layer.rope = 0;
      layer.cache = static_cast<int32_t>(i);
      model.layers.push_back(layer);
    }
  }

  // Logits of all tokens of a text.
  std::vector<Row> expected(const std::vector<int64_t>& text) const {
    std::vector<Row> x;
    for (const int64_t token : text) x.push_back(read(model.embedding, token, sizes_.hidden));
    for (const DecoderLayer& layer : model.layers) {
      std::vector<Row> q, k, v;
      for (size_t i = 0; i < x.size(); ++i) {
        const Row inputs = normed(x[i], layer.before_attention);
        q.push_back(heads_of(apply(layer.qkv[0], inputs), layer.q_norm, i));
        k.push_back(heads_of(apply(layer.qkv[1], inputs), layer.k_norm, i));
        v.push_back(apply(layer.qkv[2], inputs));
      }
      for (size_t i = 0; i < x.size(); ++i) {
        add(x[i], apply(layer.attention_out, attend(layer, q[i], k, v, i)));
        const Row inputs = normed(x[i], layer.before_mlp);
        Row gate = apply(layer.gate_up[0], inputs);
        const Row up = apply(layer.gate_up[1], inputs);
        for (size_t j = 0; j < gate.size(); ++j) gate[j] *= up[j] / (1 + std::exp(-gate[j]));
        add(x[i], apply(layer.down, gate));
      }
    }
    for (Row& row : x) {
      row = apply(model.head, normed(row, model.final_norm));
      for (double& logit : row) logit = 5 * std::tanh(logit / 5);
    }
    return x;
  }

  oats::DecoderModel model;

 private:
  const Value* normal(int64_t count, double deviation) {
    std::normal_distribution<float> values(0, static_cast<float>(deviation));
    weights_.emplace_back(new Value[static_cast<size_t>(count)]);
    Value* made = weights_.back().get();
    for (int64_t i = 0; i < count; ++i) made[i] = from_float<Value>(values(random_));
    return made;
  }

  DecoderLinear linear(int64_t d_out, int64_t d_in, bool bias) {
    DecoderLinear made;
    made.dense = normal(d_out * d_in, 1 / std::sqrt(static_cast<double>(d_in)));
    if (bias) made.bias = normal(d_out, 0.3);
    made.d_out = d_out;
    made.d_in = d_in;
    return made;
  }

  DecoderNorm norm(int64_t size) { return {normal(size, 0.3), 1e-6f, true}; }

  static Row read(const void* from, int64_t row, int64_t size) {
    const Value* values = static_cast<const Value*>(from) + row * size;
    Row out;
    for (int64_t i = 0; i < size; ++i) out.push_back(to_float(values[i]));
    return out;
  }

  static void add(Row& x, const Row& more) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += more[i];
  }

  static Row apply(const DecoderLinear& linear, const Row& x) {
    Row out = linear.bias ? read(linear.bias, 0, linear.d_out) : Row(static_cast<size_t>(linear.d_out));
    for (int64_t i = 0; i < linear.d_out; ++i) {
      const Row row = read(linear.dense, i, linear.d_in);
      for (size_t j = 0; j < x.size(); ++j) out[static_cast<size_t>(i)] += row[j] * x[j];
    }
    return out;
  }

  static Row normed(const Row& x, const DecoderNorm& norm) {
    double squares = 0;
    for (const double value : x) squares += value * value;
    const double factor = 1 / std::sqrt(squares / static_cast<double>(x.size()) + double{norm.eps});
    Row out = read(norm.weight, 0, static_cast<int64_t>(x.size()));
    for (size_t i = 0; i < x.size(); ++i) out[i] = x[i] * factor * (1 + out[i]);
    return out;
  }

  // Heads side by side: each normalised and rotated.
  Row heads_of(const Row& x, const DecoderNorm& norm, size_t position) const {
    const auto size = static_cast<size_t>(sizes_.head_dim), half = size / 2;
    Row out;
    for (size_t head = 0; head < x.size() / size; ++head) {
      const auto begin = x.begin() + static_cast<std::ptrdiff_t>(head * size);
      Row one = normed(Row(begin, begin + static_cast<std::ptrdiff_t>(size)), norm);
      for (size_t i = 0; i < half; ++i) {
        // In float, as transformers has it: the rounding of an angle grows with the position.
        const double angle = static_cast<float>(position) * model.ropes[0].frequencies[i];
        const double a = one[i], b = one[i + half];
        one[i] = a * std::cos(angle) - b * std::sin(angle);
        one[i + half] = b * std::cos(angle) + a * std::sin(angle);
      }
      out.insert(out.end(), one.begin(), one.end());
    }
    return out;
  }

  Row attend(const DecoderLayer& layer, const Row& q, const std::vector<Row>& k, const std::vector<Row>& v,
             size_t position) const {
    const auto size = static_cast<size_t>(sizes_.head_dim), window = static_cast<size_t>(layer.window);
    const auto shared = static_cast<size_t>(sizes_.heads / sizes_.kv_heads);
    const size_t first = window && position + 1 > window ? position + 1 - window : 0;
    Row out(q.size());
    for (size_t head = 0; head < static_cast<size_t>(sizes_.heads); ++head) {
      const size_t at = head * size, from = head / shared * size;
      double sum = 0;
      for (size_t token = first; token <= position; ++token) {
        double score = 0;
        for (size_t i = 0; i < size; ++i) score += q[at + i] * k[token][from + i];
        const double weight = std::exp(score * double{layer.attention_scale});
        sum += weight;
        for (size_t i = 0; i < size; ++i) out[at + i] += weight * v[token][from + i];
      }
      for (size_t i = 0; i < size; ++i) out[at + i] /= sum;
    }
    return out;
  }

  Sizes sizes_;
  std::mt19937 random_{0};
  std::vector<std::unique_ptr<Value[]>> weights_;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Two sequences grow by kSteps; all their logits are compared.
template <class Value>
void check_steps(const Case<Value>& made, const Sizes& sizes, const std::vector<int64_t> (&texts)[2],
                 const std::vector<Row> (&expected)[2], oats::Isa isa, int threads) {
  oats::Decoder decoder(made.model);
  const int64_t page = 2 * sizes.kv_heads * oats::kPageTokens * sizes.head_dim;
  std::vector<std::unique_ptr<Value, Free>> memory;
  std::vector<oats::KvCache> caches;
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    const int64_t count = page * kPages;
    auto* pages = static_cast<Value*>(std::aligned_alloc(64, static_cast<size_t>(count) * sizeof(Value)));
    for (int64_t i = 0; i < count; ++i)
      pages[i] = from_float<Value>(std::numeric_limits<float>::signaling_NaN());
    memory.emplace_back(pages);
    caches.push_back({pages, page, page});
  }
  int64_t lengths[2] = {};
  // Both sequences take pages from the same pool, in turns.
  std::vector<int32_t> tables[2][kLayers];
  for (int32_t i = 0; i < 4; ++i) {
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      tables[0][layer].push_back(7 - 2 * i);
      tables[1][layer].push_back(2 * i);
    }
  }
  for (const Counts& counts : kSteps) {
    const int64_t rows_of[2] = {counts.first, counts.second};
    std::vector<int64_t> tokens, rows;
    std::vector<oats::DecoderSequence> sequences;
    const int32_t* pages[2][kLayers];
    for (int i = 0; i < 2; ++i) {
      if (!rows_of[i]) continue;
      for (int64_t layer = 0; layer < kLayers; ++layer) {
        std::vector<int32_t>& table = tables[i][layer];
        for (int64_t gone = 0; gone < kPages && kWindows[layer]; ++gone)
          if ((gone + 1) * oats::kPageTokens <= lengths[i] + 1 - kWindows[layer])
            table[static_cast<size_t>(gone)] = -1;
        pages[i][layer] = table.data();
      }
      sequences.push_back({static_cast<int64_t>(tokens.size()), rows_of[i], lengths[i], pages[i]});
      for (int64_t j = 0; j < rows_of[i]; ++j) {
        rows.push_back(static_cast<int64_t>(tokens.size()));
        tokens.push_back(texts[i][static_cast<size_t>(lengths[i] + j)]);
      }
    }
    const auto count = static_cast<int64_t>(rows.size());
    const std::unique_ptr<Value[]> logits(new Value[static_cast<size_t>(count * sizes.vocabulary)]);
    decoder.step({tokens.data(), count, sequences.data(), static_cast<int64_t>(sequences.size()),
                  caches.data(), rows.data(), count, logits.get()},
                 threads);
    int64_t row = 0;
    for (int i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < rows_of[i]; ++j, ++row) {
        const Row& right = expected[i][static_cast<size_t>(lengths[i] + j)];
        double error = 0, size = 0;
        for (int64_t v = 0; v < sizes.vocabulary; ++v) {
          const double want = right[static_cast<size_t>(v)];
          const double apart = to_float(logits[static_cast<size_t>(row * sizes.vocabulary + v)]) - want;
          error += apart * apart;
          size += want * want;
        }
        // Rounding errors of the layers add up like a random walk; twice what was seen, or less.
        const double roundings = std::is_same_v<Value, float> ? std::ldexp(8, -23) : std::ldexp(2, -7);
        const double allowed = roundings * std::sqrt(2. * kLayers);
        ++checks;
        if (!(std::sqrt(error / size) <= allowed)) {
          std::fprintf(stderr,
                       "FAILED: %s, %zu bytes, hidden %lld, %d threads: token %lld of text %d: %g > %g\n",
                       oats::isa_name(isa), sizeof(Value), static_cast<long long>(sizes.hidden), threads,
                       static_cast<long long>(lengths[i] + j), i, std::sqrt(error / size), allowed);
          if (++failures == 20) std::exit(1);
        }
      }
      lengths[i] += rows_of[i];
    }
  }
}

template <class Value>
void check_decoders() {
  for (const Sizes& sizes : kSizes) {
    const Case<Value> made(sizes);
    std::vector<int64_t> texts[2];
    std::mt19937 random(1);
    for (const Counts& counts : kSteps) {
      for (int64_t i = 0; i < counts.first; ++i)
        texts[0].push_back(static_cast<int64_t>(random()) % sizes.vocabulary);
      for (int64_t i = 0; i < counts.second; ++i)
        texts[1].push_back(static_cast<int64_t>(random()) % sizes.vocabulary);
    }
    const std::vector<Row> expected[2] = {made.expected(texts[0]), made.expected(texts[1])};
    for (int i = 0; i <= static_cast<int>(oats::best_isa()); ++i) {
      const auto isa = static_cast<oats::Isa>(i);
      setenv("OATS_ISA", oats::isa_name(isa), 1);
      for (const int threads : {1, 3}) check_steps(made, sizes, texts, expected, isa, threads);
    }
  }
}

}  // namespace

int main() {
  check_decoders<float>();
  check_decoders<uint16_t>();
  std::printf("decoder, %s: %d of %d checks failed\n", oats::isa_name(oats::best_isa()), failures, checks);
  return failures != 0;
}
