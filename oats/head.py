"""The output head of a language model as int8 codes, and the input embedding that is tied to it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from oats import ops
from oats.bitmask import encode
from oats.config import OatsConfig
from oats.errors import DeviceError, UnsupportedModelError, WeightError
from oats.models.linear import is_linear, output_head, replace_
from oats.nn import SparseLowRankLinear
from oats.quantization import round_to_int8
from oats.storage import Storage

# Rows of the head that are rounded together: 32 MB of float32 at 4096 inputs.
_ROWS = 2048


@torch.no_grad()
def quantize_head_(model: nn.Module, scale_columns: int = OatsConfig.scale_columns) -> None:
    """Store the output head of a language model as int8 codes, in place; nothing of it is removed.

    Decoding reads the whole head for each token: in a small model, or one with a large vocabulary, as much as
    all blocks. The head becomes a `SparseLowRankLinear` of rank 0 that keeps every weight. An input embedding
    that is tied to it reads its rows from there (:class:`RowsOfHead`), so that the weights are held once. The
    model's configuration then says that nothing is tied, so that no other model may share it. To resize the
    embeddings, do so before, or dequantise the model.

    Args:
        model: of transformers; a head that has codes already stays as it is.
        scale_columns: columns of a row that share a scale, 64 or 128.

    Raises:
        UnsupportedModelError: there is no linear output head, or what is tied to it is not just an input
            embedding that reads its rows.
        WeightError: a weight is not finite.
        DeviceError: the head is not on the CPU.
        ConfigError: there is no such `scale_columns`; or the head is neither float32 nor bfloat16.
    """
    store_head_as_codes_(model, scale_columns)
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    settings = getattr(quantization, "settings", None)
    if isinstance(settings, OatsConfig):
        cast(Any, quantization).settings = replace(settings, head="int8")
    elif hasattr(model, "save_pretrained"):
        from oats.integrations.transformers import attach

        attach(model, OatsConfig(compression=0.0, rank_ratio=0.0, head="int8"))


def store_head_as_codes_(model: nn.Module, scale_columns: int) -> None:
    """Do what :func:`quantize_head_` does, but for telling ``save_pretrained`` of it."""
    storage = Storage("int8", "int8", scale_columns)
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
    reads = None
    if tied:
        embedding = cast(nn.Embedding, tied[0])
        reads = rows_of_head(embedding, layer)
        _check_reads(embedding, reads)
    names_of = dict((module, name) for name, module in model.named_modules())
    replace_(model, head, layer)
    if reads is not None:
        replace_(model, embedding, reads)
        untie_(model, f"{names_of[head]}.weight", f"{names_of[embedding]}.weight")


def _coded(head: nn.Linear, storage: Storage) -> SparseLowRankLinear:
    weight = head.weight.detach()
    if not bool(weight.isfinite().all()):
        raise WeightError("the output head has NaN or infinite entries; the checkpoint is damaged")
    d_out, d_in = weight.shape
    codes, scales = zip(
        *(round_to_int8(rows.float(), storage.scale_columns) for rows in weight.split(_ROWS)), strict=True
    )
    row_of_mask, _ = encode(torch.ones(1, d_in))
    tensors = {
        "mask": row_of_mask.expand(d_out, -1).contiguous(),
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


class RowsOfHead(nn.Embedding):
    """An embedding without a weight of its own: its rows are those of the head that it is tied to.

    Made by :func:`rows_of_head`. A conversion reaches the head through the model, not through this.
    """

    _head: tuple[SparseLowRankLinear]
    _dense: type[nn.Embedding]

    @property
    def head(self) -> SparseLowRankLinear:
        """The head; not a submodule, or the model would have it twice."""
        return self._head[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Its shape and dtype, on the meta device: whatever wants to read it as a whole fails there."""
        size = (self.num_embeddings, self.embedding_dim)
        return torch.empty(size, dtype=self.head.dtype, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """Read rows.

        Args:
            input: token ids, of any shape.

        Returns:
            (*input.shape, embedding_dim), in the dtype of the head.
        """
        head = self.head
        packed = head._buffers["packed"]
        if packed is None:
            packed = head.pack_().packed
            assert packed is not None
        rows: Tensor = ops.read_rows(packed, input, self.embedding_dim, head.dtype)
        return rows


def rows_of_head(embedding: nn.Embedding, head: SparseLowRankLinear) -> RowsOfHead:
    """What replaces an embedding that is tied to a head: of its class, but for where the rows come from."""
    reads = _restore(type(embedding))
    reads.__dict__.update(embedding.__dict__)
    reads._parameters = {name: p for name, p in embedding._parameters.items() if name != "weight"}
    reads._head = (head,)
    return reads


def own_rows(reads: RowsOfHead, weight: nn.Parameter) -> nn.Embedding:
    """The inverse of :func:`rows_of_head`: an embedding with a weight, (num_embeddings, embedding_dim)."""
    embedding = reads._dense.__new__(reads._dense)
    embedding.__dict__.update(reads.__dict__)
    del embedding.__dict__["_head"]
    embedding._parameters = {"weight": weight, **reads._parameters}
    return embedding


@functools.cache
def _kind(kind: type[nn.Embedding]) -> type[RowsOfHead]:
    # `kind` first: what its forward calls nn.Embedding's for, scaling or the like, is done to the rows.
    bases = (RowsOfHead,) if kind is nn.Embedding else (kind, RowsOfHead)

    def reduce(self: RowsOfHead, protocol: Any) -> tuple[Any, ...]:
        # pickle finds a class by its name, and this one has the name of another.
        return (_restore, (kind,), *object.__reduce_ex__(self, protocol)[2:])

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    body = {**names, "_dense": kind, "weight": RowsOfHead.weight, "__reduce_ex__": reduce}
    return type(kind.__name__, bases, body)


def _restore(kind: type[nn.Embedding]) -> RowsOfHead:
    reads_rows = _kind(kind)  # type: ignore[arg-type]
    return reads_rows.__new__(reads_rows)


def _check_reads(embedding: nn.Embedding, reads: RowsOfHead) -> None:
    """Compare on a few tokens.

    Raises:
        UnsupportedModelError: they return different things.
    """
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
    """Tell transformers that the parameters of these names are not tied: there is but one weight."""
    configuration = getattr(model, "config", None)
    if configuration is not None:
        configuration.tie_word_embeddings = False
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for target, source in list(tied.items()):
        if {target, source} == {head, embedding}:
            del tied[target]


def head_of(model: nn.Module) -> tuple[SparseLowRankLinear | None, str | None]:
    """The head, if it has codes; and the name of the embedding that reads its rows, if one does."""
    head = output_head(model)
    if not isinstance(head, SparseLowRankLinear):
        return None, None
    modules = model.named_modules()
    names = (name for name, m in modules if isinstance(m, RowsOfHead) and m.head is head)
    return head, next(names, None)
