// Tests the core without Python, for `make test-sanitize`. Every buffer has exactly the size that the headers
// of csrc/include/oats promise, so that a read or write beside it is caught.
//
// Layers of small integers have exact sums in any order. Their products are compared bit for bit: a term that
// is missing, doubled or taken from elsewhere shows. Layers of normal values, and of codes, are compared
// within the bounds of tests/kernels/test_kernels.py.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "numbers.h"
#include "oats/isa.h"
#include "oats/operations.h"
#include "oats/packed_weight.h"

namespace {

using oats::Dtype;
using oats::Isa;
using oats::PackedHeader;
using oats::Projection;
using oats::Storage;

int failures = 0, checks = 0;

__attribute__((format(printf, 2, 3))) void check(bool holds, const char* format, ...) {
  ++checks;
  if (holds) return;
  ++failures;
  std::va_list arguments;
  va_start(arguments, format);
  std::fputs("FAILED: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  if (failures < 20) return;
  std::fputs("too many failures\n", stderr);
  std::exit(1);
}

// Has exactly `size` elements, and is null if there are none, like the address of an empty tensor.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size), memory_(size ? new T[size] : nullptr) {}

  T* data() { return memory_.get(); }
  const T* data() const { return memory_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return memory_[i]; }
  const T& operator[](int64_t i) const { return memory_[i]; }
  bool operator==(const Buffer& other) const {
    return size_ == other.size_ && (!size_ || !std::memcmp(data(), other.data(), size_ * sizeof(T)));
  }

 private:
  int64_t size_;
  std::unique_ptr<T[]> memory_;
};

struct Packed {
  size_t bytes;
  std::unique_ptr<void, decltype(&std::free)> memory;

  explicit Packed(size_t bytes) : bytes(bytes), memory(std::aligned_alloc(64, bytes), &std::free) {
    // pack() writes all of it.
    std::memset(memory.get(), 0xa5, bytes);
  }
  void* data() const { return memory.get(); }
  const PackedHeader& header() const { return *static_cast<const PackedHeader*>(data()); }
};

struct Shape {
  int64_t d_out, d_in, rank;
  double density;
};

// Strips are of 8 or 16 outputs, blocks of 4 strips, pieces of work of 256 outputs; groups are of 1 or 2
// inputs, chunks of 48 groups, words of 64, ranges of 512.
constexpr Shape kShapes[] = {
    {1, 1, 0, 0},    {1, 1, 1, 1},      {1, 7, 0, 1},       {7, 1, 2, 0.5},      {5, 3, 4, 0},
    {16, 64, 0, 1},  {17, 31, 3, 0.4},  {8, 50, 40, 0.3},   {33, 65, 17, 0},     {64, 128, 16, 1},
    {66, 97, 1, 1},  {97, 129, 33, .5}, {130, 257, 70, .4}, {300, 1100, 9, .35}, {420, 260, 72, .9},
    {257, 40, 0, 1}, {3, 2100, 5, 0.5}, {4, 0, 0, 0},       {4, 0, 3, 0},        {0, 9, 2, 0},
};
constexpr int64_t kBatches[] = {1, 2, 6, 7, 16, 33, 64, 100, 129, 520};
constexpr int64_t kMaxBatch = 520;
constexpr int kThreads[] = {1, 2, 3};

struct Kinds {
  Storage values, factors;
  int16_t scale_columns;
  bool masked = true;

  int code_bits() const { return oats::has_codebook(values) ? oats::storage_bits(values, Dtype::bf16) : 0; }
};
constexpr Kinds kExact{Storage::exact, Storage::exact, 0};
constexpr Kinds kCodes[] = {
    {Storage::int8, Storage::int8, 128},        {Storage::int4, Storage::int8, 64},
    {Storage::int4, Storage::exact, 128},       {Storage::exact, Storage::int8, 64},
    {Storage::int3, Storage::int8, 128},        {Storage::int8, Storage::int8, 128, false},
    {Storage::int4, Storage::int8, 64, false},  {Storage::int3, Storage::int8, 128, false},
    {Storage::int2, Storage::exact, 64, false}, {Storage::exact, Storage::int8, 128, false}};

// A matrix as it is stored: values, or codes of a byte with their scales.
template <class Value>
struct Matrix {
  Buffer<Value> values;
  Buffer<int8_t> codes;
  Buffer<uint16_t> scales;

