// The loops of StripKernels, for any vector type. A block's sums stay in registers while its groups pass: for
// each group the cells of up to four strips are expanded, and each is multiplied by one activation of each
// column. With few columns, reading the masks and values bounds this; a prefetch runs ahead of the values.
// With more columns than registers, a chunk of groups is expanded for the first columns and read back for the
// others.
//
// Each kernels/<isa>.cpp includes this, with its own flags. The anonymous namespace gives each its own copy:
// the linker must not give one ISA code of another.
//
// `Traits` are what differs between ISAs. For exact storage they have:
//   lanes, group, flip             the StripLayout
//   registers                      how many vectors of sums fit into registers
//   min_columns                    ColumnKernels::min_columns
//   scaled_activations             whether activations are scaled (strip_kernels.h)
//   Element, to_float, from_float  of x, y and bias: Fp32Element or Bf16Element
//   pair(float, float)             a unit of two elements, if group is 2
//   Value, Mask                    a stored value, a mask word
//   Vector, Weights                `lanes` sums, `lanes` units of expanded weights
//   zero(), load(sums), store(sums, vector)
//   expand(values, mask)           the next values in the lanes of the mask, zero in the others
//   weights(values)                lanes * group values without a mask, or elements of x
//   load_units(units), store_units(units, weights)
//   transpose(square[lanes])       a square of lanes x lanes units or sums
//   multiply_add(sum, weights, unit)
// For codes (Value is int8_t) they also have:
//   Sum                            sums of codes; multiply_add() takes and returns these
//   scales(bf16)                   the scales of `lanes` rows
//   add_scaled(vector, sum, scales)
//   decode<bits>(runs, count, codebook, codes)
//                                  `count` runs of codes below 8 bits (run_codes()) to int8
// If activations are scaled, group is 4, multiply_add() takes a unit of upper and one of lower bytes, and
// there are:
//   no_sum(XScale)                 begins with XScale::minus_128_sums
//   times(scales, float)
//   kRunVectors<bits>, table_of(codebook), decode_run<bits>(run, table, weights[kRunVectors<bits>])
//                                  a run as cells
//   quantise(numbers, count, units, stride)
//                                  up to kMostScaledColumns inputs of one column; returns their XScale
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "elements.h"
#include "strip_kernels.h"

namespace oats {
namespace {

// How far ahead of the values the prefetch runs. It reaches past the chunk that is multiplied now, so that
// the next chunk is in L1 when its expansion begins.
constexpr int kPrefetchBytes = 6144;

// Groups of a chunk: their cells are expanded for the first columns and wait in L1 for the others.
constexpr int64_t kGroupsPerChunk = 48;

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls f(Constant<value>, rest...), for a value from 1 to kMost.
template <int64_t kMost, class F, class... Rest>
void with_constant(int value, const F& f, Rest... rest) {
  static_assert(kMost <= 8);
  switch (value) {
#define OATS_CASE(n)                                     \
  case n:                                                \
    if constexpr (n <= kMost) f(Constant<n>{}, rest...); \
    break;
    OATS_CASE(1)
    OATS_CASE(2)
    OATS_CASE(3)
    OATS_CASE(4)
    OATS_CASE(5)
    OATS_CASE(6)
    OATS_CASE(7)
    OATS_CASE(8)
#undef OATS_CASE
  }
}

template <class Traits>
struct StripLoops {
  using Element = typename Traits::Element;
  using Value = typename Traits::Value;
  using Mask = typename Traits::Mask;
  using Vector = typename Traits::Vector;
  using Weights = typename Traits::Weights;
  static constexpr int kLanes = Traits::lanes;
  static constexpr int kGroup = Traits::group;
  static constexpr int kCell = kLanes * kGroup;
  // After so many groups, sums of products with codes meet their scales.
  static constexpr int64_t kMostScaledGroups =
      (Traits::scaled_activations ? kMostScaledColumns : kScaledColumns) / kGroup;
  static int64_t scaled_groups(const Activations& x) {
    return Traits::scaled_activations ? x.scale_columns / kGroup : kMostScaledGroups;
  }
  // Units of activations in a group.
  static constexpr int kUnits = Traits::scaled_activations ? 2 : 1;
  static constexpr bool kCodes = std::is_same_v<Value, int8_t>;
  // Columns whose sums for a whole block fit into registers.
  static constexpr int kMaxColumns = Traits::registers / kStripsPerBlock;

