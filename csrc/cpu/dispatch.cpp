#include "column_kernels.h"
#include "strip_kernels.h"
#include "tile_kernels.h"

namespace oats {

const StripKernels& strip_kernels(Isa isa, Dtype dtype, Storage storage) {
#ifdef OATS_X86
  switch (isa) {
    case Isa::amx_bf16:
    case Isa::avx512_bf16:
      return strip_kernels_avx512_bf16(dtype, storage);
    case Isa::avx512:
      return strip_kernels_avx512(dtype, storage);
    case Isa::avx2:
      return strip_kernels_avx2(dtype, storage);
    case Isa::scalar:
      break;
  }
#endif
  static_cast<void>(isa);
  return strip_kernels_scalar(dtype, storage);
}

const ColumnKernels& column_kernels(Isa isa, Dtype dtype, Storage storage) {
#ifdef OATS_X86
  switch (isa) {
    case Isa::amx_bf16:
    case Isa::avx512_bf16:
      return column_kernels_avx512_bf16(dtype, storage);
    case Isa::avx512:
      return column_kernels_avx512(dtype, storage);
    case Isa::avx2:
      return column_kernels_avx2(dtype, storage);
    case Isa::scalar:
      break;
  }
#endif
  static_cast<void>(isa);
  return column_kernels_scalar(dtype, storage);
}

const TileKernels* tile_kernels(Isa isa, Dtype dtype, Storage storage) {
#ifdef OATS_X86
  if (isa == Isa::amx_bf16 && dtype == Dtype::bf16) return &tile_kernels_amx_bf16(storage);
#endif
  static_cast<void>(isa);
  static_cast<void>(dtype);
  static_cast<void>(storage);
  return nullptr;
}

}  // namespace oats
