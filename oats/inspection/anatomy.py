"""What the layers of a compressed model on disk look like: singular values, sparsity, bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from oats.checkpoint.stored_model import StoredLayer, StoredModel
from oats.checkpoint.stored_tensor import read_header
from oats.format.bitmask import decode_mask
from oats.format.layer_spec import TENSORS, exact_parts, tensor_names

CELLS = 64
"""Most rows and columns of a picture of a sparse part."""


@dataclass(frozen=True)
class Anatomy:
    """What one layer looks like.

    Attributes:
        layer: its sizes.
        block: number of its transformer block; None if its name has no number.
        kind: its name in the block, such as ``"mlp.up_proj"``.
        spectrum: (rank,) float32, singular values of ``U V``, largest first.
        part_bytes: name of each tensor in `TENSORS` → its bytes, including its scales.
    """

    layer: StoredLayer
    block: int | None
    kind: str
    spectrum: Tensor
    part_bytes: dict[str, int]


def block_and_kind(name: str) -> tuple[int | None, str]:
    """The number of a layer's block, and the layer's name in it.

    >>> block_and_kind("model.layers.3.mlp.up_proj"), block_and_kind("head")
    ((3, 'mlp.up_proj'), (None, 'head'))
    """
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(found[1]), found[2]) if found else (None, name)


def spectrum(low_rank_u: Tensor, low_rank_v: Tensor) -> Tensor:
    """Singular values (r,) float32 of ``U V``, largest first, of U (d_out, r) and V (r, d_in).

    The product is not computed. With ``U = Q R`` and ``Vᵀ = P T``, ``U V = Q (R Tᵀ) Pᵀ``: it has the singular
    values of ``R Tᵀ``, r × r.

    >>> spectrum(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]]))
    tensor([10.])
    """
    left = torch.linalg.qr(low_rank_u.float(), mode="r").R
    right = torch.linalg.qr(low_rank_v.float().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(left @ right.T)
    return values


def density_picture(mask: Tensor, d_in: int, cells: int = CELLS) -> Tensor:
    """Share of kept elements in each cell of a grid over a sparse part.

    Args:
        mask: uint8 (d_out, ⌈d_in / 8⌉), as stored.
        d_in: number of columns.
        cells: most rows and columns of the grid, which is float32 (min(cells, d_out), min(cells, d_in)).

    >>> density_picture(torch.tensor([[0b1111], [0b0000]], dtype=torch.uint8), 8, cells=2)
    tensor([[1., 0.],
            [0., 0.]])
    """
    kept = decode_mask(mask, d_in).float()
    shares: Tensor = torch.nn.functional.adaptive_avg_pool2d(
        kept[None], (min(cells, kept.shape[0]), min(cells, d_in))
    )
    return shares[0]


def anatomies(model: StoredModel) -> Iterator[Anatomy]:
    """Every compressed layer of a model, one after another; only one is in memory."""
    tensors = _Tensors(model)
    for layer in model.layers:
        block, kind = block_and_kind(layer.name)
        names = list(tensor_names(layer.storage))
        # Scales and codebooks count for the tensor that they belong to.
        parts = dict.fromkeys(TENSORS, 0)
        for part in names:
            owner = next((tensor for tensor in TENSORS if part.startswith(tensor)), "values")
            parts[owner] += tensors.nbytes(f"{layer.stored_name}.{part}")
        stored = {part: tensors.read(f"{layer.stored_name}.{part}") for part in names}
        _, u, v = exact_parts(stored, layer.storage)
        yield Anatomy(layer, block, kind, spectrum(u, v), parts)


def bytes_by_kind(model: StoredModel) -> dict[str, float]:
    """Kind of layer → stored bytes in all blocks, largest first; then the output head and everything else."""
    sizes: dict[str, float] = {}
    for layer in model.layers:
        kind = block_and_kind(layer.name)[1]
        sizes[kind] = sizes.get(kind, 0) + layer.stored_bytes
    largest_first = dict(sorted(sizes.items(), key=lambda item: -item[1]))
    head = {"output head": float(model.head.stored_bytes)} if model.head else {}
    return {**largest_first, **head, "everything else": model.bytes_elsewhere}


def pictures(model: StoredModel, names: list[str]) -> dict[str, Tensor]:
    """Pictures of the sparse parts of some layers, see :func:`density_picture`."""
    tensors = _Tensors(model)
    layers = {layer.name: layer for layer in model.layers}
    return {
        name: density_picture(tensors.read(f"{layers[name].stored_name}.mask"), layers[name].d_in)
        for name in names
        if layers[name].storage.mask
    }


class _Tensors:
    """The tensors of a model directory, read one at a time."""

    def __init__(self, model: StoredModel) -> None:
        self._headers = {}
        for file in sorted(Path(model.directory).glob("*.safetensors")):
            self._headers.update(read_header(file))

    def read(self, name: str) -> Tensor:
        with safe_open(self._headers[name].path, framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def nbytes(self, name: str) -> int:
        return self._headers[name].nbytes
