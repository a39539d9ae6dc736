// AVX-512 with VBMI2 (expands lanes of 8 and 16 bits), BF16 (products of pairs) and VNNI (products of fours).
#include "avx512_bf16_inl.h"

namespace oats {

// None of these instructions helps fp32.
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