  Matrix(int64_t values, int64_t codes, int64_t scales) : values(values), codes(codes), scales(scales) {}
  const void* stored() const { return codes.size() ? static_cast<const void*>(codes.data()) : values.data(); }
  bool operator==(const Matrix& other) const {
    return values == other.values && codes == other.codes && scales == other.scales;
  }
};

// A layer, inputs for it, and what it makes of them.
template <class Value>
struct Case {
  Shape shape;
  Kinds kinds;
  bool exact;
  int64_t nnz = 0;
  Buffer<uint8_t> mask;
  Matrix<Value> values, u, v;  // codes below 8 bits are a stream of bits
  Buffer<int8_t> codebook, exponents;
  std::vector<double> sparse;  // S, for inputs that are multiplied by 2 to the exponents
  Buffer<Value> bias, x;
  Buffer<double> y;  // S x + U (V x), in float64
  // |S| |x| + |U| (|V| |x|); of codes, with the largest of the inputs that share a scale for each |x| and
  // |V| |x|: that is what the error of their activations is in proportion to.
  Buffer<double> size;

  static constexpr Dtype dtype = sizeof(Value) == 4 ? Dtype::fp32 : Dtype::bf16;

  oats::WeightShape weight_shape() const {
    return {shape.d_out,  shape.d_in,    shape.rank,          nnz,         dtype,
            kinds.values, kinds.factors, kinds.scale_columns, kinds.masked};
  }
  int64_t scales_of(int64_t columns) const {
    return kinds.scale_columns ? oats::divide_up(columns, kinds.scale_columns) : 0;
  }
  Matrix<Value> factor(int64_t rows, int64_t columns) const {
    const bool codes = kinds.factors != Storage::exact;
    return {codes ? 0 : rows * columns, codes ? rows * columns : 0, codes ? rows * scales_of(columns) : 0};
  }
  double entry(const Matrix<Value>& m, int64_t columns, int64_t i) const {
    if (kinds.factors == Storage::exact) return to_float(m.values[i]);
    return m.codes[i] *
           to_float(m.scales[i / columns * scales_of(columns) + i % columns / kinds.scale_columns]);
  }
  // Each the largest of its `set`, where there are codes.
  void spread(std::vector<double>& sizes, size_t set) const {
    if (!kinds.scale_columns) return;
    for (size_t i = 0; i < sizes.size(); i += set) {
      const auto begin = sizes.begin() + static_cast<std::ptrdiff_t>(i);
      const auto end = sizes.begin() + static_cast<std::ptrdiff_t>(std::min(i + set, sizes.size()));
      std::fill(begin, end, *std::max_element(begin, end));
    }
  }

