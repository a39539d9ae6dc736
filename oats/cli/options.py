"""Options that several commands have, with one text of help each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DenseModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory (safetensors or GGUF), .gguf file, or hub name.")
]
RunDtype = Annotated[
    str | None, typer.Option(help="bf16 or fp32.", show_default="the model's own; GGUF: bf16")
]
Pattern = Annotated[str, typer.Option(help="Where non-zeros may sit: row, layer, or N:M such as 2:4.")]
Seed = Annotated[int, typer.Option(help="Seed of the fast low-rank step.")]

CalibrationText = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text to calibrate on.", show_default="first half of Python's pydoc_data.topics"),
]
Samples = Annotated[int, typer.Option(help="Calibration sequences (the paper: 128).")]
Length = Annotated[int, typer.Option(help="Tokens of a calibration sequence (the paper: 2048).")]

Context = Annotated[
    int | None, typer.Option(help="Tokens of a window.", show_default="2048, or the model's own if less")
]
Stride = Annotated[
    int | None, typer.Option(help="Tokens scored in a window.", show_default="context: no overlap")
]