  // Where a product gets its cells from, one group at a time. Sources are passed by value, which keeps them
  // in registers. This one expands cells of S.
  struct Kept {
    const Mask* mask;
    const Value* values;
    template <int Strips>
    void next(Weights (&cells)[Strips]) {
#pragma GCC unroll 4
      for (int s = 0; s < Strips; ++s) {
        const Mask m = *mask++;
        cells[s] = Traits::expand(values, m);
        __builtin_prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes);
        values += __builtin_popcountll(m);
      }
    }
  };
  // Expands cells of S and also stores them, for Expanded.
  struct Expanding {
    Kept kept;
    uint32_t* cells;
    template <int Strips>
    void next(Weights (&out)[Strips]) {
      kept.next(out);
#pragma GCC unroll 4
      for (int s = 0; s < Strips; ++s) Traits::store_units(cells + s * kLanes, out[s]);
      cells += Strips * kLanes;
    }
  };
  // Loads what Expanding stored.
  struct Expanded {
    const uint32_t* cells;
    template <int Strips>
    void next(Weights (&out)[Strips]) {
#pragma GCC unroll 4
      for (int s = 0; s < Strips; ++s) out[s] = Traits::load_units(cells + s * kLanes);
      cells += Strips * kLanes;
    }
  };
  // Loads cells of a matrix without a mask. `Ahead` if it comes from memory: the prefetcher of a CPU stops at
  // the end of each page, and after a few cells the columns keep the kernel busy.
  template <bool Ahead>
  struct Dense {
    const Value* cells;
    template <int Strips>
    void next(Weights (&out)[Strips]) {
#pragma GCC unroll 4
      for (int s = 0; s < Strips; ++s) {
        out[s] = Traits::weights(cells + s * kCell);
        if constexpr (Ahead)
          __builtin_prefetch(reinterpret_cast<const char*>(cells + s * kCell) + kPrefetchBytes);
      }
      cells += Strips * kCell;
    }
  };

  static const Mask* masks(const PackedHeader* weight, int64_t block) {
    return reinterpret_cast<const Mask*>(reinterpret_cast<const char*>(weight) + weight->masks_at) +
           block * kStripsPerBlock * weight->value_groups;
  }

  // Scales of S for one block and the columns of group `g`: [strip][lanes].
  static const uint16_t* value_scales(const PackedHeader* weight, int64_t block, int64_t g) {
    const char* base = reinterpret_cast<const char*>(weight);
    return reinterpret_cast<const uint16_t*>(base + weight->values_scale_at) +
           (block * kStripsPerBlock * weight->scale_groups +
            g * kGroup / weight->shape.scale_columns * strips_of_block(weight->strips, block)) *
               kLanes;
  }

  // sums += cells times `Columns` columns, group after group. The units of two groups are `stride` apart.
  // Returns the source behind the cells used.
  template <int Strips, int Columns, class Source, class Sum>
  [[gnu::always_inline]] static Source add_products(Source source, int64_t groups, const uint32_t* units,
                                                    int64_t stride, Sum (&sum)[Columns][Strips]) {
    for (int64_t g = 0; g < groups; ++g) {
      Weights cells[Strips];
      source.next(cells);
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) {
        const uint32_t* unit = units + g * kUnits * stride + c;
#pragma GCC unroll 8
        for (int s = 0; s < Strips; ++s) {
          if constexpr (kUnits == 2) {
            sum[c][s] = Traits::multiply_add(sum[c][s], cells[s], unit[0], unit[stride]);
          } else {
            sum[c][s] = Traits::multiply_add(sum[c][s], cells[s], unit[0]);
          }
        }
      }
    }
    return source;
  }

