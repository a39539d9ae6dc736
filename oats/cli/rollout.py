"""``oats rollout DIR IMAGE …``: what a vision transformer looks at, and each part of a compressed one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from oats.cli.options import OverwriteFile, refuse_to_replace


def rollout(
    directory: Annotated[
        Path, Argument(metavar="DIR", help="Directory of a vision transformer, dense or compressed.")
    ],
    images: Annotated[
        list[Path], Argument(metavar="IMAGE…", help="Image files; the picture has a row for each.")
    ],
    out: Annotated[Path, Option(help="Picture to write, .png or .svg.")] = Path("rollout.png"),
    overwrite: OverwriteFile = False,
) -> None:
    """Draw the attention rollout of a vision transformer, of its sparse part and of its low-rank part."""
    from oats.bench.plots import require_matplotlib
    from oats.cli.console import results, status
    from oats.inspection.rollout import draw, rollouts
    from oats.integrations.vision import load_vision_model, read_images

    refuse_to_replace(out, overwrite)
    require_matplotlib()
    with status(f"Loading {directory}"):
        model = load_vision_model(directory, attn_implementation="eager")
    pixel_values = read_images(images, model, directory)
    maps = rollouts(model, pixel_values)
    draw(pixel_values, maps, out, [image.stem for image in images])
    results().print(f"written: {out} ({', '.join(maps)})")
