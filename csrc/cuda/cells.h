// The layout that the CUDA kernels read, and the arithmetic of walking it. All of this also runs on the host,
// where tests/cuda/test_cells.cpp checks it exhaustively.
//
// S is cut into strips of 16 outputs, and a strip into cells of 64 inputs. A warp expands one cell at once,
// into the operands of tensor cores: lane 4 g + t holds outputs g and g + 8, and for each of them inputs 16 t
// to 16 t + 15. An mma sums over 16 inputs. It does not matter which, if both operands agree; so step s of
// four takes inputs 4 s to 4 s + 3 of each lane. Then what a lane needs of a row is contiguous, also in x, U
// and V, which stay row-major.
//
// The mask of a cell is 32 words, one for each lane. Word 8 s + g has the bits of outputs g (lower half) and
// g + 8 (upper half) for step s: bit 4 t + e is input 16 t + 4 s + e. The kept values lie in the order of
// half, s, g, t, e. So the values of one step and half lie side by side for the lanes that want them, and
// shared memory serves all lanes without a conflict.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define OATS_BOTH __host__ __device__ __forceinline__
#else
#define OATS_BOTH inline
#endif

namespace oats::cuda {

constexpr int kCellRows = 16;
constexpr int kCellColumns = 64;
constexpr int kCellElements = kCellRows * kCellColumns;
constexpr unsigned kLanes = 32;
constexpr int kSteps = 4;  // mma instructions that cover a cell
constexpr unsigned kAllLanes = 0xffffffffu;

OATS_BOTH constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

OATS_BOTH constexpr int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

OATS_BOTH int population(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// Bits shift % 32 and up of the two words, `low` first.
OATS_BOTH uint32_t funnel_wrapped(uint32_t low, uint32_t high, uint32_t shift) {
#ifdef __CUDA_ARCH__
  return __funnelshift_r(low, high, shift);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift % 32));
#endif
}

// Values stream through a ring in shared memory, in chunks of 16 bytes for each lane. Each warp has its own
// ring. A value's place in it is its address modulo the size of the ring.
constexpr int kChunkBytes = 16 * kLanes;
constexpr int kChunkValues = kChunkBytes / 2;
constexpr int kRingChunks = 8;
constexpr int kRingWords = kRingChunks * kChunkBytes / 4;
// A copy of the first words behind the last, so that three words in a row never wrap.
constexpr int kMirrorWords = 4;

// Where the parts of a packed weight lie, in bytes from its start.
struct Layout {
  int64_t strips, cells;       // of S, and of one strip
  int64_t u_stride, v_stride;  // elements from row to row
  int64_t starts, masks, values, u, v, bytes;
};

// Each part starts at a cache line. Rows of U and V are filled up with zeros to whole cells. Behind the
// values there is room for a chunk, because whole chunks are copied.
OATS_BOTH Layout layout_of(int64_t d_out, int64_t d_in, int64_t rank, int64_t nnz, int value_bytes) {
  constexpr int64_t kLine = 128;
  Layout l{};
  l.strips = divide_up(d_out, kCellRows);
  l.cells = divide_up(d_in, kCellColumns);
  l.u_stride = round_up(rank, kCellColumns);
  l.v_stride = round_up(d_in, kCellColumns);
  l.starts = 0;  // int64 [strips * cells + 1]: index of the first value of each cell
  l.masks = round_up(8 * (l.strips * l.cells + 1), kLine);
  l.values = l.masks + kLine * l.strips * l.cells;
  l.u = l.values + round_up(value_bytes * nnz + kChunkBytes, kLine);
  l.v = l.u + round_up(value_bytes * d_out * l.u_stride, kLine);
  l.bytes = l.v + round_up(value_bytes * rank * l.v_stride, kLine);
  return l;
}

// A quarter has the 16 mask bits of one output for one step, and above them the number of values of the cell
// before those. Returns the index in the cell of the first value of nibble `t`.
OATS_BOTH uint32_t first_value(uint32_t quarter, uint32_t t) {
  return (quarter >> 16) + population(quarter & ((1u << 4 * t) - 1));
}

OATS_BOTH uint32_t nibble_of(uint32_t quarter, uint32_t t) {
  return quarter >> 4 * t & 15;
}

