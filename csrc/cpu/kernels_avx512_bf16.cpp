// AVX-512 with VBMI2 (expansion of 16-bit lanes), and BF16 and VNNI (products of pairs).
#include "avx512_bf16_inl.h"

namespace oats {

// fp32 gains nothing from these instructions.
const StripKernels& strip_kernels_avx512_bf16(Dtype dtype, Storage storage) {
  if (dtype == Dtype::fp32) return strip_kernels_avx512(dtype, storage);
  return storage == Storage::exact ? StripLoops<Avx512Bf16>::table() : StripLoops<Avx512Codes>::table();
}

const ColumnKernels& column_kernels_avx512_bf16(Dtype dtype, Storage storage) {
  if (dtype == Dtype::fp32) return column_kernels_avx512(dtype, storage);
  return storage == Storage::exact ? ColumnLoops<Avx512Bf16>::table(88)
                                   : ColumnLoops<Avx512Bf16, Avx512Codes>::table(88);
}

}  // namespace oats
