"""Models on disk: loading what a user names, and saving so that only a finished directory has the name."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oats.atomic_file import flush
from oats.errors import CheckpointError, ConfigError, FormatError, OatsError, OutputExistsError

if TYPE_CHECKING:
    import torch

    from oats.compress import CompressionReport
    from oats.integrations.dense_source import DenseSource
    from oats.integrations.record import Record


def load_model(model: str | Path, dtype: str | None = None, *, as_saved: bool = False) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: a local directory (safetensors or one GGUF file), a GGUF file, or a name on the
            Hugging Face hub.
        dtype: ``"bf16"``, ``"fp32"``, or None for the checkpoint's own. A GGUF file is
            dequantised and has none: None means bf16.
        as_saved: take the class of transformers that saved the model, where it is not a causal language
            model: an encoder, a vision transformer.

    Returns:
        The model, in evaluation mode, and the tokenizer; None for a model that takes images.

    Raises:
        CheckpointError: there is no model of that name, or it cannot be loaded.
        ConfigError: another dtype.
        FormatError: the model is a compressed one, or its config.json, and damaged.
    """
    _check_dtype(dtype)
    source, gguf_file = _locate(model)
    stored = _DTYPES["bf16"] if gguf_file and dtype is None else _DTYPES[dtype]
    return _load(model, source, gguf_file, stored, as_saved and not gguf_file)


def load_dense_source(
    model: str | Path, dtype: str | None = None, blocks: str | None = None
) -> tuple[DenseSource, Any, torch.dtype] | None:
    """Load all but the blocks of a model that takes tokens, and its tokenizer.

    Args:
        model: as in :func:`load_model`; it is loaded by the class that saved it.
        dtype: in which the model is to be used, as there.
        blocks: dotted path of the list of blocks; None means that :mod:`oats.models` knows it.

    Returns:
        The model on disk, the tokenizer, and the dtype; None where it does not lie in safetensors files of a
        local directory, blocks cannot be read from them one at a time, or it takes images.

    Raises:
        CheckpointError, ConfigError, FormatError: as :func:`load_model`.
        UnsupportedModelError: the list of blocks was not found.
    """
    from oats.integrations.dense_source import (
        DenseSource,
        checkpoint_files,
        compressed_dtype,
        stored_float_dtype,
    )

    _check_dtype(dtype)
    source, gguf_file = _locate(model)
    directory = Path(source)
    if gguf_file or not directory.is_dir() or not checkpoint_files(directory):
        return None
    try:
        wanted, held = compressed_dtype(directory, dtype), stored_float_dtype(directory)
    except FormatError as error:
        raise CheckpointError(f"cannot load the model {model}: {error}") from error
    # In the dtype of the files nothing is read: weights are the files themselves, mapped into memory.
    network, tokenizer = _load(model, source, None, str(held).removeprefix("torch."), as_saved=True)
    if tokenizer is None:
        return None
    opened = DenseSource.open(directory, network, blocks)
    return None if opened is None else (opened, tokenizer, wanted)


_DTYPES = {None: "auto", "bf16": "bfloat16", "fp32": "float32"}


def _check_dtype(dtype: str | None) -> None:
    if dtype not in _DTYPES:
        raise ConfigError(f'dtype must be "bf16" or "fp32", got {dtype!r}')


def _load(
    model: str | Path, source: str, gguf_file: str | None, dtype: str, as_saved: bool
) -> tuple[Any, Any]:
    import transformers
    from safetensors import SafetensorError

    from oats.integrations.stored_model import read_config

    if Path(source).is_dir() and not gguf_file:
        read_config(Path(source) / "config.json")  # transformers takes what is in there for granted
    options: dict[str, Any] = {"dtype": dtype}
    if gguf_file:
        options["gguf_file"] = gguf_file
        # Releases of transformers that have GgufConfig may leave the weights in GGUF blocks.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        # Typed as returning a model, whatever output_loading_info says.
        kind: Any = _saved_class(source) if as_saved else transformers.AutoModelForCausalLM
        loaded, problems = kind.from_pretrained(source, output_loading_info=True, **options)
        tokenizer = None
        if loaded.main_input_name != "pixel_values":
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, **({"gguf_file": gguf_file} if gguf_file else {})
            )
    except OatsError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        what = "" if Path(source).exists() else " (no such local path, so it was looked up on the hub)"
        why = "" if as_saved or gguf_file else _not_causal(source)
        raise CheckpointError(f"cannot load the model {model}{what}: {why or _first_line(error)}") from error
    missing = sorted(problems["missing_keys"])
    if missing:
        # transformers fills them with random numbers and goes on.
        why = "" if as_saved or gguf_file else _not_causal(source)
        if why:
            raise CheckpointError(f"cannot load the model {model}: {why}")
        raise CheckpointError(
            f"the model {model} lacks {len(missing)} of its weights, e.g. {missing[0]}; download it again, "
            f"or give a checkpoint of {type(loaded).__name__}"
        )
    return loaded.eval(), tokenizer


