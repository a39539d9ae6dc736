// The Python module oats._core. It takes addresses and sizes and checks nothing: its callers own the tensors
// and check them.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <iterator>
#include <string>
#include <vector>

#include "oats/isa.h"
#include "oats/operations.h"
#include "oats/packed_weight.h"

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

constexpr const char* kStorages[] = {"exact", "int8", "int4", "int3", "int2"};

oats::Storage storage_from(const std::string& name) {
  for (uint32_t i = 0; i < std::size(kStorages); ++i)
    if (name == kStorages[i]) return static_cast<oats::Storage>(i);
  throw py::value_error("unknown storage '" + name + "'");
}

oats::Dtype dtype_from(int value_bytes) {
  return value_bytes == 4 ? oats::Dtype::fp32 : oats::Dtype::bf16;
}

oats::Projection projection_from(uintptr_t packed, uintptr_t bias, uintptr_t y, int64_t y_stride) {
  return {pointer<const oats::PackedHeader>(packed), pointer<const char>(bias), pointer<char>(y), y_stride};
}

// Where the tensors of a file lie, by their names there; null for a tensor that the weight does not have.
oats::UnpackedWeight tensors_from(const py::dict& addresses) {
  const auto at = [&](const char* name) -> uintptr_t {
    return addresses.contains(name) ? addresses[name].cast<uintptr_t>() : 0;
  };
  oats::UnpackedWeight w;
  w.mask = pointer<uint8_t>(at("mask"));
  w.values = pointer(at("values"));
  w.low_rank_u = pointer(at("low_rank_u"));
  w.low_rank_v = pointer(at("low_rank_v"));
  w.values_scale = pointer<uint16_t>(at("values_scale"));
  w.low_rank_u_scale = pointer<uint16_t>(at("low_rank_u_scale"));
  w.low_rank_v_scale = pointer<uint16_t>(at("low_rank_v_scale"));
  w.codebook = pointer<int8_t>(at("values_codebook"));
  w.input_exponent = pointer<int8_t>(at("input_exponent"));
  return w;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of oats: takes addresses and sizes, checks nothing.";

  const py::call_guard<py::gil_scoped_release> released;

  bind_decoder(m);

  m.def("best_isa", [] { return oats::isa_name(oats::best_isa()); });
  m.def("active_isa", [] { return oats::isa_name(oats::active_isa()); });
  m.def("isa_names", [] {
    py::list names;
    for (int i = 0; i < oats::kIsaCount; ++i) names.append(oats::isa_name(static_cast<oats::Isa>(i)));
    return names;
  });

  // Ends the threads that OpenMP keeps between the parallel regions of the calling thread; the next region
  // starts new ones. Call this before a fork: the child has none of those threads, but its first region would
  // wait for them forever. Inside a region it does nothing.
  m.def("release_threads", [] { omp_pause_resource_all(omp_pause_soft); }, released);

  m.def(
      "mask_population",
      [](uintptr_t mask, int64_t d_out, int64_t d_in) {
        return oats::mask_population(pointer<const uint8_t>(mask), d_out, d_in);
      },
      released);

  using Shape = oats::WeightShape;
  py::class_<Shape>(m, "WeightShape")
      .def(py::init([](int64_t d_out, int64_t d_in, int64_t rank, int64_t nnz, int value_bytes,
                       const std::string& values, const std::string& factors, int16_t scale_columns,
                       bool masked) {
             const oats::Dtype dtype = dtype_from(value_bytes);
             return Shape{d_out,         d_in,  rank, nnz, dtype, storage_from(values), storage_from(factors),
                          scale_columns, masked};
           }),
           py::kw_only(), py::arg("d_out"), py::arg("d_in"), py::arg("rank"), py::arg("nnz"),
           py::arg("value_bytes"), py::arg("values"), py::arg("factors"), py::arg("scale_columns"),
           py::arg("masked"))
      .def_readonly("d_out", &Shape::d_out)
      .def_readonly("d_in", &Shape::d_in)
      .def_readonly("rank", &Shape::rank)
      .def_readonly("nnz", &Shape::nnz)
      .def_property_readonly("value_bytes", [](const Shape& s) { return oats::dtype_bytes(s.dtype); })
      .def_property_readonly("values", [](const Shape& s) { return kStorages[static_cast<int>(s.values)]; })
      .def_property_readonly("factors", [](const Shape& s) { return kStorages[static_cast<int>(s.factors)]; })
      .def_readonly("scale_columns", &Shape::scale_columns)
      .def_property_readonly("masked", [](const Shape& s) { return s.masked != 0; });

  m.def("packed_bytes",
        [](const Shape& shape, const std::string& isa) { return oats::packed_bytes(shape, isa_from(isa)); });

  m.def("pack",
        [](const Shape& shape, const py::dict& tensors, const std::string& isa, uintptr_t out, int threads) {
          const oats::UnpackedWeight t = tensors_from(tensors);
          const oats::Isa target = isa_from(isa);
          py::gil_scoped_release release;
          oats::pack({shape, t.mask, t.values, t.low_rank_u, t.low_rank_v, t.values_scale, t.low_rank_u_scale,
                      t.low_rank_v_scale, t.codebook, t.input_exponent},
                     target, pointer(out), threads);
        });

  m.def("packed_header", [](uintptr_t packed, size_t bytes) {
    if (const char* problem = oats::packed_problem(pointer(packed), bytes)) throw py::value_error(problem);
    const auto* h = pointer<const oats::PackedHeader>(packed);
    return py::make_tuple(h->shape, oats::isa_name(h->isa));
  });

  m.def("unpack", [](uintptr_t packed, const py::dict& tensors, int threads) {
    const oats::UnpackedWeight out = tensors_from(tensors);
    py::gil_scoped_release release;
    oats::unpack(pointer(packed), out, threads);
  });

  m.def(
      "read_sparse_rows",
      [](uintptr_t packed, uintptr_t rows, int64_t count, uintptr_t out, int threads) {
        oats::read_sparse_rows(pointer(packed), pointer<const int64_t>(rows), count, pointer(out), threads);
      },
      released);

  m.def(
      "sparse_low_rank_linear",
      [](uintptr_t packed, uintptr_t x, int64_t batch, int64_t x_stride, uintptr_t bias, uintptr_t y,
         int64_t y_stride, int threads) {
        const oats::Projection projection = projection_from(packed, bias, y, y_stride);
        oats::sparse_low_rank_linear(&projection, 1, pointer(x), batch, x_stride, threads);
      },
      released);

  // `numbers` is one flat tuple: packed, bias, y and y_stride of each projection.
  m.def("sparse_low_rank_linears", [](const py::tuple& numbers, uintptr_t x, int64_t batch, int64_t x_stride,
                                      int threads) {
    std::vector<oats::Projection> projections(numbers.size() / 4);
    for (size_t i = 0; i < projections.size(); ++i) {
      const auto number = [&](size_t k) { return PyLong_AsSize_t(numbers[4 * i + k].ptr()); };
      projections[i] = projection_from(number(0), number(1), number(2), static_cast<int64_t>(number(3)));
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    py::gil_scoped_release release;
    oats::sparse_low_rank_linear(projections.data(), static_cast<int>(projections.size()), pointer(x), batch,
                                 x_stride, threads);
  });

  m.def("set_activation_codes", [](bool int8) {
    oats::set_activation_codes(int8 ? oats::ActivationCodes::int8 : oats::ActivationCodes::exact);
  });
  m.def("activation_codes", [] { return oats::activation_codes() == oats::ActivationCodes::int8; });

  m.def(
      "rms_norm",
      [](uintptr_t x, int64_t rows, int64_t columns, uintptr_t weight, float eps, bool one_plus,
         int value_bytes, uintptr_t y, int threads) {
        oats::rms_norm(pointer(x), rows, columns, pointer(weight), eps,
                       one_plus ? oats::RmsNorm::scale_by_one_plus : oats::RmsNorm::round_then_scale,
                       dtype_from(value_bytes), pointer(y), threads);
      },
      released);

  m.def(
      "keep_largest_in_rows",
      [](uintptr_t in, int64_t rows, int64_t columns, int64_t count, int value_bytes, uintptr_t out,
         int threads) {
        const auto keep = [&](auto zero) {
          using T = decltype(zero);
          oats::keep_largest_in_rows(pointer<const T>(in), rows, columns, count, pointer<T>(out), threads);
        };
        value_bytes == 4 ? keep(0.f) : keep(0.);
      },
      released);
}
