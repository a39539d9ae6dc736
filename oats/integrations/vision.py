"""Vision transformers: loads a model from disk, and images in the form that it takes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oats.checkpoint.config_json import read_config, saved_class
from oats.checkpoint.loading import load_model
from oats.errors import CalibrationError, CheckpointError

HALF = 0.5
"""Mean and standard deviation of each channel if the model's directory does not give them."""

CALIBRATION_IMAGES = 2048
"""Images that calibrate a vision model (arXiv 2409.13652, section 4)."""


def load_vision_model(directory: str | Path, **options: Any) -> Any:
    """Load a vision model of transformers with the class that saved it.

    Args:
        directory: of the model, dense or compressed.
        options: for ``from_pretrained``.

    Raises:
        CheckpointError: there is no vision model in the directory, or it cannot be loaded.
        FormatError: config.json is damaged, or the model is compressed and damaged.
    """
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory} is no model directory: it has no config.json; check the path")
    names = read_config(file).get("architectures") or [""]
    if getattr(saved_class(names), "main_input_name", None) != "pixel_values":
        raise CheckpointError(
            f"{file}: architectures is {names}, expected a class of transformers that takes images"
        )
    return load_model(directory, as_saved=True, **options)[0]


def read_images(paths: Sequence[str | Path], model: Any, directory: str | Path) -> Tensor:
    """Read images: cut out the square in the middle, resize it, scale it to [0, 1] and normalise it.

    Args:
        paths: of the files, of any kind that Pillow reads.
        model: its ``config`` gives the size and the number of channels.
        directory: of the model; its ``preprocessor_config.json`` gives means and standard deviations, and
            maybe a size, which overrides that of `model`.

    Returns:
        (images, channels, height, width), in the dtype of the model.

    Raises:
        CalibrationError: a file cannot be read as an image.
        FormatError: ``preprocessor_config.json`` is damaged.
    """
    import numpy as np
    from PIL import Image, ImageOps

    file, channels = Path(directory) / "preprocessor_config.json", model.config.num_channels
    settings = read_config(file) if file.is_file() else {}
    size = _side(settings) or model.config.image_size
    mean, std = (
        torch.tensor(settings.get(name, [HALF] * channels)).view(-1, 1, 1)
        for name in ("image_mean", "image_std")
    )
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                square = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size))
        except OSError as error:
            raise CalibrationError(f"cannot read the image {path}: {error}") from error
        pixels = torch.from_numpy(np.array(square)).view(size, size, channels).permute(2, 0, 1)
        images.append(((pixels / 255 - mean) / std).to(model.dtype))
    return torch.stack(images)


def calibration_images(directory: str | Path, count: int | None = None) -> list[Path]:
    """Choose image files from a directory and those below it, evenly over their sorted paths.

    Args:
        directory: with files that have the suffix of an image.
        count: number of files; None means all, but at most `CALIBRATION_IMAGES`.

    Raises:
        CalibrationError: there are none, or fewer than `count`.
    """
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(file for file in Path(directory).rglob("*") if file.suffix.lower() in suffixes)
    if not found or (count is not None and not 0 < count <= len(found)):
        wanted = "at least one" if count is None else f"{count}"
        raise CalibrationError(
            f"{directory} holds {len(found)} image files, but {wanted} were asked for; give a directory "
            "of images, or another number"
        )
    count = min(len(found), CALIBRATION_IMAGES) if count is None else count
    return [found[i * len(found) // count] for i in range(count)]


def identify_images(files: Sequence[Path], directory: Path) -> dict[str, Any]:
    """What identifies images from a directory, as plain JSON values."""
    content = hashlib.sha256()
    for file in files:
        content.update(file.read_bytes())
    digest = content.hexdigest()[:12]
    return {"images": directory.resolve().name, "sha256": digest, "samples": len(files)}


def _side(settings: Mapping[str, Any]) -> int | None:
    """Side in pixels of the square that an image processor makes; None if its settings do not give it."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    side = size.get("height", size.get("shortest_edge")) if isinstance(size, Mapping) else size
    return side if isinstance(side, int) else None
