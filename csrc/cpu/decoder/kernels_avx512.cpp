#include "kernels_inl.h"

namespace oats {

const DecoderKernels& decoder_kernels_avx512(Dtype dtype) {
  return dtype == Dtype::fp32 ? DecoderLoops<float>::table() : DecoderLoops<uint16_t>::table();
}

}  // namespace oats
