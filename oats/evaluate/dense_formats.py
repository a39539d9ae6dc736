"""Dense weights rounded to formats of few bits, to compare a compressed model with.

The model computes with the rounded numbers in its own dtype. Only the counted bytes are those of the format.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oats.errors import ConfigError

GROUP = 128
"""Columns of a row that share a scale, in int8 and int4."""


@dataclass(frozen=True)
class DenseFormat:
    """A format of dense weights.

    int8 stores a scale for each `GROUP` columns of a row, int4 a scale and a minimum. The others are formats
    of GGUF, as llama.cpp's quantiser writes them: Q8_0 and Q4_0 store a scale for 32 columns, Q4_K a scale
    and a minimum. Q4_K needs a multiple of 256 columns; other weights get Q5_0 instead.

    Args:
        name: one of `FORMATS`.

    Raises:
        ConfigError: it is none of these.

    >>> DenseFormat("int4").round(torch.tensor([[0.0, 2.25, 15.0]]))
    (tensor([[ 0.,  2., 15.]]), 6)
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise ConfigError(f"no dense format is called {self.name!r}; choose from {', '.join(FORMATS)}")
        if self.name == "q4_k":
            _llama_cpp_library()

    def round(self, weight: Tensor) -> tuple[Tensor, int]:
        """The rounded weight (d_out, d_in) in float32, and the bytes of its codes and scales."""
        return FORMATS[self.name](weight.float())

    @torch.no_grad()
    def round_(self, weights: Iterable[Tensor]) -> int:
        """Round each weight in place; returns the bytes of all codes and scales."""
        size = 0
        for weight in weights:
            rounded, added = self.round(weight)
            weight.copy_(rounded)
            size += added
        return size


def _int8(weight: Tensor) -> tuple[Tensor, int]:
    groups = _groups(weight)
    scale = _as_half(groups.abs().amax(-1, keepdim=True) / 127)
    codes = (groups / scale.clamp_min(1e-12)).round().clamp(-127, 127)
    return _ungroup(codes * scale, weight), weight.numel() + 2 * scale.numel()


def _int4(weight: Tensor) -> tuple[Tensor, int]:
    groups = _groups(weight)
    least, most = groups.aminmax(dim=-1, keepdim=True)
    least, scale = _as_half(least), _as_half((most - least) / 15)
    codes = ((groups - least) / scale.clamp_min(1e-12)).round().clamp(0, 15)
    return _ungroup(codes * scale + least, weight), (weight.numel() + 1) // 2 + 4 * scale.numel()


def _groups(weight: Tensor) -> Tensor:
    """(d_out, groups, GROUP); the last value of a row is repeated to fill its last group."""
    padded = torch.nn.functional.pad(weight[None], (0, -weight.shape[1] % GROUP), mode="replicate")[0]
    return padded.view(len(weight), -1, GROUP)


def _ungroup(groups: Tensor, weight: Tensor) -> Tensor:
    return groups.reshape(len(weight), -1)[:, : weight.shape[1]]


def _as_half(scale: Tensor) -> Tensor:
    return scale.half().float()


def _gguf(kind: str, otherwise: str = "") -> Callable[[Tensor], tuple[Tensor, int]]:
    def round_to(weight: Tensor) -> tuple[Tensor, int]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

        chosen = GGMLQuantizationType[kind]
        columns = GGML_QUANT_SIZES[chosen][0]
        if weight.shape[1] % columns:
            if otherwise:
                return _gguf(otherwise)(weight)
            raise ConfigError(
                f"{kind} takes weights with a multiple of {columns} columns, not {weight.shape[1]}"
            )
        array = weight.contiguous().numpy()
        try:
            codes = quants.quantize(array, chosen)
        except NotImplementedError:  # the package reads K formats, but does not write them
            codes = _by_llama_cpp(array, chosen)
        return torch.from_numpy(quants.dequantize(codes, chosen)), codes.nbytes

    return round_to


def _llama_cpp_library() -> Path:
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    package = find_spec("llama_cpp")
    if folder is None and package is not None and package.origin is not None:
        folder = str(Path(package.origin).parent / "lib")
    if folder is None or not (library := Path(folder) / "libggml-base.so").exists():
        raise ConfigError(
            "q4_k needs llama.cpp's quantiser: pip install llama-cpp-python, or set LLAMA_CPP_LIB_PATH to "
            "the folder of libggml-base.so"
        )
    return library


def _by_llama_cpp(array: Any, kind: Any) -> Any:
    import numpy as np
    from gguf import GGML_QUANT_SIZES

    quantize = ctypes.CDLL(str(_llama_cpp_library())).ggml_quantize_chunk
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    quantize.restype = ctypes.c_size_t
    rows, columns = array.shape
    block, size = GGML_QUANT_SIZES[kind]
    codes = np.empty((rows, columns // block * size), np.uint8)
    written = quantize(int(kind), array.ctypes.data, codes.ctypes.data, 0, rows, columns, None)
    assert written == codes.nbytes
    return codes


FORMATS: dict[str, Callable[[Tensor], tuple[Tensor, int]]] = {
    "int8": _int8,
    "int4": _int4,
    "q8_0": _gguf("Q8_0"),
    "q4_0": _gguf("Q4_0"),
    "q4_k": _gguf("Q4_K", otherwise="Q5_0"),
}
"""Name → function that rounds a weight to the format, and returns it with its bytes."""
