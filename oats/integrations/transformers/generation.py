"""``model.generate`` runs in the engine.

:func:`generate_natively_` gives a model another class of the same name. It differs in two methods:
``generate`` gets an :class:`EngineCache` where it would get a ``DynamicCache``, and ``forward`` with such a
cache runs the engine. All else is transformers' own: searches, processors, streamers, criteria. What the
engine cannot do gets transformers' cache, and so transformers' ``forward``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from oats.engine.engine import Engine
from oats.errors import ConfigError
from oats.integrations.transformers.engine_cache import EngineCache

# transformers renamed the argument and the field of the output.
_CACHE = (
    "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
)
_CACHE_NAMES = {"cache", "past_key_values"}

# What generate passes on, or keeps for itself. `cache_position` says what the cache knows.
_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    "logits_to_keep",
    "use_cache",
    "cache_position",
} | _CACHE_NAMES
_CACHE_KINDS = (None, "dynamic", "static")
# generate's own, which reach forward too; no model reads them.
_OF_GENERATE = {"tokenizer", "assistant_tokenizer"}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [
    getattr(torch_module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]
# transformers leaves these on a model once its hidden states were asked for; they do nothing otherwise.
_IDLE_HOOKS = "transformers.utils.output_capturing"


@dataclass
class _Made:
    """An engine, and what its model was when it was made."""

    state: tuple[Any, ...]
    engine: Engine


_made: weakref.WeakKeyDictionary[Any, _Made] = weakref.WeakKeyDictionary()
_making = threading.RLock()


def generate_natively_(model: Any) -> None:
    """Make ``model.generate`` run in the engine where it can; leave a model that cannot generate as it is.

    The engine is made at the first ``generate``, and again when the model is another one then: converted,
    moved, layers replaced. Copies and pickles generate natively too. Why a call does not run natively is
    logged once, by the logger ``oats`` at level INFO.

    Args:
        model: a ``PreTrainedModel`` with ``generate``; its class is replaced by a subclass.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=32, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=2)).eval()
        >>> generate_natively_(model)
        >>> type(model).__name__
        'LlamaForCausalLM'
        >>> model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False, eos_token_id=None).shape
        torch.Size([1, 5])
    """
    if hasattr(type(model), "_prepare_cache_for_generation") and not hasattr(
        type(model), "_generates_natively"
    ):
        model.__class__ = _native_class(type(model))  # type: ignore[arg-type]


def generate_in_transformers_(model: Any) -> None:
    """Undo :func:`generate_natively_`; leave any other model as it is."""
    if "_generates_natively" in type(model).__dict__:
        _made.pop(model, None)
        model.__class__ = type(model).__base__


@functools.cache
def _native_class(kind: Any) -> Any:
    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # pickle finds a class by its name, and by this name it would find `kind`.
        return (_restore, (kind,), *kind.__reduce_ex__(self, protocol)[2:])

    signature = inspect.signature(kind.forward)

    # With the name, signature and docstring of what it replaces.
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(value, EngineCache) for value in (*args, *kwargs.values())):
            return kind.forward(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        arguments = {**bound, **bound.get("kwargs", {})}
        return _forward(**{k: v for k, v in arguments.items() if k != "kwargs"})

    @functools.wraps(kind._prepare_cache_for_generation)
    def prepare(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        mine = model_kwargs.get(_CACHE)
        engine, reason = _engine_for(self, generation_config, model_kwargs)
        if engine is None:
            _tell(type(self).__name__, reason)
            if isinstance(mine, EngineCache):
                model_kwargs[_CACHE] = _computed_again(self, mine)
        elif mine is None:
            model_kwargs[_CACHE] = EngineCache(engine)
            return None
        else:
            mine.move_to(engine)
        return kind._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)

    def apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The engine would keep the memory of the weights alive that .to() replaces.
        _made.pop(self, None)
        return kind._apply(self, *args, **kwargs)

    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce_ex__": reduce}
    methods = {"forward": forward, "_prepare_cache_for_generation": prepare, "_apply": apply}
    return type(kind.__name__, (kind,), {**body, **methods, "_generates_natively": True})


def _restore(kind: Any) -> Any:
    native = _native_class(kind)
    return native.__new__(native)


@functools.cache
def _tell(model: str, reason: str) -> None:
    logging.getLogger("oats").info("%s.generate runs in transformers: %s", model, reason)


def engine_of(model: Any) -> tuple[Engine | None, str]:
    """The engine of a model as it is now.

    Returns:
        The engine and "", or None and why there is none.
    """
    with _making:
        reason, state = _look_at(model)
        if reason:
            return None, reason
        made = _made.get(model)
        if made is None or made.state != state:
            _made.pop(model, None)
            engine = Engine(model)
            # Making it may pack layers.
            made = _made[model] = _Made(_look_at(model)[1], engine)
        return (made.engine, "") if made.engine.reason is None else (None, made.engine.reason)


def _look_at(model: Any) -> tuple[str, tuple[Any, ...]]:
    """Why the modules cannot run natively, or ""; and all that an engine is made from."""
    blocks = getattr(getattr(model, "model", None), "layers", None)
    count = getattr(model.config, "num_hidden_layers", None)
    if blocks is not None and count != len(blocks):
        return f"{count} of its {len(blocks)} layers run", ()
    if any(_GLOBAL_HOOKS):
        return "there is a hook for all modules", ()
    plain = (bool, int, float, str, list, dict)
    state: list[Any] = [
        [(name, repr(value)) for name, value in vars(model.config).items() if isinstance(value, plain)]
    ]
    for name, module in model.named_modules():
        where = name or type(model).__name__
        own = vars(module)
        if module.training:
            return f"{where} is in training mode", ()
        if "forward" in own or own.get("_compiled_call_impl") is not None:
            return f"forward of {where} was replaced", ()
        hooks = [hook for kind in _HOOKS if own[kind] for hook in own[kind].values()]
        if any(getattr(hook, "__module__", None) != _IDLE_HOOKS for hook in hooks):
            return f"{where} has a hook", ()
        numbers = [(k, v) for k, v in own.items() if type(v) in (bool, int, float) and k[0] != "_"]
        tensors = [
            (k, t.data_ptr(), t.dtype, t.device, 0 if t.is_inference() else t._version)
            for k, t in (*own["_parameters"].items(), *own["_buffers"].items())
            if t is not None
        ]
        state.append((type(module), type(module).forward, numbers, tensors))
    return "", tuple(state)


def _engine_for(model: Any, config: Any, arguments: Mapping[str, Any]) -> tuple[Engine | None, str]:
    """The engine for one call of ``generate``; or None, and why it runs in transformers."""
    reason = _reason_of_call(config, arguments)
    if reason:
        return None, reason
    engine, reason = engine_of(model)
    if engine is None:
        return None, reason
    if engine.context is not None and config.max_length > engine.context:
        return None, f"up to {config.max_length} tokens were asked for, and the engine takes {engine.context}"
    return engine, ""


def _reason_of_call(config: Any, arguments: Mapping[str, Any]) -> str:
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if not config.use_cache:
        return "use_cache is False"
    if config.cache_implementation not in _CACHE_KINDS:
        return f"cache_implementation is {config.cache_implementation!r}"
    if getattr(config, "compile_config", None) is not None:
        return "compile_config was given"
    if getattr(config, "use_mtp", None) or getattr(config, "speculation_type", None):
        return "its candidates are made from hidden states"
    for name, value in arguments.items():
        if name not in _ARGUMENTS and value is not None and value is not False:
            return f"{name} was given"
    cache, mask, positions = (
        arguments.get(_CACHE),
        arguments.get("attention_mask"),
        arguments.get("position_ids"),
    )
    if cache is not None and not isinstance(cache, EngineCache):
        return f"a {type(cache).__name__} was given"
    lengths, width = ([], 0) if cache is None else (cache.lengths(), cache.width)
    pads = [0] * max(1, len(lengths)) if mask is None else _padding(mask)
    if pads is None or (mask is not None and max(pads) == mask.shape[1]):
        return "attention_mask is not padding on the left"
    if lengths and lengths != [max(0, width - pad) for pad in pads]:
        return "attention_mask is not that of the cache"
    if positions is not None and not _are_counted(positions, pads, positions.shape[-1]):
        return "position_ids do not count the tokens"
    return ""


def _computed_again(model: Any, cache: EngineCache) -> Any:
    """A cache of transformers with the same texts."""
    made = DynamicCache(config=model.config)
    if hasattr(made, "activate_past_recording"):
        made.activate_past_recording()  # Whoever had this cache may crop it.
    if cache.width:
        positions = torch.arange(cache.width) - cache.width + torch.tensor(cache.lengths())[:, None]
        ids = torch.zeros_like(positions)
        ids[positions >= 0] = torch.tensor(cache.ids())
        arguments = {"attention_mask": (positions >= 0).long(), "position_ids": positions.clamp(min=0)}
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **arguments, **{_CACHE: made})
    return made


def _padding(mask: Tensor) -> list[int] | None:
    """Columns of padding in front of each row of a mask; None if that is not what it masks."""
    if mask.dim() != 2:
        return None
    real = mask.bool()
    if not bool((real[:, 1:] >= real[:, :-1]).all()):
        return None
    return (mask.shape[1] - real.sum(1)).tolist()


def _are_counted(positions: Tensor, pads: list[int], width: int) -> bool:
    """True if positions, (rows or 1, last columns), count each row's tokens from 0, behind its padding."""
    if positions.dim() != 2:
        return False
    expected = torch.arange(width - positions.shape[1], width) - torch.tensor(pads)[:, None]
    return bool(((positions.cpu() == expected) | (expected < 0)).all())


