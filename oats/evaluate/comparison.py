"""Methods by compressions: each cell is measured once, and kept; settings are never mixed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oats.checkpoint.atomic_file import write_text
from oats.compression.calibration import Calibration
from oats.compression.compress import compress_
from oats.compression.targets import find_targets
from oats.config import PRUNING, OatsConfig
from oats.errors import ConfigError, FormatError, OutputExistsError
from oats.evaluate.dense_formats import DenseFormat
from oats.models.architecture import find_blocks
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

DENSE = "dense"
"""The name of the model as it was, among the methods; with + and a name of `FORMATS` behind, its weights are
rounded to that format (:mod:`oats.evaluate.dense_formats`)."""

MATCHED = "+match"
"""Behind the name of a method: each block is tuned too, in `PASSES` passes."""
PASSES = 2

CODES = ("+int8", "+int4")
"""Behind the name: kept values are stored as such codes (:mod:`oats.decomposition.codes`)."""

Planned = OatsConfig | DenseFormat
"""What is done to the model for a cell."""


def plan(common: OatsConfig, methods: Sequence[str], compressions: Sequence[float]) -> dict[str, Planned]:
    """What is compared: what is done for every cell but the dense one, by the cell's name.

    Args:
        common: the settings that all share; its method and compression are not used.
        methods: names out of `oats.config.METHODS`; `MATCHED`, and then one of `CODES`, may be behind. Or
            `DENSE`, + and a format: one cell, whatever the compressions.
        compressions: each in [0, 1).

    Raises:
        ConfigError: a name or a number is not one of these, or the pattern forbids it.

    >>> planned = plan(OatsConfig(), ["wanda", "oats+match", "oats+int8"], [0.5])
    >>> {name: (each.block_matching, each.values) for name, each in planned.items()}
    {'wanda 0.5': (0, None), 'oats+match 0.5': (2, None), 'oats+int8 0.5': (0, 'int8')}
    >>> plan(OatsConfig(), ["dense+q4_0"], [0.4, 0.5])
    {'dense+q4_0': DenseFormat(name='q4_0')}
    """
    formats = [name for name in methods if name.startswith(f"{DENSE}+")]
    cells: dict[str, Planned] = {name: DenseFormat(name.removeprefix(f"{DENSE}+")) for name in formats}
    for compression in compressions:
        for name in methods:
            if name in formats:
                continue
            matched, codes = split_codes(name)
            method = matched.removesuffix(MATCHED)
            cells[_cell_name(name, compression)] = replace(
                common,
                method=method,  # type: ignore[arg-type]  # OatsConfig checks it
                compression=compression,
                rank_ratio=0 if method in PRUNING else common.rank_ratio,
                block_matching=PASSES if matched.endswith(MATCHED) else 0,
                values=codes.removeprefix("+") or common.values,  # type: ignore[arg-type]
            )
    return cells


def split_codes(name: str) -> tuple[str, str]:
    """What is before one of `CODES` in the name of a method, and that, or "".

    >>> split_codes("oats+match+int8"), split_codes("wanda")
    (('oats+match', '+int8'), ('wanda', ''))
    """
    codes = next((each for each in CODES if name.endswith(each)), "")
    return name.removesuffix(codes), codes


def _cell_name(method: str, compression: float) -> str:
    return f"{method} {compression:g}"


@dataclass(frozen=True)
class Cell:
    """What one method at one compression came to.

    Attributes:
        method: its name, or `DENSE`, or that with a format.
        compression: 0 for a dense model.
        scores: name of what was measured → value, such as ``{"perplexity, book.txt": 12.3}``.
        layer_bytes: of the weights of the compressed layers, as they are stored.
        layer_parameters: non-zeros and entries of low-rank factors of these layers.
        seconds: that the compression took.
        threads: that torch used.
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
        directory: made if it is missing. One that holds a comparison is continued.
        settings: everything that the scores depend on, beside method and compression, as plain JSON values.

    Raises:
        OutputExistsError: the directory holds other files, or cannot be made.
        ConfigError: it holds a comparison with other settings.

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
            raise OutputExistsError(
                f"{self.directory} is not empty and holds no comparison; choose another directory"
            )
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
        """The cell, where it is finished.

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
        """All cells that are there, by compression; the dense model's first."""
        names = (file.stem.rpartition("-") for file in self.directory.glob("*-*.json"))
        cells = (self.get(method, float(share) / 100) for method, _, share in names)
        return sorted(
            (cell for cell in cells if cell is not None),
            key=lambda cell: (cell.compression, cell.method != DENSE, cell.method),
        )

    def _file(self, method: str, compression: float) -> Path:
        return self.directory / f"{method}-{100 * compression:g}.json"