  // sums (+)= cells times columns.
  template <int Strips, int Columns, class Source>
  static Source multiply(Source source, int64_t groups, const uint32_t* units, int64_t stride,
                         bool accumulate, float* sums) {
    Vector sum[Columns][Strips];
    for (int c = 0; c < Columns; ++c) {
      for (int s = 0; s < Strips; ++s) {
        sum[c][s] = accumulate ? Traits::load(sums + (c * Strips + s) * kLanes) : Traits::zero();
      }
    }
    source = add_products<Strips, Columns>(source, groups, units, stride, sum);
    for (int c = 0; c < Columns; ++c) {
      for (int s = 0; s < Strips; ++s) Traits::store(sums + (c * Strips + s) * kLanes, sum[c][s]);
    }
    return source;
  }

  // The same for codes and at most kMostScaledGroups groups. `scales` are those of the strips,
  // [strip][lanes]; `x_scales` those of the columns, if activations are scaled.
  template <int Strips, int Columns, class Source>
  static Source multiply_codes(Source source, int64_t groups, const uint32_t* units, int64_t stride,
                               const uint16_t* scales, const XScale* x_scales, bool accumulate, float* sums) {
    typename Traits::Sum sum[Columns][Strips];
    for (int c = 0; c < Columns; ++c) {
      for (int s = 0; s < Strips; ++s) {
        if constexpr (Traits::scaled_activations) {
          sum[c][s] = Traits::no_sum(x_scales[c]);
        } else {
          sum[c][s] = Traits::zero();
        }
      }
    }
    source = add_products<Strips, Columns>(source, groups, units, stride, sum);
    for (int s = 0; s < Strips; ++s) {
      const Vector scale = Traits::scales(scales + s * kLanes);
      for (int c = 0; c < Columns; ++c) {
        float* out = sums + (c * Strips + s) * kLanes;
        const Vector before = accumulate ? Traits::load(out) : Traits::zero();
        if constexpr (Traits::scaled_activations) {
          Traits::store(out, Traits::add_scaled(before, sum[c][s], Traits::times(scale, x_scales[c].scale)));
        } else {
          Traits::store(out, Traits::add_scaled(before, sum[c][s], scale));
        }
      }
    }
    return source;
  }

  // The same, never inlined: among the registers of dense(), GCC 12 finds no room for the sums.
  template <int Strips, int Columns, class Source, class... Rest>
  [[gnu::noinline]] static void multiply_dense_codes(Source source, Rest... rest) {
    multiply_codes<Strips, Columns>(source, rest...);
  }

  // The scales of x from column `first` on, for the inputs from group `g` on.
  static const XScale* x_scales(const Activations& x, int64_t g, int columns, int first) {
    if constexpr (Traits::scaled_activations) return x.scales + g / scaled_groups(x) * columns + first;
    return nullptr;
  }

  // The values of a block, of any storage, from the value with index `first` in the block on.
  class Values {
   public:
    Values(const PackedHeader* weight, int64_t block, int64_t first) : next_(first), codebook_(nullptr) {
      const char* base = reinterpret_cast<const char*>(weight);
      auto start = static_cast<int64_t>(reinterpret_cast<const uint64_t*>(base + weight->starts_at)[block]);
      if constexpr (kCodes) {
        storage_ = weight->shape.values;
        if (has_codebook(storage_)) {
          codebook_ = weight->codebook;
          start = start * weight->value_bits() / 8;
        }
      }
      block_ = reinterpret_cast<const Value*>(base + weight->values_at) + start;
    }

    // Index in the block of the next value.
    int64_t index() const { return next_; }

