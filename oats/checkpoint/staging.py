"""The directory that collects a compressed model, and from which a run that was stopped goes on.

It lies beside the output, as ``.OUT.unfinished``, and holds

- ``plan.json``: everything that decides the result. Only a run with an equal plan goes on from here.
- ``model/``: what becomes the output: first a file for each finished block, in the end all files.
- ``hidden/<block>/<batch>.safetensors``: the inputs of the first block that is not finished;
  ``dense/<block>/…``: the same in the dense model, if the settings need it.
- ``compressions.json``: the compression of each matrix, if the budget is not uniform; ``measured/…``: hidden
  states while they are measured.
- ``progress.json``: the number of finished blocks, and what became of their layers. It is replaced once the
  block's file and the inputs of the next block are on disk, so that it says where to go on.

Each file is written under another name, flushed to disk and renamed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oats.checkpoint.atomic import swap_in, write_file, write_text
from oats.errors import ConfigError, FormatError, OatsError, OutputExistsError

PLAN, PROGRESS, COMPRESSIONS = "plan.json", "progress.json", "compressions.json"
LOCK, MODEL, REPLACED = "lock", "model", "replaced"


class Staging:
    """The unfinished output of one run.

    Methods that read raise FormatError if a file is damaged; those that write raise OatsError if they cannot.

    Attributes:
        out: where the model will be.
        directory: holds the files until then.
        model: the directory in it that becomes `out`.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.directory = out.with_name(f".{out.name}.unfinished")
        self.model = self.directory / MODEL
        self._lock: int | None = None

    def exists(self) -> bool:
        """True if an earlier run left a plan."""
        return (self.directory / PLAN).is_file()

    def check_plan(self, plan: Mapping[str, Any]) -> None:
        """Refuse to go on from a run with another plan: a ConfigError."""
        differences = self.differences(plan)
        if differences:
            raise ConfigError(
                f"{self.directory} holds what an earlier run finished, but {'; '.join(differences)}. Run the "
                "same command as then to go on, or start over with --restart"
            )

    def differences(self, plan: Mapping[str, Any]) -> list[str]:
        """Say how the earlier run's plan differs from this one."""
        before, now = self._read(PLAN), json.loads(json.dumps(plan))
        return [
            f"{key} was {_shown(before.get(key))} and is {_shown(now.get(key))}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]

    def create(self, plan: Mapping[str, Any]) -> None:
        """Make the directory, unless there is one."""
        with self.writing():
            self.model.mkdir(parents=True, exist_ok=True)
        if not self.exists():
            self._write(PLAN, plan)

    def lock(self) -> None:
        """Keep other runs out until :meth:`unlock`, or until this process ends.

        Raises:
            OutputExistsError: another run is at work; :meth:`sweep` and :meth:`discard` raise it too.
        """
        if self._lock is not None or not self.directory.is_dir():
            return
        self._lock = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.unlock()
            raise OutputExistsError(
                f"another run is writing {self.out} (it holds {self.directory / LOCK}); wait for it to end"
            ) from error

    def unlock(self) -> None:
        """Let other runs in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Remove the directory; the next run finishes a removal that was stopped."""
        plan = self.directory / PLAN
        if self.model.exists():
            # Not delivered. The plan goes first: no run goes on from a directory without one.
            plan.unlink(missing_ok=True)
        # Delivered. The plan goes last: with it, is_delivered() says that only this removal is left to do.
        for entry in self.directory.glob("*"):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
        plan.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def sweep(self) -> None:
        """Finish a removal that was stopped."""
        if self.directory.exists() and not self.exists():
            self.discard()

    def discard(self) -> None:
        """Remove what an earlier run left."""
        self.lock()
        self.remove()
        self.unlock()

    def progress(self) -> dict[str, Any]:
        """What :meth:`commit` was given last: ``blocks`` is the number of finished blocks."""
        return self._read(PROGRESS) or {"blocks": 0}

    def commit(self, progress: Mapping[str, Any]) -> None:
        """Note that more blocks are finished, and remove the inputs of those blocks."""
        self._write(PROGRESS, progress)
        for inputs in [*self.directory.glob("hidden/*"), *self.directory.glob("dense/*")]:
            if inputs.name != str(progress["blocks"]):
                shutil.rmtree(inputs, ignore_errors=True)

    def planned(self, key: str) -> Any:
        """One entry of the earlier run's plan; None if there is no such run or entry."""
        return self._read(PLAN).get(key)

    def compressions(self) -> dict[str, float]:
        """Name of each matrix → its compression; {} if no run has measured them yet."""
        return self._read(COMPRESSIONS)

    def note_compressions(self, compressions: Mapping[str, float]) -> None:
        """Keep what :meth:`compressions` returns from now on."""
        self._write(COMPRESSIONS, compressions)
        shutil.rmtree(self.directory / "measured", ignore_errors=True)

    def deliver(self, *, overwrite: bool) -> None:
        """Give the model its name; `overwrite` lets it replace what has that name now."""
        with self.writing():
            # Runs that were killed leave what they were writing; safetensors calls it ".tmpX4gT0a".
            for partial in self.model.glob(".*"):
                if partial.is_file():
                    partial.unlink()
            aside = self.directory / REPLACED
            if self.out.exists():
                shutil.rmtree(aside, ignore_errors=True)
            swap_in(self.model, self.out, aside, overwrite=overwrite)

    def is_delivered(self) -> bool:
        """True if an earlier run was stopped after it had given the model its name."""
        return self.exists() and not self.model.exists() and self.out.is_dir()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an error of the system while a file is written into an OatsError that says what is kept."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if isinstance(error, OatsError):
                raise
            # safetensors keeps only the text of the system's error.
            full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OatsError(
                f"cannot write {self.directory}: {reason}; "
                + ("make room" if full else "mend that")
                + f" and run the same command again: {self._kept()}"
            ) from error

    def _kept(self) -> str:
        blocks = 0
        with suppress(OatsError):
            blocks = self.progress()["blocks"]
        return f"it goes on after the {blocks} finished blocks" if blocks else "no block is finished yet"

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        with self.writing():
            write_text(self.directory / name, json.dumps(value, indent=1), alone=True)

    def _read(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; {} if there is no such file."""
        file = self.directory / name
        if not file.is_file():
            return {}
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(f"{file} cannot be read ({error}); start over with --restart") from error
        if not isinstance(value, dict):
            raise FormatError(f"{file} is not a JSON object; start over with --restart")
        return value


class StoredStates:
    """What a block returned for each batch, on disk: tensors, nested tuples of them, None and plain values.

    An entry is read when it is asked for. It is mapped into memory, and only as long as it is used.
    """

    def __init__(self, directory: Path, batches: int, staging: Staging) -> None:
        self._directory, self._batches, self._staging = directory, batches, staging

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self._batches))

    def __getitem__(self, index: int) -> Any:
        file = self._file(index)
        try:
            with safe_open(file, framework="pt") as opened:
                structure = json.loads(opened.metadata()["structure"])
                return _restored(structure, opened.get_tensor)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{file} is missing or damaged ({error}); start over with --restart") from error

    def __setitem__(self, index: int, value: Any) -> None:
        tensors: dict[str, Tensor] = {}
        structure = json.dumps(_described(value, tensors))
        with self._staging.writing():
            self._directory.mkdir(parents=True, exist_ok=True)
            file = self._file(index)
            write_file(file, lambda path: save_file(tensors, path, {"structure": structure}), alone=True)

    def _file(self, index: int) -> Path:
        return self._directory / f"{index}.safetensors"


def _described(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors of a value into `tensors`; returns JSON that says how they are nested."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy: safetensors does not store two tensors that share memory.
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, tuple):
        return [_described(entry, tensors) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise OatsError(
        f"a block returns a {type(value).__name__}, which cannot be kept on disk between two blocks; load "
        "the model and call oats.compress_"
    )


def _restored(structure: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(structure, list):
        return tuple(_restored(entry, tensor) for entry in structure)
    return tensor(structure["tensor"]) if "tensor" in structure else structure["value"]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
