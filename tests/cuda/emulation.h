// Runs the kernels of csrc/cuda on a CPU, from the same sources: what nvcc and a device give them is here in
// plain C++. Blocks run one after another in a random order. The threads of a block are fibers, which run in
// a random order from one barrier to the next; so a missing barrier shows as a wrong result. Asynchronous
// copies arrive as late as they may, and leave NaN in their place until then. A barrier that some threads do
// not reach, a shuffle between lanes that have parted, and a copy that nothing waits for are errors.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulation {

constexpr int kLanes = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// Waits until everyone has come.
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started, done;
  const Barrier* waits_for;
  unsigned generation;
  unsigned exchanges;  // of the warp, so far
  std::vector<std::vector<Copy>> copies;
};

union Slot {
  unsigned char bytes[8];
  struct {
    uint32_t a[4], b[2];
  } operands;
};

struct Warp {
  Barrier barrier;
  // In turn: a lane may write its next one while another still reads this one.
  Slot slots[2][kLanes];
};

struct Machine {
  Fiber fibers[kMostThreads];
  Warp warps[kMostThreads / kLanes];
  Barrier block;
  std::unique_ptr<char[]> stacks{new char[kMostThreads * kStackBytes]};
  int threads = 0, alive = 0, current = 0;
  dim3 block_index, grid;
  jmp_buf scheduler;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  std::string error;
  std::minstd_rand random;
  // The only block of a grid that runs; all where it is negative.
  int64_t only_block = -1;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void yield() {
  Machine& m = machine();
  if (_setjmp(m.fibers[m.current].resume) == 0) _longjmp(m.scheduler, 1);
}

inline void fail(const char* what) {
  Machine& m = machine();
  if (m.error.empty()) m.error = what;
  for (;;) yield();
}

inline void arrive(Barrier& barrier, int count) {
  Machine& m = machine();
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& fiber = m.fibers[m.current];
  fiber.waits_for = &barrier;
  fiber.generation = barrier.generation;
  yield();
}

inline Warp& own_warp() {
  return machine().warps[machine().current / kLanes];
}

inline int own_lane() {
  return machine().current % kLanes;
}

inline void sync_warp() {
  arrive(own_warp().barrier, kLanes);
}

// Everyone's value, after everyone has given one.
inline Slot* exchange(const void* value, size_t bytes) {
  Machine& m = machine();
  Slot* slots = own_warp().slots[m.fibers[m.current].exchanges++ % 2];
  std::memcpy(&slots[own_lane()], value, bytes);
  sync_warp();
  return slots;
}

template <class T>
T value_of(const Slot& slot) {
  T value;
  std::memcpy(&value, slot.bytes, sizeof value);
  return value;
}

inline void copy_later(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("an asynchronous copy is not aligned");
  std::memset(to, 0xff, bytes);
  auto& copies = machine().fibers[machine().current].copies;
  if (copies.empty()) copies.emplace_back();
  copies.back().push_back({to, from, bytes});
}

inline void commit_copies() {
  auto& copies = machine().fibers[machine().current].copies;
  if (copies.empty()) copies.emplace_back();
  copies.emplace_back();  // the group that is still open
}

inline void wait_for_copies(size_t open) {
  auto& copies = machine().fibers[machine().current].copies;
  while (copies.size() > open + 1) {
    for (const Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    copies.erase(copies.begin());
  }
}

inline void finish_fiber() {
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.current];
  for (const auto& group : fiber.copies)
    if (!group.empty()) fail("an asynchronous copy was not waited for");
  fiber.done = true;
  --m.alive;
  _longjmp(m.scheduler, 1);
}

inline void run_fiber() {
  machine().body(machine().arguments);
  finish_fiber();
}

inline void resume(int thread) {
  Machine& m = machine();
  m.current = thread;
  if (_setjmp(m.scheduler) != 0) return;
  Fiber& fiber = m.fibers[m.current];
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void run_block(std::vector<int>& order) {
  Machine& m = machine();
  m.alive = m.threads;
  m.block = {};
  for (int w = 0; w < m.threads / kLanes; ++w) m.warps[w].barrier = {};
  for (int i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.started = fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.exchanges = 0;
    fiber.copies.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = m.stacks.get() + i * kStackBytes;
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
  while (m.alive > 0 && m.error.empty()) {
    bool moved = false;
    std::shuffle(order.begin(), order.end(), m.random);
    for (const int thread : order) {
      Fiber& fiber = m.fibers[thread];
      if (fiber.done) continue;
      if (fiber.waits_for && fiber.waits_for->generation == fiber.generation) continue;
      fiber.waits_for = nullptr;
      moved = true;
      resume(thread);
    }
    if (!moved) m.error = "some threads wait at a barrier that the others do not reach";
  }
}

template <class... Parameters>
void run_grid(dim3 grid, dim3 block, void (*kernel)(Parameters...), Parameters... arguments) {
  Machine& m = machine();
  auto call = [&] { kernel(arguments...); };
  m.threads = static_cast<int>(block.x);
  m.grid = grid;
  m.arguments = &call;
  m.body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
  m.error.clear();
  std::vector<int> order(m.threads);
  for (int i = 0; i < m.threads; ++i) order[i] = i;
  std::vector<unsigned> blocks(static_cast<size_t>(grid.x) * grid.y);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<unsigned>(i);
  std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (const unsigned i : blocks) {
    if (m.only_block >= 0 && m.only_block != i) continue;
    m.block_index = dim3(i % grid.x, i / grid.x);
    run_block(order);
    if (!m.error.empty()) throw std::logic_error(m.error);
  }
}

// For a test of a part of something large.
extern "C" __attribute__((visibility("default"), used)) inline void emulate_only_block(int64_t block) {
  machine().only_block = block;
}

// As lane 4 g + t of mma.m16n8k16 has them: PTX ISA, "Matrix fragments for mma.m16n8k16".
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen)(uint16_t)) {
  Slot own;
  std::memcpy(own.operands.a, a, sizeof own.operands.a);
  own.operands.b[0] = b0;
  own.operands.b[1] = b1;
  const Slot* slots = exchange(&own, sizeof own);
  const auto half = [&](uint32_t word, int k) { return widen(static_cast<uint16_t>(word >> 16 * (k % 2))); };
  for (int i = 0; i < 4; ++i) {
    const int row = own_lane() / 4 + 8 * (i / 2), column = 2 * (own_lane() % 4) + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const Slot& of_a = slots[4 * (row % 8) + k % 8 / 2];
      const Slot& of_b = slots[4 * column + k % 8 / 2];
      sum += static_cast<double>(half(of_a.operands.a[row / 8 + 2 * (k / 8)], k)) *
             half(of_b.operands.b[k / 8], k);
    }
    c[i] = static_cast<float>(sum);
  }
}