    // A source for the next cells, whose mask words are `masks`. Codes below 8 bits are decoded into `codes`,
    // which has room for kCell codes a cell and kSpare more.
    Kept source(const Mask* masks, int64_t cells, Value* codes) {
      if constexpr (kCodes) {
        if (codebook_)
          return {masks, decoded(storage_, block_, codebook_, next_, population(masks, cells), codes)};
      }
      return {masks, block_ + next_};
    }
    // Call this with what source() returned, as it was before and after the cells.
    void used(const Kept& begin, const Kept& end) { next_ += end.values - begin.values; }

   private:
    static int64_t population(const Mask* masks, int64_t cells) {
      // As wide as the masks, so that the compiler vectorises it.
      std::conditional_t<sizeof(Mask) == 8, uint64_t, uint32_t> count = 0;
      for (int64_t i = 0; i < cells; ++i) {
        if constexpr (sizeof(Mask) == 8) {
          count += static_cast<uint64_t>(__builtin_popcountll(masks[i]));
        } else {
          count += static_cast<uint32_t>(__builtin_popcount(masks[i]));
        }
      }
      return static_cast<int64_t>(count);
    }

    int64_t next_;
    const Value* block_;      // with a codebook: bytes of runs
    const int8_t* codebook_;  // null if there is none
    Storage storage_ = Storage::exact;
  };
  // The first and the last run reach beyond the cells, and kernels load past the last code.
  static constexpr int64_t kSpare = 2 * kLongestRun + 64;

  // `count` codes of a block from index `first` on, decoded into `codes`; returns where they begin there.
  // `ahead`: also fetches what follows.
  static const int8_t* decoded(Storage storage, const void* block, const int8_t* codebook, int64_t first,
                               int64_t count, int8_t* codes, bool ahead = true) {
    const int64_t run = run_codes(storage), skipped = first / run,
                  runs = divide_up(first + count, run) - skipped;
    const auto decode = [&](auto bits) {
      const auto* bytes = static_cast<const uint8_t*>(block) + skipped * run * bits / 8;
      for (int64_t i = 0; ahead && i < runs * run * bits / 8; i += 64)
        __builtin_prefetch(bytes + kPrefetchBytes / 2 + i);
      Traits::template decode<bits>(bytes, runs, codebook, codes);
    };
    storage == Storage::int4   ? decode(Constant<4>{})
    : storage == Storage::int3 ? decode(Constant<3>{})
                               : decode(Constant<2>{});
    return codes + first % run;
  }

  // Cells of a matrix of codes without a mask, from group `g` on, for `groups` groups: where they lie, or
  // decoded into `codes`.
  static const int8_t* dense_codes(const DenseBlock& matrix, int64_t g, int64_t groups, int8_t* codes,
                                   bool ahead = true) {
    const int64_t first = g * matrix.strips * kCell;
    if (!has_codebook(matrix.storage)) return static_cast<const int8_t*>(matrix.cells) + first;
    return decoded(matrix.storage, matrix.cells, matrix.codebook, first, groups * matrix.strips * kCell,
                   codes, ahead);
  }

  // Calls f(Constant<Columns>, first column) in steps over `columns`, as even as possible: a narrow last step
  // would have too few sums in flight.
  template <class F>
  static void over_columns(int columns, const F& f) {
    const int steps = (columns + kMaxColumns - 1) / kMaxColumns;
    for (int i = 0; i < steps; ++i) {
      const int first = (columns * i + steps - 1) / steps;
      with_constant<kMaxColumns>((columns * (i + 1) + steps - 1) / steps - first, f, first);
    }
  }

  static void sparse(const PackedHeader* weight, int64_t block, Activations x, int columns, float* sums) {
    with_constant<kStripsPerBlock>(strips_of_block(weight->strips, block), [&](auto strips) {
      // The loops below set the sums, but not if there are no inputs.
      if (weight->groups == 0) std::fill_n(sums, columns * strips * kLanes, 0.f);
      if constexpr (kCodes) {
        sparse_codes<strips>(weight, block, x, columns, sums);
      } else {
        sparse_exact<strips>(weight, block, x.units, columns, sums);
      }
    });
  }

