// The order of the work and its split over threads; the arithmetic is in strip_kernels_<isa>.cpp.
//
//   every thread:  its share of V x, then S x for its strips
//   one barrier:   U needs all of V x; S x before it hides that the shares of V x are uneven
//   every thread:  U (V x) and the bias for its strips, then the outputs
#include "oats/sparse_low_rank_linear.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "strip_kernels.h"

namespace oats {

namespace {

// Below this many packed bytes a thread, waking it costs more than it saves.
constexpr int64_t kBytesPerThread = 32 << 10;

// Columns whose activations and sums are held at once; the weights are read again for each tile.
constexpr int64_t kTileColumns = 256;

// Strips that go through all columns of a tile before the next ones: with d_in = 4096 they are half of a 1 MB
// L2.
constexpr int64_t kStripsPerBlock = 8;

// Kept between calls of the same thread up to this size.
constexpr size_t kWorkspaceKept = 4 << 20;

struct Workspace {
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
  size_t bytes = 0;

  char* reserve(size_t wanted) {
    if (wanted > bytes) {
      wanted = (wanted + 4095) / 4096 * 4096;
      memory.reset(std::aligned_alloc(64, wanted));
      if (!memory) throw std::bad_alloc();
      bytes = wanted;
    }
    return static_cast<char*>(memory.get());
  }
  void trim() {
    if (bytes > kWorkspaceKept) {
      memory.reset();
      bytes = 0;
    }
  }
};

size_t aligned(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

// Columns of a tile that go through the kernels together.
struct Chunk {
  int64_t first;  // column of the tile; all chunks before it are full, so also their padded columns
  int columns;    // real ones
  int padded;     // as the kernels see them
};

struct Tile {
  const PackedHeader* w;
  const StripKernels* kernels;
  const char* x;
  int64_t x_stride, columns, chunks;
  const char* bias;
  char* y;
  int64_t y_stride;
  uint32_t* activations;  // [chunk][groups][padded]
  uint32_t* low_rank;     // [chunk][rank_strips * lanes / group][padded]
  float* sums;            // [strip][chunk][padded][lanes]
  float* rank_sums;       // [rank strip][chunk][padded][lanes]
  bool direct;            // x already is what the kernels read

  Chunk chunk(int64_t i) const {
    const int64_t first = i * kernels->max_columns;
    const int columns_left = static_cast<int>(std::min<int64_t>(columns - first, kernels->max_columns));
    return {first, columns_left, kernels->padded_columns(columns_left)};
  }
  int64_t padded_total() const {
    const Chunk last = chunk(chunks - 1);
    return last.first + last.padded;
  }
  const uint32_t* inputs(const Chunk& c) const {
    return direct ? reinterpret_cast<const uint32_t*>(x) : activations + c.first * w->groups;
  }
  int64_t rank_units() const { return w->rank_strips * w->layout.lanes / w->layout.group; }

  void prepare(int64_t begin, int64_t end) const {
    const int64_t value_bytes = static_cast<int64_t>(dtype_bytes(w->dtype));
    for (int64_t i = 0; i < chunks; ++i) {
      const Chunk c = chunk(i);
      kernels->prepare(x + c.first * x_stride * value_bytes, x_stride, w->d_in, c.columns, c.padded, begin,
                       end, activations + c.first * w->groups);
    }
  }

  void low_rank_inputs(int64_t begin, int64_t end) const {
    const char* v = reinterpret_cast<const char*>(w) + w->v_at;
    const int64_t units_per_strip = w->layout.lanes / w->layout.group;
    for (int64_t i = 0; i < chunks && begin < end; ++i) {
      const Chunk c = chunk(i);
      float* out = rank_sums + (c.first * w->rank_strips + begin * c.padded) * w->layout.lanes;
      kernels->dense(v, w->groups, begin, end, inputs(c), c.padded, false, out);
      for (int64_t s = begin; s < end; ++s) {
        kernels->sums_to_activations(out + (s - begin) * c.padded * w->layout.lanes, c.padded,
                                     low_rank + c.first * rank_units() + s * units_per_strip * c.padded);
      }
    }
  }

  // Sums of one chunk and of a block of strips lie together: [chunk of the block][strip][padded][lanes].
  float* block_sums(int64_t begin, int64_t end, const Chunk& c) const {
    return sums + (begin * padded_total() + c.first * (end - begin)) * w->layout.lanes;
  }

  template <class F>
  void over_blocks(int64_t begin, int64_t end, const F& f) const {
    for (int64_t b = begin; b < end; b += kStripsPerBlock) {
      const int64_t e = std::min(end, b + kStripsPerBlock);
      for (int64_t i = 0; i < chunks; ++i) f(b, e, chunk(i));
    }
  }

  void sparse(int64_t begin, int64_t end) const {
    over_blocks(begin, end, [&](int64_t b, int64_t e, const Chunk& c) {
      kernels->sparse(w, b, e, inputs(c), c.padded, block_sums(b, e, c));
    });
  }

  void finish(int64_t begin, int64_t end) const {
    const char* u = reinterpret_cast<const char*>(w) + w->u_at;
    const int64_t value_bytes = static_cast<int64_t>(dtype_bytes(w->dtype));
    const int64_t lanes = w->layout.lanes;
    over_blocks(begin, end, [&](int64_t b, int64_t e, const Chunk& c) {
      float* out = block_sums(b, e, c);
      if (w->rank) {
        kernels->dense(u, w->rank_groups, b, e, low_rank + c.first * rank_units(), c.padded, true, out);
      }
      for (int64_t s = b; s < e; ++s) {
        const int64_t row = s * lanes;
        kernels->store(out + (s - b) * c.padded * lanes, c.columns, bias ? bias + row * value_bytes : nullptr,
                       static_cast<int>(std::min(lanes, w->d_out - row)),
                       y + (c.first * y_stride + row) * value_bytes, y_stride);
      }
    });
  }
};

// The strip where part `i` of `n` begins, so that each part has the same number of bytes to read.
int64_t strip_boundary(const PackedHeader* w, int i, int n) {
  const auto* starts = reinterpret_cast<const uint64_t*>(reinterpret_cast<const char*>(w) + w->starts_at);
  const uint64_t value_bytes = dtype_bytes(w->dtype);
  const uint64_t cell = w->layout.lanes * w->layout.group;
  const uint64_t fixed = w->groups * cell / 8 + w->rank_groups * cell * value_bytes;
  const auto bytes_before = [&](int64_t strip) { return starts[strip] * value_bytes + strip * fixed; };
  const uint64_t wanted = bytes_before(w->strips) / n * i;
  int64_t low = 0, high = w->strips;
  if (i == n) return high;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    bytes_before(middle) < wanted ? low = middle + 1 : high = middle;
  }
  return low;
}

void run_part(const Tile& tile, int part, int parts) {
  const PackedHeader* w = tile.w;
  if (!tile.direct) {
    tile.prepare(w->groups * part / parts, w->groups * (part + 1) / parts);
#pragma omp barrier
  }
  const int64_t begin = strip_boundary(w, part, parts), end = strip_boundary(w, part + 1, parts);
  tile.low_rank_inputs(w->rank_strips * part / parts, w->rank_strips * (part + 1) / parts);
  tile.sparse(begin, end);
  if (w->rank) {
#pragma omp barrier
  }
  tile.finish(begin, end);
}

}  // namespace

void sparse_low_rank_linear(const void* packed, const void* x, int64_t batch, int64_t x_stride,
                            const void* bias, void* y, int64_t y_stride, int threads) {
  static thread_local Workspace workspace;
  const auto* w = static_cast<const PackedHeader*>(packed);
  const StripKernels& kernels = strip_kernels(w->isa, w->dtype);
  const int64_t value_bytes = static_cast<int64_t>(dtype_bytes(w->dtype));
  if (w->d_out == 0) return;
  const int useful = static_cast<int>(std::max<int64_t>(1, static_cast<int64_t>(w->bytes) / kBytesPerThread));
  const int team = std::max(1, std::min({threads, useful, static_cast<int>(w->strips)}));

  for (int64_t first = 0; first < batch; first += kTileColumns) {
    Tile tile{};
    tile.w = w;
    tile.kernels = &kernels;
    tile.x = static_cast<const char*>(x) + first * x_stride * value_bytes;
    tile.x_stride = x_stride;
    tile.columns = std::min(batch - first, kTileColumns);
    tile.chunks = (tile.columns + kernels.max_columns - 1) / kernels.max_columns;
    tile.bias = static_cast<const char*>(bias);
    tile.y = static_cast<char*>(y) + first * y_stride * value_bytes;
    tile.y_stride = y_stride;
    // One row of whole groups of 4 bytes is already [groups][1].
    tile.direct = tile.columns == 1 && value_bytes * w->layout.group == 4 && w->d_in % w->layout.group == 0;

    const int64_t padded = tile.padded_total();
    const size_t activations = tile.direct ? 0 : aligned(w->groups * padded * 4);
    const size_t low_rank = aligned(tile.rank_units() * padded * 4);
    const size_t sums = aligned(w->strips * padded * w->layout.lanes * 4);
    const size_t rank_sums = aligned(w->rank_strips * padded * w->layout.lanes * 4);
    char* memory = workspace.reserve(activations + low_rank + sums + rank_sums);
    tile.activations = reinterpret_cast<uint32_t*>(memory);
    tile.low_rank = reinterpret_cast<uint32_t*>(memory + activations);
    tile.sums = reinterpret_cast<float*>(memory + activations + low_rank);
    tile.rank_sums = reinterpret_cast<float*>(memory + activations + low_rank + sums);

    if (team == 1) {
      run_part(tile, 0, 1);
    } else {
#pragma omp parallel num_threads(team)
      run_part(tile, omp_get_thread_num(), omp_get_num_threads());
    }
  }
  workspace.trim();
}

}  // namespace oats
