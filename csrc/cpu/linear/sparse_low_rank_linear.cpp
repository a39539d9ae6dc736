// One call of the product: multiplies x by 2^input_exponent if the weights have codes, decides how many
// threads take part and in which order they work, and divides the blocks among them. Projections that cannot
// share activations are calls of their own.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "elements.h"
#include "kernels/column_kernels.h"
#include "kernels/tile_kernels.h"
#include "oats/operations.h"
#include "products.h"

namespace oats {

namespace {

// Below this much work for a thread, waking it costs more than it saves.
constexpr int64_t kElementsPerThread = 32 << 10;
constexpr int64_t kBytesPerThread = 32 << 10;  // of packed weights

// out = x times powers of two, which is exact. bf16 is the upper half of fp32.
template <class Io, class Element = typename Io::Element>
void scale_inputs(const Element* x, int64_t batch, int64_t x_stride, int64_t d_in, const Element* powers,
                  Element* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * d_in >= kElementsPerThread * 2)
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t i = 0; i < d_in; ++i) {
      const float value = Io::to_float(x[row * x_stride + i]) * Io::to_float(powers[i]);
      if constexpr (sizeof(Element) == 4) {
        out[row * d_in + i] = value;
      } else {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        out[row * d_in + i] = static_cast<Element>(bits >> 16);
      }
    }
  }
}

std::atomic<ActivationCodes> process_activations{ActivationCodes::exact};

enum class Order { strips, columns, tiles };

Order best_order(const Call& call) {
  const PackedHeader* w = call.first();
  if (call.one_byte()) return Order::strips;
  const TileKernels* tiles = tile_kernels(w->isa, w->shape.dtype, w->shape.values);
  if (tiles) return call.batch < tiles->min_batch ? Order::strips : Order::tiles;
  const int64_t least = column_kernels(w->isa, w->shape.dtype, w->shape.values).min_columns;
  return call.batch < least ? Order::strips : Order::columns;
}

}  // namespace

void set_activation_codes(ActivationCodes codes) {
  process_activations = codes;
}

ActivationCodes activation_codes() {
  return process_activations;
}

void sparse_low_rank_linear(const Projection* projections, int count, const void* x, int64_t batch,
                            int64_t x_stride, int threads) {
  static thread_local Workspace workspace, scaled_x;
  const PackedHeader* first = projections[0].w;
  for (int i = 1; i < count; ++i) {
    const PackedHeader* w = projections[i].w;
    if (w->isa == first->isa && !w->inputs_at && !first->inputs_at) continue;
    // The activations are laid out for one ISA, and scaled by the exponents of one weight.
    sparse_low_rank_linear(projections, i, x, batch, x_stride, threads);
    sparse_low_rank_linear(projections + i, count - i, x, batch, x_stride, threads);
    return;
  }
  if (first->inputs_at && batch > 0) {
    const int64_t d_in = first->shape.d_in;
    const auto scale = [&](auto io) {
      using T = typename decltype(io)::Element;
      auto* out = reinterpret_cast<T*>(scaled_x.reserve(std::max<int64_t>(batch * d_in, 1) * sizeof(T)));
      scale_inputs<decltype(io)>(static_cast<const T*>(x), batch, x_stride, d_in,
                                 part_at<T>(first, first->inputs_at), out, threads);
      x = out;
      x_stride = d_in;
    };
    first->shape.dtype == Dtype::fp32 ? scale(Fp32Element{}) : scale(Bf16Element{});
  }
  Call call{projections, count, static_cast<const char*>(x), batch, x_stride, 1};
  int64_t bytes = 0;
  for (int i = 0; i < count; ++i) bytes += static_cast<int64_t>(projections[i].w->bytes);
  const int64_t useful = std::min<int64_t>(call.blocks(), bytes / kBytesPerThread);
  if (batch == 0 || call.blocks() == 0) return;
  call.team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
  switch (best_order(call)) {
    case Order::tiles:
      product_by_tiles(call, workspace);
      break;
    case Order::strips:
      product_by_strips(call, workspace);
      break;
    case Order::columns:
      product_by_columns(call, workspace);
      break;
  }
  workspace.trim();
  scaled_x.trim();
}

PlannedProduct plan_product(const Call& call, int64_t first, Workspace& workspace) {
  switch (best_order(call)) {
    case Order::tiles:
      return plan_by_tiles(call, first, workspace);
    case Order::strips:
      return plan_by_strips(call, first, workspace);
    case Order::columns:
      break;
  }
  return plan_by_columns(call, first, workspace);
}

