// AMX adds tiles to AVX-512 with BF16.
#include "kernels.h"

namespace oats {

const DecoderKernels& decoder_kernels_amx_bf16(Dtype dtype) {
  static const DecoderKernels kernels = [] {
    DecoderKernels all = decoder_kernels_avx512_bf16(Dtype::bf16);
    all.attend = attend_amx_bf16;
    all.dense_tiles = &dense_tiles_amx_bf16();
    return all;
  }();
  return dtype == Dtype::bf16 ? kernels : decoder_kernels_avx512_bf16(dtype);
}

}  // namespace oats