struct Half {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Of the 16 upper bits, to nearest, ties to even.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // A number of float's range whose exponent is 112 too small; subnormal numbers come out right too.
  return float_of(sign | bits_of(float_of(rest << 13) * float_of(0x77800000)));
}

inline uint16_t to_half(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float size = float_of(bits & 0x7fffffff);
  if (size != size) return 0x7fff;
  if (size >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
  uint32_t found;
  if (size < float_of(0x38800000)) {  // 2^-14: units of 2^-24, rounded by the addition
    found = bits_of(size + 0.5f) - bits_of(0.5f);
  } else {
    const uint32_t b = bits & 0x7fffffff;
    found = (b - 0x38000000 + 0xfff + (b >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | found);
}

}  // namespace emulation

namespace emulation {

// Read anew at each use.
template <unsigned (*kRead)()>
struct Index {
  operator unsigned() const { return kRead(); }
};

inline unsigned thread_x() {
  return static_cast<unsigned>(machine().current);
}
inline unsigned block_x() {
  return machine().block_index.x;
}
inline unsigned block_y() {
  return machine().block_index.y;
}
inline unsigned grid_x() {
  return machine().grid.x;
}
inline unsigned grid_y() {
  return machine().grid.y;
}

}  // namespace emulation

constexpr struct {
  emulation::Index<emulation::thread_x> x;
} threadIdx{};
constexpr struct {
  emulation::Index<emulation::block_x> x;
  emulation::Index<emulation::block_y> y;
} blockIdx{};
constexpr struct {
  emulation::Index<emulation::grid_x> x;
  emulation::Index<emulation::grid_y> y;
} gridDim{};

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::value_of<T>(emulation::exchange(&value, sizeof value)[lane]);
}

template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = emulation::own_lane();
  const auto* slots = emulation::exchange(&value, sizeof value);
  return lane < distance ? value : emulation::value_of<T>(slots[lane - distance]);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  const int lane = emulation::own_lane();
  return emulation::value_of<T>(emulation::exchange(&value, sizeof value)[lane ^ distance]);
}

inline unsigned __ballot_sync(unsigned, bool value) {
  const auto* slots = emulation::exchange(&value, sizeof value);
  unsigned bits = 0;
  for (int i = 0; i < emulation::kLanes; ++i) bits |= static_cast<unsigned>(slots[i].bytes[0]) << i;
  return bits;
}

inline void __syncwarp() {
  emulation::sync_warp();
}

inline void __syncthreads() {
  // Threads that have returned are not waited for.
  emulation::arrive(emulation::machine().block, emulation::machine().alive);
}

inline void __threadfence() {}

inline uint32_t atomicAdd(uint32_t* to, uint32_t value) {
  const uint32_t before = *to;
  *to += value;
  return before;
}

template <class T>
T __ldcs(const T* from) {
  return *from;
}

template <class T>
T __ldcg(const T* from) {
  return *from;
}

inline float __uint_as_float(uint32_t bits) {
  return emulation::float_of(bits);
}
inline emulation::Half __float2bfloat16_rn(float value) {
  return {emulation::to_bfloat16(value)};
}
inline uint16_t __bfloat16_as_ushort(emulation::Half value) {
  return value.bits;
}
inline emulation::Half __ushort_as_half(uint16_t bits) {
  return {bits};
}
inline float __half2float(emulation::Half value) {
  return emulation::from_half(value.bits);
}
inline emulation::Half __float2half_rn(float value) {
  return {emulation::to_half(value)};
}
inline uint16_t __half_as_ushort(emulation::Half value) {
  return value.bits;
}

enum cudaError_t { cudaSuccess };
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeProgrammaticStreamSerialization };
using cudaStream_t = void*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) {
  return "";
}
template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  emulation::run_grid(config->gridDim, config->blockDim, kernel, arguments...);
  return cudaSuccess;
}
