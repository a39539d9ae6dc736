"""OATS checkpoints in transformers: ``save_pretrained`` and ``from_pretrained``.

Importing this module registers the quantization method ``"oats"`` with transformers; where torch's
entry points are on, that happens by itself (:mod:`oats._autoload`). A compressed model is then saved and
loaded like any other, and its dense weights are never built.

Where this package is not installed, transformers does not know the method: it logs ``Unknown
quantization type, got oats … we will skip the quantization`` and builds dense layers, which it would fill
with random values. To make that fail, each layer also has a *marker*: a one-element tensor under the
name that its dense weight would have. transformers refuses a tensor of the wrong shape,
so that ``from_pretrained`` raises instead of returning a random model (unless
``ignore_mismatched_sizes=True`` asks for that). With this package, the marker is ignored.

On loading:

- ``dtype=torch.float32`` and ``torch.bfloat16`` work, whatever was stored; the values are cast.
- the device is the CPU; ``device_map="auto"`` means the CPU. Move the model afterwards.
- with ``quantization_config=OatsConfig(…)`` a dense model is compressed once its weights are there.
- every file's header is checked against ``config.json`` before a tensor is read, and every mask
  against its values after: a checkpoint that disagrees with itself raises
  :class:`~oats.errors.FormatError`.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from oats.checkpoint.layer_table import layer_table, layers_of, replacements, storable
from oats.checkpoint.quantization_config import (
    EMBEDDING,
    QUANT_METHOD,
    RETRY,
    lowest_format_version,
    parse_quantization_config,
    quantization_dict,
)
from oats.checkpoint.stored_model import StoredTensor, check_sizes, check_tensors, read_header
from oats.compression.saving_hook import register_saving_hook
from oats.config import OatsConfig, Storage
from oats.errors import CalibrationError, ConfigError, FormatError
from oats.format.layer_spec import DTYPES
from oats.models.experts import split_all_
from oats.models.linear import fused_outputs, is_linear, like_linear, replace_, weight_of
from oats.nn.experts import SplitExperts, fused_weights
from oats.nn.fusion import fuse_, unfuse_
from oats.nn.head import RowsOfHead, own_rows, rows_of_head
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from oats.nn.split_linear import SplitLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(kw_only=True, repr=False)
class OatsQuantizationConfig(QuantizationConfigMixin):
    """What ``config.json`` says about a compressed model.

    Given to ``from_pretrained`` of a dense model, it says how to compress it; so does an ``OatsConfig``.

    Args:
        settings: of the compression run.
        layers: name of each compressed layer → its ``rank`` and ``nnz``, and where it has codes the fields of
            its :class:`~oats.config.Storage`; of the output head also its ``embedding``.
        calibration: of a dense model: the path of a UTF-8 text, or token ids (sequences, length); None means
            the first half of ``pydoc_data.topics``. It is not stored.
        samples: sequences cut from a calibration text.
        length: tokens of each; less where the model takes fewer.
    """

    settings: OatsConfig
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # an enum of the methods transformers has
    calibration: Tensor | str | Path | None = field(default=None, compare=False)
    samples: int = field(default=64, compare=False)
    length: int = field(default=512, compare=False)
    _model: weakref.ref[nn.Module] | None = field(default=None, init=False, compare=False)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> OatsQuantizationConfig | tuple[OatsQuantizationConfig, dict[str, Any]]:
        """Read ``quantization_config`` of a ``config.json``.

        Raises:
            FormatError: another format version, a key that is unknown or missing, or a bad value.
        """
        settings, layers = parse_quantization_config(config_dict)
        config = cls(settings=settings, layers=layers)
        return (config, kwargs) if return_unused_kwargs else config

    def follow(self, model: nn.Module) -> None:
        """From now on `layers` are those that `model` has when the configuration is written.

        A model that holds this one shares the configuration, and saves it without asking the quantizer.
        """
        self._model = weakref.ref(model)

    def _update(self) -> None:
        model = self._model() if self._model is not None else None
        if model is not None:
            self.layers = layer_table(model)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the model: a copy belongs to another one, and pickle takes no weak reference."""
        self._update()
        return {**self.__dict__, "_model": None}

    @property
    def format_version(self) -> int:
        """Of the tensors on disk: the lowest that can say what the layers are."""
        return lowest_format_version(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        self._update()
        return quantization_dict(self.settings, self.layers)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Items of :meth:`to_dict`, so that ``dict(config)`` works."""
        yield from self.to_dict().items()


class OatsQuantizer(HfQuantizer):
    """Loads and saves models with `SparseLowRankLinear` layers; called by transformers."""

    quantization_config: OatsQuantizationConfig

    def __init__(self, quantization_config: OatsQuantizationConfig | OatsConfig, **kwargs: Any) -> None:
        if isinstance(quantization_config, OatsConfig):
            quantization_config = OatsQuantizationConfig(settings=quantization_config)
        super().__init__(quantization_config, **kwargs)
        # Layer name in the model that is being loaded → where it was found, for error messages.
        self._origin: dict[str, str] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse devices other than the CPU.

        Raises:
            ConfigError: `device_map` names another device, or the disk.
        """
        if not isinstance(device_map, dict):
            return
        elsewhere = sorted({str(d) for d in device_map.values() if str(d) != "cpu"})
        if elsewhere:
            raise ConfigError(
                f"device_map places layers on {', '.join(elsewhere)}; OATS models are loaded on the CPU, "
                'with device_map="cpu" or without device_map, and moved then'
            )

    def update_device_map(self, device_map: Any) -> Any:
        """``"auto"`` and its like mean the CPU."""
        return {"": torch.device("cpu")} if isinstance(device_map, str) else device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuse dtypes without a kernel; a dense model that is to be compressed may have any.

        Raises:
            ConfigError: `dtype` is neither float32 nor bfloat16.
        """
        if self.pre_quantized and dtype not in DTYPES.values():
            raise ConfigError(
                f"an OATS model cannot be loaded as {dtype}; pass dtype=torch.bfloat16 or "
                "dtype=torch.float32 to from_pretrained"
            )
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        saved_names = [name for each in self.quantization_config.layers for name in _aliases(model, each)]
        split_all_(model, lambda name: any(saved.startswith(f"{name}.") for saved in saved_names))
        places: dict[str, dict[str, dict[str, Any]]] = {}
        markers = set()
        left_out = set()
        known_names = {name for name, _ in model.named_modules(remove_duplicate=False)}
        for saved_name, sizes in self.quantization_config.layers.items():
            if sizes.get(EMBEDDING, "") is None and not known_names & set(_aliases(model, saved_name)):
                left_out.add(saved_name)  # a base model has no head
                continue
            name, part = _find_linear(model, saved_name)
            places.setdefault(name, {})[part] = sizes
            for place in (saved_name, f"{name}.{part}".rstrip(".")):
                for known in (place, place.removesuffix(f".{part}")):
                    markers.add(f"{re.escape(known)}\\.weight$")
        # A layer that the model has under several names is stored under each, and stays one layer.
        linears = {name: model.get_submodule(name) for name in places}
        made: dict[nn.Module, nn.Module] = {}
        for name, linear in linears.items():
            if linear not in made:
                made[linear] = _unfilled(model, name, places[name])
        for name, linear in linears.items():
            model.set_submodule(name, made[linear])
        embedding = self._read_rows_of_head(model)
        layers = layers_of(model)
        ignored = model._keys_to_ignore_on_load_unexpected
        # A list in transformers 5.0, which adds lists of its own; a set in later releases.
        kind = set if isinstance(ignored, set) else list
        model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), *markers])
        self._origin = _check_headers(model, layers, checkpoint_files, left_out, embedding)

    def _read_rows_of_head(self, model: PreTrainedModel) -> str | None:
        """Replace the embedding that has no weight of its own.

        Returns:
            Its name; None where there is none.
        """
        heads = {name: sizes for name, sizes in self.quantization_config.layers.items() if EMBEDDING in sizes}
        for saved_name, sizes in heads.items():
            what = f"config.json: quantization_config.layers[{saved_name!r}]"
            head, saved_embedding = model.get_output_embeddings(), sizes[EMBEDDING]
            modules = dict(model.named_modules(remove_duplicate=False))
            found = [modules[name] for name in _aliases(model, saved_name) if name in modules]
            if saved_embedding is None and not found:
                continue
            if not isinstance(head, SparseLowRankLinear) or head not in found:
                raise FormatError(f"{what} has an {EMBEDDING}, but is not the output head; {RETRY}")
            if head.nnz != head.in_features * head.out_features:
                raise FormatError(f"{what} keeps {head.nnz} values, not all of the output head; {RETRY}")
            if saved_embedding is None:
                continue
            name = next((name for name in _aliases(model, saved_embedding) if name in modules), "")
            embedding, shape = modules.get(name), (head.out_features, head.in_features)
            if not name or not isinstance(embedding, nn.Embedding) or embedding.weight.shape != shape:
                raise FormatError(
                    f"{what} has the embedding {saved_embedding!r}, which is none of {shape[0]} rows and "
                    f"{shape[1]} columns in {type(model).__name__}; {RETRY}"
                )
            replace_(model, embedding, rows_of_head(embedding, head))
            return name
        return None

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            self._compress(model)
            return model
        for name, layer in layers_of(model).items():
            layer.pack_(f"{self._origin[name]}: {name}")
            if layer.bias is not None:
                layer.bias.requires_grad_(False)  # transformers turns it on
        self.quantization_config.follow(model)
        fuse_(model)
        return model

    def _compress(self, model: PreTrainedModel) -> None:
        from transformers.utils import logging

        from oats.compression.compress import compress_

        windows = _calibration_windows(model, self.quantization_config)
        with logging.tqdm(desc="Compressing", unit="layer") as bar:

            def progress(done: int, total: int, name: str, error: float) -> None:
                bar.total = total
                bar.set_postfix_str(f"{name} error {error:.3f}", refresh=False)
                bar.update(1)

            compress_(model, windows, self.quantization_config.settings, progress=progress)
        # compress_ has attached a quantizer of its own, in whose place transformers may put this one.
        self.quantization_config = model.config.quantization_config
        self.pre_quantized = True
        model.hf_quantizer = self  # type: ignore[assignment]

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # A name is what save_pretrained leaves in the model's configuration.
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        with torch.device("meta"):
            original = type(model)(model.config)  # has the kind of linear layer that belongs in each place
        experts = {name: m for name, m in model.named_modules() if isinstance(m, SplitExperts)}
        fused = split_all_(original, experts.__contains__)
        made: dict[nn.Module, nn.Module] = {}
        for name, layer in replacements(model).items():
            if layer not in made:
                bias = None if layer.bias is None else layer.bias.detach().to(wanted)
                made[layer] = like_linear(original.get_submodule(name), layer.weight.to(wanted), bias)
            model.set_submodule(name, made[layer])
        for name, module in experts.items():
            for parameter, weight in fused_weights(module).items():
                fused[name].register_parameter(parameter, nn.Parameter(weight.to(wanted)))
            model.set_submodule(name, fused[name])
        for reads in [module for module in model.modules() if isinstance(module, RowsOfHead)]:
            replace_(model, reads, own_rows(reads, model.get_output_embeddings().weight))
            model.config.tie_word_embeddings = True
            model.tie_weights()
        unfuse_(model)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` writes, by the layers that the model has now."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapters are saved
        layers = layer_table(model)
        if not layers:
            # Nothing to say: a reader without this package shall load it as the dense model that it is.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            return None, {}
        self.quantization_config.follow(model)
        model.config.quantization_config = self.quantization_config
        return storable(model, model.state_dict(), layers.keys() | replacements(model).keys()), {}

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained: gradients pass through the layers, the layers stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` takes the model."""
        return True


def _calibration_windows(model: PreTrainedModel, config: OatsQuantizationConfig) -> Tensor:
    """Token ids to compress a model on, (sequences, length)."""
    from transformers import AutoTokenizer

    from oats.compression.calibration_text import calibration_text
    from oats.compression.tokenization import calibration_sequences
    from oats.models.context import context_limit

    if isinstance(config.calibration, Tensor):
        return config.calibration
    text = calibration_text(config.calibration)
    source = model.config.name_or_path
    tokenizer: Any = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        tokenizer = AutoTokenizer.from_pretrained(source)
    # Some releases make an empty tokenizer where there is none: all is one unknown token.
    if tokenizer is None or len(tokenizer(text.content[:100], add_special_tokens=False).input_ids) < 2:
        raise CalibrationError(
            f"{source} has no tokenizer that turns {text.name} into tokens; pass token ids, (sequences, "
            "length), as OatsQuantizationConfig(settings=…, calibration=ids)"
        )
    vocabulary = cast(int, model.get_input_embeddings().num_embeddings)
    length = min(config.length, context_limit(model) or config.length)
    return calibration_sequences(tokenizer, text, vocabulary, config.samples, length)


def attach(model: Any, config: OatsConfig) -> None:
    """Make ``save_pretrained`` write the OATS format.

    A quantizer that the model was loaded with (GGUF) is replaced: its layers are gone.

    Its layers may be replaced before or after: what is written is what the model has when it is saved.

    Args:
        model: a ``PreTrainedModel``.
        config: the settings that its layers are compressed with.
    """
    quantizer = OatsQuantizer(OatsQuantizationConfig(settings=config, layers=layer_table(model)))
    quantizer.quantization_config.follow(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = quantizer.quantization_config


def _find_linear(model: PreTrainedModel, saved_name: str) -> tuple[str, str]:
    """Name of the linear layer in the model, and which part of it is meant ("" for the whole)."""
    for name in _aliases(model, saved_name):
        for place, part in ((name, ""), name.rpartition(".")[::2]):
            try:
                module = model.get_submodule(place)
            except AttributeError:
                continue
            if is_linear(module) and (not part or part in _fused_outputs(model, place)):
                return place, part
            if not part:
                raise FormatError(
                    f"config.json: quantization_config.layers names {saved_name!r}, which is a "
                    f"{type(module).__name__} in {type(model).__name__}, not a linear layer; {RETRY}"
                )
    raise FormatError(
        f"config.json: quantization_config.layers names {saved_name!r}, which is not in "
        f"{type(model).__name__}; load the checkpoint with the class it was saved from, or {RETRY}"
    )


def _aliases(model: PreTrainedModel, saved_name: str) -> tuple[str, str, str]:
    """The names that a layer of a checkpoint may have in the model."""
    # As transformers does for tensors: a model with a head and its base model load each other's checkpoints.
    prefix = f"{model.base_model_prefix}."
    return saved_name, saved_name.removeprefix(prefix), prefix + saved_name


def _fused_outputs(model: nn.Module, name: str) -> dict[str, int]:
    owner, _, attribute = name.rpartition(".")
    return fused_outputs(model.get_submodule(owner), attribute)


def _unfilled(model: nn.Module, name: str, parts: dict[str, dict[str, Any]]) -> nn.Module:
    """What replaces a linear layer: part → rank and nnz, as config.json has them, "" for the whole."""
    linear = model.get_submodule(name)
    weight = weight_of(linear)
    d_out, d_in = weight.shape
    outputs = {"": d_out} if "" in parts else _fused_outputs(model, name)
    if outputs.keys() != parts.keys():
        raise FormatError(
            f"config.json: quantization_config.layers has the parts {sorted(parts)} of {name!r}, expected "
            f"{sorted(outputs)}; {RETRY}"
        )
    layers = {}
    for part, rows in outputs.items():
        rank, nnz = parts[part]["rank"], parts[part]["nnz"]
        check_sizes(f"{name}.{part}" if part else name, rows, d_in, rank=rank, nnz=nnz)
        layers[part] = SparseLowRankLinear(
            d_in,
            rows,
            rank,
            nnz,
            bias=linear.bias is not None,
            dtype=weight.dtype,
            device="meta",
            storage=Storage.from_dict(parts[part]),
        )
    return layers[""] if "" in parts else SplitLinear(layers)


def _check_headers(
    model: PreTrainedModel,
    layers: Mapping[str, SparseLowRankLinear],
    checkpoint_files: list[str] | None,
    left_out: Collection[str],
    embedding: str | None,
) -> dict[str, str]:
    """Check names, shapes and dtypes of every layer's tensors; returns layer name → file.

    transformers would only warn about a missing tensor, and fill it with random values.
    """
    if not checkpoint_files or not all(path.endswith(".safetensors") for path in checkpoint_files):
        raise ConfigError(
            "an OATS checkpoint is loaded from safetensors files; from_pretrained was given "
            f"{checkpoint_files or 'a state dict'}. Pass the directory that save_pretrained wrote"
        )
    stored = _stored_tensors(model, checkpoint_files)
    for key, tensor in stored.items():
        name, _, tensor_name = key.rpartition(".")
        if tensor_name in ("low_rank_u", "low_rank_v") and name not in layers and name not in left_out:
            raise FormatError(
                f"{tensor.path}: {key} belongs to a layer that config.json (quantization_config.layers) does "
                f"not list for {type(model).__name__}; the files do not belong together, {RETRY}"
            )
    if f"{embedding}.weight" in stored:
        raise FormatError(
            f"{stored[f'{embedding}.weight'].path}: {embedding} has a weight, but config.json says that it "
            f"reads the rows of the output head; {RETRY}"
        )
    for name, layer in layers.items():
        shapes = {part: tuple(tensor.shape) for part, tensor in layer.state_dict().items()}
        found = {part: stored[f"{name}.{part}"] for part in shapes if f"{name}.{part}" in stored}
        check_tensors(name, shapes, found, ", ".join(checkpoint_files), layer.storage)
    return {name: stored[f"{name}.mask"].path for name in layers}


def _stored_tensors(model: PreTrainedModel, checkpoint_files: list[str]) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint, by the name that transformers will load it under."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    # DINOv2's checkpoints have the biases of gate and up in one tensor.
    chunks = [
        entry
        for entry in conversions
        if isinstance(entry, WeightConverter) and [type(step) for step in entry.operations] == [Chunk]
    ]
    state_dict = model.state_dict()
    stored = {}
    for path in checkpoint_files:
        for key, tensor in read_header(path).items():
            name, source = rename_source_key(key, renamings, chunks, model.base_model_prefix, state_dict)
            if source is not None:
                targets = next(entry.target_patterns for entry in chunks if source in entry.source_patterns)
                shape = (tensor.shape[0] // len(targets), *tensor.shape[1:])
                part = replace(tensor, shape=shape, nbytes=tensor.nbytes // len(targets))
                stored.update({name.replace(targets[0], target): part for target in targets})
                continue
            if name not in state_dict and key in state_dict:
                name = key
            stored[name] = tensor
    return stored


def _register() -> None:
    # Not register_quantizer(), which raises where the method is known already.
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = OatsQuantizationConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = OatsQuantizer
    register_saving_hook(attach)


_register()