  template <int Strips>
  static void sparse_exact(const PackedHeader* weight, int64_t block, const uint32_t* activations,
                           int columns, float* sums) {
    const int64_t groups = weight->groups;
    Kept source = Values(weight, block, 0).source(masks(weight, block), 0, nullptr);
    if (columns <= kMaxColumns) {
      over_columns(columns, [&](auto width, int) {
        multiply<Strips, width>(source, groups, activations, columns, false, sums);
      });
      return;
    }
    alignas(64) uint32_t cells[kGroupsPerChunk * kStripsPerBlock * kLanes];
    for (int64_t g = 0; g < groups; g += kGroupsPerChunk) {
      const int64_t count = std::min(kGroupsPerChunk, groups - g);
      over_columns(columns, [&](auto width, int first) {
        const uint32_t* units = activations + g * columns + first;
        float* out = sums + first * Strips * kLanes;
        if (first == 0) {
          source = multiply<Strips, width>(Expanding{source, cells}, count, units, columns, g > 0, out).kept;
        } else {
          multiply<Strips, width>(Expanded{cells}, count, units, columns, g > 0, out);
        }
      });
    }
  }

  template <int Strips>
  static void sparse_codes(const PackedHeader* weight, int64_t block, Activations x, int columns,
                           float* sums) {
    const int64_t groups = weight->value_groups;
    const Mask* mask = masks(weight, block);
    Values values(weight, block, 0);
    const int64_t range = scaled_groups(x);
    alignas(64) Value codes[kMostScaledGroups * kStripsPerBlock * kCell + kSpare];
    alignas(64) uint32_t cells[kMostScaledGroups * kStripsPerBlock * kLanes];
    for (int64_t g = 0; g < groups; g += range) {
      const int64_t count = std::min(range, groups - g);
      const Kept begin = values.source(mask + g * Strips, count * Strips, codes);
      Kept source = begin;
      const uint16_t* scale = value_scales(weight, block, g);
      over_columns(columns, [&](auto width, int first) {
        const uint32_t* units = x.units + g * kUnits * columns + first;
        const XScale* of_x = x_scales(x, g, columns, first);
        float* out = sums + first * Strips * kLanes;
        if (columns <= kMaxColumns) {
          source = multiply_codes<Strips, width>(source, count, units, columns, scale, of_x, g > 0, out);
        } else if (first == 0) {
          source = multiply_codes<Strips, width>(Expanding{source, cells}, count, units, columns, scale, of_x,
                                                 g > 0, out)
                       .kept;
        } else {
          multiply_codes<Strips, width>(Expanded{cells}, count, units, columns, scale, of_x, g > 0, out);
        }
      });
      values.used(begin, source);
    }
  }

  // One column of a whole block of codes below 8 bits, whose cells are vectors: they go from the run to the
  // product in registers, and the sums stay there.
  template <int Bits>
  static void one_column(const DenseBlock& matrix, int64_t groups, Activations x, bool accumulate,
                         float* sums) {
    constexpr int kStrips = kStripsPerBlock, kVectors = Traits::template kRunVectors<Bits>;
    // Runs and groups of a step: a run of int3 has two groups, a group of int4 two runs.
    constexpr int kRuns = kVectors < kStrips ? kStrips / kVectors : 1;
    constexpr int kGroups = kRuns * kVectors / kStrips;
    const auto table = Traits::table_of(matrix.codebook);
    const auto* run = static_cast<const uint8_t*>(matrix.cells);
    Vector total[kStrips];
    for (int s = 0; s < kStrips; ++s)
      total[s] = accumulate ? Traits::load(sums + s * kLanes) : Traits::zero();
    const int64_t range = scaled_groups(x);
    for (int64_t g = 0; g < groups; g += range) {
      const uint32_t* unit = x.units + g * kUnits;
      const XScale scale = x.scales[g / range];
      typename Traits::Sum sum[kStrips];
      for (int s = 0; s < kStrips; ++s) sum[s] = Traits::no_sum(scale);
      for (int64_t left = std::min(range, groups - g); left > 0; left -= kGroups) {
        Weights cells[kRuns][kVectors];
#pragma GCC unroll 2
        for (int r = 0; r < kRuns; ++r) {
          Traits::template decode_run<Bits>(run, table, cells[r]);
#pragma GCC unroll 3
          for (int line = 0; line < kVectors * Bits / 8; ++line)
            __builtin_prefetch(run + kPrefetchBytes / 2 + line * 64);
          run += kVectors * 8 * Bits;
        }
#pragma GCC unroll 2
        for (int i = 0; i < kGroups; ++i, unit += kUnits) {
          if (i > 0 && left == i) break;
#pragma GCC unroll 4
          for (int s = 0; s < kStrips; ++s) {
            const int cell = i * kStrips + s;
            sum[s] = Traits::multiply_add(sum[s], cells[cell / kVectors][cell % kVectors], unit[0], unit[1]);
          }
        }
      }
      const uint16_t* scales = matrix.scales + g * kGroup / matrix.scale_columns * kStrips * kLanes;
      for (int s = 0; s < kStrips; ++s) {
        total[s] = Traits::add_scaled(total[s], sum[s],
                                      Traits::times(Traits::scales(scales + s * kLanes), scale.scale));
      }
    }
    for (int s = 0; s < kStrips; ++s) Traits::store(sums + s * kLanes, total[s]);
  }

