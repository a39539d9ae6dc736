"""The output head of a language model as int8 codes, and the input embedding that is tied to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from oats.compression.saving_hook import prepare_saving_
from oats.config import OatsConfig, Storage
from oats.decomposition.matrix_codes import round_to_int8
from oats.errors import DeviceError, UnsupportedModelError, WeightError
from oats.models.architecture import output_head
from oats.models.linear import is_linear, replace_
from oats.nn.head import RowsOfHead, rows_of_head
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

# Rows of the head that are rounded together: 32 MB of float32 at 4096 inputs.
_ROWS = 2048


@torch.no_grad()
def quantize_head_(model: nn.Module, scale_columns: int = OatsConfig.scale_columns) -> None:
    """Store the output head of a language model as int8 codes, in place; nothing of it is removed.

    Decoding reads the whole head for each token. In a small model, or one with a large vocabulary, that is as
    much as all blocks. The head becomes a `SparseLowRankLinear` of rank 0 that keeps every weight. An input
    embedding that is tied to it reads its rows from there (:class:`RowsOfHead`), so that the weights are held
    once. The model's configuration then says that nothing is tied; no other model may share that
    configuration. Resize embeddings before, or dequantise the model first.

    Args:
        model: of transformers; a head that already has codes stays as it is.
        scale_columns: columns of a row that share a scale, 64 or 128.

    Raises:
        UnsupportedModelError: there is no linear output head, or something else is tied to it than one input
            embedding that reads its rows.
        WeightError: a weight is NaN or infinite.
        DeviceError: the head is not on the CPU.
        ConfigError: there is no such `scale_columns`; or the head is neither float32 nor bfloat16.
    """
    store_head_as_codes_(model, scale_columns)
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    settings = getattr(quantization, "settings", None)
    if isinstance(settings, OatsConfig):
        cast(Any, quantization).settings = replace(settings, head="int8")
    else:
        prepare_saving_(model, OatsConfig(compression=0.0, rank_ratio=0.0, head="int8"))


def store_head_as_codes_(model: nn.Module, scale_columns: int) -> None:
    """Do what :func:`quantize_head_` does, without telling ``save_pretrained``."""
    storage = Storage("int8", "int8", scale_columns, mask=False)
    head = output_head(model)
    if isinstance(head, SparseLowRankLinear):
        return
    if not (isinstance(head, nn.Linear) and is_linear(head)):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear output head "
            f"({'none at all' if head is None else type(head).__name__}); leave the head as it is"
        )
    if not head.weight.is_cpu:
        raise DeviceError(f"the output head is on {head.weight.device}; move the model to the CPU first")
    tied = [m for m in model.modules() if m is not head and m._parameters.get("weight") is head.weight]
    if tied and (len(tied) > 1 or tied[0] is not cast(Any, model).get_input_embeddings()):
        names = sorted({type(module).__name__ for module in tied})
        raise UnsupportedModelError(
            f"{type(model).__name__}: {len(tied)} modules are tied to the output head ({', '.join(names)}), "
            "not just the input embedding; leave the head as it is"
        )
    layer = _coded(head, storage)
    if tied:
        embedding = cast(nn.Embedding, tied[0])
        reads = rows_of_head(embedding, layer)
        _check_reads(embedding, reads)
    names_of = {module: name for name, module in model.named_modules()}
    replace_(model, head, layer)
    if tied:
        replace_(model, embedding, reads)
        untie_(model, f"{names_of[head]}.weight", f"{names_of[embedding]}.weight")


def _coded(head: nn.Linear, storage: Storage) -> SparseLowRankLinear:
    weight = head.weight.detach()
    if not bool(weight.isfinite().all()):
        raise WeightError("the output head has NaN or infinite entries; the checkpoint is damaged")
    d_out, d_in = weight.shape
    rounded = [round_to_int8(rows.float(), storage.scale_columns) for rows in weight.split(_ROWS)]
    codes, scales = zip(*rounded, strict=True)
    tensors = {
        "values": torch.cat(codes).flatten(),
        "values_scale": torch.cat(scales),
        "low_rank_u": torch.empty(d_out, 0, dtype=torch.int8),
        "low_rank_u_scale": torch.empty(d_out, 0, dtype=torch.bfloat16),
        "low_rank_v": torch.empty(0, d_in, dtype=torch.int8),
        "low_rank_v_scale": torch.empty(0, storage.scales(d_in), dtype=torch.bfloat16),
        "input_exponent": torch.zeros(d_in, dtype=torch.int8),
    }
    return SparseLowRankLinear.from_canonical(
        tensors, d_in, head.bias, "the head", storage=storage, dtype=weight.dtype
    )


def _check_reads(embedding: nn.Embedding, reads: RowsOfHead) -> None:
    """Compare an embedding with what shall replace it, on a few tokens."""
    ids = torch.arange(0, embedding.num_embeddings, max(1, embedding.num_embeddings // 64))[None]
    try:
        expected, got = embedding(ids).float(), reads(ids).float()
        close = float((got - expected).norm()) <= 0.05 * float(expected.norm())
    except (RuntimeError, NotImplementedError):
        close = False
    if not close or embedding.max_norm is not None:
        raise UnsupportedModelError(
            f"{type(embedding).__name__} does not read its rows as nn.Embedding does, and it is tied to the "
            "head; leave the head as it is"
        )


def untie_(model: nn.Module, head: str, embedding: str) -> None:
    """Tell transformers that these two parameters are not tied: only the head still has a weight."""
    configuration = getattr(model, "config", None)
    if configuration is not None:
        configuration.tie_word_embeddings = False
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name, source in list(tied.items()):
        if {name, source} == {head, embedding}:
            del tied[name]


def head_of(model: nn.Module) -> tuple[SparseLowRankLinear | None, str | None]:
    """The head if it has codes, and the name of the embedding that reads its rows; each may be None."""
    head = output_head(model)
    if not isinstance(head, SparseLowRankLinear):
        return None, None
    modules = model.named_modules()
    names = (name for name, m in modules if isinstance(m, RowsOfHead) and m.head is head)
    return head, next(names, None)
