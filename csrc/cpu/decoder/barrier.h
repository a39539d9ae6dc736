// Where the threads of a step wait for each other. They spin: a step has hundreds of barriers, and to wake a
// thread takes longer than most phases do.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace oats {

class Barrier {
 public:
  // Returns when all `parts` have called it. While one waits, it calls `idle` again and again.
  template <class Idle>
  void wait(int parts, const Idle& idle) {
    if (parts == 1) return;
    const uint32_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == parts) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins < kSpins) {
        idle();
#ifdef OATS_X86
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();  // there are fewer cores than threads
      }
    }
  }

 private:
  static constexpr int kSpins = 1 << 10;

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
};

}  // namespace oats