  Case(const Shape& s, bool exact, const Kinds& kinds = kExact)
      : shape(s),
        kinds(kinds),
        exact(exact),
        mask(kinds.masked ? s.d_out * oats::divide_up(s.d_in, 8) : 0),
        values(0, 0, kinds.values == Storage::exact ? 0 : s.d_out * scales_of(s.d_in)),
        u(factor(s.d_out, s.rank)),
        v(factor(s.rank, s.d_in)),
        codebook(kinds.code_bits() ? 1 << kinds.code_bits() : 0),
        exponents(kinds.scale_columns ? s.d_in : 0),
        sparse(s.d_out * s.d_in, 0.0),
        bias(s.d_out),
        x(kMaxBatch * s.d_in),
        y(kMaxBatch * s.d_out),
        size(kMaxBatch * s.d_out) {
    std::mt19937 random(static_cast<uint32_t>(s.d_out * 7919 + s.d_in * 31 + s.rank));
    std::normal_distribution<float> normal;
    // V x must be exact in bf16, which has integers up to 256.
    const auto value = [&](int largest, float scale) {
      const int integer = static_cast<int>(random() % (2 * largest + 1)) - largest;
      return from_float<Value>(exact ? static_cast<float>(integer) : normal(random) * scale);
    };
    const auto code = [&] { return static_cast<int8_t>(static_cast<int>(random() % 255) - 127); };
    const auto fill_scales = [&](Buffer<uint16_t>& scales, float size) {
      for (int64_t i = 0; i < scales.size(); ++i) {
        scales[i] = from_float<uint16_t>(size / 127 * (1 + std::abs(normal(random))));
      }
    };
    std::vector<Value> kept;
    std::vector<int8_t> kept_codes;
    std::bernoulli_distribution keep(s.density);
    std::fill_n(mask.data(), mask.size(), uint8_t{0});
    fill_scales(values.scales, 1);
    for (int64_t i = 0; i < codebook.size(); ++i) codebook[i] = code();
    for (int64_t i = 0; i < s.d_out * s.d_in; ++i) {
      if (kinds.masked && !keep(random)) continue;
      const int64_t row = i / s.d_in, column = i % s.d_in;
      if (kinds.masked)
        mask[row * oats::divide_up(s.d_in, 8) + column / 8] |= static_cast<uint8_t>(1u << column % 8);
      if (kinds.values == Storage::exact) {
        // Also zeros: a kept value is a bit of the mask, whatever it is.
        kept.push_back(value(3, 1));
        sparse[i] = to_float(kept.back());
        continue;
      }
      const bool indexed = codebook.size() > 0;
      kept_codes.push_back(indexed ? static_cast<int8_t>(random() % codebook.size()) : code());
      sparse[i] = (indexed ? codebook[kept_codes.back()] : kept_codes.back()) *
                  to_float(values.scales[row * scales_of(s.d_in) + column / kinds.scale_columns]);
    }
    nnz = static_cast<int64_t>(kept.size() + kept_codes.size());
    values.values = Buffer<Value>(static_cast<int64_t>(kept.size()));
    std::copy(kept.begin(), kept.end(), values.values.data());
    if (const int bits = kinds.code_bits()) {
      std::vector<int8_t> stream(oats::divide_up(nnz * bits, 8), 0);
      for (int64_t i = 0; i < nnz * bits; ++i) {
        const int bit = kept_codes[i / bits] >> i % bits & 1;
        stream[i / 8] = static_cast<int8_t>(stream[i / 8] | bit << i % 8);
      }
      kept_codes = stream;
    }
    values.codes = Buffer<int8_t>(static_cast<int64_t>(kept_codes.size()));
    std::copy(kept_codes.begin(), kept_codes.end(), values.codes.data());
    const float shrink = 1 / std::sqrt(static_cast<float>(std::max<int64_t>(1, s.d_in)));
    for (int64_t i = 0; i < u.values.size(); ++i) u.values[i] = value(2, 1);
    for (int64_t i = 0; i < v.values.size(); ++i) v.values[i] = value(1, shrink);
    for (int64_t i = 0; i < u.codes.size(); ++i) u.codes[i] = code();
    for (int64_t i = 0; i < v.codes.size(); ++i) v.codes[i] = code();
    fill_scales(u.scales, 1);
    fill_scales(v.scales, shrink);
    for (int64_t i = 0; i < exponents.size(); ++i) {
      exponents[i] = static_cast<int8_t>(static_cast<int>(random() % 5) - 2);
    }
    for (int64_t i = 0; i < bias.size(); ++i) bias[i] = value(3, 1);
    for (int64_t i = 0; i < x.size(); ++i) x[i] = value(1, 1);

    std::vector<double> row(s.d_in), row_size(s.d_in), t(s.rank), t_size(s.rank);
    for (int64_t b = 0; b < kMaxBatch; ++b) {
      for (int64_t j = 0; j < s.d_in; ++j) {
        row[j] = to_float(x[b * s.d_in + j]);
        if (exponents.size()) row[j] = std::ldexp(row[j], exponents[j]);
        row_size[j] = std::abs(row[j]);
      }
      spread(row_size, kinds.scale_columns);
      for (int64_t r = 0; r < s.rank; ++r) {
        t[r] = t_size[r] = 0;
        for (int64_t j = 0; j < s.d_in; ++j) {
          const double weight = entry(v, s.d_in, r * s.d_in + j);
          t[r] += weight * row[j];
          t_size[r] += std::abs(weight) * row_size[j];
        }
        if (exact && std::abs(t[r]) > 256) std::abort();
      }
      spread(t_size, 64);
      for (int64_t i = 0; i < s.d_out; ++i) {
        double sum = 0, sum_size = 0;
        for (int64_t j = 0; j < s.d_in; ++j) {
          sum += sparse[i * s.d_in + j] * row[j];
          sum_size += std::abs(sparse[i * s.d_in + j]) * row_size[j];
        }
        for (int64_t r = 0; r < s.rank; ++r) {
          const double weight = entry(u, s.rank, i * s.rank + r);
          sum += weight * t[r];
          sum_size += std::abs(weight) * t_size[r];
        }
        y[b * s.d_out + i] = sum;
        size[b * s.d_out + i] = sum_size;
      }
    }
  }

