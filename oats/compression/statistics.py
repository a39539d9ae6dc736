"""Statistics of the inputs of linear layers: second moments, Hessians, means and variances.

Each function takes a runner before block `index`, and linear layers of that block by name; it returns a
tensor for each. A layer that did not run is absent. Tokens that an attention mask (batch, length) excludes do
not count, even in experts that they are routed to. If it is unknown which inputs of a layer are padding, each
raises a `CalibrationError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from oats.compression.block_runner import BlockRunner
from oats.compression.calibration import token_mask
from oats.config import OatsConfig
from oats.decomposition.methods import statistic_for
from oats.errors import CalibrationError
from oats.nn.experts import SplitExperts


def input_statistics(
    runner: BlockRunner, index: int, linears: Mapping[str, nn.Module], config: OatsConfig
) -> dict[str, Tensor]:
    """The statistics that the method of a run needs, as one of the functions below collects them."""
    collectors = {
        "second_moments": second_moments,
        "hessians": hessians,
        "means_and_variances": means_and_variances,
    }
    return collectors[statistic_for(config)](runner, index, linears)


def second_moments(runner: BlockRunner, index: int, linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Σ over tokens of x_j² at the input of each layer, (d_in,) float32 (arXiv 2409.13652, section 2.2)."""
    sums = _sum_over_inputs(runner, index, linears, lambda x: x.square().sum(0).double())
    return {name: moment.float() for name, moment in sums.items()}


def hessians(runner: BlockRunner, index: int, linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """``X Xᵀ`` over the tokens at the input X (d_in, tokens) of each layer, (d_in, d_in) float32.

    Its diagonal is the second moments. Layers that always have the same input share the tensor.
    """
    return _sum_over_inputs(runner, index, linears, lambda x: x.mT @ x)


def means_and_variances(
    runner: BlockRunner, index: int, linears: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Mean and variance over the tokens of each input of each layer, (2, d_in) float64."""

    def sums(x: Tensor) -> Tensor:
        x = x.double()
        return torch.stack([x.sum(0), x.square().sum(0), x.new_full(x.shape[1:], len(x))])

    moments = {}
    for name, (first, second, count) in _sum_over_inputs(runner, index, linears, sums).items():
        mean = first / count
        moments[name] = torch.stack([mean, (second / count - mean.square()).clamp_min(0)])
    return moments


def _sum_over_inputs(
    runner: BlockRunner, index: int, linears: Mapping[str, nn.Module], statistic: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Sum of a statistic of the float32 inputs (tokens, d_in) of each layer, over all ranks' batches."""
    # For one batch: an input, its version, its statistic, and the layers that it went to.
    seen: list[tuple[Tensor, int, Tensor, list[str]]] = []
    # By the layers that share an input: q, k and v cost one statistic.
    sums: dict[tuple[str, ...], Tensor] = {}
    routers = {
        module: experts
        for experts in runner.blocks[index].modules()
        if isinstance(experts, SplitExperts)
        for module in experts.modules()
    }

    def collect(name: str, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        given = args[0]
        for x, version, _statistic, names in seen:
            if x is given and version == given._version:
                names.append(name)
                return
        rows = _counted(given.detach(), token_mask(runner.batch), routers.get(linear), name)
        if len(rows):  # else this is an expert that only padding was routed to
            seen.append((given, given._version, statistic(rows.float()), [name]))

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.enter_context(linear.register_forward_pre_hook(partial(collect, name)))
        for _ in runner.run(index):
            for *_given, value, names in seen:
                key = tuple(names)
                sums[key] = sums[key].add_(value) if key in sums else value
            seen.clear()
    totals: dict[str, Tensor] = {}
    for key, value in runner.ranks.sum(sums).items():
        for name in key:
            totals[name] = totals[name] + value if name in totals else value
    return totals


def _counted(x: Tensor, mask: Tensor | None, experts: SplitExperts | None, name: str) -> Tensor:
    """The inputs of a layer, (tokens, d_in), without those of padding."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is None or mask.all():
        return rows
    if experts is not None and experts.routed is not None:
        counts = mask.reshape(-1)[experts.routed]
        fits = len(counts) == len(rows)
    else:
        counts = mask.reshape(-1)
        # Some models flatten batch and length before a product.
        fits = x.shape[:-1] in (mask.shape, (mask.numel(),))
    if not fits:
        raise CalibrationError(
            f"{name}: which of its inputs, {tuple(x.shape)}, are padding cannot be told from an attention "
            f"mask of shape {tuple(mask.shape)}; calibrate on sequences of one length, without padding"
        )
    return rows[counts]
