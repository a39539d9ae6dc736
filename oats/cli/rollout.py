"""``oats rollout DIR IMAGE …``: what a compressed vision transformer looks at, and each of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def rollout(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory of a vision transformer, dense or compressed.")
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Image files, a row each.")],
    out: Annotated[Path, typer.Option(help="Picture to write, .png or .svg.")] = Path("rollout.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Draw the attention rollout of a model, of its sparse part alone and of its low-rank part alone."""
    from oats.bench.plots import require_matplotlib
    from oats.cli.console import results, status
    from oats.errors import OutputExistsError
    from oats.inspection.rollout import draw, rollouts
    from oats.integrations.vision import load_vision_model, read_images

    if out.exists() and not overwrite:
        raise OutputExistsError(
            f"{out} is there already; give another name with --out, or replace it with --overwrite"
        )
    require_matplotlib()
    with status(f"Loading {directory}"):
        model = load_vision_model(directory, attn_implementation="eager")
    pixel_values = read_images(images, model, directory)
    maps = rollouts(model, pixel_values)
    draw(pixel_values, maps, out, [image.stem for image in images])
    results().print(f"written: {out} ({', '.join(maps)})")
