"""The AVX-512 kernel of SparAMX, bf16, built from a checkout that is not part of this project.

Arguments: the folder SparAMX of the checkout, and a folder for what is built.

Its file of layers imports the built module as `sparamx.avx_sparse_linear`; its AMX kernels are not needed.
"""

import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import sysconfig
import types

import torch
from torch.utils import cpp_extension
from worker import Peer, serve

# What its kernel needs; its own build adds AMX, which this file of it does not use.
FLAGS = [
    *(f"-mavx512{part}" for part in ("f", "dq", "bw", "vl", "vbmi2", "bf16", "vpopcntdq")),
    *("-std=c++20", "-O3", "-DNDEBUG", "-fopenmp", "-shared", "-fPIC", "-w"),
    "-DTORCH_EXTENSION_NAME=avx_sparse_linear",
]


def layer_class(checkout, built):
    """Build the kernel into the folder `built`, once, and return its version and its class of layers."""
    source = pathlib.Path(checkout) / "csrc/avx_sparse_linear.cpp"
    version = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    library = pathlib.Path(built) / f"avx_sparse_linear-{version}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(".tmp")
        includes = [
            f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])
        ]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        libraries += ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, *FLAGS, *includes, str(source), *libraries, "-o", str(unfinished)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        unfinished.rename(library)
    sys.modules["sparamx"] = package = types.ModuleType("sparamx")
    package.avx_sparse_linear = module_at("avx_sparse_linear", library)
    layers = module_at("layers", pathlib.Path(checkout) / "layer/avx_sparse_linear.py")
    return version, layers.AvxSparseLinear


def module_at(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SparAMX(Peer):
    def __init__(self, checkout, built):
        digest, base = layer_class(checkout, built)
        self.version = f"source {digest}"

        class Layer(base):
            # The same sums as its own method, which takes seconds to loop over words in Python.
            def split_weights_to_sets(self, sets):
                words = self.weight_metadata.data.view(sets, -1)
                counts = sum(((words >> bit) & 1).sum(1) for bit in range(32))
                self.weight_values_is.data = (counts.cumsum(0) - counts).int()

        self._layer = Layer

    def size(self, weight):
        return weight.size // 8 + 2 * int((weight != 0).sum())

    def load(self, weight, factors, copies, threads):
        torch.set_num_threads(threads)
        # A set of columns for each thread; its default of 32 sets was no faster.
        layer = self._layer.from_weights(torch.from_numpy(weight), num_threads=threads)
        tensors = layer.weight_metadata, layer.weight_values, layer.weight_values_is
        self._copies = []
        for _ in range(copies):
            copy = self._layer.from_weights(torch.from_numpy(weight[:16, :2]), num_threads=1)
            copy.weight_metadata, copy.weight_values, copy.weight_values_is = (
                torch.nn.Parameter(t.data.clone(), requires_grad=False) for t in tensors
            )
            copy.out_cols = weight.shape[0]
            self._copies.append(copy)
        return sum(t.nbytes for t in tensors)

    def calls(self, x):
        rows = torch.from_numpy(x).bfloat16()[None]
        torch.set_grad_enabled(False)
        return [lambda layer=layer: layer(rows) for layer in self._copies]

    def result(self, returned):
        return returned[0].float().numpy()


serve(SparAMX(*sys.argv[1:]))
