"""``oats info [DIR]``."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from oats._version import __version__
from oats.cli.options import Json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console


MOST_ERRORS = 5
BAR_WIDTH = 32


def info(
    directory: Annotated[
        Path | None, Argument(metavar="[DIR]", help="Directory of a dense or compressed model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Describe this installation, or with DIR what a model directory holds, per layer."""
    if directory is None:
        _installation(as_json)
    else:
        _model(directory, as_json)


def _installation(as_json: bool) -> None:
    import torch

    from oats.cli.console import print_json, results, settings_table
    from oats.kernels.isa import active_isa, available_isas

    wanted, threads = os.environ.get("OATS_ISA"), torch.get_num_threads()
    if as_json:
        print_json(
            version=__version__, isa=active_isa(), available_isas=available_isas(), oats_isa=wanted,
            threads=threads, torch=torch.__version__,
        )  # fmt: skip
        return
    settings = {
        "oats": __version__,
        "ISA in use": active_isa(),
        "ISAs available": ", ".join(available_isas()),
        "OATS_ISA": "not set" if wanted is None else wanted,
        "threads": threads,
        "torch": torch.__version__,
    }
    results().print(settings_table(settings))


def _model(directory: Path, as_json: bool) -> None:
    from oats.checkpoint.record import Record, in_words
    from oats.checkpoint.stored_model import read_stored_model
    from oats.cli.console import human_bytes, plain_table, print_json, results, settings_table
    from oats.engine.native import why_not_native
    from oats.inspection.anatomy import bytes_by_kind

    model = read_stored_model(directory)
    record = Record.read(directory) or Record()
    errors = record.errors_of([layer.name for layer in model.layers])
    stored, dense = model.layer_bytes, model.dense_bf16_bytes
    settings: dict[str, Any] = {
        name: value for name, value in (model.config or {}).items() if name != "layers"
    }
    if as_json:
        layers = [
            asdict(layer)
            | {
                "density": layer.density,
                "share_of_dense_bf16": layer.share_of_dense_bf16,
                "relative_error": errors.get(layer.name),
            }
            for layer in model.layers
        ]
        print_json(
            directory=model.directory, model_type=model.model_type, config=settings or None, layers=layers,
            head=model.head and asdict(model.head), layer_bytes=stored, layer_dense_bf16_bytes=dense,
            share_of_dense_bf16=stored / dense if dense else None,
            other_parameters=model.parameters_elsewhere, other_bytes=model.bytes_elsewhere,
            disk_bytes=model.disk_bytes, source=record.source, evaluations=record.evaluations,
            quantizations=record.quantizations, not_in_engine=why_not_native(model.architecture),
        )  # fmt: skip
        return

    console = results()
    if model.layers:
        # The common start of all names goes into the header, so that the table fits 80 columns.
        shared = _common_parent([layer.name for layer in model.layers])
        columns = (shared or "layer", "shape", "rank", "non-zeros", "density", "stored", "of bf16")
        table = plain_table(*columns)
        for layer in model.layers:
            table.add_row(
                layer.name.removeprefix(shared), f"{layer.d_out} x {layer.d_in}", str(layer.rank),
                str(layer.nnz), f"{layer.density:.3f}", human_bytes(layer.stored_bytes),
                f"{layer.share_of_dense_bf16:.3f}",
            )  # fmt: skip
        table.add_section()
        elements = sum(layer.d_out * layer.d_in for layer in model.layers)
        nnz = sum(layer.nnz for layer in model.layers)
        table.add_row(
            f"{len(model.layers)} layers", "", "", str(nnz), f"{nnz / elements:.3f}", human_bytes(stored),
            f"{stored / dense:.3f}",
        )  # fmt: skip
        console.print(table)
        print_bars(console, "Where the bytes are", bytes_by_kind(model), human_bytes)
        if errors:
            taken = record.errors_were_taken(any(layer.storage.has_codes for layer in model.layers))
            worst = sorted(errors, key=errors.__getitem__, reverse=True)[:MOST_ERRORS]
            title = "Largest errors of layers, relative, on the calibration data" + taken
            shown = {name.removeprefix(shared): errors[name] for name in worst}
            print_bars(console, title, shown, lambda error: f"{error:.3f}")
    reason = why_not_native(model.architecture)
    facts = {
        "directory": model.directory,
        "model": model.model_type + ("" if model.config else ", not compressed by oats"),
        "runs in": f"transformers: {reason}" if reason else "the engine",
    }
    if record.source:
        facts["compressed from"] = record.source
    # Without `quant_method`, and without settings that are None or empty.
    facts |= {name: v for name, v in settings.items() if name != "quant_method" and v not in (None, [])}
    if record.calibration:
        facts["calibration"] = in_words(record.calibration)
    for last in record.evaluations[-1:]:
        measured_on = f"{last['text']}, {last['split']}, context {last['context']}"
        facts["perplexity"] = f"{last['perplexity']:.2f} on {measured_on}"
    for words in record.quantizations_in_words()[-1:]:
        facts["quantised"] = words
    if dense:
        facts["linear layers"] = f"{human_bytes(stored)}, {stored / dense:.3f} of dense bf16"
    if model.head:
        of_bf16 = f"{model.head.share_of_dense_bf16:.3f} of dense bf16"
        facts["output head"] = f"{human_bytes(model.head.stored_bytes)}, {of_bf16}, {model.head.dtype}"
    elsewhere = f"{human_bytes(model.bytes_elsewhere)}, {model.parameters_elsewhere:,} elements"
    facts |= {"other tensors": elsewhere, "on disk": f"{human_bytes(model.disk_bytes)}, all files"}
    console.print(settings_table(facts))


def print_bars(
    console: Console, title: str, values: Mapping[str, float], show: Callable[[float], str]
) -> None:
    """Print a bar for each value; the bar of the largest value has the full width."""
    from rich.table import Table

    largest = max(values.values(), default=0) or 1
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for name, value in values.items():
        table.add_row(f" {name}", show(value), "█" * round(BAR_WIDTH * value / largest))
    console.print(title)
    console.print(table)
    console.print()


def _common_parent(names: list[str]) -> str:
    """The longest common start of dotted names that ends in a dot; "" if there is none.

    >>> _common_parent(["model.layers.0.up", "model.layers.1.up"])
    'model.layers.'
    """
    shared: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0] + ".")
    return "".join(shared)
