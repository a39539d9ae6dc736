"""Fitting codes: a layer's kept values as int8 or int4, its low-rank factors as int8.

A kept value is never near zero, so an int4 codebook has no level there: its sixteen levels are ± eight,
fitted to the magnitudes that a layer has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from oats.config import Storage
from oats.decomposition.error_feedback import inverse_factor, settle_columns
from oats.decomposition.metric import nearest_low_rank
from oats.errors import WeightError
from oats.format.bitmask import decode, decode_mask
from oats.format.layer_spec import CODEBOOK, exact_parts, tensor_names
from oats.format.nibbles import pack_nibbles

LARGEST = 127
"""The largest magnitude of a code."""

LARGEST_EXPONENT = 20
"""Of the power of two that an input is multiplied by."""

# Elements of S that are looked at together: about 30 MB of float32 for each of a few copies.
_CHUNK = 1 << 23

# Of Lloyd's algorithm, on so many rows.
_ROUNDS = 8

_SAMPLE_ROWS = 256

# Scales that are tried for each row and group, as shares of what maps the largest to the last level.
_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76)


def quantize_tensors(
    tensors: Mapping[str, Tensor],
    d_in: int,
    storage: Storage,
    hessian: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    catch_up: bool = False,
) -> dict[str, Tensor]:
    """The tensors of a layer, with codes in the place of numbers.

    Each input is first multiplied by the power of two that brings the kept values for it to the size of the
    others. The scales of int8 map the largest magnitude to 127. Those of int4, and its codebook, minimise
    ``Σ H_jj (s_ij − ŝ_ij)²``. With a Hessian, the error of each code is then made good by the kept
    values of the inputs to come (GPTQ, arXiv 2210.17323, on the support). With the weight too, the low-rank
    part is fitted to what the codes leave of it, so that it takes up their error (SLiM, arXiv 2410.09615).

    Args:
        tensors: ``mask``, ``values``, ``low_rank_u`` and ``low_rank_v``, exact.
        d_in: inputs.
        storage: what becomes codes.
        hessian: (d_in, d_in), ``X Xᵀ`` of the layer's inputs; None means that it is not known.
        weight: (d_out, d_in), what the layer stands for; it is not used without a Hessian.
        catch_up: whether the kept values make good what they miss of the weight, too: a gain where they were
            not fitted to the Hessian, a loss where they were.

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
    result = {"mask": tensors["mask"]}
    sparse = decode(tensors["mask"], tensors["values"].float(), d_in)
    kept = decode_mask(tensors["mask"], d_in)
    exponent = _input_exponent(sparse, kept)
    powers = exponent.float().exp2()
    sparse /= powers
    result["input_exponent"] = exponent
    factors = tensors
    if storage.values == "exact":
        result["values"] = sparse[kept].to(tensors["values"].dtype)
    else:
        target, scaled = sparse, None if hessian is None else hessian * (powers * powers[:, None])
        if hessian is not None and weight is not None and catch_up:
            low_rank = tensors["low_rank_u"].float() @ tensors["low_rank_v"].float()
            target = (weight.float() - low_rank) / powers
        fit = _int8 if storage.values == "int8" else _int4
        result |= fit(sparse, kept, storage, scaled, target)
        if hessian is not None and weight is not None:
            factors = _fitted_factors(tensors, result, d_in, storage, hessian, weight)
    u, v = factors["low_rank_u"], factors["low_rank_v"]
    tensors = {"low_rank_u": u, "low_rank_v": (v.float() / powers).to(v.dtype)}
    for name in ("low_rank_u", "low_rank_v"):
        if storage.low_rank == "exact":
            result[name] = tensors[name]
        else:
            result[name], result[f"{name}_scale"] = round_to_int8(
                tensors[name].float(), storage.scale_columns
            )
    names = tensor_names(storage)
    return {name: result[name] for name in names}