  // |y - ŷ| <= bound() * (|S| |x| + |U| (|V| |x|) + |b|), as tests/kernels/test_kernels.py derives it.
  double bound() const {
    const double d_in = static_cast<double>(shape.d_in), rank = static_cast<double>(shape.rank);
    const double sums = std::ldexp(8 + 4 * (std::sqrt(d_in) + std::sqrt(rank)), -24);
    if (dtype == Dtype::fp32) return sums;
    const double rounded = sums + std::ldexp(1 + std::ldexp(1, -8), -7);
    // Activations in units of 1 / 32639 of the largest, twice; or codes that become bf16.
    return kinds.scale_columns ? rounded + std::ldexp(1, -8) : rounded;
  }
};

template <class Value>
Packed pack(const Case<Value>& c, Isa isa, int threads) {
  Packed packed(oats::packed_bytes(c.weight_shape(), isa));
  oats::pack(
      {c.weight_shape(), c.mask.data(), c.values.stored(), c.u.stored(), c.v.stored(), c.values.scales.data(),
       c.u.scales.data(), c.v.scales.data(), c.codebook.data(), c.exponents.data()},
      isa, packed.data(), threads);
  return packed;
}

// "avx2 bf16 16 x 64, rank 0, density 1", valid until the next call.
template <class Value>
const char* name_of(const Case<Value>& c, Isa isa) {
  static char name[160];
  constexpr const char* kStorages[] = {"exact", "int8", "int4", "int3", "int2"};
  std::snprintf(name, sizeof name, "%s %s %s S %s%s U V %s %lld x %lld, rank %lld, density %g",
                oats::isa_name(isa), c.dtype == Dtype::fp32 ? "fp32" : "bf16",
                c.exact ? "integers" : "normal", kStorages[static_cast<int>(c.kinds.values)],
                c.kinds.masked ? "" : " without a mask", kStorages[static_cast<int>(c.kinds.factors)],
                static_cast<long long>(c.shape.d_out), static_cast<long long>(c.shape.d_in),
                static_cast<long long>(c.shape.rank), c.shape.density);
  return name;
}

template <class Value>
void check_unpack(const Case<Value>& c, Isa isa, const Packed& packed) {
  const char* name = name_of(c, isa);
  const char* problem = oats::packed_problem(packed.data(), packed.bytes);
  check(!problem, "%s: refused: %s", name, problem ? problem : "");
  const auto like = [](const Matrix<Value>& m) {
    return Matrix<Value>(m.values.size(), m.codes.size(), m.scales.size());
  };
  const auto stored = [](Matrix<Value>& m) { return const_cast<void*>(m.stored()); };
  Buffer<uint8_t> mask(c.mask.size());
  Matrix<Value> values = like(c.values), u = like(c.u), v = like(c.v);
  Buffer<int8_t> codebook(c.codebook.size()), exponents(c.exponents.size());
  oats::unpack(packed.data(),
               {mask.data(), stored(values), stored(u), stored(v), values.scales.data(), u.scales.data(),
                v.scales.data(), codebook.data(), exponents.data()},
               2);
  check(codebook == c.codebook, "%s: unpacked codebook", name);
  check(exponents == c.exponents, "%s: unpacked exponents", name);
  check(mask == c.mask, "%s: unpacked mask", name);
  check(values == c.values, "%s: unpacked values", name);
  check(u == c.u, "%s: unpacked U", name);
  check(v == c.v, "%s: unpacked V", name);
}

// Reads rows in no order, some of them twice.
template <class Value>
void check_rows(const Case<Value>& c, Isa isa, const Packed& packed, int threads) {
  if (c.shape.d_out == 0) return;
  const char* name = name_of(c, isa);
  for (const int64_t count : {int64_t{0}, int64_t{1}, int64_t{20}}) {
    Buffer<int64_t> rows(count);
    for (int64_t i = 0; i < count; ++i) rows[i] = (i * 37 + 5) % c.shape.d_out;
    Buffer<Value> out(count * c.shape.d_in);
    oats::read_sparse_rows(packed.data(), rows.data(), count, out.data(), threads);
    bool right = true;
    for (int64_t i = 0; i < out.size(); ++i) {
      const int64_t row = rows[i / c.shape.d_in], column = i % c.shape.d_in;
      double expected = c.sparse[row * c.shape.d_in + column];
      if (c.exponents.size()) expected = std::ldexp(expected, c.exponents[column]);
      const double unit = std::ldexp(std::abs(expected), c.dtype == Dtype::fp32 ? -23 : -8);
      right &= std::abs(to_float(out[i]) - expected) <= (c.kinds.scale_columns ? unit : 0);
    }
    check(right, "%s: %lld rows, %d threads", name, static_cast<long long>(count), threads);
  }
}

// Rows are an odd number of elements apart. With `odd_address` they begin one element behind an aligned
// address.
template <class Value>
void check_product(const Case<Value>& c, Isa isa, const Packed& packed, int64_t batch, int threads,
                   bool odd_address, oats::ActivationCodes activations = oats::ActivationCodes::exact) {
  const int64_t d_out = c.shape.d_out, d_in = c.shape.d_in;
  const int64_t x_stride = d_in + 1 + d_in % 2 * 2, y_stride = d_out + 2 - d_out % 2, shift = odd_address;
  const Value gap = from_float<Value>(12345), nan = from_float<Value>(std::ldexp(1.9f, 127));

  Buffer<Value> x(shift + (batch - 1) * x_stride + d_in), y(shift + (batch - 1) * y_stride + d_out);
  std::fill_n(x.data(), x.size(), nan);
  std::fill_n(y.data(), y.size(), gap);
  for (int64_t b = 0; b < batch; ++b)
    std::copy_n(c.x.data() + b * d_in, d_in, x.data() + shift + b * x_stride);
  const bool with_bias = (batch + threads) % 2;
  const Projection projection{reinterpret_cast<const PackedHeader*>(packed.data()),
                              with_bias ? reinterpret_cast<const char*>(c.bias.data()) : nullptr,
                              reinterpret_cast<char*>(y.data() + shift), y_stride};
  oats::set_activation_codes(activations);
  oats::sparse_low_rank_linear(&projection, 1, x.data() + shift, batch, x_stride, threads);
  oats::set_activation_codes(oats::ActivationCodes::exact);
  // int8 are multiples of 1 / 127 of the largest.
  const double bound = c.bound() + (activations == oats::ActivationCodes::int8 ? 1 / 254.0 : 0);

  int64_t wrong = 0, first_wrong = 0, spoilt = shift && y.size() && y[0] != gap;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < (b + 1 < batch ? y_stride : d_out); ++i) {
      const Value got = y[shift + b * y_stride + i];
      if (i >= d_out) {
        spoilt += got != gap;
        continue;
      }
      const double bias = with_bias ? to_float(c.bias[i]) : 0.0, expected = c.y[b * d_out + i] + bias;
      const double difference = std::abs(to_float(got) - expected);
      const bool right = c.exact ? to_float(got) == to_float(from_float<Value>(static_cast<float>(expected)))
                                 : difference <= bound * (c.size[b * d_out + i] + std::abs(bias));
      if (!right && !wrong++) first_wrong = b * d_out + i;
    }
  }
  const auto as_long = [](int64_t value) { return static_cast<long long>(value); };
  check(!wrong, "%s: batch %lld, %d threads: %lld outputs wrong, the first is %lld of row %lld",
        name_of(c, isa), as_long(batch), threads, as_long(wrong),
        as_long(first_wrong % std::max(d_out, int64_t{1})),
        as_long(first_wrong / std::max(d_out, int64_t{1})));
  check(!spoilt, "%s: batch %lld, %d threads: %lld elements beside the outputs were written", name_of(c, isa),
        as_long(batch), threads, as_long(spoilt));
}

