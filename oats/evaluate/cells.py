"""The results of a comparison: one file for each cell of its table, in one directory, with the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oats.checkpoint.atomic import write_text
from oats.errors import ConfigError, FormatError, OutputExistsError

DENSE = "dense"
"""The method of the uncompressed model's cell. ``dense+q4_0`` is that model with its weights rounded to a
format of :mod:`oats.evaluate.dense_formats`."""


@dataclass(frozen=True)
class Cell:
    """One cell of a comparison: the results of one method at one compression.

    Attributes:
        method: name of the method, such as "oats", "oats+match+int8", `DENSE` or "dense+q4_0".
        compression: 0 for a dense model.
        scores: name of the score → value, such as ``{"perplexity, book.txt": 12.3}``.
        layer_bytes: bytes of the weights of the compressed layers, as stored.
        layer_parameters: non-zeros plus entries of the low-rank factors of these layers.
        seconds: time of the compression.
    """

    method: str
    compression: float
    scores: dict[str, float]
    layer_bytes: int
    layer_parameters: int
    seconds: float
    threads: int


class Cells:
    """The finished cells of one comparison, in a directory.

    Args:
        directory: made if it is missing. A comparison that is there is continued.
        settings: everything that the scores depend on besides method and compression, as plain JSON values.

    Raises:
        OutputExistsError: the directory holds other files, or cannot be made.
        ConfigError: it holds a comparison with other settings. Their cells cannot be compared with new ones.

    >>> import tempfile
    >>> cells = Cells(tempfile.mkdtemp(), {"context": 512})
    >>> cells.put(Cell("oats", 0.5, {"perplexity": 14.9}, 1000, 500, 3.2, 2))
    >>> cells.get("oats", 0.5).scores
    {'perplexity': 14.9}
    >>> cells.get("wanda", 0.5) is None
    True
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        self.settings = json.loads(json.dumps(settings))
        file = self.directory / "settings.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            new = not file.is_file()
            foreign = new and any(self.directory.iterdir())
            if new and not foreign:
                write_text(file, json.dumps(self.settings, indent=2) + "\n")
        except OSError as error:
            raise OutputExistsError(
                f"cannot use the directory {self.directory}: {error.strerror}; choose another"
            ) from error
        if foreign:
            problem = "is not empty and holds no comparison"
            raise OutputExistsError(f"{self.directory} {problem}; choose another directory")
        there = _read(file)
        different = [
            f"{name} is {there.get(name)!r} there and {self.settings.get(name)!r} here"
            for name in sorted(there.keys() | self.settings.keys())
            if there.get(name) != self.settings.get(name)
        ]
        if different:
            raise ConfigError(
                f"{self.directory} holds a comparison with other settings: {'; '.join(different)}; choose "
                "another directory"
            )

    def get(self, method: str, compression: float) -> Cell | None:
        """The cell, or None if it is not finished.

        Raises:
            FormatError: its file is damaged.
        """
        file = self._file(method, compression)
        if not file.is_file():
            return None
        try:
            return Cell(**_read(file))
        except TypeError as error:
            raise FormatError(f"{file} does not hold a cell ({error}); remove it") from error

    def put(self, cell: Cell) -> None:
        """Keep a finished cell."""
        write_text(self._file(cell.method, cell.compression), json.dumps(asdict(cell), indent=2) + "\n")

    def finished(self) -> list[Cell]:
        """All finished cells, by compression; the cell of the dense model comes first."""
        names = (file.stem.rpartition("-") for file in self.directory.glob("*-*.json"))
        cells = (self.get(method, float(share) / 100) for method, _, share in names)
        return sorted(
            (cell for cell in cells if cell is not None),
            key=lambda cell: (cell.compression, cell.method != DENSE, cell.method),
        )

    def _file(self, method: str, compression: float) -> Path:
        return self.directory / f"{method}-{100 * compression:g}.json"


def is_dense(cell: Cell) -> bool:
    """True if nothing was removed: the model as it was, or its weights rounded to a format."""
    return cell.method.partition("+")[0] == DENSE


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} is not valid JSON ({error}); remove it") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file} does not hold a JSON object; remove it")
    return value
