"""What the engine must know of decoder-only architectures: one entry each.

An entry says how an architecture differs from Llama. Sizes, projections, biases, windows and rotary
frequencies are read from the modules. The engine compares its logits with the model's own ``forward``
before it is used. So a wrong entry is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oats.errors import UnsupportedModelError
from oats.models.experts import is_fused_experts, split_experts
from oats.nn.experts import SplitExperts


@dataclass(frozen=True)
class DecoderEntry:
    """How an architecture differs from Llama.

    Attributes:
        one_plus: norms multiply by one plus their weight.
        norms_after: there are norms behind attention and MLP too, before their outputs are added.
        embedding_scale: of the configuration: what embeddings are multiplied by.
        residual_scale: the same, of what a block adds.
        logits_scale: the same, of the logits.
        window_everywhere: if there are no ``layer_types``, ``config.sliding_window`` holds in all layers.
        normalised_experts: of the configuration: whether the weights of the chosen experts add up to one.
        computed_again_at: of the configuration: the length beyond which ``generate`` computes a text again.
    """

    one_plus: bool = False
    norms_after: bool = False
    embedding_scale: Callable[[Any], float] = lambda config: 1.0
    residual_scale: Callable[[Any], float] = lambda config: 1.0
    logits_scale: Callable[[Any], float] = lambda config: 1.0
    window_everywhere: bool = False
    normalised_experts: Callable[[Any], bool] = lambda config: bool(config.norm_topk_prob)
    computed_again_at: Callable[[Any], int | None] = lambda config: None


def _root_of_hidden(config: Any) -> float:
    # Rounded as the embedding's dtype rounds it.
    scale = torch.tensor(config.hidden_size**0.5)
    return float(scale.to(config.dtype) if isinstance(config.dtype, torch.dtype) else scale)


_GEMMA = DecoderEntry(one_plus=True, norms_after=True, embedding_scale=_root_of_hidden)

DECODERS: dict[str, DecoderEntry] = {
    "llama": DecoderEntry(),
    "mistral": DecoderEntry(window_everywhere=True),
    "mixtral": DecoderEntry(window_everywhere=True, normalised_experts=lambda config: True),
    "qwen2": DecoderEntry(),
    "qwen2_moe": DecoderEntry(),
    "qwen3": DecoderEntry(),
    "qwen3_moe": DecoderEntry(window_everywhere=True),
    "phi3": DecoderEntry(
        window_everywhere=True,
        computed_again_at=lambda config: getattr(config, "original_max_position_embeddings", None),
    ),
    "gemma": DecoderEntry(one_plus=True, embedding_scale=_root_of_hidden),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "granite": DecoderEntry(
        embedding_scale=lambda config: config.embedding_multiplier,
        residual_scale=lambda config: config.residual_multiplier,
        logits_scale=lambda config: 1 / config.logits_scaling,
    ),
}
"""``config.model_type`` → entry."""


@dataclass(frozen=True)
class Norm:
    """A root mean square norm: weight (n,), and what is added to the mean of the squares."""

    weight: Tensor
    eps: float
    one_plus: bool


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding, whose frequencies may depend on the length of the text.

    Attributes:
        frequencies: (n,), float32, of texts of at most `original` tokens.
        scale: what sines and cosines are multiplied by.
        original: None if the frequencies hold for every length.
        beyond: a longer length → its frequencies.
    """

    frequencies: Tensor
    scale: float
    original: int | None = None
    beyond: Callable[[int], Tensor] | None = None

    def at(self, length: int) -> Tensor:
        """The frequencies of a text of `length` tokens."""
        if self.beyond is None or self.original is None or length <= self.original:
            return self.frequencies
        return self.beyond(length)


@dataclass
class Experts:
    """A mixture. Of each expert: what computes gate and up, and down."""

    router: Tensor
    """(experts, n)."""
    each: list[tuple[list[nn.Module], nn.Module]]
    chosen: int
    """Experts of a token."""
    normalised: bool
    """Their weights add up to one."""
    shared: tuple[list[nn.Module], nn.Module] | None = None
    """Gets all tokens, times the sigmoid of `shared_gate`."""
    shared_gate: nn.Module | None = None


@dataclass
class Layer:
    """One block. Projections are modules: of :mod:`oats.nn`, or dense linear layers.

    The feed-forward network is `gate_up` and `down`, or `experts`.
    """

    before_attention: Norm
    before_mlp: Norm
    qkv: list[nn.Module]
    attention_out: nn.Module
    gate_up: list[nn.Module]
    down: nn.Module | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    window: int
    rope: int
    activation: str
    after_attention: Norm | None = None
    after_mlp: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    experts: Experts | None = None


@dataclass
class Decoder:
    """A whole model, in the order in which it runs."""

    embedding: nn.Module
    final_norm: Norm
    head: nn.Module
    layers: list[Layer] = field(default_factory=list)
    ropes: list[Rotation] = field(default_factory=list)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float = 0.0
    unlimited: bool = False
    """The frequencies grow with the text: ``config.max_position_embeddings`` is no limit."""
    computed_again_at: int | None = None
    """A text that grows beyond this length is computed again, with the frequencies of long texts."""

    @property
    def border(self) -> int | None:
        """The length up to which the rotary frequencies do not depend on it; None if they never do."""
        borders = [rope.original for rope in self.ropes if rope.original is not None]
        return min(borders, default=None)