// A header with any byte changed is refused.
template <class Value>
void check_damaged_headers(const Case<Value>& c, Isa isa) {
  const Packed packed = pack(c, isa, 1);
  auto* bytes = static_cast<uint8_t*>(packed.data());
  const char* name = name_of(c, isa);
  check(oats::packed_problem(bytes, packed.bytes - 64), "%s: truncated, yet accepted", name);
  check(oats::packed_problem(bytes, packed.bytes + 64), "%s: extended, yet accepted", name);
  check(oats::packed_problem(bytes, sizeof(PackedHeader) - 1), "%s: no header, yet accepted", name);
  check(oats::packed_problem(bytes + 8, packed.bytes - 8), "%s: not aligned, yet accepted", name);
  for (size_t i = 0; i < sizeof(PackedHeader); ++i) {
    for (int change = 1; change < 256; ++change) {
      const uint8_t before = bytes[i];
      bytes[i] = static_cast<uint8_t>(before ^ change);
      check(oats::packed_problem(bytes, packed.bytes),
            "%s: byte %zu of the header changed by %d, yet accepted", name, i, change);
      bytes[i] = before;
    }
  }
}

template <class Float>
void check_keep_largest() {
  std::mt19937 random(1);
  for (const int64_t rows : {0, 1, 2, 5, 17}) {
    for (const int64_t columns : {0, 1, 4, 63, 64, 65, 500, 2049}) {
      for (const int kind : {0, 1, 2, 3}) {
        Buffer<Float> in(rows * columns);
        std::normal_distribution<Float> normal;
        for (int64_t i = 0; i < in.size(); ++i) {
          const Float value = normal(random);
          in[i] = kind == 0   ? value
                  : kind == 1 ? std::round(2 * value)             // many ties
                  : kind == 2 ? std::exp(20 * value)              // more octaves than there are bins for
                              : (value < 0 ? Float{0} : -value);  // half of them zero
        }
        for (const int64_t count : {int64_t{0}, int64_t{1}, columns / 3, columns - 1, columns, columns + 1}) {
          Buffer<Float> expected(in.size());
          std::fill_n(expected.data(), expected.size(), Float{0});
          std::vector<int64_t> order(columns);
          for (int64_t r = 0; r < rows && columns; ++r) {
            const Float* row = in.data() + r * columns;
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(),
                             [&](int64_t a, int64_t b) { return std::abs(row[a]) > std::abs(row[b]); });
            for (int64_t i = 0; i < std::min(count, columns); ++i)
              expected[r * columns + order[i]] = row[order[i]];
          }
          for (const int threads : kThreads) {
            Buffer<Float> out(in.size());
            oats::keep_largest_in_rows(in.data(), rows, columns, count, out.data(), threads);
            const bool in_place = threads == 2;
            if (in_place) {
              std::copy_n(in.data(), in.size(), out.data());
              oats::keep_largest_in_rows(out.data(), rows, columns, count, out.data(), threads);
            }
            check(out == expected, "keep_largest_in_rows<%s>: %lld of %lld x %lld, kind %d, %d threads%s",
                  sizeof(Float) == 4 ? "float" : "double", static_cast<long long>(count),
                  static_cast<long long>(rows), static_cast<long long>(columns), kind, threads,
                  in_place ? ", in place" : "");
          }
        }
      }
    }
  }
}

