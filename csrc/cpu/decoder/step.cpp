// A step in one parallel region. All rows of all sequences go through a layer together:
//
//   norm             rows of the residual stream → inputs of q, k and v
//   q, k, v          one product, or one for each that scales its inputs (csrc/cpu/linear/products.h)
//   rotate, store    q and k of each head; k and v go into the pages of the cache
//   attend           units of at most kQueryRows queries, over ranges of pages
//   merge            the ranges of a unit
//   output           one product
//   add, norm        → inputs of gate and up
//   gate, up         one product
//   gate * up
//   down             one product
//   add
//
// A barrier stands between two lines, and between the stages of a product. Products and attention at few rows
// are bound by reading weights and cache, the rest by barriers.
//
// A mixture of experts has other lines in the place of the last four:
//
//   router           one product: logits of the experts
//   choose           the experts of each row; then the rows of each expert
//   each expert      norm of its rows, gate, up, gate * up, down; add to the mixture
//   add              the mixture
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../linear/products.h"
#include "ahead.h"
#include "barrier.h"
#include "experts.h"
#include "kernels.h"
#include "oats/operations.h"

namespace oats {

namespace {

// Linear layers that read the same rows: what of them is one product, and what scales its inputs.
struct ProductGroup {
  struct Part {
    const DecoderLinear* first;
    int count;
    int64_t offset;      // of its outputs in a row
    const void* powers;  // that multiply its inputs, or null
    int copy;            // which copy of the inputs it reads
  };
  static constexpr int kMostParts = 4;
  Part parts[kMostParts];
  int count = 0, copies = 0;
  int dense_copy = -1;  // the copy of the inputs that dense weights read
  int64_t d_in = 0, d_out = 0;
  const void* powers_of_copy[kMostParts] = {};
  std::vector<std::vector<Piece>> pieces;  // that each thread reads first

  ProductGroup() = default;
  explicit ProductGroup(const std::vector<DecoderLinear>& linears) {
    for (const DecoderLinear& linear : linears) add(linear);
  }
  explicit ProductGroup(const DecoderLinear& linear) { add(linear); }

  void add(const DecoderLinear& linear) {
    const PackedHeader* w = linear.packed;
    const void* powers = w && w->inputs_at ? reinterpret_cast<const char*>(w) + w->inputs_at : nullptr;
    d_in = linear.d_in;
    Part* last = count ? &parts[count - 1] : nullptr;
    if (last && w && !powers && !last->powers && last->first->packed && last->first->packed->isa == w->isa &&
        &linear == last->first + last->count) {
      ++last->count;
    } else {
      int copy = 0;
      while (copy < copies && (powers || powers_of_copy[copy])) ++copy;
      if (copy == copies) powers_of_copy[copies++] = powers;
      if (!w) dense_copy = copy;
      parts[count++] = {&linear, 1, d_out, powers, copy};
    }
    d_out += linear.d_out;
  }
};

struct MlpPlan {
  ProductGroup gate_up, down;
};

struct LayerPlan {
  ProductGroup qkv, output;
  MlpPlan mlp;
  ProductGroup router;  // of a mixture, and
  std::vector<MlpPlan> experts;

  explicit LayerPlan(const DecoderLayer& layer)
      : qkv(layer.qkv), output(layer.attention_out), router(layer.experts.router) {
    if (layer.experts.each.empty()) mlp = {ProductGroup(layer.gate_up), ProductGroup(layer.down)};
    for (const DecoderExpert& one : layer.experts.each)
      experts.push_back({ProductGroup(one.gate_up), ProductGroup(one.down)});
  }

  // What reads the norm in front of the feed-forward network.
  const ProductGroup& behind_attention() const { return experts.empty() ? mlp.gate_up : router; }
  template <class Visit>
  void for_mlps(const Visit& visit) {
    if (experts.empty()) visit(mlp);
    for (MlpPlan& expert : experts) visit(expert);
  }
};

// Bytes of its next product that a thread fetches while it waits. They fit into L2.
constexpr int64_t kAheadBytes = 128 << 10;

// Lines that it fetches before each barrier even if it is the last one to arrive.
constexpr int kBurst = 16;

int64_t align(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

}  // namespace

struct Decoder::State {
  DecoderModel model;
  const DecoderKernels& kernels;
  std::vector<LayerPlan> plans;
  ProductGroup head, nothing;
  int64_t element;  // bytes
  bool has_dense = false;
  int64_t most_experts = 0, most_chosen = 0;  // of a layer, and of a row
  int64_t widest_input = 0, widest_qkv = 0, widest_mlp = 0, widest_attended = 0, copies = 1, frequencies = 0;