def _fitted_factors(
    tensors: Mapping[str, Tensor],
    coded: Mapping[str, Tensor],
    d_in: int,
    storage: Storage,
    hessian: Tensor,
    weight: Tensor,
) -> dict[str, Tensor]:
    """U and V for what the codes of S leave of the weight, in the dtype that they had."""
    factors = {name: tensors[name] for name in ("low_rank_u", "low_rank_v")}
    rank, dtype = len(factors["low_rank_v"]), factors["low_rank_v"].dtype
    if rank == 0:
        return factors
    values_only = Storage.of(storage.values, "exact", storage.scale_columns)
    sparse, _, _ = exact_parts({**factors, **coded}, values_only)
    u, v = nearest_low_rank(weight.float() - sparse, hessian, rank)
    return {"low_rank_u": u.to(dtype), "low_rank_v": v.to(dtype)}


def _input_exponent(sparse: Tensor, kept: Tensor) -> Tensor:
    """For each input the rounded logarithm of the root mean square of the kept values for it, (d_in,) int8.

    An entry is kept where ``|s| √m`` is large, so that these go with ``1 / √m``, over orders of magnitude.
    """
    size = sparse.square().sum(0).div_(kept.sum(0).clamp_min(1)).sqrt_()
    there = size > 0
    if not bool(there.any()):
        return torch.zeros(len(size), dtype=torch.int8)
    logarithm = torch.where(there, size, 1).log2()
    logarithm -= logarithm[there].median()
    exponent = torch.where(there, logarithm, 0).round_()
    return exponent.clamp_(-LARGEST_EXPONENT, LARGEST_EXPONENT).to(torch.int8)


def _int8(
    sparse: Tensor, kept: Tensor, storage: Storage, hessian: Tensor | None, target: Tensor
) -> dict[str, Tensor]:
    codes, scale = round_to_int8(sparse, storage.scale_columns)
    if hessian is not None:
        settled = _with_feedback(target, kept, scale, storage.scale_columns, hessian, _nearest_int8)
        codes = settled.to(torch.int8)
    return {"values": codes[kept], "values_scale": scale}


def _nearest_int8(shares: Tensor) -> Tensor:
    return shares.round().clamp_(-LARGEST, LARGEST)