template <class Value>
void check_rms_norm() {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (const int64_t rows : {0, 1, 3, 70}) {
    for (const int64_t columns : {1, 7, 16, 33, 1000}) {
      Buffer<Value> x(rows * columns), weight(columns);
      for (int64_t i = 0; i < x.size(); ++i) x[i] = from_float<Value>(normal(random));
      for (int64_t i = 0; i < columns; ++i) weight[i] = from_float<Value>(normal(random));
      for (const auto kind : {oats::RmsNorm::round_then_scale, oats::RmsNorm::scale_by_one_plus}) {
        const double plus = kind == oats::RmsNorm::scale_by_one_plus;
        for (const int threads : kThreads) {
          Buffer<Value> y(x.size());
          const bool in_place = threads == 2;
          if (in_place) std::copy_n(x.data(), x.size(), y.data());
          oats::rms_norm(in_place ? y.data() : x.data(), rows, columns, weight.data(), 1e-6f, kind,
                         Case<Value>::dtype, y.data(), threads);
          bool right = true;
          for (int64_t i = 0; i < x.size(); ++i) {
            double squares = 0;
            for (int64_t j = 0; j < columns; ++j)
              squares += std::pow(to_float(x[i / columns * columns + j]), 2);
            const double normed =
                to_float(x[i]) / std::sqrt(squares / static_cast<double>(columns) + double{1e-6f});
            const double factor = plus + to_float(weight[i % columns]);
            const double size = std::abs(normed) * (plus + std::abs(to_float(weight[i % columns])));
            const double c = std::ldexp(8 + static_cast<double>(columns) / 16, -24) +
                             (sizeof(Value) == 2 ? std::ldexp(1 + std::ldexp(1, -8), -7) : 0);
            right &= std::abs(to_float(y[i]) - normed * factor) <= c * size;
          }
          check(right, "rms_norm: %zu bytes, %lld x %lld, kind %d, %d threads%s", sizeof(Value),
                static_cast<long long>(rows), static_cast<long long>(columns), static_cast<int>(kind),
                threads, in_place ? ", in place" : "");
        }
      }
    }
  }
}