  // Of a step; they grow with its rows.
  Workspace memory, workspaces[ProductGroup::kMostParts];
  Call calls[ProductGroup::kMostParts];
  Projection projections[ProductGroup::kMostParts][ProductGroup::kMostParts];
  PlannedProduct planned[ProductGroup::kMostParts];
  float *x, *cosines, *sines, *scratch, *sums;
  PartialAttention* partials;
  char *inputs, *qkv, *attended, *mlp, *gated, *out;
  int64_t *positions, *row_sequence;
  char* routed;  // logits of the experts
  float *mixture, *shares;
  int32_t* chosen;
  RowsOfExperts by_expert;
  uint32_t* tiles;  // of the inputs of a dense product
  uint32_t* tile_weights;
  float* tile_sums;
  int64_t copy_bytes, scratch_floats;
  const DecoderStep* step;
  int team;
  Barrier barrier;
  struct alignas(64) Own {
    Ahead ahead;
  };
  std::vector<Own> own;  // of each thread

  void wait(int part, int parts) {
    Ahead& ahead = own[static_cast<size_t>(part)].ahead;
    for (int i = 0; i < kBurst; ++i) ahead.fetch();
    barrier.wait(parts, [&] { ahead.fetch(); });
  }

  void look_ahead() {
    if (own.size() == static_cast<size_t>(team)) return;
    own.assign(static_cast<size_t>(team), {});
    for (size_t i = 0; i < plans.size(); ++i) {
      const DecoderLayer& layer = model.layers[i];
      look_ahead(plans[i].qkv, &layer.before_attention);
      look_ahead(plans[i].output, nullptr);
      if (!plans[i].experts.empty()) look_ahead(plans[i].router, &layer.before_mlp);
      plans[i].for_mlps([&](MlpPlan& mlp) {
        look_ahead(mlp.gate_up, plans[i].experts.empty() ? &layer.before_mlp : nullptr);
        look_ahead(mlp.down, nullptr);
      });
    }
    look_ahead(head, &model.final_norm);
    look_ahead(nothing, nullptr);
  }
  void look_ahead(ProductGroup& group, const DecoderNorm* norm) {
    group.pieces.assign(static_cast<size_t>(team), {});
    for (int part = 0; part < team; ++part) {
      std::vector<Piece>& pieces = group.pieces[static_cast<size_t>(part)];
      const auto add = [&](const void* begin, int64_t elements) {
        if (begin) pieces.push_back({static_cast<const char*>(begin), elements * element});
      };
      if (norm) add(norm->weight, group.d_in);
      for (int copy = 0; copy < group.copies; ++copy) add(group.powers_of_copy[copy], group.d_in);
      for (int i = 0; i < group.count; ++i) {
        const ProductGroup::Part& one = group.parts[i];
        if (one.first->packed) {
          for (int j = 0; j < one.count; ++j) projections[0][j] = {one.first[j].packed, nullptr, nullptr, 0};
          const Call call{projections[0], one.count, nullptr, 1, 0, team};
          for (const Piece& piece : pieces_of_part(call, part, team, kAheadBytes)) pieces.push_back(piece);
        } else {
          const auto [begin, end] = dense_share(one.first->d_out, part, team);
          add(static_cast<const char*>(one.first->dense) + begin * group.d_in * element,
              std::min((end - begin) * group.d_in, kAheadBytes / element));
        }
      }
    }
  }

  // Whole cache lines of outputs.
  static std::pair<int64_t, int64_t> dense_share(int64_t d_out, int part, int parts) {
    const int64_t lines = divide_up(d_out, 32);
    return {lines * part / parts * 32, std::min(lines * (part + 1) / parts * 32, d_out)};
  }

