// Features of a device that CUDA has no plain names for: numbers of 16 bits, tensor cores, asynchronous
// copies, the order of two launches. Without nvcc, tests/cuda/emulation.h runs the same kernels on the host.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulation.h"
#endif

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cells.h"
#include "kernels.h"

namespace oats::cuda {

// mma() adds the product of a 16 x 16 matrix a and a 16 x 8 matrix b to c (PTX ISA, mma.m16n8k16). Lane 4 g +
// t holds rows g and g + 8 of a, column g of b, and columns 2 t and 2 t + 1 of c.
#ifdef __CUDACC__
#define OATS_MMA(type)                                                       \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#else
#define OATS_MMA(type) emulation::mma(c, a, b0, b1, widen)
#endif

// A number of 16 bits is held as its bits.
struct Bf16 {
  static __device__ __forceinline__ float widen(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
  static __device__ __forceinline__ uint16_t round(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    OATS_MMA("bf16");
  }
};

struct Fp16 {
  static __device__ __forceinline__ float widen(uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
  }
  static __device__ __forceinline__ uint16_t round(float value) {
    return __half_as_ushort(__float2half_rn(value));
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    OATS_MMA("f16");
  }
};

// Copies 16 bytes from global to shared memory, both aligned to 16. They have arrived once
// wait_for_copies<n>() returns, where n is at most the number of groups committed after theirs. That holds
// for the lane that asked; the other lanes also need a __syncwarp().
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global) {
#ifdef __CUDACC__
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  emulation::copy_later(shared, global, 16);
#endif
}

__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::commit_copies();
#endif
}

template <int kOpen>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
#else
  emulation::wait_for_copies(kOpen);
#endif
}

// In a kernel that was launched as `dependent`: returns when the launch before it has ended and its writes
// are visible. Without code for compute capability 9, such a kernel starts only then.
__device__ __forceinline__ void wait_for_previous_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the dependent launch start when there is room for it.
__device__ __forceinline__ void start_dependent_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Whether a device of that capability runs code in which wait_for_previous_launch() waits. It need not: PTX
// for capability 8 runs on newer devices too. This assumes that the newest architecture is there as PTX,
// which is the default.
constexpr bool can_wait(int capability) {
#ifdef __CUDA_ARCH_LIST__
  constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};
#else
  constexpr int kArchitectures[] = {900};
#endif
  for (const int architecture : kArchitectures)
    if (architecture >= 900 && architecture / 100 <= capability) return true;
  return false;
}

// A `dependent` launch does not wait for the end of the one before it, if the device supports that.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, const Queue& queue, bool dependent,
            Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  cudaLaunchAttribute attribute{};
  if (dependent && can_wait(queue.capability)) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace oats::cuda
