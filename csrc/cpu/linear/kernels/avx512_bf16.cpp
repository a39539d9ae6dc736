// AVX-512 with VBMI2 (expands lanes of 8 and 16 bits), BF16 (products of pairs) and VNNI (products of fours).
#include "avx512_bf16_inl.h"

namespace oats {

const Kernels& kernels_avx512_bf16(Dtype dtype, Storage storage) {
  // None of these instructions helps fp32.
  if (dtype == Dtype::fp32) return kernels_avx512(dtype, storage);
  return storage == Storage::exact ? kKernels<Avx512Bf16> : kKernels<Avx512Bf16, Avx512Codes>;
}

}  // namespace oats