def _with_feedback(
    target: Tensor,
    kept: Tensor,
    scale: Tensor,
    scale_columns: int,
    hessian: Tensor,
    nearest: Callable[[Tensor], Tensor],
) -> Tensor:
    """Values for a target in units of their scales: each what `nearest` makes of it, given the errors before.

    What is not kept is zero; what that misses is passed on as well.
    """
    factor = inverse_factor(hessian, "its inputs").float()
    # Columns as rows, as settle_columns() works on them.
    units = scale.float().T.contiguous()
    there, shares = kept.T.contiguous(), torch.empty(target.T.shape)

    def settle(j: int, block: Tensor) -> Tensor:
        unit = units[j // scale_columns]
        shares[j] = torch.where(there[j] & (unit > 0), nearest(block[:, 0] / unit), 0)
        return shares[j] * unit

    settle_columns(target.clone(), factor, settle)
    return shares.T.contiguous()


def round_to_int8(matrix: Tensor, scale_columns: int) -> tuple[Tensor, Tensor]:
    """The nearest codes of a matrix.

    Args:
        matrix: float32.
        scale_columns: columns of a row that share a scale.

    Returns:
        Codes, int8, of the shape of the matrix, and scales, (rows, scales) bf16.
    """
    rows, columns = matrix.shape
    padded = nn.functional.pad(matrix, (0, -columns % scale_columns))
    largest = padded.view(rows, padded.shape[1] // scale_columns, scale_columns).abs().amax(-1)
    scale = (largest / LARGEST).bfloat16()
    each = scale.float().repeat_interleave(scale_columns, 1)[:, :columns]
    codes = _nearest_int8((matrix / each).nan_to_num_(0))
    return codes.to(torch.int8), scale


def _int4(
    sparse: Tensor, kept: Tensor, storage: Storage, hessian: Tensor | None, target: Tensor
) -> dict[str, Tensor]:
    rows, columns = sparse.shape
    padding = (0, -columns % storage.scale_columns)
    importance = torch.ones(columns) if hessian is None else hessian.diagonal().float()
    weight = nn.functional.pad(importance, padding).view(-1, storage.scale_columns)
    padded = nn.functional.pad(sparse.abs(), padding)
    magnitudes = padded.view(rows, storage.scales(columns), storage.scale_columns)
    levels = _fit_levels(magnitudes[:: max(1, rows // _SAMPLE_ROWS)], weight)
    # As int8, the last one the largest.
    levels = (levels * (LARGEST / levels[-1])).round()
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scale = torch.empty(magnitudes.shape[:2], dtype=torch.bfloat16)
    for part in _chunks(rows, columns):
        scale[part], chosen = _fit_scales(magnitudes[part], weight, levels)
        codes[part] = chosen.view(len(chosen), -1)[:, :columns]
    if hessian is not None:

        def nearest(shares: Tensor) -> Tensor:
            return levels[_nearest(shares.abs(), levels).int()].copysign_(shares)

        sparse = _with_feedback(target, kept, scale, storage.scale_columns, hessian, nearest)
        codes = _nearest(sparse.abs(), levels)
    # The lower half of the codebook are the negative levels.
    codes = torch.where(sparse < 0, CODEBOOK // 2 - 1 - codes, CODEBOOK // 2 + codes)
    codebook = torch.cat([-levels.flip(0), levels]).to(torch.int8)
    return {
        "values": pack_nibbles(codes[kept]),
        "values_scale": scale,
        "values_codebook": codebook,
    }


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(columns, 1))
    for begin in range(0, rows, step):
        yield slice(begin, begin + step)


def _nearest(shares: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each, as uint8."""
    return torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


def _fit_levels(magnitudes: Tensor, weight: Tensor) -> Tensor:
    """Eight levels for magnitudes in units of a scale, by Lloyd's algorithm in turn with the scales.

    Args:
        magnitudes: (rows, scales, scale_columns), zero where nothing is kept.
        weight: (scales, scale_columns).
    """
    count = CODEBOOK // 2
    levels = torch.linspace(1 / count, 1, count)
    there = magnitudes > 0
    if not bool(there.any()):
        return levels
    for _ in range(_ROUNDS):
        scale, chosen = _fit_scales(magnitudes, weight, levels)
        each = scale.float().unsqueeze(-1)
        # Weighted mean of the shares, each with the weight that its error has.
        importance = (weight * each.square())[there]
        shares, index = (magnitudes / each)[there], chosen[there].long()
        total = torch.zeros(count).index_add_(0, index, importance)
        moved = torch.zeros(count).index_add_(0, index, importance * shares) / total
        levels = torch.where(total > 0, moved, levels).sort().values
        levels = levels / levels[-1]
    return levels


def _fit_scales(magnitudes: Tensor, weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each row and group, bf16, and the level of each magnitude, as uint8."""
    largest = magnitudes.amax(-1)
    there = magnitudes > 0
    best_error = torch.full(largest.shape, torch.inf)
    best = torch.zeros_like(largest)

    def try_scale(scale: Tensor) -> None:
        scale = scale.bfloat16().float()
        chosen = levels[_nearest(magnitudes / scale.unsqueeze(-1), levels).int()]
        error = ((chosen * scale.unsqueeze(-1) - magnitudes).square() * weight * there).sum(-1)
        better = error < best_error
        best_error[better], best[better] = error[better], scale[better]

    for share in _SHARES:
        try_scale(largest * (share / levels[-1]))
    # Least squares for the levels that this chose.
    chosen = levels[_nearest(magnitudes / best.unsqueeze(-1), levels).int()] * there
    products, squares = (weight * chosen * magnitudes).sum(-1), (weight * chosen.square()).sum(-1)
    try_scale(torch.where(squares > 0, products / squares, best))
    return best.bfloat16(), _nearest(magnitudes / best.unsqueeze(-1), levels)
