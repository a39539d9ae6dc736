// pybind11: pointers and sizes in, nothing else. oats/ops.py owns the tensors and checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "oats/isa.h"
#include "oats/keep_largest.h"
#include "oats/packed_weight.h"
#include "oats/rms_norm.h"
#include "oats/sparse_low_rank_linear.h"
#include "oats/threads.h"

namespace py = pybind11;

void bind_decoder(py::module_& m);  // decoder_bindings.cpp

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

oats::Isa isa_from(const std::string& name) {
  oats::Isa isa;
  if (!oats::parse_isa(name.c_str(), &isa)) throw py::value_error("unknown instruction set '" + name + "'");
  return isa;
}

using Addresses = std::array<uintptr_t, 9>;

oats::WeightShape shape_from(const py::tuple& numbers) {
  const auto number = [&](size_t i) { return numbers[i].cast<int64_t>(); };
  return {number(0),
          number(1),
          number(2),
          number(3),
          number(4) == 4 ? oats::Dtype::fp32 : oats::Dtype::bf16,
          static_cast<oats::Storage>(number(5)),
          static_cast<oats::Storage>(number(6)),
          static_cast<int32_t>(number(7))};
}

oats::Projection projection_from(uintptr_t packed, uintptr_t bias, uintptr_t y, int64_t y_stride) {
  return {pointer<const oats::PackedHeader>(packed), pointer<const char>(bias), pointer<char>(y), y_stride};
}

