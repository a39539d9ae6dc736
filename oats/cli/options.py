"""Options that several commands share, with their help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

from typer import Argument, Option

from oats.errors import OutputExistsError

FORMS = "directory (safetensors or GGUF), .gguf file, or hub name"
DenseModel = Annotated[str, Argument(metavar="MODEL", help=f"Dense model: {FORMS}.")]
AnyModel = Annotated[str, Argument(metavar="DIR", help=f"Dense or compressed model: {FORMS}.")]
CompressedModel = Annotated[Path, Argument(metavar="DIR", help="Directory of a compressed model.")]
OutModel = Annotated[
    Path, Argument(metavar="OUT", help="Directory to write; empty or new, unless --overwrite is given.")
]
OverwriteFile = Annotated[bool, Option("--overwrite", help="Replace a file that is there.")]
OverwriteModel = Annotated[bool, Option("--overwrite", help="Replace a model that is at OUT.")]

RunDtype = Annotated[
    str | None, Option(help="Dtype to run in: bf16 or fp32.", show_default="the model's own; GGUF: bf16")
]
RunActivations = Annotated[
    str, Option("--activations", help="int8 rounds what meets codes in prompts: faster with AMX, less exact.")
]
StoredDtype = Annotated[
    str | None, Option(help="Dtype of the result: bf16 or fp32.", show_default="the model's own; GGUF: bf16")
]
RankRatio = Annotated[float, Option(help="Share of the kept parameters that goes to the low-rank part.")]
Pattern = Annotated[str, Option(help="Where non-zeros may sit: row, layer, or N:M such as 2:4.")]
Seed = Annotated[int, Option(help="Seed of the fast low-rank step.")]
ScaleColumns = Annotated[int, Option(help="Columns of a row whose codes share a scale: 64 or 128.")]
Head = Annotated[
    str | None,
    Option(
        help="Store the output head, and an embedding tied to it, as int8 codes; none of it is removed.",
        show_default="as it is",
    ),
]

CalibrationText = Annotated[
    Path | None,
    Option(help="UTF-8 text to calibrate on.", show_default="first half of Python's pydoc_data.topics"),
]
Samples = Annotated[int, Option(help="Calibration sequences (the paper: 128).")]
Length = Annotated[int, Option(help="Tokens of a calibration sequence (the paper: 2048).")]

HELD_OUT = "second half of Python's pydoc_data.topics"
Context = Annotated[
    int | None, Option(help="Tokens of a window.", show_default="2048, or the model's own if less")
]
Stride = Annotated[int | None, Option(help="Tokens scored in a window.", show_default="context: no overlap")]
MaxTokens = Annotated[
    int | None, Option(help="Use only this many tokens, from the start of a text.", show_default="all")
]
TaskPath = Annotated[
    Path | None,
    Option(
        help="Directory with YAML files of your own tasks.", show_default="none", exists=True, file_okay=False
    ),
]
Limit = Annotated[int | None, Option(help="Most questions of each task.", show_default="all")]

SamplingSeed = Annotated[int, Option(help="Seed of the sampling.")]
ChatTemplate = Annotated[
    Path | None,
    Option(
        help="Jinja file that turns a conversation into a prompt.", show_default="the model's own, if any"
    ),
]
Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]


def use_activations(activations: str) -> None:
    """Do what ``--activations`` says.

    Raises:
        ConfigError: see :func:`oats.set_activations`.
    """
    from oats.kernels.activations import set_activations

    set_activations(cast(Any, activations))


def refuse_to_replace(file: Path, overwrite: bool) -> None:
    """Check that a file may be written, before the long work.

    Raises:
        OutputExistsError: it exists, and `overwrite` is False.
    """
    if file.exists() and not overwrite:
        raise OutputExistsError(
            f"{file} is there already; give another name with --out, or replace it with --overwrite"
        )
