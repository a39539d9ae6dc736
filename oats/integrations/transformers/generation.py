"""``generate`` in the engine, for models of transformers.

A model becomes an instance of a subclass of its class. While its ``generate`` runs, its ``forward`` is a step
of the engine; all else (sampling, beams, processors, streamers) stays with transformers. What the engine
cannot do goes through the model's own ``forward``.
"""

from __future__ import annotations

import functools
import inspect
import logging
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from oats.engine.engine import Engine
from oats.integrations.transformers.engine_cache import EngineCache

_ENGINE = "_oats_engine"
_generating: ContextVar[frozenset[int]] = ContextVar("generating", default=frozenset())

# What a call of forward may say that changes nothing, or what the engine does anyway.
_HARMLESS = {"return_dict": (True, None), "use_cache": (True,), "output_attentions": (False, None)}
_HARMLESS |= {"output_hidden_states": (False, None), "output_router_logits": (False, None)}


def generate_natively_(model: Any) -> None:
    """Let ``model.generate`` use the engine where it can, in place.

    The engine is made when ``generate`` first runs, and again when the model's weights were moved, cast or
    replaced. The class keeps its name; copies and pickles of the model work like the model.

    Args:
        model: a causal language model of transformers; any other is left alone.
    """
    if hasattr(model, "generate") and not hasattr(type(model), "_oats_class"):
        kind: Any = type(model)
        model.__class__ = _native_class(kind)


def engine_of(model: Any) -> Engine:
    """The engine of a model, made if there is none for its weights as they are.

    ``Engine.reason`` says why it does not run.
    """
    state = _state_of(model)
    kept = model.__dict__.get(_ENGINE)
    if kept is None or kept[0] != state:
        engine = Engine(model)
        kept = model.__dict__[_ENGINE] = (state, engine)
        if engine.reason is not None:
            log = logging.getLogger("oats")
            log.info("%s runs in transformers, not in the engine: %s", type(model).__name__, engine.reason)
    return kept[1]  # type: ignore[no-any-return]


@functools.cache
def _native_class(kind: Any) -> Any:
    # With names, signatures and docstrings of what they replace: transformers reads them.
    @functools.wraps(kind.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _can_run(self):
            return kind.generate(self, *args, **kwargs)
        if kwargs.get("cache_implementation") == "static":
            del kwargs["cache_implementation"]  # it would only keep the engine from being used
        token = _generating.set(_generating.get() | {id(self)})
        try:
            return kind.generate(self, *args, **kwargs)
        finally:
            _generating.reset(token)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and not torch.compiler.is_compiling() and id(self) in _generating.get():
            output = _forward(self, kwargs)
            if output is not None:
                return output
        return kind.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # pickle finds a class by its name, and by this name it would find `kind`. The engine is not copied.
        parts = kind.__reduce_ex__(self, protocol)
        state = {name: value for name, value in parts[2].items() if name != _ENGINE}
        return (_new, (kind,), state, *parts[3:])

    body: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": reduce,
        "generate": generate,
        "forward": forward,
        "_oats_class": kind,
    }
    return type(kind.__name__, (kind,), body)


def _new(kind: Any) -> Any:
    native = _native_class(kind)
    return native.__new__(native)


def _can_run(model: Any) -> bool:
    """True if nobody listens to the model's modules, and the engine runs it."""
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return False
    return not model.training and engine_of(model).reason is None


def _state_of(model: nn.Module) -> tuple[object, ...]:
    """Changes when a module or a tensor of the model is replaced, or its dtype, or the mode."""
    tensors = [
        (id(module), name, tensor.data_ptr(), tensor.dtype)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    return (model.training, *tensors)


def _forward(model: Any, given: dict[str, Any]) -> Any:
    """A step of the engine; None if it cannot be one."""
    names = inspect.signature(type(model).forward).parameters
    cache_name = "cache" if "cache" in names else "past_key_values"  # by the release of transformers
    kwargs = {name: value for name, value in given.items() if value is not None}
    ids, cache = kwargs.pop("input_ids", None), kwargs.pop(cache_name, None)
    mask, positions = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
    keep, use_cache = kwargs.pop("logits_to_keep", 0), kwargs.pop("use_cache", False)
    others = [
        name
        for name, value in kwargs.items()
        if isinstance(value, Tensor) or value not in _HARMLESS.get(name, ())
    ]
    if others or ids is None or cache is None or not use_cache or isinstance(keep, Tensor):
        return None
    if torch.is_grad_enabled():
        return None
    if not isinstance(cache, EngineCache):
        padding = _padding(ids, mask, positions)
        if padding is None or cache.get_seq_length():
            return None
        cache = EngineCache(engine_of(model), padding)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    logits = cache.forward(ids, keep or ids.shape[1])
    output: dict[str, Any] = {cache_name: cache}
    return CausalLMOutputWithPast(logits=logits, **output)


def _padding(ids: Tensor, mask: object, positions: Tensor | None) -> list[int] | None:
    """Tokens of padding at the left of each row; None where the mask or the positions say something else."""
    if mask is None:
        mask = torch.ones_like(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return None
    mask = mask.bool()
    count = mask.sum(1)
    left = torch.arange(ids.shape[1]) >= (ids.shape[1] - count)[:, None]
    if not torch.equal(mask, left) or not bool(count.all()):
        return None
    if positions is not None:
        expected = (mask.cumsum(1) - 1).clamp(min=0)
        if not torch.equal(positions.expand_as(expected)[mask], expected[mask]):
            return None
    return [ids.shape[1] - int(n) for n in count]
