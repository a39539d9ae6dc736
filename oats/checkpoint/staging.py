"""The directory in which a compressed model is put together, and from which a run that was stopped goes on.

It lies beside the output, as ``.OUT.unfinished``, and holds

- ``plan.json``: what the run was started with. Another run goes on only from an equal plan.
- ``model/``: what will be the output: a file for each finished block, in the end all that belongs there.
- ``hidden/<block>/<batch>.safetensors``: what enters the first block that is not finished, and
  ``dense/…`` the same in the dense model, for matching.
- ``compressions.json``: of each matrix, where the budget is not uniform; ``measured/…`` while it is made.
- ``progress.json``: how many blocks are finished, and what became of their layers. It is replaced when the
  block's file and the inputs of the next block are on disk; so it is what decides where to go on.

Each of these files is written under another name, flushed to disk and renamed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oats.checkpoint.atomic_directory import swap_in
from oats.checkpoint.atomic_file import write_file, write_text
from oats.errors import ConfigError, FormatError, OatsError, OutputExistsError

PLAN, PROGRESS, LOCK, MODEL = "plan.json", "progress.json", "lock", "model"
HIDDEN, DENSE, MEASURED, REPLACED = "hidden", "dense", "measured", "replaced"
COMPRESSIONS = "compressions.json"


class Staging:
    """The unfinished output of one run.

    Args:
        out: where the model shall go.

    Attributes:
        directory: where its parts are until then.
        model: what will be the output.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.directory = out.with_name(f".{out.name}.unfinished")
        self.model = self.directory / MODEL
        self._lock: int | None = None

    def exists(self) -> bool:
        """Whether an earlier run left something to go on from."""
        return (self.directory / PLAN).is_file()

    def check_plan(self, plan: Mapping[str, Any]) -> None:
        """Refuse to go on with another run's blocks.

        Raises:
            ConfigError: the earlier run's plan was another one.
            FormatError: it cannot be read.
        """
        differences = self.differences(plan)
        if differences:
            raise ConfigError(
                f"{self.directory} holds what an earlier run finished, but {'; '.join(differences)}. Run the "
                "same command as then to go on, or start over with --restart"
            )

    def differences(self, plan: Mapping[str, Any]) -> list[str]:
        """What of the earlier run's plan was not as in this one, for people.

        Raises:
            FormatError: it cannot be read.
        """
        before, now = _read_json(self.directory / PLAN), json.loads(json.dumps(plan))
        return [
            f"{key} was {_shown(before.get(key))} and is {_shown(now.get(key))}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]

    def create(self, plan: Mapping[str, Any]) -> None:
        """Make the directory, unless it is there.

        Raises:
            OatsError: it cannot be written.
        """
        with self.writing():
            self.model.mkdir(parents=True, exist_ok=True)
            if not self.exists():
                write_text(self.directory / PLAN, json.dumps(plan, indent=1), alone=True)

    def lock(self) -> None:
        """Keep other runs out for as long as this process lives.

        Raises:
            OutputExistsError: one is at work.
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
        """Forget everything; a removal that is stopped is finished by the next run."""
        plan = self.directory / PLAN
        if self.model.exists():
            # Not delivered: without the plan, what is left counts as nothing.
            plan.unlink(missing_ok=True)
        # Delivered: as long as the plan is there, so is what says that only this removal is left to do.
        for entry in self.directory.glob("*"):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
        plan.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def sweep(self) -> None:
        """Finish a removal that was stopped.

        Raises:
            OutputExistsError: another run is at work there.
        """
        if self.directory.exists() and not self.exists():
            self.discard()

    def discard(self) -> None:
        """Forget what an earlier run left.

        Raises:
            OutputExistsError: it is still at work.
        """
        self.lock()
        self.remove()
        self.unlock()

    def progress(self) -> dict[str, Any]:
        """What is finished: ``blocks``, their number, and what the run noted beside it.

        Raises:
            FormatError: the file cannot be read.
        """
        file = self.directory / PROGRESS
        return _read_json(file) if file.is_file() else {"blocks": 0}

    def commit(self, progress: Mapping[str, Any]) -> None:
        """Note that more blocks are finished, and drop what only they needed.

        Args:
            progress: as :meth:`progress` returns it.

        Raises:
            OatsError: it cannot be written.
        """
        with self.writing():
            write_text(self.directory / PROGRESS, json.dumps(progress), alone=True)
        for kind in (HIDDEN, DENSE):
            self.drop(kind, keep=progress["blocks"])

    def drop(self, kind: str, *, keep: int) -> None:
        """Remove the inputs of all blocks but one."""
        for old in (self.directory / kind).glob("*"):
            if old.name != str(keep):
                shutil.rmtree(old, ignore_errors=True)

    def planned(self, key: str) -> Any:
        """One entry of the earlier run's plan; None where it has none.

        Raises:
            FormatError: the plan cannot be read.
        """
        return _read_json(self.directory / PLAN).get(key)

    def compressions(self) -> dict[str, float] | None:
        """Name of each matrix → its compression, where an earlier run got so far.

        Raises:
            FormatError: the file cannot be read.
        """
        file = self.directory / COMPRESSIONS
        return _read_json(file) if file.is_file() else None

    def note_compressions(self, compressions: Mapping[str, float]) -> None:
        """Keep what :meth:`compressions` returns.

        Raises:
            OatsError: it cannot be written.
        """
        with self.writing():
            write_text(self.directory / COMPRESSIONS, json.dumps(compressions, indent=1), alone=True)
        self.drop(MEASURED, keep=0)

    def deliver(self, *, overwrite: bool) -> None:
        """Give the model its name.

        Args:
            overwrite: whether what has the name now may be replaced.

        Raises:
            OatsError: something was put there since it was checked.
        """
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
        """Whether an earlier run was stopped after it had given the model its name."""
        return self.exists() and not self.model.exists() and self.out.is_dir()

    def states(self, kind: str, block: int, batches: int) -> StoredStates:
        """The inputs of a block, of which there are as many as batches."""
        return StoredStates(self.directory / kind / str(block), batches, self)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what can go wrong while something is written into an error that says what is kept.

        Raises:
            OatsError: it did.
        """
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            if isinstance(error, OatsError):
                raise
            # The library in between keeps only the text of the system's error.
            full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OatsError(
                f"cannot write {self.directory}: {reason}; "
                + ("make room" if full else "mend that")
                + f" and run the same command again: {self._kept()}"
            ) from error

    def _kept(self) -> str:
        try:
            blocks = self.progress()["blocks"]
        except OatsError:
            blocks = 0
        return f"it goes on after the {blocks} finished blocks" if blocks else "no block is finished yet"


class StoredStates:
    """What a block returned for each batch, on disk: tensors, nested tuples of them, None and plain values.

    Each is read when it is asked for, and mapped into memory only for as long as it is used.
    """

    def __init__(self, directory: Path, batches: int, staging: Staging) -> None:
        self._directory, self._batches, self._staging = directory, batches, staging

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self._batches))

    def __getitem__(self, index: int) -> Any:
        from safetensors import SafetensorError, safe_open

        file = self._file(index)
        try:
            with safe_open(file, framework="pt") as opened:
                structure = json.loads(opened.metadata()["structure"])
                return _restored(structure, lambda name: opened.get_tensor(name))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{file} is missing or damaged ({error}); start over with --restart") from error

    def __setitem__(self, index: int, value: Any) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        structure = json.dumps(_described(value, tensors))
        with self._staging.writing():
            self._directory.mkdir(parents=True, exist_ok=True)
            write_file(
                self._file(index), lambda path: save_file(tensors, path, {"structure": structure}), alone=True
            )

    def _file(self, index: int) -> Path:
        return self._directory / f"{index}.safetensors"


def _described(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A JSON value that says how tensors are nested; they go to `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy: one that is a part of another cannot be stored beside it.
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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} cannot be read ({error}); start over with --restart") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file} is not a JSON object; start over with --restart")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