  explicit State(DecoderModel given)
      : model(std::move(given)),
        kernels(decoder_kernels(active_isa(), model.dtype)),
        element(static_cast<int64_t>(dtype_bytes(model.dtype))) {
    widest_input = model.hidden;
    plans.reserve(model.layers.size());
    for (const DecoderLayer& layer : model.layers) {
      plans.emplace_back(layer);
      LayerPlan& plan = plans.back();
      widest_qkv = std::max(widest_qkv, plan.qkv.d_out);
      most_chosen = std::max(most_chosen, layer.experts.per_row());
      most_experts = std::max(most_experts, static_cast<int64_t>(plan.experts.size()));
      const auto visit = [&](const ProductGroup& group) {
        widest_input = std::max(widest_input, group.d_in);
        has_dense = has_dense || group.dense_copy >= 0;
        copies = std::max<int64_t>(copies, group.copies);
      };
      for (const ProductGroup* group : {&plan.qkv, &plan.output, &plan.router}) visit(*group);
      plan.for_mlps([&](const MlpPlan& mlp) {
        visit(mlp.gate_up);
        visit(mlp.down);
        widest_mlp = std::max(widest_mlp, mlp.gate_up.d_out);
      });
      widest_attended = std::max(widest_attended, layer.heads * layer.head_dim);
    }
    head = ProductGroup(model.head);
    has_dense = has_dense || head.dense_copy >= 0;
    for (const Rope& rope : model.ropes)
      frequencies = std::max(frequencies, static_cast<int64_t>(rope.frequencies.size()));
  }

  // Pages of the cache that a sequence's rows see.
  struct Pages {
    int64_t first, count;

    int64_t ranges() const { return std::min(count, kMostRanges); }
    int64_t begin_of(int64_t range) const { return (first + count * range / ranges()) * kPageTokens; }
  };
  static Pages pages_of(const DecoderLayer& layer, const DecoderSequence& sequence) {
    const int64_t first =
        layer.window ? std::max<int64_t>(0, sequence.start + 1 - layer.window) / kPageTokens : 0;
    return {first, divide_up(sequence.start + sequence.rows, kPageTokens) - first};
  }

  // Units of a layer: of each sequence and head of keys, kQueryRows rows of queries.
  int64_t units_of(const DecoderLayer& layer, const DecoderSequence& sequence) const {
    return layer.kv_heads * divide_up(sequence.rows * (layer.heads / layer.kv_heads), kQueryRows);
  }
  int64_t units_of(const DecoderLayer& layer) const {
    int64_t units = 0;
    for (int64_t i = 0; i < step->sequence_count; ++i) units += units_of(layer, step->sequences[i]);
    return units;
  }
  int64_t ranges_of(const DecoderLayer& layer) const {
    int64_t ranges = 0;
    for (int64_t i = 0; i < step->sequence_count; ++i)
      ranges += units_of(layer, step->sequences[i]) * pages_of(layer, step->sequences[i]).ranges();
    return ranges;
  }
  // Few units: threads share out their ranges.
  bool splits_ranges(int64_t units) const { return units < 4 * team; }

  void cut(Cutter& cutter) {
    const int64_t rows = step->rows;
    int64_t split_ranges = 0, head_dim = 0;
    for (const DecoderLayer& layer : model.layers) {
      if (splits_ranges(units_of(layer))) split_ranges = std::max(split_ranges, ranges_of(layer));
      head_dim = std::max(head_dim, layer.head_dim);
    }
    x = cutter.take<float>(rows * model.hidden);
    copy_bytes = align(rows * model.hidden * element);
    inputs = cutter.take<char>(copy_bytes * copies);
    qkv = cutter.take<char>(rows * widest_qkv * element);
    attended = cutter.take<char>(rows * widest_attended * element);
    mlp = cutter.take<char>(rows * widest_mlp * element);
    gated = cutter.take<char>(rows * widest_mlp * element);
    out = cutter.take<char>(rows * model.hidden * element);
    cosines = cutter.take<float>(rows * frequencies * static_cast<int64_t>(model.ropes.size()));
    sines = cutter.take<float>(rows * frequencies * static_cast<int64_t>(model.ropes.size()));
    positions = cutter.take<int64_t>(rows);
    row_sequence = cutter.take<int64_t>(rows);
    routed = cutter.take<char>(rows * most_experts * element);
    chosen = cutter.take<int32_t>(rows * most_chosen);
    shares = cutter.take<float>(rows * most_chosen);
    mixture = cutter.take<float>(most_experts ? rows * model.hidden : 0);
    by_expert.begin = cutter.take<int64_t>(most_experts + 1);
    by_expert.rows = cutter.take<int64_t>(rows * most_chosen);
    by_expert.shares = cutter.take<float>(rows * most_chosen);
    partials = cutter.take<PartialAttention>(split_ranges * kQueryRows);
    sums = cutter.take<float>(split_ranges * kQueryRows * head_dim);
    // Of a thread: queries, then partial results of all ranges of a unit.
    scratch_floats = align((kQueryRows * head_dim + kMostRanges * kQueryRows * (head_dim + 2)) * 4) / 4;
    scratch_floats = std::max(scratch_floats, align(most_experts * 4) / 4);
    scratch = cutter.take<float>(scratch_floats * team);
    const bool tiled = has_dense && on_tiles(rows);
    tiles = cutter.take<uint32_t>(tiled ? kernels.dense_tiles->input_units(rows, widest_input) : 0);
    tile_weights = cutter.take<uint32_t>(tiled ? kernels.dense_tiles->weights * team : 0);
    tile_sums = cutter.take<float>(tiled ? kernels.dense_tiles->sums * team : 0);
  }