@torch.no_grad()
def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    use_cache: bool | None = None,
    return_dict: bool | None = None,
    cache_position: Tensor | None = None,
    **others: Any,
) -> Any:
    """``forward`` of a causal language model whose cache is the engine's.

    Returns:
        A ``CausalLMOutputWithPast``: logits (rows, columns kept, vocabulary) in the model's dtype, zeros
        where there is padding; and the cache.

    Raises:
        ConfigError: another argument was given, or mask, positions and cache do not belong together.
    """
    cache = next(value for name, value in others.items() if name in _CACHE_NAMES and value is not None)
    given = [
        name
        for name, value in others.items()
        if name not in _CACHE_NAMES | _OF_GENERATE and value is not None and value is not False
    ]
    if given or input_ids is None or use_cache is False:
        wrong = ", ".join(given) or ("inputs_embeds" if input_ids is None else "use_cache=False")
        raise _unsuited(f"the engine does not take {wrong}")
    rows, columns = input_ids.shape
    width = cache.width + columns
    pads = [0] * rows if attention_mask is None else _padding(attention_mask)
    if pads is None or len(pads) != rows or (attention_mask is not None and attention_mask.shape[1] != width):
        raise _unsuited(f"attention_mask is not padding on the left of {rows} rows of {width} columns")
    if (cache.lengths() or [0] * rows) != [max(0, cache.width - pad) for pad in pads]:
        raise _unsuited(f"{rows} rows with padding of {pads} columns do not go on from {cache}")
    if position_ids is not None and not _are_counted(position_ids, pads, width):
        raise _unsuited("position_ids do not count the tokens")
    texts = [ids[max(0, pad - cache.width) :] for ids, pad in zip(input_ids.tolist(), pads, strict=True)]
    kept = min(logits_to_keep, columns) if isinstance(logits_to_keep, int) and logits_to_keep else columns
    keep = [min(kept, len(text)) for text in texts]
    logits = cache.append(texts, keep, columns)
    if min(keep) == kept:
        logits = logits.view(rows, kept, -1)
    else:
        padded = logits.new_zeros(rows, kept, logits.shape[1])
        padded[torch.arange(kept) >= kept - torch.tensor(keep)[:, None]] = logits
        logits = padded
    if isinstance(logits_to_keep, Tensor):
        logits = logits[:, logits_to_keep]
    output = CausalLMOutputWithPast(logits=logits, **{_CACHE: cache})
    wanted = self.config.return_dict if return_dict is None else return_dict
    return output if wanted else output.to_tuple()


def _unsuited(reason: str) -> ConfigError:
    return ConfigError(f"{reason}; pass a DynamicCache() to generate, which runs in transformers then")
