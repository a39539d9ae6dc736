"""``oats report DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from oats.cli.options import CompressedModel, OverwriteFile, refuse_to_replace
from oats.errors import OatsError, OutputExistsError


def report(
    directory: CompressedModel,
    out: Annotated[
        Path | None, Option(help="File to write.", show_default="the directory's name with -report.html")
    ] = None,
    speed: Annotated[
        bool,
        Option(
            "--speed", help="Also time each size of layer against torch's dense layer, some seconds each."
        ),
    ] = False,
    overwrite: OverwriteFile = False,
) -> None:
    """Draw a compressed model as one HTML file: bytes, errors of the layers, spectra, sparsity.

    The pictures are in the file. It opens in any browser, also without a network.
    """
    from oats.checkpoint.atomic import write_text
    from oats.checkpoint.record import Record
    from oats.checkpoint.stored_model import read_stored_model
    from oats.cli.console import human_bytes, progress_bar, results
    from oats.inspection.html_report import html_report

    out = Path(f"{directory.resolve().name}-report.html") if out is None else out
    if out.is_dir():
        raise OutputExistsError(f"{out} is a directory; give the name of a file")
    refuse_to_replace(out, overwrite)
    stored = read_stored_model(directory)
    rows = []
    if speed:
        from oats.inspection.layer_speed import time_layers

        with progress_bar("Timing") as bar:
            rows = time_layers(stored, bar.update)
    with progress_bar("Reading") as bar:
        text = html_report(
            stored, Record.read(directory), speed=rows,
            progress=lambda done, total: bar.update(done, total, "layers"),
        )  # fmt: skip
    try:
        write_text(out, text)
    except OSError as error:
        raise OatsError(f"cannot write {out}: {error.strerror}; choose another with --out") from error
    results().print(f"{out}, {human_bytes(len(text.encode()))}; open it in a browser", soft_wrap=True)
