"""An input embedding that reads its rows from the packed output head that it is tied to."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from oats.kernels.to_dense import read_rows
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear


class RowsOfHead(nn.Embedding):
    """An embedding without a weight: it reads its rows from the head that it is tied to.

    :func:`rows_of_head` makes it. ``.to()`` converts the head as a module of the model, not through this.
    """

    _head: tuple[SparseLowRankLinear]
    _dense: type[nn.Embedding]

    @property
    def head(self) -> SparseLowRankLinear:
        """The head. It is not a submodule here: the model would list it twice."""
        return self._head[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """An empty tensor of its shape and dtype on the meta device; reading values of it fails."""
        size = (self.num_embeddings, self.embedding_dim)
        return torch.empty(size, dtype=self.head.dtype, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """Rows of token ids of any shape, (*input.shape, embedding_dim), in the dtype of the head."""
        head = self.head
        packed = head._buffers["packed"]
        if packed is None:
            packed = head.pack_().packed
            assert packed is not None
        return read_rows(packed, input, self.embedding_dim, head.dtype)  # type: ignore[no-any-return]


def rows_of_head(embedding: nn.Embedding, head: SparseLowRankLinear) -> RowsOfHead:
    """A replacement of the same class for an embedding that is tied to `head`; it reads its rows there."""
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
    # `kind` first: its forward, which may scale the rows, finds ours where it calls nn.Embedding's.
    bases = (RowsOfHead,) if kind is nn.Embedding else (kind, RowsOfHead)

    def reduce(self: RowsOfHead, protocol: Any) -> tuple[Any, ...]:
        # pickle finds a class by its name, and by this name it would find `kind`.
        return (_restore, (kind,), *object.__reduce_ex__(self, protocol)[2:])

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    body = {**names, "_dense": kind, "weight": RowsOfHead.weight, "__reduce_ex__": reduce}
    return type(kind.__name__, bases, body)


def _restore(kind: type[nn.Embedding]) -> RowsOfHead:
    reads_rows = _kind(kind)  # type: ignore[arg-type]
    return reads_rows.__new__(reads_rows)
