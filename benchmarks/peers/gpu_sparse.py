"""Products of unstructured sparse weights on a GPU: MACKO (arXiv 2511.13061) and SpInfer (EuroSys 2025).

Both are compiled with nvcc from checkouts that are not part of this project (github.com/vlejd/macko_spmv at
afa7033, github.com/vlejd/SpInfer at a7aba35), for the GPU of this machine. They hold float16 and
multiply by a sparse weight alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""x (batch, d_in) to y (batch, d_out), float16; one weight, whose buffers it owns."""

ROOM_OF_A_TILE = 2304
"""Values of a tile of 64 × 64 that SpInfer's kernel has shared memory for."""


def macko(checkout: Path, weight: Tensor, copies: int) -> list[Product]:
    """Products with one row of x, each by a copy of its own of a weight (d_out, d_in).

    Raises:
        ValueError: d_out is not a multiple of 32.
    """
    rows, columns = weight.shape
    if rows % 32:
        raise ValueError(f"MACKO takes outputs in multiples of 32, got {rows}")
    library = _compiled("macko", checkout / "src/macko_spmv/cuda")
    dense = weight.half().cpu().contiguous()
    begins = torch.empty(rows + 1, dtype=torch.int32)
    deltas = torch.empty(dense.numel() // 2 + 8, dtype=torch.uint8)
    values = torch.empty(dense.numel() + 8, dtype=torch.float16)
    count = library.macko_compress(_at(dense), rows, columns, _at(begins), _at(deltas), _at(values))

    def of(parts: list[Tensor]) -> Product:
        def multiply(x: Tensor) -> Tensor:
            y = x.new_empty(1, rows)
            _check(
                library.macko_multiply(*map(_at, parts), _at(x), rows, columns, _at(y), _stream()), "MACKO"
            )
            return y

        return multiply

    return [of(parts) for parts in _copies([values[:count], deltas[: count // 2], begins], weight, copies)]


def spinfer(checkout: Path, weight: Tensor, copies: int, splits: Sequence[int]) -> dict[int, list[Product]]:
    """Products with 8, 16, 32 or 64 rows of x, each by a copy of its own of a weight.

    Args:
        checkout: of the repository.
        weight: (d_out, d_in).
        copies: of the weight.
        splits: over how many blocks a product spreads its inputs.

    Returns:
        Split → products.

    Raises:
        ValueError: sizes are not multiples of 64, or a tile of 64 × 64 is too full for the kernel.
    """
    rows, columns = weight.shape
    if rows % 64 or columns % 64:
        raise ValueError(f"SpInfer takes sizes in multiples of 64, got {rows} x {columns}")
    library = _compiled("spinfer", checkout / "csrc")
    dense = weight.half().cpu().contiguous()
    tiles = dense.numel() // 64**2
    values = torch.empty(dense.numel(), dtype=torch.float16)
    # The kernel looks one tile ahead.
    offsets = torch.zeros(tiles + 3, dtype=torch.int32)
    medians = torch.zeros(4 * (tiles + 1), dtype=torch.int32)
    bitmap = torch.empty(64 * tiles, dtype=torch.int64)
    most = library.spinfer_compress(
        _at(dense), rows, columns, _at(values), _at(offsets), _at(medians), _at(bitmap)
    )
    most = -(-most // 64) * 64
    if most > ROOM_OF_A_TILE:
        raise ValueError(f"SpInfer has room for {ROOM_OF_A_TILE} values in a tile, one needs {most}")
    held = [values[: int(offsets[tiles])], offsets, medians, bitmap, torch.tensor([most], dtype=torch.int32)]

    def of(parts: list[Tensor], split: int) -> Product:
        def multiply(x: Tensor) -> Tensor:
            batch = len(x)
            y, workspace = x.new_empty(batch, rows), x.new_empty(split, batch, rows)
            sizes = (batch, rows, columns)
            status = library.spinfer_multiply(
                *map(_at, parts), _at(x), *sizes, _at(y), _at(workspace), split, _stream()
            )
            _check(status, "SpInfer")
            return y

        return multiply

    placed = _copies(held, weight, copies)
    return {split: [of(parts, split) for parts in placed] for split in splits}


def _copies(parts: list[Tensor], weight: Tensor, copies: int) -> list[list[Tensor]]:
    return [[part.to(weight.device, copy=True) for part in parts] for _ in range(copies)]


def _compiled(name: str, include: Path) -> ctypes.CDLL:
    """The library of NAME.cu, compiled once for what it includes."""
    own = Path(__file__).with_name(f"{name}.cu")
    theirs = sorted(path for path in include.iterdir() if path.suffix in (".cu", ".cuh", ".h"))
    architecture = (
        "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "sm_90"
    )
    version = hashlib.sha256(b"".join(path.read_bytes() for path in (own, *theirs))).hexdigest()[:8]
    library = Path(".bench/gpu") / f"{name}-{version}-{architecture}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(".tmp")
        options = [f"-arch={architecture}", f"-I{include}", "-O3", "-w", "-shared", "-Xcompiler=-fPIC"]
        subprocess.run(["nvcc", *options, "-o", str(unfinished), str(own)], check=True)
        unfinished.rename(library)
    return ctypes.CDLL(str(library.resolve()))


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _check(status: int, name: str) -> None:
    if status:
        raise RuntimeError(f"{name}: CUDA error {status}")
