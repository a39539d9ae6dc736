"""The target layers of a compression: which are taken, and why other matrices of the blocks stay dense."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import nn

from oats import budget
from oats.config import OatsConfig
from oats.errors import UnsupportedModelError, WeightError
from oats.nn import SparseLowRankLinear

SKIPPED = "it matches OatsConfig.skip"
"""Why a layer stays dense, where the user said so."""


@dataclass(frozen=True)
class Targets:
    """The linear layers of a model's blocks, divided into those to compress and the rest.

    Attributes:
        blocks: for each block, its layers to compress, by name.
        left_dense: name of each other matrix → why it stays as it is.
    """

    blocks: list[dict[str, nn.Linear]]
    left_dense: dict[str, str]

    def __len__(self) -> int:
        """Number of layers to compress."""
        return sum(map(len, self.blocks))

    def check(self, config: OatsConfig) -> None:
        """Find what would stop their compression, before anything has been changed.

        Raises:
            ConfigError: the budget or the pattern cannot be met for a layer's shape.
            WeightError: a weight or bias is not finite.
        """
        for layers in self.blocks:
            for name, linear in layers.items():
                d_out, d_in = linear.out_features, linear.in_features
                budget.check_inputs(d_in, config.pattern, name)
                budget.rank_for(d_out, d_in, config.compression, config.rank_ratio, config.pattern)
                for kind, parameter in linear.named_parameters():
                    if not torch.isfinite(parameter).all():
                        raise WeightError(
                            f"{name}: the {kind} has NaN or infinite entries; the checkpoint is damaged"
                        )


def find_targets(
    model: nn.Module, path: str, blocks: nn.ModuleList | nn.Sequential, config: OatsConfig
) -> Targets:
    """Every `nn.Linear` in the blocks, but for those that `config.skip` names or that are not called.

    Args:
        model: the whole model; lists of blocks other than `blocks` are noted as left dense.
        path: dotted path of `blocks` in it, with which the names begin.
        blocks: from :func:`oats.models.find_blocks`.
        config: whose `skip` is obeyed.

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
        targets.blocks.append(_of_block(f"{path}.{name}", block, config, targets.left_dense, seen))
    if not len(targets):
        raise UnsupportedModelError(
            f"{type(model).__name__}: no nn.Linear to compress inside {path}; {reasons(targets.left_dense)}"
        )
    _note_other_blocks(model, path, blocks, config, targets.left_dense)
    return targets


def reasons(left_dense: dict[str, str]) -> str:
    """The first few layers that stay dense and why, for a message.

    >>> reasons({"fc1": "it did not run"})
    'fc1 (it did not run)'
    """
    if not left_dense:
        return "they hold no matrices"
    each = [f"{name} ({why})" for name, why in left_dense.items()]
    return "; ".join(each[:3]) + (f"; and {len(each) - 3} more" if len(each) > 3 else "")


# Their forward functions read the weights of the layers inside, and never call the layers.
_FUSED = (nn.TransformerEncoderLayer.forward, nn.MultiheadAttention.forward)


def _of_block(
    prefix: str, block: nn.Module, config: OatsConfig, left_dense: dict[str, str], seen: set[nn.Module]
) -> dict[str, nn.Linear]:
    """The layers of one block; `seen` are the modules of those before it, and grows."""
    names: dict[nn.Module, list[str]] = {}
    fused: dict[nn.Module, str] = {}
    for name, module in block.named_modules(prefix=prefix, remove_duplicate=False):
        names.setdefault(module, []).append(name)
        if type(module).forward in _FUSED:
            fused.update(dict.fromkeys(module.modules(), type(module).__name__))
    found: dict[str, nn.Linear] = {}
    for module, (name, *_) in names.items():
        if module in seen:
            continue
        if isinstance(module, nn.Linear):
            if any(_is_skipped(alias, config) for alias in names[module]):
                left_dense[name] = SKIPPED
            elif module in fused:
                left_dense[name] = f"{fused[module]} reads its weight and does not call it"
            elif type(module).forward is not nn.Linear.forward:
                left_dense[name] = f"{type(module).__name__} computes in its own way"
            else:
                found[name] = module
        elif not isinstance(module, (nn.Embedding, SparseLowRankLinear)):
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2 and min(parameter.shape[-2:]) > 1:
                    left_dense[f"{name}.{parameter_name}"] = f"{type(module).__name__} is not an nn.Linear"
    seen.update(names)
    return found


def _note_other_blocks(
    model: nn.Module,
    path: str,
    blocks: nn.ModuleList | nn.Sequential,
    config: OatsConfig,
    left_dense: dict[str, str],
) -> None:
    """Note the layers of lists of blocks that are not compressed, such as an encoder beside its decoder."""
    inside = set(blocks.modules())
    for list_name, modules in model.named_modules():
        if not isinstance(modules, (nn.ModuleList, nn.Sequential)) or modules in inside:
            continue
        # A head is a list of layers, not of blocks.
        if len({type(m) for m in modules}) != 1 or not all(any(m.children()) for m in modules):
            continue
        for name, module in modules.named_modules(prefix=list_name):
            if isinstance(module, nn.Linear) and module not in inside:
                reason = f"only the blocks in {path} are compressed"
                left_dense[name] = SKIPPED if _is_skipped(name, config) else reason


def _is_skipped(name: str, config: OatsConfig) -> bool:
    return any(fnmatch(name, pattern) for pattern in config.skip)