def complete(
    cells: Cells,
    planned: Mapping[str, Planned],
    measure: Callable[[Planned | None], tuple[dict[str, float], int, int, float]],
    progress: Callable[[int, int, str, Cell | None], None],
) -> list[Cell]:
    """Measure what is not finished.

    Args:
        cells: where finished cells are, and go.
        planned: from :func:`plan`.
        measure: does to the model what is planned, nothing for None, and evaluates it; returns the scores,
            the bytes and parameters of the layers, and the seconds that compressing took.
        progress: called as progress(done, total, name, cell) before each cell, with None, and after it.

    Returns:
        The dense model's cell, and those of the plan in its order.
    """
    finished: list[Cell] = []
    everything: dict[str, Planned | None] = {DENSE: None, **planned}
    for name, config in everything.items():
        method, compression = name, 0.0
        if isinstance(config, OatsConfig):
            method, compression = name.rpartition(" ")[0], config.compression
        progress(len(finished), len(everything), name, None)
        cell = cells.get(method, compression)
        if cell is None:
            scores, layer_bytes, layer_parameters, seconds = measure(config)
            cell = Cell(
                method, compression, scores, layer_bytes, layer_parameters, seconds, torch.get_num_threads()
            )
            cells.put(cell)
        finished.append(cell)
        progress(len(finished), len(everything), name, cell)
    return finished


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} is not valid JSON ({error}); remove it") from error
    if not isinstance(value, dict):
        raise FormatError(f"{file} does not hold a JSON object; remove it")
    return value


def apply_(
    model: nn.Module, planned: Planned | None, calibration: Calibration, common: OatsConfig
) -> tuple[int, int]:
    """Do to a model what is planned for a cell.

    Args:
        model: as it was; it is changed in place.
        planned: a value of :func:`plan`, or None for the dense model.
        calibration: as of :func:`oats.compress_`.
        common: as of :func:`plan`; it says which layers are meant.

    Returns:
        Bytes, as they would be stored, and parameters of the weights of these layers.
    """
    if isinstance(planned, OatsConfig):
        compress_(model, calibration, planned)
        return compressed_sizes(model)
    targets = find_targets(model, *find_blocks(model), common)
    weights = [
        weight
        for block in targets.blocks
        for target in block.values()
        for weight, _ in target.matrices().values()
    ]
    size = sum(weight.nbytes for weight in weights) if planned is None else planned.round_(weights)
    return size, sum(weight.numel() for weight in weights)


def compressed_sizes(model: nn.Module) -> tuple[int, int]:
    """Bytes and parameters of the weights of the compressed layers, as they would be stored."""
    layers = [module for module in model.modules() if isinstance(module, SparseLowRankLinear)]
    size = sum(tensor.nbytes for layer in layers for tensor in layer.canonical().values())
    return size, sum(layer.nnz + layer.rank * (layer.in_features + layer.out_features) for layer in layers)


def header(cells: Sequence[Cell]) -> list[str]:
    """Names of the columns of :func:`rows`."""
    return ["method", "compression", "parameters", "layers, MB", *cells[0].scores, "seconds"]


def rows(cells: Sequence[Cell]) -> list[list[str]]:
    """The table as text, a row a cell.

    >>> rows([Cell("oats", 0.5, {"perplexity": 14.912}, 1_250_000, 500_000, 3.2, 2)])
    [['oats', '50 %', '0.5 M', '1.25', '14.91', '3']]
    """
    return [
        [
            cell.method,
            "" if is_dense(cell) else f"{100 * cell.compression:g} %",
            f"{cell.layer_parameters / 1e6:.3g} M",
            f"{cell.layer_bytes / 1e6:.2f}",
            *(format_score(name, value) for name, value in cell.scores.items()),
            "" if is_dense(cell) else f"{cell.seconds:.0f}",
        ]
        for cell in cells
    ]


def is_dense(cell: Cell) -> bool:
    """Whether nothing was removed: the model as it was, or with its weights in another format."""
    return cell.method.partition("+")[0] == DENSE


def format_score(name: str, value: float) -> str:
    """A score as it is printed; an accuracy is a share of 1, a cosine is one.

    >>> format_score("accuracy", 0.91234), format_score("perplexity", 12.3456), format_score("", 45678.9)
    ('91.23 %', '12.35', '45679')
    >>> format_score("cosine to dense", 0.98765)
    '0.9877'
    """
    if is_accuracy(name):
        return f"{100 * value:.2f} %"
    if is_cosine(name):
        return f"{value:.4f}"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def is_accuracy(name: str) -> bool:
    """Whether a score is an accuracy, of which more is better."""
    return name.startswith("accuracy")


def is_cosine(name: str) -> bool:
    """Whether a score is a cosine, of which more is better; what is neither is a perplexity."""
    return name.startswith("cosine")


def markdown(cells: Sequence[Cell], settings: Mapping[str, Any]) -> str:
    """The table and the settings it depends on, as Markdown."""
    lines = [header(cells), ["---", "---", *["---:"] * (len(header(cells)) - 2)], *rows(cells)]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*table, "", *(f"- {name}: {value}" for name, value in settings.items())]) + "\n"
