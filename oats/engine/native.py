"""A described decoder as the core's own structures, and one step of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oats import _core
from oats.errors import UnsupportedModelError
from oats.models.decoders import DECODERS, Decoder, Experts, Layer, Norm, unknown_architecture
from oats.models.linear import is_linear
from oats.nn import SparseLowRankLinear, SplitLinear
from oats.nn.head import RowsOfHead

_GATES = {
    "silu": _core.Gate.silu,
    "gelu": _core.Gate.gelu,
    "gelu_pytorch_tanh": _core.Gate.gelu_tanh,
    "gelu_new": _core.Gate.gelu_tanh,
    "relu": _core.Gate.relu,
}


def why_not_native(config: Mapping[str, Any]) -> str | None:
    """Why a model with this ``config.json`` does not run in the engine; None where its architecture does.

    Whether its logits are right is known when an engine is made.
    """
    kind = str(config.get("model_type", ""))
    if kind not in DECODERS:
        return unknown_architecture(kind)
    # What is missing, or no number, is for transformers to refuse.
    hidden, heads, head_dim = (config.get(n) for n in ("hidden_size", "num_attention_heads", "head_dim"))
    if head_dim is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        head_dim = hidden // heads
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    return _no_kernel(head_dim if isinstance(head_dim, int) else 16, str(activation))


def _no_kernel(head_dim: int, activation: str) -> str | None:
    if head_dim % 16 or head_dim > 512:
        return f"heads have {head_dim} dimensions; the engine takes multiples of 16 up to 512"
    if activation not in _GATES:
        return f"the engine does not know the activation {activation!r}"
    return None


class NativeDecoder:
    """The core's decoder for one model.

    It reads the model's own memory: what it points to is kept alive here, and must not be replaced.

    Args:
        decoder: from :func:`oats.models.decoders.describe_decoder`.

    Attributes:
        caches: of each cache: its layers, heads of keys, head_dim and window.
        dtype: of weights, activations and cache.

    Raises:
        UnsupportedModelError: a part has no kernel.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._kept: list[Any] = []
        self.dtype = decoder.final_norm.weight.dtype
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedModelError(
                f"the engine computes in float32 and bfloat16, and the model is {self.dtype}"
            )
        self.vocabulary, hidden = _shape(decoder.head)
        packed = dense = 0
        if isinstance(decoder.embedding, RowsOfHead):
            packed = self._packed(decoder.embedding.head)
        else:
            dense = self._address(decoder.embedding.weight)  # type: ignore[arg-type]
        model = _core.DecoderModel(
            value_bytes=self.dtype.itemsize,
            hidden=hidden,
            vocabulary=self.vocabulary,
            embedding=dense,
            packed_embedding=packed,
        )
        model.embedding_scale, model.residual_scale = decoder.embedding_scale, decoder.residual_scale
        model.logits_scale, model.logits_softcap = decoder.logits_scale, decoder.logits_softcap
        self._ropes = decoder.ropes
        self._changing = decoder.border is not None
        model.ropes = [_core.Rope(rope.frequencies.tolist(), rope.scale) for rope in decoder.ropes]
        model.final_norm = self._norm(decoder.final_norm)
        model.head = self._linear(decoder.head)
        keys = [(layer.window, layer.kv_heads, layer.head_dim) for layer in decoder.layers]
        self.caches = list(dict.fromkeys(keys))
        self.layers_of = [keys.count(key) for key in self.caches]
        places = [(self.caches.index(key), keys[:index].count(key)) for index, key in enumerate(keys)]
        model.layers = [
            self._layer(layer, *place) for layer, place in zip(decoder.layers, places, strict=True)
        ]
        self._decoder = _core.Decoder(model)

    def ropes_at(self, length: int) -> list[Any]:
        """``_core.Rope`` each, of a text of `length` tokens; none where the model's hold for every length."""
        if not self._changing:
            return []
        return [_core.Rope(rope.at(length).tolist(), rope.scale) for rope in self._ropes]

    def step(
        self,
        tokens: Sequence[int],
        sequences: Sequence[Any],
        pages: Sequence[Tensor],
        logits_rows: Sequence[int],
    ) -> Tensor:
        """Run tokens through the model.

        Args:
            tokens: of all sequences, one after another.
            sequences: ``_core.DecoderSequence`` each.
            pages: of each cache, (pages, layers, 2, kv_heads, page tokens · head_dim).
            logits_rows: for which of the tokens logits are wanted.

        Returns:
            (len(logits_rows), vocabulary), the model's dtype.
        """
        logits = torch.empty(len(logits_rows), self.vocabulary, dtype=self.dtype)
        self._decoder.step(
            list(tokens),
            list(sequences),
            [(pool.data_ptr(), pool.stride(1), pool.stride(0)) for pool in pages],
            list(logits_rows),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        return logits

    def _layer(self, layer: Layer, cache: int, cache_layer: int) -> Any:
        if problem := _no_kernel(layer.head_dim, layer.activation):
            raise UnsupportedModelError(problem)
        made = _core.DecoderLayer()
        made.before_attention, made.before_mlp = (
            self._norm(layer.before_attention),
            self._norm(layer.before_mlp),
        )
        made.after_attention, made.after_mlp = self._norm(layer.after_attention), self._norm(layer.after_mlp)
        made.q_norm, made.k_norm = self._norm(layer.q_norm), self._norm(layer.k_norm)
        made.qkv = self._linears(layer.qkv)
        made.attention_out = self._linear(layer.attention_out)
        made.gate_up = self._linears(layer.gate_up)
        if layer.down is not None:
            made.down = self._linear(layer.down)
        if layer.experts is not None:
            if layer.after_mlp is not None:
                raise UnsupportedModelError("the engine has no norm behind a mixture of experts")
            made.experts = self._experts(layer.experts)
        made.heads, made.kv_heads, made.head_dim = layer.heads, layer.kv_heads, layer.head_dim
        made.attention_scale, made.attention_softcap = layer.scale, layer.softcap
        made.window, made.rope = layer.window, layer.rope
        made.cache, made.cache_layer = cache, cache_layer
        made.gate = _GATES[layer.activation]
        return made

    def _norm(self, norm: Norm | None) -> Any:
        if norm is None:
            return _core.DecoderNorm()
        return _core.DecoderNorm(weight=self._address(norm.weight), eps=norm.eps, one_plus=norm.one_plus)

    def _experts(self, experts: Experts) -> Any:
        count, d_in = experts.router.shape
        router = [_core.DecoderLinear(d_out=count, d_in=d_in, dense=self._address(experts.router))]
        each = list(experts.each)
        if experts.shared is not None and experts.shared_gate is not None:
            router.append(self._linear(experts.shared_gate))
            each.append(experts.shared)
        return _core.DecoderExperts(
            router=router,
            each=[_core.DecoderExpert(self._linears(gate_up), self._linear(down)) for gate_up, down in each],
            chosen=experts.chosen,
            normalised=experts.normalised,
            shared=experts.shared is not None,
        )

    def _linears(self, modules: Sequence[nn.Module]) -> list[Any]:
        return [self._linear(part) for module in modules for part in _parts(module)]

    def _linear(self, module: nn.Module) -> Any:
        d_out, d_in = _shape(module)
        bias = getattr(module, "bias", None)
        address = 0 if bias is None else self._address(bias)
        if isinstance(module, SparseLowRankLinear):
            return _core.DecoderLinear(d_out=d_out, d_in=d_in, packed=self._packed(module), bias=address)
        if not is_linear(module) or not isinstance(module, nn.Linear):
            raise UnsupportedModelError(f"the engine has no kernel for a {type(module).__name__}")
        return _core.DecoderLinear(d_out=d_out, d_in=d_in, dense=self._address(module.weight), bias=address)

    def _packed(self, layer: SparseLowRankLinear) -> int:
        packed = layer.pack_().packed
        assert packed is not None
        if not packed.is_cpu or layer.dtype != self.dtype:
            raise UnsupportedModelError(
                f"a layer is {layer.dtype} on {packed.device}, the model {self.dtype}"
            )
        self._kept.append(packed)
        return packed.data_ptr()

    def _address(self, tensor: Tensor) -> int:
        if tensor.dtype != self.dtype or not tensor.is_cpu or not tensor.is_contiguous():
            raise UnsupportedModelError(
                f"a weight is {tensor.dtype} on {tensor.device}, expected contiguous {self.dtype} on the CPU"
            )
        self._kept.append(tensor)
        return tensor.data_ptr()


def _parts(module: nn.Module) -> list[nn.Module]:
    return list(module.values()) if isinstance(module, SplitLinear) else [module]


def _shape(module: Any) -> tuple[int, int]:
    return int(module.out_features), int(module.in_features)