  static void dense(const DenseBlock& matrix, int64_t inputs, Activations x, int columns, bool accumulate,
                    float* sums) {
    const int64_t groups = divide_up(inputs, kGroup);
    if constexpr (Traits::scaled_activations) {
      if (columns == 1 && matrix.strips == kStripsPerBlock && has_codebook(matrix.storage)) {
        const auto multiply = [&](auto bits) { one_column<bits>(matrix, groups, x, accumulate, sums); };
        matrix.storage == Storage::int4   ? multiply(Constant<4>{})
        : matrix.storage == Storage::int3 ? multiply(Constant<3>{})
                                          : multiply(Constant<2>{});
        return;
      }
    }
    // A range of inputs for all columns, so that a large matrix is read from memory once.
    with_constant<kStripsPerBlock>(matrix.strips, [&](auto strips) {
      if (groups == 0 && !accumulate) std::fill_n(sums, columns * strips * kLanes, 0.f);
      const int64_t range = kCodes ? scaled_groups(x) : columns > kMaxColumns ? kGroupsPerChunk : groups;
      for (int64_t g = 0; g < groups; g += range) {
        const int64_t count = std::min(range, groups - g);
        const bool add = accumulate || g > 0;
        if constexpr (kCodes) {
          alignas(64) int8_t codes[kMostScaledGroups * strips * kCell + kSpare];
          const int8_t* cells = dense_codes(matrix, g, count, codes);
          const uint16_t* scales = matrix.scales + g * kGroup / matrix.scale_columns * strips * kLanes;
          const auto step = [&](auto source, auto width, int first) {
            multiply_dense_codes<strips, width>(source, count, x.units + g * kUnits * columns + first,
                                                columns, scales, x_scales(x, g, columns, first), add,
                                                sums + first * strips * kLanes);
          };
          over_columns(columns, [&](auto width, int first) {
            first == 0 ? step(Dense<true>{cells}, width, first) : step(Dense<false>{cells}, width, first);
          });
        } else {
          const Value* cells = static_cast<const Value*>(matrix.cells) + g * strips * kCell;
          const auto step = [&](auto source, auto width, int first) {
            multiply<strips, width>(source, count, x.units + g * columns + first, columns, add,
                                    sums + first * strips * kLanes);
          };
          over_columns(columns, [&](auto width, int first) {
            first == 0 ? step(Dense<true>{cells}, width, first) : step(Dense<false>{cells}, width, first);
          });
        }
      }
    });
  }

  static uint32_t unit(const Element* x, int64_t available) {
    if constexpr (kGroup == 1) {
      const float value = Traits::to_float(x[0]);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      return bits;
    } else {
      static_assert(kGroup == 2 && sizeof(Element) == 2);
      return x[0] | (available > 1 ? static_cast<uint32_t>(x[1]) << 16 : 0u);
    }
  }