  void run(const DecoderStep& given, int threads) {
    step = &given;
    team = threads;
    look_ahead();
    Cutter size(nullptr);
    cut(size);
    Cutter cutter(memory.reserve(std::max<size_t>(size.used(), 64)));
    cut(cutter);
    for (int64_t i = 0; i < given.sequence_count; ++i) {
      const DecoderSequence& sequence = given.sequences[i];
      for (int64_t row = 0; row < sequence.rows; ++row) {
        positions[sequence.first_row + row] = sequence.start + row;
        row_sequence[sequence.first_row + row] = i;
      }
    }
    if (model.packed_embedding)
      read_sparse_rows(model.packed_embedding, given.tokens, given.rows, out, threads);
    if (threads == 1) {
      run_part(0, 1);
    } else {
#pragma omp parallel num_threads(threads)
      run_part(omp_get_thread_num(), omp_get_num_threads());
    }
  }

  // Calls visit(i) for a part's even share of [0, count).
  template <class Visit>
  static void share(int64_t count, int part, int parts, const Visit& visit) {
    for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) visit(i);
  }

  void run_part(int part, int parts) {
    const int64_t rows = step->rows, hidden = model.hidden;
    share(rows, part, parts, [&](int64_t row) {
      const char* from = model.packed_embedding ? out + row * hidden * element
                                                : static_cast<const char*>(model.embedding) +
                                                      step->tokens[row] * hidden * element;
      kernels.widen(from, hidden, model.embedding_scale, x + row * hidden);
      for (size_t i = 0; i < model.ropes.size(); ++i) rotate_row(i, row);
    });
    for (size_t i = 0; i < model.layers.size(); ++i)
      layer(model.layers[i], plans[i], i + 1 < plans.size() ? plans[i + 1].qkv : head, part, parts);
    if (step->logits_count == 0) return;
    wait(part, parts);
    share(step->logits_count, part, parts, [&](int64_t i) {
      kernels.norm(x + step->logits_rows[i] * hidden, hidden, model.final_norm, head.powers_of_copy[0],
                   inputs + i * hidden * element);
    });
    wait(part, parts);
    product(head, inputs, hidden, step->logits_count, static_cast<char*>(step->logits), model.vocabulary,
            plans[0].qkv, part, parts);
    if (model.logits_scale != 1.f || model.logits_softcap != 0.f) {
      share(step->logits_count * parts, part, parts, [&](int64_t i) {
        // A row is cut into as many pieces as there are parts.
        const int64_t row = i / parts, begin = model.vocabulary * (i % parts) / parts,
                      end = model.vocabulary * (i % parts + 1) / parts;
        kernels.cap(static_cast<char*>(step->logits) + (row * model.vocabulary + begin) * element,
                    end - begin, model.logits_scale, model.logits_softcap);
      });
    }
  }

  float* angles_of(float* all, size_t rope, int64_t row) const {
    return all + (static_cast<int64_t>(rope) * step->rows + row) * frequencies;
  }

  void rotate_row(size_t index, int64_t row) const {
    const Rope* own = step->sequences[row_sequence[row]].ropes;
    const Rope& rope = own ? own[index] : model.ropes[index];
    float *cosine = angles_of(cosines, index, row), *sine = angles_of(sines, index, row);
    const auto position = static_cast<float>(positions[row]);
    for (size_t i = 0; i < rope.frequencies.size(); ++i) {
      const float angle = position * rope.frequencies[i];
      cosine[i] = std::cos(angle) * rope.scale;
      sine[i] = std::sin(angle) * rope.scale;
    }
  }

