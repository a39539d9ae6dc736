"""Vision transformers on disk: the model as it was saved, and images as it wants them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oats.errors import CalibrationError, CheckpointError, OatsError

HALF = 0.5
"""Mean and standard deviation of the channels, where the model's directory does not say."""


def load_vision_model(directory: str | Path, **options: Any) -> Any:
    """Load a vision model of transformers by the class that saved it.

    Args:
        directory: of the model, dense or compressed.
        options: for ``from_pretrained``.

    Raises:
        CheckpointError: there is no vision model in the directory, or it cannot be loaded.
        FormatError: it is a compressed one, and damaged.
    """
    import transformers

    from oats.integrations.stored_model import read_config

    file = Path(directory) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory} is no model directory: it has no config.json; check the path")
    config = read_config(file)
    names = config.get("architectures") or [""]
    kind: Any = getattr(transformers, str(names[0]), None)
    if getattr(kind, "main_input_name", None) != "pixel_values":
        raise CheckpointError(
            f"{file}: architectures is {names}, expected a class of transformers that takes images"
        )
    try:
        return kind.from_pretrained(directory, **options).eval()
    except OatsError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise CheckpointError(f"cannot load the model {directory}: {error}") from error


def read_images(paths: Sequence[str | Path], model: Any, directory: str | Path) -> Tensor:
    """Images as a model takes them: resized to a square, scaled to [0, 1] and normalised.

    Args:
        paths: of the files, of any kind that Pillow reads.
        model: whose ``config`` gives the size and the number of channels.
        directory: of the model; its ``preprocessor_config.json`` gives means and standard deviations.

    Returns:
        (images, channels, height, width), the dtype of the model.

    Raises:
        CalibrationError: a file cannot be read as an image.
    """
    import numpy as np
    from PIL import Image

    size, channels = model.config.image_size, model.config.num_channels
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                resized = image.convert("L" if channels == 1 else "RGB").resize((size, size))
        except OSError as error:
            raise CalibrationError(f"cannot read the image {path}: {error}") from error
        images.append(torch.from_numpy(np.array(resized)).view(size, size, channels).permute(2, 0, 1))
    mean, std = _normalisation(Path(directory), channels)
    return ((torch.stack(images) / 255 - mean) / std).to(model.dtype)


def _normalisation(directory: Path, channels: int) -> tuple[Tensor, Tensor]:
    file = directory / "preprocessor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    mean, std = (
        torch.tensor(settings.get(name, [HALF] * channels)).view(-1, 1, 1)
        for name in ("image_mean", "image_std")
    )
    return mean, std