  static void prepare(const void* x, int64_t stride, int64_t d_in, int columns, int padded, int64_t begin,
                      int64_t end, Activations out) {
    const auto* rows = static_cast<const Element*>(x);
    if constexpr (Traits::scaled_activations) {
      const int64_t set = out.scale_columns;
      for (int64_t i = begin * 2 / set; i * set < end * 2; ++i) {
        const int64_t first = i * set, count = std::min(set, d_in - first);
        for (int c = 0; c < columns; ++c) {
          out.scales[i * padded + c] =
              Traits::quantise(rows + c * stride + first, count, out.units + first / 2 * padded + c, padded);
        }
      }
    } else {
      prepare_squares(rows, stride, d_in, columns, padded, begin, end, out.units);
    }
  }

  // Transposes square by square, so that both the rows of x and the rows of units are accessed `lanes` units
  // at a time.
  static void prepare_squares(const Element* rows, int64_t stride, int64_t d_in, int columns, int padded,
                              int64_t begin, int64_t end, uint32_t* activations) {
    int c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      int64_t g = begin;
      for (; g + kLanes <= end && (g + kLanes) * kGroup <= d_in; g += kLanes) {
        Weights square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = Traits::weights(rows + (c + i) * stride + g * kGroup);
        Traits::transpose(square);
        for (int i = 0; i < kLanes; ++i) Traits::store_units(activations + (g + i) * padded + c, square[i]);
      }
      prepare_units(rows, stride, d_in, c, c + kLanes, padded, g, end, activations);
    }
    prepare_units(rows, stride, d_in, c, columns, padded, begin, end, activations);
    for (c = columns; c < padded; ++c) {
      for (int64_t g = begin; g < end; ++g) activations[g * padded + c] = 0;
    }
  }

  static void prepare_units(const Element* rows, int64_t stride, int64_t d_in, int c_begin, int c_end,
                            int padded, int64_t begin, int64_t end, uint32_t* activations) {
    for (int c = c_begin; c < c_end; ++c) {
      const Element* row = rows + c * stride;
      for (int64_t g = begin; g < end; ++g) {
        activations[g * padded + c] = unit(row + g * kGroup, d_in - g * kGroup);
      }
    }
  }

  static void sums_to_activations(const float* sums, int strips, int columns, Activations out) {
    for (int c = 0; c < columns; ++c) {
      const float* column = sums + c * strips * kLanes;
      if constexpr (Traits::scaled_activations) {
        static_assert(kStripsPerBlock * kLanes == kScaledColumns);
        out.scales[c] = Traits::quantise(column, strips * kLanes, out.units + c, columns);
      } else {
        for (int g = 0; g < strips * kLanes / kGroup; ++g) {
          const float* lane = column + g * kGroup;
          if constexpr (kGroup == 1) {
            std::memcpy(out.units + g * columns + c, lane, 4);
          } else {
            out.units[g * columns + c] = Traits::pair(lane[0], lane[1]);
          }
        }
      }
    }
  }

  static void store(const float* sums, int strips, int columns, const void* bias, int valid, void* y,
                    int64_t y_stride) {
    const auto* b = static_cast<const Element*>(bias);
    for (int c = 0; c < columns; ++c) {
      Element* out = static_cast<Element*>(y) + c * y_stride;
      const float* sum = sums + c * strips * kLanes;
      for (int i = 0; i < valid; ++i) {
        out[i] = Traits::from_float(b ? sum[i] + Traits::to_float(b[i]) : sum[i]);
      }
    }
  }

  static constexpr StripLayout kLayout{kLanes, kGroup, Traits::flip};
  static constexpr StripKernels kKernels{kLayout, Traits::scaled_activations, prepare, sparse,
                                         dense,   sums_to_activations,        store};
};

}  // namespace
}  // namespace oats
