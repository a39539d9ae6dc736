"""Integer codes for a layer's tensors: its kept values in 2 to 8 bits, its low-rank factors as int8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from oats.config import CODE_BITS, Storage
from oats.decomposition.matrix_codes import round_to_int8, sparse_to_codebook, sparse_to_int8
from oats.decomposition.metric import nearest_low_rank
from oats.errors import WeightError
from oats.format.bit_stream import pack_bits
from oats.format.layer_spec import decode_values, exact_parts, kept_elements, tensor_names

LARGEST_EXPONENT = 20
"""Of the power of two that an input is multiplied by."""


def quantize_tensors(
    tensors: Mapping[str, Tensor],
    d_in: int,
    storage: Storage,
    hessian: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    catch_up: bool = False,
) -> dict[str, Tensor]:
    """Turn the tensors of a layer into codes.

    First each input is multiplied by a power of two, so that the kept values for all inputs have about the
    same size. An int8 scale maps the largest magnitude to 127. The scales and levels of shorter codes
    minimise ``Σ H_jj (s_ij − ŝ_ij)²``. With a Hessian, the kept values that follow a code make up for its
    error (GPTQ, arXiv 2210.17323, on the support). With the weight too, the low-rank part is fitted to what
    the codes leave of the weight, and so takes up their error (SLiM, arXiv 2410.09615).

    Args:
        tensors: ``mask`` unless every element is kept, ``values``, ``low_rank_u`` and ``low_rank_v``, exact.
        d_in: inputs; the mask has up to 7 more columns.
        storage: which of them become codes.
        hessian: (d_in, d_in), ``X Xᵀ`` of the layer's inputs, or None.
        weight: (d_out, d_in), the matrix that the layer approximates, or None. Not used without a Hessian.
        catch_up: let the kept values also make up for what the layer misses of the weight. This helps if they
            were not fitted to the Hessian before, and harms if they were.

    Raises:
        WeightError: a value is not finite, or the Hessian is not positive semi-definite.

    >>> from oats.format.bitmask import encode
    >>> mask, values = encode(torch.tensor([[0.5, 0.0, -1.0]]))
    >>> tensors = {"mask": mask, "values": values, "low_rank_u": torch.ones(1, 1)}
    >>> tensors["low_rank_v"] = torch.ones(1, 3)
    >>> codes = quantize_tensors(tensors, 3, Storage("int8", "int8", 64))
    >>> codes["values"].tolist(), codes["input_exponent"].tolist()
    ([127, -127], [0, 0, 1])
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise WeightError(f"{name}: values that are not finite have no codes; compress the layer again")
    sparse = decode_values(tensors, tensors["values"].float(), d_in)
    kept = kept_elements(tensors, d_in)
    exponent = _input_exponent(sparse, kept)
    powers = exponent.float().exp2()
    sparse /= powers
    result = {name: tensor for name, tensor in tensors.items() if name == "mask"}
    result["input_exponent"] = exponent
    u, v = tensors["low_rank_u"], tensors["low_rank_v"]
    if storage.values == "exact":
        result["values"] = sparse[kept].to(tensors["values"].dtype)
    else:
        target, scaled = sparse, None if hessian is None else hessian * (powers * powers[:, None])
        if hessian is not None and weight is not None and catch_up:
            target = (weight.float() - u.float() @ v.float()) / powers
        result |= _quantize_values(sparse, kept, storage, scaled, target)
        if hessian is not None and weight is not None:
            u, v = _fit_factors(u, v, result, storage, hessian, weight)
    for name, factor in (("low_rank_u", u), ("low_rank_v", (v.float() / powers).to(v.dtype))):
        if storage.low_rank == "exact":
            result[name] = factor
        else:
            result[name], result[f"{name}_scale"] = round_to_int8(factor.float(), storage.scale_columns)
    return {name: result[name] for name in tensor_names(storage)}


def _quantize_values(
    sparse: Tensor, kept: Tensor, storage: Storage, hessian: Tensor | None, target: Tensor
) -> dict[str, Tensor]:
    if storage.values == "int8":
        codes, scale = sparse_to_int8(sparse, kept, storage.scale_columns, hessian, target)
        return {"values": codes[kept], "values_scale": scale}
    bits = CODE_BITS[storage.values]
    codes, scale, codebook = sparse_to_codebook(sparse, kept, bits, storage.scale_columns, hessian, target)
    return {"values": pack_bits(codes[kept], bits), "values_scale": scale, "values_codebook": codebook}


def _fit_factors(
    u: Tensor, v: Tensor, codes: Mapping[str, Tensor], storage: Storage, hessian: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """U and V, in their dtype, for what the codes of S leave of the weight."""
    if len(v) == 0:
        return u, v
    values_only = replace(storage, low_rank="exact")
    sparse, _, _ = exact_parts({"low_rank_u": u, "low_rank_v": v, **codes}, values_only)
    new_u, new_v = nearest_low_rank(weight.float() - sparse, hessian, len(v))
    return new_u.to(v.dtype), new_v.to(v.dtype)


def _input_exponent(sparse: Tensor, kept: Tensor) -> Tensor:
    """For each input the rounded log2 of the root mean square of its kept values, (d_in,) int8.

    An entry is kept if ``|s| √m`` is large. So these sizes are proportional to ``1 / √m``, and span orders of
    magnitude.
    """
    size = sparse.square().sum(0).div_(kept.sum(0).clamp_min(1)).sqrt_()
    there = size > 0
    if not bool(there.any()):
        return torch.zeros(len(size), dtype=torch.int8)
    logarithm = torch.where(there, size, 1).log2()
    logarithm -= logarithm[there].median()
    exponent = torch.where(there, logarithm, 0).round_()
    return exponent.clamp_(-LARGEST_EXPONENT, LARGEST_EXPONENT).to(torch.int8)
