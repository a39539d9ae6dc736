"""The matrix product of llama.cpp, through the shared library of its tensor library ggml.

Arguments: the folder of libggml*.so, and the type of the weight, q8_0 or q4_k. (Q4_K_M is a recipe for whole
models, most of whose matrices are Q4_K.) Weights go to the buffer that llama.cpp itself would use: repacked
for this CPU where ggml has such a layout.
"""

import ctypes
import pathlib
import sys

import numpy as np
from worker import Peer, serve

TYPES = {"f32": 0, "q8_0": 8, "q4_k": 12}


class InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Library:
    """The few functions that are called, each with its types."""

    def __init__(self, folder):
        base, cpu = (
            ctypes.CDLL(str(next(pathlib.Path(folder).rglob(f"lib{name}.so"))), mode=ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu")
        )
        pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        number = ctypes.c_int
        for library, name, result, *arguments in (
            (base, "ggml_version", ctypes.c_char_p),
            (base, "ggml_init", pointer, InitParams),
            (base, "ggml_free", None, pointer),
            (base, "ggml_tensor_overhead", size),
            (base, "ggml_graph_overhead", size),
            (base, "ggml_new_tensor_2d", pointer, pointer, number, integer, integer),
            (base, "ggml_nbytes", size, pointer),
            (base, "ggml_mul_mat", pointer, pointer, pointer, pointer),
            (base, "ggml_new_graph", pointer, pointer),
            (base, "ggml_build_forward_expand", None, pointer, pointer),
            (base, "ggml_quantize_chunk", size, number, pointer, pointer, *[integer] * 3, pointer),
            (base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer),
            (base, "ggml_backend_buffer_free", None, pointer),
            (base, "ggml_backend_tensor_set", None, pointer, pointer, size, size),
            (base, "ggml_backend_tensor_get", None, pointer, pointer, size, size),
            (base, "ggml_backend_graph_compute", number, pointer, pointer),
            (base, "ggml_backend_reg_dev_get", pointer, pointer, size),
            (base, "ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p),
            (base, "ggml_backend_dev_supports_op", ctypes.c_bool, pointer, pointer),
            (base, "ggml_backend_cpu_buffer_type", pointer),
            (cpu, "ggml_backend_cpu_reg", pointer),
            (cpu, "ggml_backend_cpu_init", pointer),
            (cpu, "ggml_backend_cpu_set_n_threads", None, pointer, number),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)


class Ggml(Peer):
    def __init__(self, folder, kind):
        self._ggml = Library(folder)
        self._type, self._name = TYPES[kind], kind
        self.version = self._ggml.version().decode()
        self._backend = self._ggml.backend_cpu_init()
        self._held, self._graphs = [], []

    def _context(self):
        g = self._ggml
        room = 16 * g.tensor_overhead() + g.graph_overhead()
        return g.init(InitParams(room, None, True))

    def _quantised(self, weight):
        d_out, d_in = weight.shape
        bytes_ = np.empty(weight.nbytes, np.uint8)
        size = self._ggml.quantize_chunk(
            self._type, weight.ctypes.data, bytes_.ctypes.data, 0, d_out, d_in, None
        )
        return bytes_[:size]

    def _buffer_types(self):
        """Those that llama.cpp tries for a weight on the CPU, in its order; the last takes everything."""
        g = self._ggml
        registry = g.backend_cpu_reg()
        self._device = g.backend_reg_dev_get(registry, 0)
        address = g.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        extra = []
        if address:
            get = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
            for buffer_type in get(self._device):
                if not buffer_type:
                    break
                extra.append(buffer_type)
        return [*extra, g.backend_cpu_buffer_type()]

    def size(self, weight):
        return {"q8_0": 34 / 32, "q4_k": 144 / 256}[self._name] * weight.size

    def load(self, weight, factors, copies, threads):
        g = self._ggml
        g.backend_cpu_set_n_threads(self._backend, threads)
        for buffer, context in (*self._graphs, *self._held):
            g.backend_buffer_free(buffer)
            g.free(context)
        self._held, self._graphs, self._weights = [], [], []
        data = self._quantised(np.ascontiguousarray(weight))
        self._shape = d_out, d_in = weight.shape
        for buffer_type in self._buffer_types():
            context = self._context()
            tensor = g.new_tensor_2d(context, self._type, d_in, d_out)
            buffer = g.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
            probe = self._context()
            product = g.mul_mat(probe, tensor, g.new_tensor_2d(probe, TYPES["f32"], d_in, 1))
            usable = buffer and g.backend_dev_supports_op(self._device, product)
            g.free(probe)
            if buffer:
                g.backend_buffer_free(buffer)
            g.free(context)
            if usable:
                break
        for _ in range(copies):
            context = self._context()
            tensor = g.new_tensor_2d(context, self._type, d_in, d_out)
            buffer = g.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
            g.backend_tensor_set(tensor, data.ctypes.data, 0, data.size)
            self._held.append((buffer, context))
            self._weights.append(tensor)
        return data.size

    def calls(self, x):
        for buffer, context in self._graphs:
            self._ggml.backend_buffer_free(buffer)
            self._ggml.free(context)
        self._graphs = []
        return [self._call(weight, np.ascontiguousarray(x)) for weight in self._weights]

    def result(self, returned):
        y = np.empty((self._batch, self._shape[0]), np.float32)
        self._ggml.backend_tensor_get(returned, y.ctypes.data, 0, y.nbytes)
        return y

    def _call(self, weight, x):
        g = self._ggml
        d_in = self._shape[1]
        context = self._context()
        columns = g.new_tensor_2d(context, TYPES["f32"], d_in, len(x))
        product = g.mul_mat(context, weight, columns)
        graph = g.new_graph(context)
        g.build_forward_expand(graph, product)
        buffer = g.backend_alloc_ctx_tensors_from_buft(context, g.backend_cpu_buffer_type())
        self._graphs.append((buffer, context))
        g.backend_tensor_set(columns, x.ctypes.data, 0, x.nbytes)
        self._batch = len(x)

        def call():
            status = g.backend_graph_compute(self._backend, graph)
            if status != 0:
                raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
            return product

        return call


serve(Ggml(sys.argv[1], sys.argv[2]))