// Two 16-bit weights for two mask bits. `values` holds the kept ones, the first in the lower half.
OATS_BOTH uint32_t place_pair(uint32_t values, uint32_t bits) {
  if (!(bits & 1)) values <<= 16;
  return bits & 2 ? values : values & 0xffff;
}

struct Quad {
  uint32_t first, second;  // weights e = 0, 1 and e = 2, 3
};

// Four 16-bit weights of a lane, from the three words of values that can hold them. The first kept value is
// the lower half of `w0` if `index` is even, else the upper half.
OATS_BOTH Quad place_quad(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t index, uint32_t nibble) {
  const uint32_t shift = index << 4;  // modulo 32, as the shift takes it: 0 or 16
  const uint32_t a = funnel_wrapped(w0, w1, shift), b = funnel_wrapped(w1, w2, shift);
  // The second pair begins after the none, one or two values of the first.
  const uint32_t middle = funnel_wrapped(a, b, 16);
  const uint32_t rest = nibble & 2 ? (nibble & 1 ? b : middle) : (nibble & 1 ? middle : a);
  return {place_pair(a, nibble), place_pair(rest, nibble >> 2)};
}

// Chunks up to value `end`; and those that place_quad() reads, which goes up to four values further.
OATS_BOTH constexpr uint32_t chunks_of(uint32_t end) {
  return (end + (kChunkValues - 1)) / kChunkValues;
}

OATS_BOTH constexpr uint32_t chunks_read(uint32_t end) {
  return chunks_of(end + 4);
}

// A full cell that begins at the end of a chunk fits.
static_assert(chunks_read(kChunkValues - 1 + kCellElements) <= kRingChunks, "");

struct Range {
  int64_t first, last;
};

// Cuts [0, count) into consecutive parts whose sizes differ by at most one. The host divides: a division of
// 64 bits takes the device as long as part of a cell.
struct Shares {
  int64_t each, longer;  // the first `longer` parts have each + 1

  OATS_BOTH Range of(int64_t part) const {
    const int64_t first = part * each + (part < longer ? part : longer);
    return {first, first + each + (part < longer ? 1 : 0)};
  }
};

inline Shares shares_of(int64_t count, int64_t parts) {
  return {count / parts, count % parts};
}

constexpr int kWarps = 8;  // of a thread block; they share the cells of a strip
constexpr int kThreads = kWarps * kLanes;

// The most columns (rows of x) that the product takes at once.
constexpr int kMaxColumns = 32;

// Columns are padded to 8, 16 or 32: an mma has 8.
OATS_BOTH constexpr int column_groups(int64_t batch) {
  return batch <= 8 ? 1 : batch <= 16 ? 2 : 4;
}

// How many blocks share the inputs of a strip: enough to give each multiprocessor two blocks, as long as each
// warp keeps two cells.
OATS_BOTH int64_t splits_for(int64_t strips, int64_t cells, int64_t multiprocessors) {
  const int64_t wanted = divide_up(2 * multiprocessors, strips > 0 ? strips : 1);
  const int64_t most = cells / (2 * kWarps);
  const int64_t splits = wanted < most ? wanted : most;
  return splits > 1 ? splits : 1;
}

// Where a product keeps its intermediate results, in bytes from the start of a buffer.
struct Workspace {
  int64_t t_stride;                      // elements from row to row of t = V x
  int64_t t, counters, partials, bytes;  // counters: uint32 of each strip; partials: float
};

OATS_BOTH Workspace workspace_of(int64_t d_out, int64_t rank, int64_t batch, int64_t splits) {
  constexpr int64_t kLine = 128;
  const int64_t strips = divide_up(d_out, kCellRows);
  Workspace w{};
  w.t_stride = round_up(rank, kCellColumns);
  w.t = 0;
  w.counters = round_up(2 * batch * w.t_stride, kLine);
  w.partials = w.counters + (splits > 1 ? round_up(4 * strips, kLine) : 0);
  w.bytes = w.partials + (splits > 1 ? 4 * splits * strips * kCellRows * 8 * column_groups(batch) : 0);
  return w;
}

}  // namespace oats::cuda
