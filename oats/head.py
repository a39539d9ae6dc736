"""The output head of a language model as int8 codes, and the input embedding that is tied to it."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from oats import ops
from oats.config import OatsConfig
from oats.errors import UnsupportedModelError, WeightError
from oats.models.linear import output_head, replace_
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
    that is tied to it reads its rows from there (:class:`RowsOfHead`), so that the weights are held once.

    Args:
        model: of transformers; a head that has codes already stays as it is.
        scale_columns: columns of a row that share a scale, 64 or 128.

    Raises:
        UnsupportedModelError: there is no linear output head, or the embedding tied to it computes in a way
            of its own.
        WeightError: a weight is not finite.
        ConfigError: there is no such `scale_columns`.
    """
    storage = Storage("int8", "int8", scale_columns)
    head = output_head(model)
    if isinstance(head, SparseLowRankLinear):
        return
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear output head "
            f"({'none at all' if head is None else type(head).__name__}); leave the head as it is"
        )
    embedding = cast(Any, model).get_input_embeddings()
    tied = embedding is not None and getattr(embedding, "weight", None) is head.weight
    layer = _coded(head, storage)
    reads = rows_of_head(embedding, layer) if tied else None
    if reads is not None:
        _check_reads(embedding, reads)
    replace_(model, head, layer)
    if reads is not None:
        replace_(model, embedding, reads)
        untie_(model)


def _coded(head: nn.Linear, storage: Storage) -> SparseLowRankLinear:
    weight = head.weight.detach()
    if not bool(weight.isfinite().all()):
        raise WeightError("the output head has NaN or infinite entries; the checkpoint is damaged")
    d_out, d_in = weight.shape
    codes, scales = zip(
        *(round_to_int8(rows.float(), storage.scale_columns) for rows in weight.split(_ROWS)), strict=True
    )
    columns = torch.arange(-(-d_in // 8) * 8).view(-1, 8) < d_in
    row_of_mask = (columns * (1 << torch.arange(8))).sum(1).to(torch.uint8)
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

    Made by :func:`rows_of_head`.
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
    ids = torch.arange(min(embedding.num_embeddings, 8))[None]
    try:
        expected, got = embedding(ids).float(), reads(ids).float()
        close = float((got - expected).norm()) <= 0.05 * float(expected.norm())
    except (RuntimeError, NotImplementedError):
        close = False
    if not close:
        raise UnsupportedModelError(
            f"{type(embedding).__name__} does not read its rows as nn.Embedding does, and it is tied to the "
            "head; leave the head as it is"
        )


def untie_(model: nn.Module) -> None:
    """Tell transformers that nothing has to be tied: there is but one weight."""
    configuration = getattr(model, "config", None)
    if configuration is not None:
        configuration.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied:
        tied.clear()


def head_of(model: nn.Module) -> tuple[SparseLowRankLinear | None, str | None]:
    """The head, if it has codes; and the name of the embedding that reads its rows, if one does."""
    head = output_head(model)
    if not isinstance(head, SparseLowRankLinear):
        return None, None
    names = (name for name, module in model.named_modules() if isinstance(module, RowsOfHead))
    return head, next(names, None)
