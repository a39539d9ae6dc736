"""Targets: the layers that a run compresses, and why other matrices of the blocks stay dense."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import cast

import torch
from torch import Tensor, nn

from oats.config import OatsConfig
from oats.decomposition import budget
from oats.errors import UnsupportedModelError, WeightError
from oats.models.architecture import fused_outputs
from oats.models.linear import is_linear, weight_of
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

SKIPPED = "it matches OatsConfig.skip"
"""Why a layer stays dense that the user named."""

SPLIT = ("qkv_proj",)
"""The fused projections that the paper decomposes one by one (arXiv 2409.13652, section 3)."""


@dataclass(frozen=True)
class Target:
    """A linear layer to compress."""

    module: nn.Module
    outputs: dict[str, int]
    """Of a fused projection whose parts are decomposed one by one: part → number of outputs; else empty."""

    def matrices(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Part → weight (d_out, d_in) and bias (d_out,), views; the part of an unsplit layer is ""."""
        weight = weight_of(self.module).detach()
        bias = None if self.module.bias is None else cast(Tensor, self.module.bias).detach()
        if not self.outputs:
            return {"": (weight, bias)}
        sizes = list(self.outputs.values())
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        return dict(zip(self.outputs, zip(weight.split(sizes), biases, strict=True), strict=True))


@dataclass(frozen=True)
class Targets:
    """What a run compresses."""

    blocks: list[dict[str, Target]]
    """For each block, name → layer to compress."""
    left_dense: dict[str, str]
    """Name of each other matrix → why it stays dense."""

    def __len__(self) -> int:
        """Number of matrices to decompose."""
        return sum(len(target.outputs) or 1 for block in self.blocks for target in block.values())

    def check_block(self, index: int, config: OatsConfig) -> None:
        """Find what would stop the compression of a block, before anything is changed.

        Raises:
            ConfigError: the budget or the pattern cannot be met for a layer's shape.
            WeightError: a weight or bias has NaN or infinite entries.
        """
        for name, target in self.blocks[index].items():
            for weight, _ in target.matrices().values():
                d_out, d_in = weight.shape
                budget.check_pattern_divides(d_in, config.pattern, name)
                budget.rank_for(d_out, d_in, config.compression, config.rank_ratio, config.pattern)
            for kind, parameter in target.module.named_parameters():
                if not torch.isfinite(parameter).all():
                    raise WeightError(
                        f"{name}: the {kind} has NaN or infinite entries; the checkpoint is damaged"
                    )


def find_targets(
    model: nn.Module,
    path: str,
    blocks: nn.ModuleList | nn.Sequential,
    config: OatsConfig,
    split: Collection[str] = SPLIT,
) -> Targets:
    """Find the linear layers in the blocks, except those that `config.skip` names or that are not called.

    Args:
        model: the whole model; layers of its other lists of blocks are noted as left dense.
        path: dotted path of `blocks` in the model; names begin with it.
        blocks: from :func:`oats.models.architecture.find_blocks`.
        config: gives `skip`.
        split: names of fused projections whose parts are decomposed one by one.

    Raises:
        UnsupportedModelError: there is nothing to compress.

    >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    >>> targets = find_targets(model, "layers", model, OatsConfig(skip="*.1"))
    >>> list(targets.blocks[0]), targets.left_dense
    (['layers.0.0'], {'layers.0.1': 'it matches OatsConfig.skip'})
    """
    seen: set[nn.Module] = set()
    targets = Targets([], {})
    for name, block in blocks.named_children():
        targets.blocks.append(_of_block(f"{path}.{name}", block, config, split, targets.left_dense, seen))
    if not len(targets):
        compressed = any(isinstance(module, SparseLowRankLinear) for module in blocks.modules())
        why = "they are compressed already" if compressed else reasons(targets.left_dense)
        raise UnsupportedModelError(
            f"{type(model).__name__}: no linear layer to compress inside {path}; {why}"
        )
    _note_other_blocks(model, path, blocks, config, targets.left_dense)
    return targets


def reasons(left_dense: dict[str, str]) -> str:
    """The first three layers that stay dense and why, for a message.

    >>> reasons({"fc1": "it did not run"})
    'fc1 (it did not run)'
    """
    if not left_dense:
        return "they hold no matrices"
    each = [f"{name} ({why})" for name, why in left_dense.items()]
    return "; ".join(each[:3]) + (f"; and {len(each) - 3} more" if len(each) > 3 else "")


# These forward functions read the weights of the layers inside and never call the layers.
_FUSED = (nn.TransformerEncoderLayer.forward, nn.MultiheadAttention.forward)


def _of_block(
    prefix: str,
    block: nn.Module,
    config: OatsConfig,
    split: Collection[str],
    left_dense: dict[str, str],
    seen: set[nn.Module],
) -> dict[str, Target]:
    """Find the layers of one block; modules of the blocks before are in `seen`, to which this one's go."""
    modules = dict(block.named_modules(prefix=prefix, remove_duplicate=False))
    names: dict[nn.Module, list[str]] = {}
    fused: dict[nn.Module, str] = {}
    for name, module in modules.items():
        names.setdefault(module, []).append(name)
        if type(module).forward in _FUSED:
            fused.update(dict.fromkeys(module.modules(), type(module).__name__))
    found: dict[str, Target] = {}
    for module, (name, *_) in names.items():
        if module in seen:
            continue
        if isinstance(module, nn.Linear) or is_linear(module):
            if any(is_skipped(alias, config) for alias in names[module]):
                left_dense[name] = SKIPPED
            elif module in fused:
                left_dense[name] = f"{fused[module]} reads its weight and does not call it"
            elif not is_linear(module):
                left_dense[name] = f"{type(module).__name__} computes in its own way"
            else:
                owner, _, attribute = name.rpartition(".")
                outputs = fused_outputs(modules.get(owner), attribute) if attribute in split else {}
                found[name] = Target(module, outputs)
        elif not isinstance(module, (nn.Embedding, SparseLowRankLinear)):
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2 and min(parameter.shape[-2:]) > 1:
                    full = f"{name}.{parameter_name}"
                    reason = f"{type(module).__name__} is not a linear layer"
                    left_dense[full] = SKIPPED if is_skipped(full, config) else reason
    seen.update(names)
    return found


def _note_other_blocks(
    model: nn.Module, path: str, blocks: nn.Module, config: OatsConfig, left_dense: dict[str, str]
) -> None:
    """Note the layers of other lists of blocks, such as an encoder beside its decoder: they stay dense."""
    inside = set(blocks.modules())
    for list_name, modules in model.named_modules():
        if not isinstance(modules, (nn.ModuleList, nn.Sequential)) or modules in inside:
            continue
        # Blocks are of one class and hold layers. A head may be a list too, but of layers.
        if len({type(m) for m in modules}) != 1 or not all(any(m.children()) for m in modules):
            continue
        for name, module in modules.named_modules(prefix=list_name):
            if (isinstance(module, nn.Linear) or is_linear(module)) and module not in inside:
                reason = f"only the blocks in {path} are compressed"
                left_dense[name] = SKIPPED if is_skipped(name, config) else reason


def is_skipped(name: str, config: OatsConfig) -> bool:
    """True if `config.skip` names this layer."""
    return any(fnmatch(name, pattern) for pattern in config.skip)