def _saved_class(source: str) -> Any:
    """The class that saved a model; that of causal language models where it is one, or not transformers'."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = transformers.AutoConfig.from_pretrained(source)
    name = next(iter(config.architectures or []), "")
    if name == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type):
        return transformers.AutoModelForCausalLM
    return getattr(transformers, name, transformers.AutoModelForCausalLM)


def _not_causal(source: str) -> str:
    """Why a model that could not be loaded as a causal language model is none; empty where it is one."""
    import transformers

    try:
        kind = _saved_class(source)
    except (OSError, ValueError, KeyError):
        return ""
    if kind is transformers.AutoModelForCausalLM:
        return ""
    return f"it was saved as {kind.__name__}, but a causal language model is needed to predict text"


def _locate(model: str | Path) -> tuple[str, str | None]:
    """Directory or hub name, and the GGUF file in it where that is what to load."""
    path = Path(model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"{path} is a file but not a .gguf file; give the directory that holds the model"
            )
        return str(path.parent), path.name
    if not path.is_dir():
        # A hub name is "name" or "owner/name"; anything else was meant as a path.
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


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_output(out: str | Path, *, overwrite: bool = False, source: str | Path | None = None) -> Path:
    """Refuse an output directory before the long work rather than after it.

    Args:
        out: where the result shall go.
        overwrite: whether a model that is already there may be replaced.
        source: the model that is being read; `out` must not contain it.

    Returns:
        The resolved path.

    Raises:
        OutputExistsError: `out` is in use, or cannot be written.
    """
    out = Path(out).resolve()
    if source is not None and Path(source).exists():
        model = Path(source).resolve()
        if out == model or out in model.parents:
            raise OutputExistsError(f"the output directory {out} holds the model itself; choose another")
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"the output {out} is a file; choose a directory")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise OutputExistsError(
                f"the output directory {out} is not empty; choose another, or overwrite it (--overwrite)"
            )
        if not (out / "config.json").is_file():
            raise OutputExistsError(
                f"the output directory {out} holds files but no model (no config.json), so it is not "
                "overwritten; choose another, or empty it yourself"
            )
    existing = next(parent for parent in out.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputExistsError(f"the output directory {out} cannot be made: {existing} is not writable")
    return out


def save_model(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    overwrite: bool = False,
    report: CompressionReport | None = None,
    record: Record | None = None,
    **known: Any,
) -> Path:
    """Save a model and its tokenizer as a Hugging Face directory, with a model card, all or nothing.

    The files are written to a hidden directory beside `out` and flushed to disk, which then gets the name.
    A run that is killed leaves `out` as it was, with one exception: to overwrite takes two renames, and
    between them the old model is at ``.OUT.replaced-<pid>`` and nothing at `out`. What a killed run left
    of its own files is removed by the next one with the same `out`.

    Args:
        overwrite: replace a model that is already at `out`.
        report: of the compression, whose errors are kept beside the weights.
        record: what is known without a report, of a model that was compressed before.
        known: what else the model card says, see :func:`oats.integrations.model_card.write_model_card`. From
            a local directory `source`, files for image processors and sentence-transformers are copied.

    Raises:
        OutputExistsError: `out` is in use, see :func:`check_output`.
        OatsError: the files cannot be written.
    """
    from safetensors import SafetensorError

    from oats.integrations.companions import copy_companions
    from oats.integrations.model_card import write_model_card

    out = check_output(out, overwrite=overwrite)
    try:
        with _new_directory(out, overwrite) as partial:
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            if "source" in known:
                copy_companions(known["source"], partial)
            if report is not None or getattr(model, "quantization_method", None) == "oats":
                if record is not None:
                    record.write(partial)
                # Where a class that transformers does not have gives layers other names in files, headers
                # do not tell which tensors are whose, and the card is left out.
                with contextlib.suppress(FormatError):
                    write_model_card(partial, report, name=out.name, **known)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise OatsError(f"cannot write {out}: {reason}; nothing was changed there") from error
    return out


@contextlib.contextmanager
def _new_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """A directory beside `out` that gets its name if the body succeeds, and is removed if not."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    aside = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_partial(out)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        if overwrite and out.exists():
            out.rename(aside)
        elif out.exists():
            out.rmdir()  # fails if something was put there since it was checked
        partial.rename(out)
        flush(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_partial(out: Path) -> None:
    """Remove what runs that are no longer alive, or this process, left unfinished beside `out`."""
    prefix = f".{out.name}.partial-"
    for path in out.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdecimal() and not _is_another_process(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_another_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True