  void layer(const DecoderLayer& l, const LayerPlan& plan, const ProductGroup& behind, int part, int parts) {
    const int64_t rows = step->rows, hidden = model.hidden, q_width = l.heads * l.head_dim;
    norm_inputs(l.before_attention, plan.qkv, part, parts);
    wait(part, parts);
    product(plan.qkv, inputs, hidden, rows, qkv, plan.qkv.d_out, plan.output, part, parts);
    rotate_and_store(l, plan.qkv.d_out, part, parts);
    wait(part, parts);
    attention(l, plan, part, parts);
    wait(part, parts);
    product(plan.output, attended, q_width, rows, out, hidden, plan.behind_attention(), part, parts);
    add_and_norm(l.after_attention, &l.before_mlp, &plan.behind_attention(), part, parts);
    wait(part, parts);
    if (!plan.experts.empty()) return experts(l, plan, behind, part, parts);
    feed_forward(l, plan.mlp, rows, behind, part, parts);
    add_and_norm(l.after_mlp, nullptr, nullptr, part, parts);
  }

  // Rows of inputs → rows of out.
  void feed_forward(const DecoderLayer& l, const MlpPlan& plan, int64_t rows, const ProductGroup& behind,
                    int part, int parts) {
    const int64_t hidden = model.hidden;
    product(plan.gate_up, inputs, hidden, rows, mlp, plan.gate_up.d_out, plan.down, part, parts);
    const int64_t width = plan.down.d_in;
    // In pieces of a row, so that one row keeps all threads at work.
    share(rows * parts, part, parts, [&](int64_t i) {
      const int64_t row = i / parts, begin = width * (i % parts) / parts,
                    end = width * (i % parts + 1) / parts;
      const char* g = mlp + (row * plan.gate_up.d_out + begin) * element;
      const void* powers = at(plan.down.powers_of_copy[0], begin);
      kernels.gate(l.gate, g, l.gated ? g + width * element : nullptr, end - begin, powers,
                   gated + (row * width + begin) * element);
    });
    wait(part, parts);
    product(plan.down, gated, width, rows, out, hidden, behind, part, parts);
  }

  // A mixture: the experts that rows chose, one after another, each with its rows.
  void experts(const DecoderLayer& l, const LayerPlan& plan, const ProductGroup& behind, int part,
               int parts) {
    const int64_t rows = step->rows, hidden = model.hidden, per_row = l.experts.per_row();
    const auto count = static_cast<int64_t>(plan.experts.size());
    product(plan.router, inputs, hidden, rows, routed, count, nothing, part, parts);
    share(rows, part, parts, [&](int64_t row) {
      float* logits = scratch + part * scratch_floats;
      kernels.widen(routed + row * count * element, count, 1.f, logits);
      choose_experts(logits, l.experts, chosen + row * per_row, shares + row * per_row);
      std::fill_n(mixture + row * hidden, hidden, 0.f);
    });
    wait(part, parts);
    if (part == 0) by_expert.fill(chosen, shares, rows, per_row, count);
    wait(part, parts);
    const auto has_rows = [&](int64_t e) { return by_expert.begin[e] < by_expert.begin[e + 1]; };
    for (int64_t e = 0; e < count; ++e) {
      if (!has_rows(e)) continue;
      const MlpPlan& one = plan.experts[e];
      const int64_t first = by_expert.begin[e], own_rows = by_expert.begin[e + 1] - first;
      share(own_rows, part, parts,
            [&](int64_t i) { norm_row(l.before_mlp, one.gate_up, by_expert.rows[first + i], i); });
      wait(part, parts);
      int64_t next = e + 1;
      while (next < count && !has_rows(next)) ++next;
      feed_forward(l, one, own_rows, next < count ? plan.experts[next].gate_up : behind, part, parts);
      share(own_rows, part, parts, [&](int64_t i) {
        kernels.add(mixture + by_expert.rows[first + i] * hidden, hidden, out + i * hidden * element, {},
                    by_expert.shares[first + i]);
      });
    }
    wait(part, parts);
    share(rows, part, parts, [&](int64_t row) {
      for (int64_t i = row * hidden; i < (row + 1) * hidden; ++i) x[i] += model.residual_scale * mixture[i];
    });
  }

