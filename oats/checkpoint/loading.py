"""Loads the model that a user names: a directory, a GGUF file, or a name on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from oats.checkpoint.config_json import read_config, saved_class
from oats.checkpoint.dense_source import DenseSource, checkpoint_files, compressed_dtype, stored_float_dtype
from oats.errors import CheckpointError, ConfigError, FormatError, OatsError, first_line


def load_model(
    model: str | Path, dtype: str | None = None, *, as_saved: bool = False, **options: Any
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: a local directory (safetensors or one GGUF file), a GGUF file, or a name on the
            Hugging Face hub.
        dtype: ``"bf16"``, ``"fp32"``, or None for that of the checkpoint. A GGUF file is dequantised;
            None then means bf16.
        as_saved: also load models that are no causal language models (encoders, vision transformers), with
            the class that saved them.
        options: more for ``from_pretrained``.

    Returns:
        The model, in evaluation mode, and the tokenizer; None for a model that takes images.

    Raises:
        CheckpointError: there is no model of that name, or it cannot be loaded.
        ConfigError: `dtype` is none of these.
        FormatError: config.json is damaged, or the model is compressed and damaged.
    """
    _check_dtype(dtype)
    source, gguf_file = _locate(model)
    stored = _DTYPES["bf16"] if gguf_file and dtype is None else _DTYPES[dtype]
    return _load(model, source, gguf_file, as_saved and not gguf_file, dtype=stored, **options)


def load_dense_source(
    model: str | Path, dtype: str | None = None, blocks: str | None = None
) -> tuple[DenseSource, Any, torch.dtype] | None:
    """Load a model that takes tokens, except for its blocks, and its tokenizer.

    Args:
        model: as in :func:`load_model`; loaded with the class that saved it.
        dtype: to use the model in, as there.
        blocks: dotted path of the list of blocks; None tries the known paths.

    Returns:
        The model on disk, the tokenizer, and the dtype. None if the model is not in safetensors files of a
        local directory, if its blocks cannot be read one at a time, or if it takes images.

    Raises:
        CheckpointError, ConfigError, FormatError: as :func:`load_model`.
        UnsupportedModelError: the list of blocks was not found.
    """
    _check_dtype(dtype)
    source, gguf_file = _locate(model)
    directory = Path(source)
    if gguf_file or not directory.is_dir() or not checkpoint_files(directory):
        return None
    try:
        wanted, held = compressed_dtype(directory, dtype), stored_float_dtype(directory)
    except FormatError as error:
        raise CheckpointError(f"cannot load the model {model}: {error}") from error
    # In the dtype of the files no weight is copied: the files are mapped into memory.
    network, tokenizer = _load(model, source, None, True, dtype=str(held).removeprefix("torch."))
    if tokenizer is None:
        return None
    opened = DenseSource.open(directory, network, blocks)
    return None if opened is None else (opened, tokenizer, wanted)


_DTYPES = {None: "auto", "bf16": "bfloat16", "fp32": "float32"}


def _check_dtype(dtype: str | None) -> None:
    if dtype not in _DTYPES:
        raise ConfigError(f'dtype must be "bf16" or "fp32", got {dtype!r}')


def _load(
    model: str | Path, source: str, gguf_file: str | None, as_saved: bool, **options: Any
) -> tuple[Any, Any]:
    import transformers

    if Path(source).is_dir() and not gguf_file:
        read_config(Path(source) / "config.json")  # transformers does not check it
    file = {"gguf_file": gguf_file} if gguf_file else {}
    # Versions of transformers that have GgufConfig may keep the weights in GGUF blocks.
    if gguf_file and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        # Any, since from_pretrained is typed as if it always returned a model.
        kind: Any = _class_to_load(source) if as_saved else transformers.AutoModelForCausalLM
        loaded, problems = kind.from_pretrained(source, output_loading_info=True, **file, **options)
        tokenizer = None
        if loaded.main_input_name != "pixel_values":
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **file)
    except OatsError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        what = "" if Path(source).exists() else " (no such local path, so it was looked up on the hub)"
        why = "" if as_saved or gguf_file else _not_causal(source)
        raise CheckpointError(f"cannot load the model {model}{what}: {why or first_line(error)}") from error
    missing = sorted(problems["missing_keys"])
    if missing:
        # transformers would fill them with random numbers.
        if not as_saved and not gguf_file and (why := _not_causal(source)):
            raise CheckpointError(f"cannot load the model {model}: {why}")
        raise CheckpointError(
            f"the model {model} lacks {len(missing)} of its weights, e.g. {missing[0]}; download it again, "
            f"or give a checkpoint of {type(loaded).__name__}"
        )
    return loaded.eval(), tokenizer


def _class_to_load(source: str) -> Any:
    """AutoModelForCausalLM for causal language models and unknown classes; else the class that saved it."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = transformers.AutoConfig.from_pretrained(source)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if config.architectures and config.architectures[0] == causal:
        return transformers.AutoModelForCausalLM
    return saved_class(config.architectures) or transformers.AutoModelForCausalLM


def _not_causal(source: str) -> str:
    """Says that a model is no causal language model; empty if it is one, or not known."""
    import transformers

    try:
        kind = _class_to_load(source)
    except (OSError, ValueError, KeyError):
        return ""
    if kind is transformers.AutoModelForCausalLM:
        return ""
    return f"it was saved as {kind.__name__}, but a causal language model is needed to predict text"


def _locate(model: str | Path) -> tuple[str, str | None]:
    """Directory or hub name of a model, and the GGUF file in it to load, if any."""
    path = Path(model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"{path} is a file but not a .gguf file; give the directory that holds the model"
            )
        return str(path.parent), path.name
    if not path.is_dir():
        # A hub name is "name" or "owner/name"; everything else is meant as a path.
        if path.is_absolute() or str(model).startswith((".", "~")) or len(path.parts) > 2:
            raise CheckpointError(f"there is no model directory {model}; check the path")
        return str(model), None
    if (path / "config.json").is_file():
        return str(path), None
    gguf_files = sorted(file.name for file in path.glob("*.gguf"))
    if not gguf_files:
        raise CheckpointError(
            f"{path} holds neither config.json nor a .gguf file, so it is no model; check the path, "
            "or whether the run that should have written it finished"
        )
    if len(gguf_files) > 1:
        raise CheckpointError(
            f"{path} holds {len(gguf_files)} .gguf files ({', '.join(gguf_files)}); give the path of one"
        )
    return str(path), gguf_files[0]
