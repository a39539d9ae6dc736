"""Checks that the tensors of one layer agree with each other and with its shape."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.config import EXACT, Storage
from oats.errors import FormatError
from oats.format.bitmask import mask_columns, mask_population
from oats.format.layer_spec import DTYPES, LayerSpec, tensor_names


def validate(
    name: str,
    d_out: int,
    d_in: int,
    *,
    storage: Storage = EXACT,
    bias: Tensor | None = None,
    **tensors: Tensor,
) -> None:
    """Check that the tensors of a layer agree with each other and with its shape.

    Args:
        name: of the layer, for error messages.
        d_out: outputs.
        d_in: inputs.
        storage: which of their numbers are codes.
        bias: (d_out,) or None.
        tensors: all that a layer of this `storage` has, by name.

    Raises:
        FormatError: they disagree; the message names the layer, the tensor and what was expected.
    """
    missing = next((part for part in tensor_names(storage) if part not in tensors), None)
    if missing is not None:
        raise FormatError(f"{name}: {missing} is missing; download or compress the checkpoint again")
    values, low_rank_v = tensors["values"], tensors["low_rank_v"]
    dtype = torch.bfloat16
    if "exact" in (storage.values, storage.low_rank):
        dtype = tensors["values" if storage.values == "exact" else "low_rank_u"].dtype
    if dtype not in DTYPES.values():
        raise FormatError(
            f"{name}: values are {_short(dtype)}; this release stores bfloat16 or float32. "
            "Convert them, or compress the model again"
        )
    population = d_out * d_in
    if storage.mask:
        mask = tensors["mask"]
        readable = mask.dtype == torch.uint8 and mask.shape == (d_out, mask_columns(d_in))
        population = mask_population(mask, d_in) if readable else 0
    # Codes below 8 bits share bytes: only the mask tells how many there are.
    nnz = max(population, 0) if storage.has_codebook or not storage.mask else values.numel()
    rank = low_rank_v.shape[0] if low_rank_v.dim() == 2 else 0
    for tensor_name, (expected, shape) in LayerSpec(d_out, d_in, rank, nnz, dtype, storage).tensors().items():
        tensor = tensors[tensor_name]
        if tensor.dtype != expected or tuple(tensor.shape) != shape:
            raise FormatError(
                f"{name}: {tensor_name} is {_short(tensor.dtype)} {tuple(tensor.shape)}, expected "
                f"{_short(expected)} {shape} for a {d_out} x {d_in} layer; the checkpoint does not match its "
                "config, download or compress it again"
            )
    if bias is not None and (tuple(bias.shape) != (d_out,) or not bias.is_floating_point()):
        raise FormatError(
            f"{name}: bias is {_short(bias.dtype)} {tuple(bias.shape)}, expected floating-point ({d_out},)"
        )
    if population < 0:
        raise FormatError(
            f"{name}: mask has a bit set past its last input (d_in = {d_in}); the file is damaged, "
            "download or compress it again"
        )
    if population != nnz:
        raise FormatError(
            f"{name}: mask keeps {population} values but {nnz} are stored; the file is damaged, "
            "download or compress it again"
        )
    for tensor_name, tensor in tensors.items():
        if tensor_name.endswith("_scale") and not bool(tensor.isfinite().all()):
            raise FormatError(
                f"{name}: {tensor_name} is not finite; download or compress the checkpoint again"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