def unknown_architecture(model_type: str) -> str:
    """What is wrong with a model that has no entry."""
    return f"the engine does not know the architecture {model_type!r}, but {', '.join(sorted(DECODERS))}"


def describe_decoder(model: Any) -> Decoder:
    """Read what the engine needs from a causal language model of transformers.

    Raises:
        UnsupportedModelError: the architecture has no entry, or the model is not what its entry says.
    """
    config = getattr(model, "config", None)
    entry = DECODERS.get(getattr(config, "model_type", ""))
    if entry is None or config is None:
        raise UnsupportedModelError(unknown_architecture(getattr(config, "model_type", "")))
    try:
        return _describe(model, config, entry)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not built as its type says: {error}"
        ) from error


def _rotation(config: Any, rotary: Any, kind: str, rope_type: str) -> Rotation:
    prefix = f"{kind}_" if kind else ""
    frequencies = getattr(rotary, f"{prefix}original_inv_freq")
    scale = float(getattr(rotary, f"{prefix}attention_scaling"))
    if rope_type != "longrope" and "dynamic" not in rope_type:
        return Rotation(frequencies, scale)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def computed(length: int) -> Tensor:
        made: Tensor = ROPE_INIT_FUNCTIONS[rope_type](
            config, None, seq_len=torch.tensor(length), layer_type=kind or None
        )[0]
        return made

    if rope_type == "longrope":
        of_kind = config.rope_parameters[kind] if kind else config.rope_parameters
        original = int(of_kind["original_max_position_embeddings"])
        long = computed(original + 1)
        return Rotation(frequencies, scale, original, lambda length: long)
    return Rotation(frequencies, scale, int(rotary.original_max_seq_len), computed)


def _feed_forward(mlp: Any) -> tuple[list[nn.Module], nn.Module]:
    fused = hasattr(mlp, "gate_up_proj")
    return [mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj], mlp.down_proj


def _experts(mlp: Any, normalised: bool) -> Experts:
    experts = mlp.experts
    if is_fused_experts(experts):
        experts = split_experts(experts)
    if not isinstance(experts, SplitExperts):
        raise UnsupportedModelError(f"the engine does not know the experts of a {type(experts).__name__}")
    shared = getattr(mlp, "shared_expert", None)
    each: list[Any] = list(experts)
    return Experts(
        router=mlp.gate.weight,
        each=[([expert.gate, expert.up], expert.down) for expert in each],
        chosen=int(mlp.gate.top_k),
        normalised=normalised,
        shared=None if shared is None else _feed_forward(shared),
        shared_gate=None if shared is None else mlp.shared_expert_gate,
    )


def _describe(model: Any, config: Any, entry: DecoderEntry) -> Decoder:
    body = model.model

    def norm(module: Any) -> Norm | None:
        if module is None:
            return None
        eps = getattr(module, "eps", None)
        return Norm(module.weight, module.variance_epsilon if eps is None else eps, entry.one_plus)

    def some_norm(module: Any) -> Norm:
        found = norm(module)
        assert found is not None
        return found

    types = getattr(config, "layer_types", None)
    rotary = body.rotary_emb
    kinds = sorted(set(types)) if types and hasattr(rotary, f"{types[0]}_inv_freq") else [""]
    decoder = Decoder(
        embedding=body.embed_tokens,
        final_norm=some_norm(body.norm),
        head=model.get_output_embeddings(),
        embedding_scale=entry.embedding_scale(config),
        residual_scale=entry.residual_scale(config),
        logits_scale=entry.logits_scale(config),
        logits_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        computed_again_at=entry.computed_again_at(config),
    )
    for kind in kinds:
        rope_type = rotary.rope_type[kind] if kind else rotary.rope_type
        decoder.ropes.append(_rotation(config, rotary, kind, rope_type))
        decoder.unlimited = decoder.unlimited or "dynamic" in rope_type
    for index, block in enumerate(body.layers):
        attention, mlp = block.self_attn, block.mlp
        is_mixture = hasattr(mlp, "experts")
        kind = types[index] if types else ""
        sliding = kind == "sliding_attention" or (not types and entry.window_everywhere)
        fused = hasattr(attention, "qkv_proj")
        heads = config.num_attention_heads
        after = entry.norms_after
        decoder.layers.append(
            Layer(
                before_attention=some_norm(block.input_layernorm),
                after_attention=norm(block.post_attention_layernorm) if after else None,
                before_mlp=some_norm(
                    block.pre_feedforward_layernorm if after else block.post_attention_layernorm
                ),
                after_mlp=norm(block.post_feedforward_layernorm) if after else None,
                q_norm=norm(getattr(attention, "q_norm", None)),
                k_norm=norm(getattr(attention, "k_norm", None)),
                qkv=[attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj],
                attention_out=attention.o_proj,
                gate_up=[] if is_mixture else _feed_forward(mlp)[0],
                down=None if is_mixture else _feed_forward(mlp)[1],
                experts=_experts(mlp, entry.normalised_experts(config)) if is_mixture else None,
                heads=heads,
                kv_heads=config.num_key_value_heads,
                head_dim=attention.head_dim,
                scale=float(attention.scaling),
                softcap=float(getattr(config, "attn_logit_softcapping", None) or 0.0),
                window=int(config.sliding_window or 0) if sliding else 0,
                rope=kinds.index(kind) if kind in kinds else 0,
                activation=getattr(config, "hidden_activation", None) or config.hidden_act,
            )
        )
    return decoder
