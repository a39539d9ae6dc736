"""Attention rollout: which patches of an image a vision transformer looks at.

A compressed layer is ``S + U V``. If all layers use only S, or only U V, the rollout shows what each of the
two parts attends to (arXiv 2409.13652, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from oats.compression.temporary import replaced_forward
from oats.errors import ConfigError, UnsupportedModelError
from oats.format.layer_spec import decode_values
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Part = Literal["sparse", "low-rank"]
PARTS: tuple[Part, ...] = ("sparse", "low-rank")


@torch.no_grad()
def attention_rollout(model: Any, pixel_values: Tensor) -> Tensor:
    """How much of each patch reaches the class token (Abnar and Zuidema, arXiv 2005.00928).

    The rollout is the product of ``(A + I) / 2`` over the blocks. A is the attention of a block, averaged
    over its heads; I stands for the residual connection.

    Args:
        model: a vision transformer of transformers with a class token, loaded with
            ``attn_implementation="eager"``.
        pixel_values: (images, channels, height, width).

    Returns:
        (images, rows, columns) of patches, float32. The rest up to a sum of 1 is the class token itself.

    Raises:
        UnsupportedModelError: there is no attention, or the tokens are not a class token and a square.
    """
    attentions = model(pixel_values, output_attentions=True).attentions
    if not attentions or attentions[0] is None:
        raise UnsupportedModelError(
            f'{type(model).__name__} gives no attention; load it with attn_implementation="eager"'
        )
    tokens = attentions[0].shape[-1]
    side = round((tokens - 1) ** 0.5)
    if side * side != tokens - 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {tokens} tokens, which is not a class token and a square of patches"
        )
    rollout = torch.eye(tokens)
    for attention in attentions:
        rollout = (attention.float().mean(1) + torch.eye(tokens)) / 2 @ rollout
    return rollout[:, 0, 1:].reshape(-1, side, side)


@contextmanager
def only(model: nn.Module, part: Part) -> Iterator[None]:
    """In this context the compressed layers of a model use one part of their weight; biases stay.

    Raises:
        UnsupportedModelError: the model has no such part.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseLowRankLinear)]
    if not any(layer.nnz if part == "sparse" else layer.rank for layer in layers):
        raise UnsupportedModelError(f"{type(model).__name__} has no {part} part in any of its layers")
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(layer, _partial(layer, part)))
        yield


def _partial(layer: SparseLowRankLinear, part: Part) -> Any:
    tensors = layer.canonical()
    if part == "sparse":
        weight = decode_values(tensors, tensors["values"], layer.in_features)
    else:
        weight = tensors["low_rank_u"] @ tensors["low_rank_v"]

    def forward(x: Tensor) -> Tensor:
        return nn.functional.linear(x, weight.to(x.dtype), layer.bias)

    return forward


def rollouts(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """The rollouts of the whole model and of each part alone: name → (images, rows, columns)."""
    found = {"whole model": attention_rollout(model, pixel_values)}
    for part in PARTS:
        try:
            with only(model, part):
                found[f"{part} part alone"] = attention_rollout(model, pixel_values)
        except UnsupportedModelError:
            continue  # a dense model, or one without a low-rank part
    return found


def draw(pixel_values: Tensor, maps: dict[str, Tensor], file: Path, names: Sequence[str] = ()) -> None:
    """Write one picture, .png or .svg, with the images (count, channels, height, width) and their rollouts.

    `maps` is from :func:`rollouts`; `names` are those of the images.

    Raises:
        ConfigError: the file cannot be written.
    """
    picture = figure(pixel_values, maps, names)
    try:
        picture.savefig(file, dpi=160)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {file}: {error}") from error


def figure(pixel_values: Tensor, maps: dict[str, Tensor], names: Sequence[str] = ()) -> Figure:
    """A row for each image: the image, then the image under each rollout."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    images = pixel_values.float()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    images = (images - low) / (high - low).clamp_min(1e-6)
    count, channels, height, width = images.shape
    if channels != 3:
        images = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    images = images.permute(0, 2, 3, 1)
    # From transparent to glowing: a patch without attention shows the image, dimmed.
    glow = colormaps["plasma"](torch.linspace(0.35, 1, 256).numpy())
    glow[:, 3] = torch.linspace(0, 0.95, 256).numpy()
    colours = LinearSegmentedColormap.from_list("attention", glow)

    columns = 1 + len(maps)
    tight = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    made = Figure(figsize=(1.9 * columns + 0.3, 1.9 * count + 0.8), layout=tight)
    grid = made.subplots(count, columns, squeeze=False)
    for i, (image, panels) in enumerate(zip(images, grid, strict=True)):
        for axes, title in zip(panels, ("image", *maps), strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if i == 0:
                axes.set_title(title, fontsize=10)
            if title not in maps:
                axes.imshow(image.numpy())
                continue
            axes.imshow((0.7 * image).numpy())
            fine = nn.functional.interpolate(
                maps[title][i][None, None], size=(8 * height, 8 * width), mode="bilinear"
            )[0, 0]
            fine = (fine - fine.min()) / (fine.max() - fine.min()).clamp_min(1e-12)
            axes.imshow(colours(fine.numpy()), extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        if i < len(names):
            panels[0].set_ylabel(names[i], fontsize=10)
    below = {"ax": grid[-1, 1:].tolist(), "location": "bottom"}
    bar = made.colorbar(ScalarMappable(cmap=colours), **below, aspect=50, pad=0.02, shrink=0.6)
    bar.set_ticks([0, 1], labels=["least attention of this map", "most"])
    bar.ax.tick_params(length=0, labelsize=9)
    bar.ax.set_facecolor("#333333")
    return made
