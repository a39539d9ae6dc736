// The threshold of the sparse part. A thread block finds the threshold of one row by radix selection on the
// magnitude bits, which order like the magnitudes: eleven bits at a time, from the top. It reads the row from
// memory once, then from the caches.
#include <type_traits>

#include "cells.h"
#include "device.h"
#include "kernels.h"

namespace oats::cuda {
namespace {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kDigitsOfThread = kDigits / kThreads;

template <class Float>
using BitsOf = std::conditional_t<sizeof(Float) == 4, uint32_t, unsigned long long>;

template <class Float>
__device__ __forceinline__ BitsOf<Float> magnitude(Float value) {
  BitsOf<Float> bits;
  memcpy(&bits, &value, sizeof bits);
  return bits << 1 >> 1;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (unsigned distance = kLanes / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

struct RowShared {
  uint32_t histogram[kDigits];
  int64_t before_warp[kWarps];
  double squares[kWarps];
  uint32_t digit;
  int64_t wanted;      // how many entries with this digit stay
  int64_t with_digit;  // how many there are
};

// Finds the digit of the `wanted`-th entry from the top. All threads of the block take part.
__device__ __forceinline__ void find_digit(RowShared& shared, int64_t wanted) {
  const unsigned thread = threadIdx.x, warp = thread / kLanes, lane = thread % kLanes;
  // Thread 0 has the largest digits.
  const int top = kDigits - 1 - kDigitsOfThread * static_cast<int>(thread);
  int64_t own = 0;
#pragma unroll
  for (int i = 0; i < kDigitsOfThread; ++i) own += shared.histogram[top - i];
  int64_t sum = own;
#pragma unroll
  for (unsigned distance = 1; distance < kLanes; distance *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == kLanes - 1) shared.before_warp[warp] = sum;
  __syncthreads();
  int64_t above = sum - own;
  for (unsigned w = 0; w < warp; ++w) above += shared.before_warp[w];
  // One thread's digits have the entry.
  if (above < wanted && wanted <= above + own) {
    int digit = top;
    while (above + shared.histogram[digit] < wanted) above += shared.histogram[digit--];
    shared.digit = static_cast<uint32_t>(digit);
    shared.wanted = wanted - above;
    shared.with_digit = shared.histogram[digit];
  }
  __syncthreads();
}

// 0 < count < columns.
template <class Float>
__global__ void __launch_bounds__(kThreads)
    keep_largest_kernel(Float* in, int64_t columns, int64_t count, Float* out, double* squares) {
  using Bits = BitsOf<Float>;
  constexpr int kMagnitudeBits = 8 * sizeof(Bits) - 1;
  __shared__ RowShared shared;
  const unsigned thread = threadIdx.x, warp = thread / kLanes, lane = thread % kLanes;
  in += blockIdx.x * columns;
  out += blockIdx.x * columns;

  // An entry stays if its bits from `shift` up are above those of the threshold. `equal` entries have the
  // same bits; `wanted` of them stay, and lower bits decide which.
  Bits threshold = 0;
  int shift = kMagnitudeBits;
  int64_t wanted = count, equal = columns;
  while (shift > 0 && wanted < equal) {
    const int width = shift < kDigitBits ? shift : kDigitBits, next = shift - width;
    for (unsigned i = thread; i < kDigits; i += kThreads) shared.histogram[i] = 0;
    __syncthreads();
    for (int64_t i = thread; i < columns; i += kThreads) {
      const Bits m = magnitude(in[i]);
      if (m >> shift == threshold >> shift)
        atomicAdd(&shared.histogram[static_cast<uint32_t>(m >> next) & ((1u << width) - 1)], 1u);
    }
    __syncthreads();
    find_digit(shared, wanted);
    threshold |= static_cast<Bits>(shared.digit) << next;
    wanted = shared.wanted;
    equal = shared.with_digit;
    shift = next;
    __syncthreads();
  }

  Float square = 0;
  const auto put = [&](int64_t i, Float value, bool keep) {
    out[i] = keep ? value : Float{0};
    if (squares == nullptr) return;
    if (keep)
      in[i] = Float{0};
    else
      square += value * value;
  };
  if (wanted == equal) {
    for (int64_t i = thread; i < columns; i += kThreads) {
      const Float value = in[i];
      put(i, value, magnitude(value) >> shift >= threshold >> shift);
    }
  } else {
    // Of equal magnitudes the first ones stay. Count them, one column for each thread at a time.
    int64_t left = wanted;
    for (int64_t first = 0; first < columns; first += kThreads) {
      const int64_t i = first + thread;
      const Float value = i < columns ? in[i] : Float{0};
      const Bits m = magnitude(value);
      const bool tie = i < columns && m == threshold;
      const unsigned ties = __ballot_sync(kAllLanes, tie);
      if (lane == 0) shared.before_warp[warp] = population(ties);
      __syncthreads();
      int64_t before = population(ties & ((1u << lane) - 1)), all = 0;
      for (unsigned w = 0; w < kWarps; ++w) {
        if (w < warp) before += shared.before_warp[w];
        all += shared.before_warp[w];
      }
      if (i < columns) put(i, value, m > threshold || (tie && before < left));
      left = left > all ? left - all : 0;
      __syncthreads();
    }
  }
  if (squares == nullptr) return;
  const double sum = warp_sum(static_cast<double>(square));
  if (lane == 0) shared.squares[warp] = sum;
  __syncthreads();
  if (thread == 0) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared.squares[w];
    squares[blockIdx.x] = total;
  }
}

// One thread decides over the few columns of a group: entry i stays if fewer than `count` come before it.
template <class Float>
__global__ void __launch_bounds__(kThreads)
    keep_largest_of_group_kernel(const Float* in, int64_t groups, int columns, int count, Float* out) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= groups) return;
  in += group * columns;
  out += group * columns;
  unsigned long long kept = 0;
  for (int i = 0; i < columns; ++i) {
    const auto own = magnitude(in[i]);
    int before = 0;
    for (int j = 0; j < columns; ++j) {
      const auto other = magnitude(in[j]);
      before += other > own || (other == own && j < i);
    }
    kept |= static_cast<unsigned long long>(before < count) << i;
  }
  for (int i = 0; i < columns; ++i) out[i] = kept >> i & 1 ? in[i] : Float{0};
}

template <class Float>
void run(void* in, int64_t rows, int64_t columns, int64_t count, void* out, double* squares,
         const Queue& queue) {
  if (columns <= kMaxGroup) {
    if (squares != nullptr) throw std::invalid_argument("the squares of what is left take longer rows");
    const dim3 grid(static_cast<unsigned>(divide_up(rows, kThreads)));
    launch(keep_largest_of_group_kernel<Float>, grid, dim3(kThreads), queue, false,
           static_cast<const Float*>(in), rows, static_cast<int>(columns), static_cast<int>(count),
           static_cast<Float*>(out));
  } else {
    launch(keep_largest_kernel<Float>, dim3(static_cast<unsigned>(rows)), dim3(kThreads), queue, false,
           static_cast<Float*>(in), columns, count, static_cast<Float*>(out), squares);
  }
}

}  // namespace

void keep_largest_in_rows(void* in, int64_t rows, int64_t columns, int64_t count, int value_bytes, void* out,
                          double* squares, const Queue& queue) {
  if (rows == 0) return;
  // A group's bits are counted in 64; a grid has fewer than 2^31 blocks.
  if (rows >= int64_t{1} << 31 && columns > kMaxGroup) throw std::invalid_argument("too many rows");
  if (value_bytes == 4)
    run<float>(in, rows, columns, count, out, squares, queue);
  else if (value_bytes == 8)
    run<double>(in, rows, columns, count, out, squares, queue);
  else
    throw std::invalid_argument("the largest are kept of float32 and float64 only");
}

}  // namespace oats::cuda