const oats::PackedHeader& header(uintptr_t packed, size_t bytes) {
  if (const char* problem = oats::packed_problem(pointer<const void>(packed), bytes))
    throw py::value_error(problem);
  return *pointer<const oats::PackedHeader>(packed);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  bind_decoder(m);
  m.doc() = "The C++ core of oats: addresses and sizes, no checks. Use oats.ops.";

  m.def("best_isa", [] { return oats::isa_name(oats::best_isa()); });
  m.def("active_isa", [] { return oats::isa_name(oats::active_isa()); });
  m.def("isa_names", [] {
    py::list names;
    for (int i = 0; i < oats::kIsaCount; ++i) names.append(oats::isa_name(static_cast<oats::Isa>(i)));
    return names;
  });

  m.def("release_threads", oats::release_threads, py::call_guard<py::gil_scoped_release>());

  m.def(
      "mask_population",
      [](uintptr_t mask, int64_t d_out, int64_t d_in) {
        return oats::mask_population(pointer<const uint8_t>(mask), d_out, d_in);
      },
      py::arg("mask"), py::arg("d_out"), py::arg("d_in"), py::call_guard<py::gil_scoped_release>());

  // shape: as WeightShape; see oats/ops.py.
  m.def(
      "packed_bytes",
      [](const py::tuple& shape, const std::string& isa) {
        return oats::packed_bytes(shape_from(shape), isa_from(isa));
      },
      py::arg("shape"), py::arg("isa"));

  // tensors: mask, values, low_rank_u, low_rank_v, their scales, codebook and input exponents; 0 for those
  // that are not.
  m.def(
      "pack",
      [](const py::tuple& shape, const Addresses& tensors, const std::string& isa, uintptr_t out,
         int threads) {
        const oats::Isa target = isa_from(isa);
        const oats::CanonicalWeight weight{shape_from(shape),
                                           pointer<const uint8_t>(tensors[0]),
                                           pointer<const void>(tensors[1]),
                                           pointer<const void>(tensors[2]),
                                           pointer<const void>(tensors[3]),
                                           pointer<const uint16_t>(tensors[4]),
                                           pointer<const uint16_t>(tensors[5]),
                                           pointer<const uint16_t>(tensors[6]),
                                           pointer<const int8_t>(tensors[7]),
                                           pointer<const int8_t>(tensors[8])};
        py::gil_scoped_release release;
        oats::pack(weight, target, pointer(out), threads);
      },
      py::arg("shape"), py::arg("tensors"), py::arg("isa"), py::arg("out"), py::arg("threads"));

  m.def(
      "packed_header",
      [](uintptr_t packed, size_t bytes) {
        const oats::PackedHeader& h = header(packed, bytes);
        const oats::WeightShape& s = h.shape;
        return py::make_tuple(
            py::make_tuple(s.d_out, s.d_in, s.rank, s.nnz, oats::dtype_bytes(s.dtype),
                           static_cast<int>(s.values), static_cast<int>(s.factors), s.scale_columns),
            oats::isa_name(h.isa));
      },
      py::arg("packed"), py::arg("bytes"));

  m.def(
      "unpack",
      [](uintptr_t packed, const Addresses& tensors, int threads) {
        const oats::UnpackedWeight weight{
            pointer<uint8_t>(tensors[0]),  pointer(tensors[1]),           pointer(tensors[2]),
            pointer(tensors[3]),           pointer<uint16_t>(tensors[4]), pointer<uint16_t>(tensors[5]),
            pointer<uint16_t>(tensors[6]), pointer<int8_t>(tensors[7]),   pointer<int8_t>(tensors[8])};
        py::gil_scoped_release release;
        oats::unpack(pointer<const void>(packed), weight, threads);
      },
      py::arg("packed"), py::arg("tensors"), py::arg("threads"));

  m.def(
      "read_sparse_rows",
      [](uintptr_t packed, uintptr_t rows, int64_t count, uintptr_t out, int threads) {
        oats::read_sparse_rows(pointer<const void>(packed), pointer<const int64_t>(rows), count, pointer(out),
                               threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "sparse_low_rank_linear",
      [](uintptr_t packed, uintptr_t x, int64_t batch, int64_t x_stride, uintptr_t bias, uintptr_t y,
         int64_t y_stride, int threads) {
        const oats::Projection projection = projection_from(packed, bias, y, y_stride);
        oats::sparse_low_rank_linear(&projection, 1, pointer<const void>(x), batch, x_stride, threads);
      },
      py::call_guard<py::gil_scoped_release>());

  // projections: packed, bias, y and y_stride of each, in one flat tuple.
  m.def("sparse_low_rank_linears", [](const py::tuple& numbers, uintptr_t x, int64_t batch, int64_t x_stride,
                                      int threads) {
    std::vector<oats::Projection> projections(numbers.size() / 4);
    for (size_t i = 0; i < projections.size(); ++i) {
      const auto number = [&](size_t k) { return PyLong_AsSize_t(numbers[4 * i + k].ptr()); };
      projections[i] = projection_from(number(0), number(1), number(2), static_cast<int64_t>(number(3)));
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    py::gil_scoped_release release;
    oats::sparse_low_rank_linear(projections.data(), static_cast<int>(projections.size()),
                                 pointer<const void>(x), batch, x_stride, threads);
  });

  m.def(
      "rms_norm",
      [](uintptr_t x, int64_t rows, int64_t columns, uintptr_t weight, float eps, bool one_plus,
         int value_bytes, uintptr_t y, int threads) {
        oats::rms_norm(pointer<const void>(x), rows, columns, pointer<const void>(weight), eps,
                       one_plus ? oats::RmsNorm::scale_by_one_plus : oats::RmsNorm::round_then_scale,
                       value_bytes == 4 ? oats::Dtype::fp32 : oats::Dtype::bf16, pointer(y), threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "keep_largest_in_rows",
      [](uintptr_t in, int64_t rows, int64_t columns, int64_t count, int value_bytes, uintptr_t out,
         int threads) {
        if (value_bytes == 4) {
          oats::keep_largest_in_rows(pointer<const float>(in), rows, columns, count, pointer<float>(out),
                                     threads);
        } else {
          oats::keep_largest_in_rows(pointer<const double>(in), rows, columns, count, pointer<double>(out),
                                     threads);
        }
      },
      py::call_guard<py::gil_scoped_release>());
}
