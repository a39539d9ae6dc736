"""The shapes of the linear layers of well-known models, by the name of the model.

Sizes follow from the published configurations (hidden size, intermediate size, heads). Only layers inside the
blocks are listed, because a compression changes only those.
"""

from __future__ import annotations

from dataclasses import dataclass

from oats.errors import ConfigError


@dataclass(frozen=True)
class LayerShape:
    """One linear layer of a model.

    Attributes:
        name: name of the layer in its block, as in transformers; layers of one shape are listed together.
        count: number of such layers in the whole model.
    """

    name: str
    d_out: int
    d_in: int
    count: int = 1


def _decoder(
    blocks: int, hidden: int, intermediate: int, query: int, key_value: int
) -> tuple[LayerShape, ...]:
    """A decoder like Llama. `query` and `key_value` are the number of heads × the size of a head."""
    attention = (
        (LayerShape("q_proj", query, hidden, blocks), LayerShape("o_proj", hidden, query, blocks))
        if query != hidden
        else (LayerShape("q_proj, o_proj", hidden, hidden, 2 * blocks),)
    )
    return (
        *attention,
        LayerShape("k_proj, v_proj", key_value, hidden, 2 * blocks),
        LayerShape("gate_proj, up_proj", intermediate, hidden, 2 * blocks),
        LayerShape("down_proj", hidden, intermediate, blocks),
    )


MODELS: dict[str, tuple[LayerShape, ...]] = {
    "llama-3-8b": _decoder(32, hidden=4096, intermediate=14336, query=32 * 128, key_value=8 * 128),
    "llama-2-7b": (
        LayerShape("q_proj, k_proj, v_proj, o_proj", 4096, 4096, 4 * 32),
        LayerShape("gate_proj, up_proj", 11008, 4096, 2 * 32),
        LayerShape("down_proj", 4096, 11008, 32),
    ),
    # qkv_proj and gate_up_proj are fused: one layer computes several projections.
    "phi-3-mini": (
        LayerShape("qkv_proj", 3 * 3072, 3072, 32),
        LayerShape("o_proj", 3072, 3072, 32),
        LayerShape("gate_up_proj", 2 * 8192, 3072, 32),
        LayerShape("down_proj", 3072, 8192, 32),
    ),
    "gemma-3-270m": _decoder(18, hidden=640, intermediate=2048, query=4 * 256, key_value=256),
    "vit-b-16": (
        LayerShape("query, key, value, attention.output", 768, 768, 4 * 12),
        LayerShape("intermediate", 3072, 768, 12),
        LayerShape("output", 768, 3072, 12),
    ),
    # SwiGLU: weights_in makes gate and value at once, each 8 ⌈(6144 · 2/3) / 8⌉ = 4096 wide.
    "dinov2-giant": (
        LayerShape("query, key, value, attention.output", 1536, 1536, 4 * 40),
        LayerShape("mlp.weights_in", 2 * 4096, 1536, 40),
        LayerShape("mlp.weights_out", 1536, 4096, 40),
    ),
}
"""Model name → the shapes of its linear layers."""


def shapes_of(model: str) -> tuple[LayerShape, ...]:
    """The layer shapes of a model in :data:`MODELS`.

    Raises:
        ConfigError: no model of that name is known.

    >>> [(shape.name, shape.d_out, shape.d_in) for shape in shapes_of("vit-b-16")][1:]
    [('intermediate', 3072, 768), ('output', 768, 3072)]
    """
    if model not in MODELS:
        raise ConfigError(
            f"no model is called {model!r}; known are {', '.join(MODELS)}. "
            "For any other layer give --d-out and --d-in"
        )
    return MODELS[model]
