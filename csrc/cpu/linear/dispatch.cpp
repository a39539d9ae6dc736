// The kernels of each ISA. AMX adds tiles; its other kernels are those of AVX-512 with BF16.
#include "kernels/column_kernels.h"
#include "kernels/strip_kernels.h"
#include "kernels/tile_kernels.h"

namespace oats {

// `operation`_<isa> for each Isa, in its order. Headers name no ISA beyond best_isa(), which is scalar on
// other CPUs.
#ifdef OATS_X86
#define OATS_BY_ISA(operation) \
  {operation##_scalar, operation##_avx2, operation##_avx512, operation##_avx512_bf16, operation##_avx512_bf16}
#else
#define OATS_BY_ISA(operation) \
  {operation##_scalar, operation##_scalar, operation##_scalar, operation##_scalar, operation##_scalar}
#endif

const StripKernels& strip_kernels(Isa isa, Dtype dtype, Storage storage) {
  static constexpr decltype(&strip_kernels_scalar) kByIsa[kIsaCount] = OATS_BY_ISA(strip_kernels);
  return kByIsa[static_cast<int>(isa)](dtype, storage);
}

const ColumnKernels& column_kernels(Isa isa, Dtype dtype, Storage storage) {
  static constexpr decltype(&column_kernels_scalar) kByIsa[kIsaCount] = OATS_BY_ISA(column_kernels);
  return kByIsa[static_cast<int>(isa)](dtype, storage);
}

const TileKernels* tile_kernels([[maybe_unused]] Isa isa, [[maybe_unused]] Dtype dtype,
                                [[maybe_unused]] Storage storage) {
#ifdef OATS_X86
  if (isa == Isa::amx_bf16 && dtype == Dtype::bf16) return &tile_kernels_amx_bf16(storage);
#endif
  return nullptr;
}

}  // namespace oats