  const void* at(const void* powers, int64_t index) const {
    return powers ? static_cast<const char*>(powers) + index * element : nullptr;
  }

  // Rows of x, normalised, for each copy of the inputs.
  void norm_inputs(const DecoderNorm& norm, const ProductGroup& group, int part, int parts) const {
    share(step->rows, part, parts, [&](int64_t row) { norm_row(norm, group, row, row); });
  }
  void norm_row(const DecoderNorm& norm, const ProductGroup& group, int64_t row, int64_t to) const {
    for (int copy = 0; copy < group.copies; ++copy) {
      kernels.norm(x + row * model.hidden, model.hidden, norm, group.powers_of_copy[copy],
                   inputs + copy * copy_bytes + to * model.hidden * element);
    }
  }
  void add_and_norm(const DecoderNorm& after, const DecoderNorm* norm, const ProductGroup* group, int part,
                    int parts) const {
    share(step->rows, part, parts, [&](int64_t row) {
      kernels.add(x + row * model.hidden, model.hidden, out + row * model.hidden * element, after,
                  model.residual_scale);
      if (norm) norm_row(*norm, *group, row, row);
    });
  }

  bool on_tiles(int64_t rows) const {
    return kernels.dense_tiles && rows >= kernels.dense_tiles->min_columns;
  }

  void dense(const DecoderLinear& linear, const char* x_rows, int64_t x_stride, int64_t rows, char* y,
             int64_t y_stride, int part, int parts) const {
    auto [begin, end] = dense_share(linear.d_out, part, parts);
    if (on_tiles(rows)) {
      const DenseTiles& on = *kernels.dense_tiles;
      begin = on.multiply(linear, begin, end, tiles, rows, tile_weights + part * on.weights,
                          tile_sums + part * on.sums, y, y_stride);
    }
    kernels.dense(linear, begin, end, x_rows, rows, x_stride, y, y_stride);
  }

  // Ends with a barrier: its outputs are there for all.
  void product(const ProductGroup& group, const char* x_rows, int64_t x_stride, int64_t rows, char* y,
               int64_t y_stride, const ProductGroup& next, int part, int parts) {
    int64_t done[ProductGroup::kMostParts] = {};
    for (bool first = true;; first = false) {
      if (part == 0) {
        for (int i = 0; i < group.count; ++i)
          if (group.parts[i].first->packed && done[i] < rows)
            plan(group.parts[i], i, x_rows, x_stride, rows, y, y_stride, done[i]);
      }
      wait(part, parts);
      // Dense weights are multiplied in the last of their stages; they share their inputs.
      const int dense_stages = group.dense_copy < 0 || !first ? 0 : on_tiles(rows) ? 2 : 1;
      int stages = dense_stages;
      if (dense_stages == 2) {
        kernels.dense_tiles->prepare(x_rows + group.dense_copy * copy_bytes, rows, x_stride, group.d_in, part,
                                     parts, tiles);
      }
      for (int i = 0; i < group.count; ++i)
        if (group.parts[i].first->packed && done[i] < rows) stages = std::max(stages, planned[i].stages);
      for (int stage = 0; stage < stages; ++stage) {
        if (stage) wait(part, parts);
        for (int i = 0; i < group.count; ++i) {
          const ProductGroup::Part& one = group.parts[i];
          if (one.first->packed) {
            if (done[i] < rows && stage < planned[i].stages)
              planned[i].run(planned[i].plan, stage, part, parts);
          } else if (stage + 1 == dense_stages) {
            dense(*one.first, x_rows + one.copy * copy_bytes, x_stride, rows, y + one.offset * element,
                  y_stride, part, parts);
          }
        }
      }
      bool all = true;
      for (int i = 0; i < group.count; ++i) {
        if (!group.parts[i].first->packed) continue;
        if (done[i] < rows) done[i] += planned[i].rows;
        all = all && done[i] >= rows;
      }
      own[static_cast<size_t>(part)].ahead.start(next.pieces[static_cast<size_t>(part)]);
      wait(part, parts);
      if (all) return;
    }
  }

  void plan(const ProductGroup::Part& one, int i, const char* x_rows, int64_t x_stride, int64_t rows, char* y,
            int64_t y_stride, int64_t first) {
    int64_t offset = one.offset;
    for (int j = 0; j < one.count; ++j) {
      const DecoderLinear& linear = one.first[j];
      projections[i][j] = {linear.packed, static_cast<const char*>(linear.bias), y + offset * element,
                           y_stride};
      offset += linear.d_out;
    }
    calls[i] = {projections[i], one.count, x_rows + one.copy * copy_bytes, rows, x_stride, team};
    planned[i] = plan_product(calls[i], first, workspaces[i]);
  }

