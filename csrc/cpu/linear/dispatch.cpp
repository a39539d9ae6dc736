// The kernels of each ISA. AMX adds tiles; its other kernels are those of AVX-512 with BF16.
#include "kernels/column_kernels.h"
#include "kernels/strip_kernels.h"
#include "kernels/tile_kernels.h"

namespace oats {

// By vectors is faster for fewer columns.
[[maybe_unused]] static constexpr int64_t kByteTileColumns = 2;

static const Kernels& kernels([[maybe_unused]] Isa isa, Dtype dtype, Storage storage) {
#ifdef OATS_X86
  static constexpr decltype(&kernels_scalar) kByIsa[kIsaCount] = {
      kernels_scalar, kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_avx512_bf16};
  return kByIsa[static_cast<int>(isa)](dtype, storage);
#else
  return kernels_scalar(dtype, storage);
#endif
}

const StripKernels& strip_kernels(Isa isa, Dtype dtype, Storage storage, [[maybe_unused]] int64_t columns,
                                  [[maybe_unused]] bool one_byte) {
#ifdef OATS_X86
  if (isa == Isa::amx_bf16 && dtype == Dtype::bf16 && storage != Storage::exact &&
      columns >= kByteTileColumns)
    return byte_tile_kernels(one_byte);
#endif
  return kernels(isa, dtype, storage).strips;
}

const ColumnKernels& column_kernels(Isa isa, Dtype dtype, Storage storage) {
  return kernels(isa, dtype, storage).columns;
}

const TileKernels* tile_kernels([[maybe_unused]] Isa isa, [[maybe_unused]] Dtype dtype,
                                [[maybe_unused]] Storage storage) {
#ifdef OATS_X86
  if (isa == Isa::amx_bf16 && dtype == Dtype::bf16) return &tile_kernels_amx_bf16(storage);
#endif
  return nullptr;
}

}  // namespace oats
