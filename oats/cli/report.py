"""``oats report DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oats.cli.options import CompressedModel
from oats.errors import OatsError, OutputExistsError

if TYPE_CHECKING:
    from oats.evaluate.latency import Row
    from oats.integrations.stored_model import StoredModel

BATCHES = (1, 16, 128)


def report(
    directory: CompressedModel,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write.", show_default="the directory's name with -report.html"),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed", help="Also time each size of layer against torch's dense one, some seconds each."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Draw a compressed model as one HTML file: bytes, errors of the layers, spectra, sparsity.

    The file has its pictures in it and opens in any browser, also without a network.
    """
    from oats.atomic_file import write_text
    from oats.cli.console import human_bytes, progress_bar, results
    from oats.evaluate.html_report import html_report
    from oats.integrations.record import Record
    from oats.integrations.stored_model import read_stored_model

    out = Path(f"{directory.resolve().name}-report.html") if out is None else out
    if out.is_dir():
        raise OutputExistsError(f"{out} is a directory; give the name of a file")
    if out.exists() and not overwrite:
        raise OutputExistsError(
            f"{out} is there already; give another name with --out, or replace it with --overwrite"
        )
    stored = read_stored_model(directory)
    rows = _time(stored) if speed else []
    with progress_bar("Reading") as bar:
        text = html_report(
            stored,
            Record.read(directory),
            speed=rows,
            progress=lambda done, total: bar.update(done, total, "layers"),
        )
    try:
        write_text(out, text)
    except OSError as error:
        raise OatsError(f"cannot write {out}: {error.strerror}; choose another with --out") from error
    results().print(f"{out}, {human_bytes(len(text.encode()))}; open it in a browser", soft_wrap=True)


def _time(model: StoredModel) -> list[Row]:
    """Time each size of layer that the model has."""
    from oats.cli.console import progress_bar
    from oats.evaluate.anatomy import block_and_kind
    from oats.evaluate.contenders import Dtype, compressed, torch_dense
    from oats.evaluate.latency import layer_rows
    from oats.evaluate.shapes import LayerShape
    from oats.integrations.stored_model import parse_quantization_config

    if model.config is None or not model.layers:
        return []
    config = parse_quantization_config(model.config)[0]
    kinds: dict[tuple[int, int], dict[str, None]] = {}
    for layer in model.layers:
        kinds.setdefault((layer.d_out, layer.d_in), {})[block_and_kind(layer.name)[1]] = None
    storage = model.layers[0].storage
    dtype: Dtype = "fp32" if model.layers[0].dtype == "fp32" else "bf16"
    rows: list[Row] = []
    with progress_bar("Timing") as bar:
        for done, ((d_out, d_in), names) in enumerate(kinds.items()):

            def progress(note: str, done: int = done) -> None:
                bar.update(done, len(kinds), note)

            shape = LayerShape(", ".join(names), d_out, d_in)
            ours = [compressed(dtype, storage=storage)]
            rows += layer_rows(shape, BATCHES, config, ours, [torch_dense(dtype)], progress=progress)
    return rows