  char* page_of(const DecoderLayer& l, int32_t page) const {
    const KvCache& cache = step->caches[l.cache];
    return static_cast<char*>(cache.pages) +
           (l.cache_layer * cache.layer_stride + page * cache.page_stride) * element;
  }
  int64_t head_bytes(const DecoderLayer& l) const { return kPageTokens * l.head_dim * element; }

  void rotate_and_store(const DecoderLayer& l, int64_t width, int part, int parts) const {
    const int64_t heads = l.heads + l.kv_heads, q_width = l.heads * l.head_dim,
                  kv_width = l.kv_heads * l.head_dim;
    const int64_t rotated = l.rope < 0 ? 0 : static_cast<int64_t>(model.ropes[l.rope].frequencies.size());
    share(step->rows * heads, part, parts, [&](int64_t i) {
      const int64_t row = i / heads, head = i % heads;
      char* of_row = qkv + row * width * element;
      char* vector = of_row + head * l.head_dim * element;
      const size_t rope = l.rope < 0 ? 0 : static_cast<size_t>(l.rope);
      const bool is_q = head < l.heads;
      kernels.norm_and_rotate(vector, l.head_dim, is_q ? l.q_norm : l.k_norm, angles_of(cosines, rope, row),
                              angles_of(sines, rope, row), rotated);
      if (is_q) return;
      const int64_t kv_head = head - l.heads, position = positions[row];
      const int32_t page = step->sequences[row_sequence[row]].pages[l.cache][position / kPageTokens];
      char* keys = page_of(l, page) + kv_head * head_bytes(l);
      kernels.write_key(vector, l.head_dim, keys, position % kPageTokens);
      // Whoever has the first token of a group writes all of it.
      const DecoderSequence& sequence = step->sequences[row_sequence[row]];
      if (position % kernels.group && row > sequence.first_row) return;
      const bool more = kernels.group > 1 && row + 1 < sequence.first_row + sequence.rows;
      const char* value = of_row + (q_width + kv_width + kv_head * l.head_dim) * element;
      kernels.write_value(value, more ? value + width * element : nullptr, l.head_dim,
                          page_of(l, page) + (l.kv_heads + kv_head) * head_bytes(l), position % kPageTokens);
    });
  }

  // Which queries a unit has: of a sequence and a head of keys, rows times heads of the group from `first`
  // on. Its ranges are numbered from `first_range` on.
  struct Place {
    const DecoderSequence& sequence;
    Pages pages;
    int64_t kv_head, first, group, first_range;
    int rows;

    int64_t row(int j) const { return sequence.first_row + (first + j) / group; }
    int64_t head(int j) const { return kv_head * group + (first + j) % group; }
  };
  // The unit with a number, or the one that has the range with a number.
  Place place_of(const DecoderLayer& l, int64_t index, bool of_range) const {
    const DecoderSequence* s = step->sequences;
    int64_t first_range = 0;
    for (;; ++s) {
      const int64_t ranges = pages_of(l, *s).ranges(), items = units_of(l, *s) * (of_range ? ranges : 1);
      if (index < items) break;
      index -= items;
      first_range += units_of(l, *s) * ranges;
    }
    const Pages pages = pages_of(l, *s);
    if (of_range) index /= pages.ranges();
    const int64_t group = l.heads / l.kv_heads, first = index / l.kv_heads * kQueryRows;
    return {*s,
            pages,
            index % l.kv_heads,
            first,
            group,
            first_range + index * pages.ranges(),
            static_cast<int>(std::min<int64_t>(kQueryRows, s->rows * group - first))};
  }