// Tiles are emulated in this program, so it tests them on every CPU with AVX-512 and BF16.
Isa last_isa() {
  return oats::best_isa() == Isa::avx512_bf16 ? Isa::amx_bf16 : oats::best_isa();
}

template <class Value>
void check_layers() {
  std::vector<std::pair<bool, Kinds>> kinds{{true, kExact}, {false, kExact}};
  for (const Kinds& codes : kCodes) kinds.emplace_back(false, codes);
  for (const Shape& shape : kShapes) {
    for (const auto& [exact, storage] : kinds) {
      const Case<Value> c(shape, exact, storage);
      for (int i = 0; i <= static_cast<int>(last_isa()); ++i) {
        const Isa isa = static_cast<Isa>(i);
        for (const int threads : kThreads) {
          const Packed packed = pack(c, isa, threads);
          check_unpack(c, isa, packed);
          check_rows(c, isa, packed, threads);
          for (const int64_t batch : kBatches) {
            check_product(c, isa, packed, batch, threads, threads % 2);
            if (storage.values != Storage::exact && isa == Isa::amx_bf16)
              check_product(c, isa, packed, batch, threads, threads % 2, oats::ActivationCodes::int8);
          }
        }
      }
    }
  }
  for (int i = 0; i <= static_cast<int>(oats::best_isa()); ++i) {
    check_damaged_headers(Case<Value>({70, 37, 5, 0.5}, true), static_cast<Isa>(i));
    check_damaged_headers(Case<Value>({70, 37, 5, 0.5}, false, kCodes[1]), static_cast<Isa>(i));
  }
}

}  // namespace

int main() {
  check_keep_largest<float>();
  check_keep_largest<double>();
  check_rms_norm<float>();
  check_rms_norm<uint16_t>();
  check_layers<float>();
  check_layers<uint16_t>();
  std::printf("%s: %d of %d checks failed\n", oats::isa_name(oats::best_isa()), failures, checks);
  return failures != 0;
}
