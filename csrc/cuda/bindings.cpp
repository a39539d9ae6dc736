// The Python module oats._cuda. It takes addresses and sizes and checks nothing: its callers own the tensors
// and check them.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cells.h"
#include "kernels.h"

namespace py = pybind11;

namespace {

using oats::cuda::PackedWeight;
using oats::cuda::Queue;

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

PackedWeight weight_from(uintptr_t packed, int64_t d_out, int64_t d_in, int64_t rank, int64_t nnz,
                         int dtype) {
  return {pointer<const char>(packed), d_out, d_in, rank, nnz, static_cast<oats::cuda::Dtype>(dtype)};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("max_columns") = oats::cuda::kMaxColumns;
  m.attr("max_group") = oats::cuda::kMaxGroup;
  m.attr("cell_rows") = oats::cuda::kCellRows;
  m.attr("cell_columns") = oats::cuda::kCellColumns;

  // Returns the offsets of starts, masks, values, u and v, the bytes in all, and the row strides of u and v
  // in elements.
  m.def(
      "layout",
      [](int64_t d_out, int64_t d_in, int64_t rank, int64_t nnz, int value_bytes) {
        const oats::cuda::Layout l = oats::cuda::layout_of(d_out, d_in, rank, nnz, value_bytes);
        return py::make_tuple(l.starts, l.masks, l.values, l.u, l.v, l.bytes, l.u_stride, l.v_stride);
      },
      py::arg("d_out"), py::arg("d_in"), py::arg("rank"), py::arg("nnz"), py::arg("value_bytes"));

  // Returns the splits, and the bytes of the workspace.
  m.def("plan", [](int64_t d_out, int64_t d_in, int64_t rank, int64_t batch, int64_t multiprocessors) {
    const int64_t strips = oats::cuda::divide_up(d_out, oats::cuda::kCellRows);
    const int64_t cells = oats::cuda::divide_up(d_in, oats::cuda::kCellColumns);
    const int64_t splits = oats::cuda::splits_for(strips, cells, multiprocessors);
    return py::make_tuple(splits, oats::cuda::workspace_of(d_out, rank, batch, splits).bytes);
  });

  m.def("sparse_low_rank_linear",
        [](uintptr_t packed, int64_t d_out, int64_t d_in, int64_t rank, int64_t nnz, int dtype, uintptr_t x,
           int64_t batch, int64_t x_stride, uintptr_t bias, uintptr_t y, int64_t y_stride, int64_t splits,
           uintptr_t workspace, uintptr_t stream, int capability) {
          oats::cuda::sparse_low_rank_linear(weight_from(packed, d_out, d_in, rank, nnz, dtype), pointer(x),
                                             batch, x_stride, pointer(bias), pointer(y), y_stride, splits,
                                             pointer(workspace), Queue{pointer(stream), capability});
        });

  m.def("expand", [](uintptr_t packed, int64_t d_out, int64_t d_in, int64_t rank, int64_t nnz, int dtype,
                     int64_t first, int64_t rows, uintptr_t out, int64_t out_stride, int64_t columns,
                     uintptr_t stream, int capability) {
    oats::cuda::expand(weight_from(packed, d_out, d_in, rank, nnz, dtype), first, rows, pointer(out),
                       out_stride, columns, Queue{pointer(stream), capability});
  });

  m.def("keep_largest_in_rows",
        [](uintptr_t in, int64_t rows, int64_t columns, int64_t count, int value_bytes, uintptr_t out,
           uintptr_t squares, uintptr_t stream, int capability) {
          oats::cuda::keep_largest_in_rows(pointer(in), rows, columns, count, value_bytes, pointer(out),
                                           pointer<double>(squares), Queue{pointer(stream), capability});
        });
}