namespace {

// Bytes of one strip of U or V that has `columns` columns.
int64_t factor_bytes(const PackedHeader* w, int64_t columns) {
  return w->layout.lanes * columns * storage_bits(w->shape.factors, w->shape.dtype) / 8;
}

// Bytes of the first `block` blocks of S, and of U if `with_u`, without the few bytes of scales and padding.
int64_t bytes_before(const PackedHeader* w, int64_t block, bool with_u) {
  const int64_t u_strip = with_u ? factor_bytes(w, w->shape.rank) : 0;
  const int64_t strips = std::min(block * kStripsPerBlock, w->strips),
                strip = w->layout.lanes * w->shape.d_in;
  if (!w->shape.masked) return strips * (strip * w->value_bits() / 8 + u_strip);
  const auto* starts = part_at<uint64_t>(w, w->starts_at);
  return static_cast<int64_t>(starts[block]) * w->value_bits() / 8 + strips * (strip / 8 + u_strip);
}

}  // namespace

std::vector<Piece> pieces_of_part(const Call& call, int part, int parts, int64_t most) {
  std::vector<Piece> pieces;
  const auto add = [&](const void* begin, int64_t bytes) {
    if (most <= 0 || bytes <= 0) return;
    pieces.push_back({static_cast<const char*>(begin), std::min(bytes, most)});
    most -= bytes;
  };
  call.for_rank_blocks(part, parts, [&](int i, int64_t block) {
    const PackedHeader* w = call.projections[i].w;
    const DenseBlock v = dense_block(w, Matrix::v, block);
    add(v.cells, v.strips * factor_bytes(w, w->shape.d_in));
  });
  call.split(block_boundary(call, part, parts, true), block_boundary(call, part + 1, parts, true),
             [&](int i, int64_t begin, int64_t end) {
               const PackedHeader* w = call.projections[i].w;
               const int64_t bits = w->value_bits();
               const int64_t strip = w->value_groups * w->layout.lanes * w->values_layout.group / 8;
               for (int64_t block = begin; block < end; ++block) {
                 if (!w->shape.masked) {
                   const DenseBlock s = dense_block(w, Matrix::s, block);
                   add(s.cells, s.strips * strip * bits);
                   continue;
                 }
                 const auto* starts = part_at<uint64_t>(w, w->starts_at);
                 const auto first = static_cast<int64_t>(starts[block]);
                 add(part_at<char>(w, w->masks_at) + block * kStripsPerBlock * strip,
                     strips_of_block(w->strips, block) * strip);
                 add(part_at<char>(w, w->values_at) + first * bits / 8,
                     (static_cast<int64_t>(starts[block + 1]) - first) * bits / 8);
               }
             });
  return pieces;
}

int64_t block_boundary(const Call& call, int i, int n, bool with_v) {
  if (i == n) return call.blocks();
  const PackedHeader* first = call.first();
  const int64_t v_strip = factor_bytes(first, first->shape.d_in);
  const int64_t rank_blocks = call.rank_blocks();
  const auto v_bytes_before = [&](int part) {
    int64_t strips = 0;
    if (with_v) {
      call.split_rank(0, rank_blocks * part / n, [&](int p, int64_t, int64_t end) {
        strips += std::min(end * kStripsPerBlock, call.projections[p].w->rank_strips);
      });
    }
    return strips * v_strip;
  };
  int64_t total = v_bytes_before(n);
  for (int p = 0; p < call.count; ++p) {
    const PackedHeader* w = call.projections[p].w;
    total += bytes_before(w, w->blocks(), !with_v);
  }
  // A part whose blocks of V already exceed its share gets no blocks of S: the boundary stays.
  int64_t wanted = 0;
  for (int part = 1; part <= i; ++part) wanted = std::max(wanted, total / n * part - v_bytes_before(part));
  int64_t blocks = 0;
  for (int p = 0; p < call.count; ++p) {
    const PackedHeader* w = call.projections[p].w;
    const int64_t bytes = bytes_before(w, w->blocks(), !with_v);
    if (bytes >= wanted) {
      int64_t low = 0, high = w->blocks();
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        bytes_before(w, middle, !with_v) < wanted ? low = middle + 1 : high = middle;
      }
      return blocks + low;
    }
    wanted -= bytes;
    blocks += w->blocks();
  }
  return blocks;
}

}  // namespace oats