  // One unit: queries gathered from their rows.
  AttentionUnit unit_of(const DecoderLayer& l, int64_t width, const Place& place, uint32_t* queries,
                        int64_t* of_queries) const {
    AttentionUnit unit{};
    unit.rows = place.rows;
    const int64_t bytes = l.head_dim * element;
    for (int j = 0; j < place.rows; ++j) {
      std::memcpy(reinterpret_cast<char*>(queries) + j * bytes,
                  qkv + (place.row(j) * width + place.head(j) * l.head_dim) * element,
                  static_cast<size_t>(bytes));
      of_queries[j] = positions[place.row(j)];
    }
    unit.queries = queries;
    unit.positions = of_queries;
    const int64_t earliest = of_queries[0], latest = of_queries[unit.rows - 1];
    unit.begin = l.window ? std::max<int64_t>(0, earliest + 1 - l.window) : 0;
    unit.end = latest + 1;
    unit.head_dim = l.head_dim;
    unit.window = l.window;
    unit.scale = l.attention_scale;
    unit.softcap = l.attention_softcap;
    unit.pages = place.sequence.pages[l.cache];
    unit.cache = page_of(l, 0) + place.kv_head * head_bytes(l);
    unit.page_bytes = step->caches[l.cache].page_stride * element;
    unit.values_bytes = l.kv_heads * head_bytes(l);
    return unit;
  }

  // A unit's outputs from the partial results of its ranges.
  void merge(const DecoderLayer& l, const LayerPlan& plan, const Place& place, PartialAttention* partial,
             const float* of_values) const {
    for (int j = 0; j < place.rows; ++j) {
      const int64_t head = place.head(j);
      kernels.merge(partial + j, of_values + j * l.head_dim, place.pages.ranges(), kQueryRows,
                    kQueryRows * l.head_dim, l.head_dim, at(plan.output.powers_of_copy[0], head * l.head_dim),
                    attended + (place.row(j) * l.heads + head) * l.head_dim * element);
    }
  }

  void attention(const DecoderLayer& l, const LayerPlan& plan, int part, int parts) {
    const int64_t width = plan.qkv.d_out, units = units_of(l), range_floats = kQueryRows * l.head_dim;
    const bool split = splits_ranges(units);
    float* mine = scratch + part * scratch_floats;
    auto* queries = reinterpret_cast<uint32_t*>(mine);
    auto* own_sums = mine + range_floats;
    auto* own_partials = reinterpret_cast<PartialAttention*>(own_sums + kMostRanges * range_floats);
    int64_t of_queries[kQueryRows];
    const auto attend = [&](AttentionUnit unit, const Pages& pages, int64_t r, PartialAttention* p,
                            float* s) {
      unit.begin = std::max(unit.begin, pages.begin_of(r));
      unit.end = std::min(unit.end, pages.begin_of(r + 1));
      unit.partial = p;
      unit.sums = s;
      kernels.attend(unit);
    };
    // In turns, because later queries see more tokens.
    for (int64_t i = part; i < (split ? ranges_of(l) : units); i += parts) {
      const Place place = place_of(l, i, split);
      const AttentionUnit unit = unit_of(l, width, place, queries, of_queries);
      if (split) {
        attend(unit, place.pages, i - place.first_range, partials + i * kQueryRows, sums + i * range_floats);
        continue;
      }
      for (int64_t r = 0; r < place.pages.ranges(); ++r)
        attend(unit, place.pages, r, own_partials + r * kQueryRows, own_sums + r * range_floats);
      merge(l, plan, place, own_partials, own_sums);
    }
    if (!split) return;
    wait(part, parts);
    share(units, part, parts, [&](int64_t index) {
      const Place place = place_of(l, index, false);
      merge(l, plan, place, partials + place.first_range * kQueryRows,
            sums + place.first_range * range_floats);
    });
  }
};

Decoder::Decoder(DecoderModel model) : state_(std::make_unique<State>(std::move(model))) {}
Decoder::~Decoder() = default;

void Decoder::step(const DecoderStep& step, int threads) {
  if (step.rows > 0) state_->run(step, std::max(threads, 1));
}

int64_t most_likely(const void* logits, int64_t n, Dtype dtype) {
  return decoder_kernels(active_isa(), dtype).most_likely(logits, n);
}

const DecoderKernels& decoder_kernels(Isa isa, Dtype dtype) {
#ifdef OATS_X86
  switch (isa) {
    case Isa::amx_bf16:
      return decoder_kernels_amx_bf16(dtype);
    case Isa::avx512_bf16:
      return decoder_kernels_avx512_bf16(dtype);
    case Isa::avx512:
      return decoder_kernels_avx512(dtype);
    case Isa::avx2:
      return decoder_kernels_avx2(dtype);
    case Isa::scalar:
      break;
  }
#endif
  static_cast<void>(isa);
  return decoder_kernels_scalar(dtype);
}

}  // namespace oats
