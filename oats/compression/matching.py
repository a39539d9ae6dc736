"""Block-wise matching: the compressed layers of one block are tuned together for the block's output.

A decomposition fits one layer as if the others were exact. Here Adam moves the kept values (not their
positions) and the low-rank factors of a whole block, so that the block returns what the dense block returns
on the calibration data: the transformer matching of 3BASiL (arXiv 2603.01376). Nothing else of the model
changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from oats.compression.block_runner import BlockRunner, HiddenStates
from oats.compression.calibration import token_mask
from oats.compression.temporary import replaced_forward
from oats.errors import CalibrationError
from oats.format.layer_spec import decode_values, kept_elements
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

TOKENS_PER_STEP = 1024
"""Each step of Adam takes sequences of about this many tokens in all."""

RATE = 1e-3
"""First step size relative to the root mean square of the tensor; it falls linearly to 0."""

BETAS = 0.9, 0.95


def match_block(
    runner: BlockRunner,
    index: int,
    layers: Sequence[SparseLowRankLinear],
    dense_outputs: HiddenStates,
    passes: int,
) -> tuple[float, float]:
    """Tune layers of a block, in place, so that the block returns what the dense block returned.

    The loss is the mean over tokens of ``‖y − t‖² / ‖t‖²``, y being what the block returns and t what the
    dense block returned. It is relative because the next block normalises each token: else a few tokens of
    huge norm would decide. Tokens that an attention mask excludes do not count. Layers stay as they were if
    tuning does not lower the loss.

    Args:
        runner, index: the block, and a runner that is before it.
        layers: to tune; none of an earlier block.
        dense_outputs: what the dense block returned for each batch: a tensor (…, d), or a tuple that begins
            with one.
        passes: over the calibration data, at least 1.

    Returns:
        The loss before and after.

    Raises:
        CalibrationError: the block does not return a tensor, or its loss is not finite.
    """
    before = _loss(runner, index, dense_outputs)
    untuned = [layer.canonical() for layer in layers]
    for layer, tuned in zip(layers, _tune(runner, index, layers, dense_outputs, passes), strict=True):
        _store(layer, tuned)
    after = _loss(runner, index, dense_outputs)
    if after < before:
        return before, after
    for layer, canonical in zip(layers, untuned, strict=True):
        _store(layer, canonical)
    return before, before


class _Tunable:
    """A layer's values and factors as float32 tensors that autograd follows."""

    def __init__(self, layer: SparseLowRankLinear) -> None:
        canonical = layer.canonical()
        self._bias, self._nnz = layer.bias, layer.nnz
        self._kept = kept_elements(canonical, layer.in_features).float()
        self._sparse = decode_values(
            canonical, canonical["values"].float(), layer.in_features
        ).requires_grad_()
        self._u = canonical["low_rank_u"].float().requires_grad_()
        self._v = canonical["low_rank_v"].float().requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.addmm(self._sparse * self._kept, self._u, self._v)
        return nn.functional.linear(x, weight.to(x.dtype), self._bias)

    def groups(self) -> Iterator[dict[str, Any]]:
        """Adam's parameter groups, each with the scale of its steps."""
        sizes = {self._sparse: self._nnz, self._u: self._u.numel(), self._v: self._v.numel()}
        for tensor, count in sizes.items():
            if count:
                yield {"params": [tensor], "scale": RATE * float(tensor.detach().norm()) / count**0.5}

    def tuned(self) -> dict[str, Tensor]:
        values = self._sparse.detach()[self._kept != 0]
        return {"values": values, "low_rank_u": self._u.detach(), "low_rank_v": self._v.detach()}


def _tune(
    runner: BlockRunner,
    index: int,
    layers: Sequence[SparseLowRankLinear],
    dense_outputs: HiddenStates,
    passes: int,
) -> list[dict[str, Tensor]]:
    tunables = [_Tunable(layer) for layer in layers]
    groups = [group for tunable in tunables for group in tunable.groups()]
    optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
    parameters = [group["params"][0] for group in optimizer.param_groups]
    steps, step = passes * len(dense_outputs), 0
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for layer, tunable in zip(layers, tunables, strict=True):
            stack.enter_context(replaced_forward(layer, tunable.forward))
        for _ in range(passes):
            for output, target in zip(runner.run(index), dense_outputs, strict=True):
                loss = _relative_error(output, target, runner.batch)
                # Not backward(): norms, and the embedding before the first block, need no gradients.
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                for group in optimizer.param_groups:
                    group["lr"] = group["scale"] * (1 - step / steps)
                optimizer.step()
                step += 1
    return [tunable.tuned() for tunable in tunables]


def _store(layer: SparseLowRankLinear, tensors: dict[str, Tensor]) -> None:
    """Replace values and factors, rounded to the layer's dtype."""
    state = layer.state_dict()
    state.update({name: tensor.to(layer.dtype) for name, tensor in tensors.items() if name != "mask"})
    layer.load_state_dict(state)


def _loss(runner: BlockRunner, index: int, dense_outputs: HiddenStates) -> float:
    losses = [
        float(_relative_error(output, target, runner.batch))
        for output, target in zip(runner.run(index), dense_outputs, strict=True)
    ]
    mean = sum(losses) / len(losses)
    if not torch.isfinite(torch.tensor(mean)):
        raise CalibrationError(f"block {index}: what it returns on the calibration data is not finite")
    return mean


def _relative_error(output: Any, dense: Any, batch: dict[str, Tensor]) -> Tensor:
    y, t = _hidden(output), _hidden(dense)
    each = (y - t).square().sum(-1) / t.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    mask = token_mask(batch)
    if mask is not None and each.shape in (mask.shape, (mask.numel(),)):
        each = each.reshape(-1)[mask.reshape(-1)]
    return each.mean()


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise CalibrationError(
            f"a block returns a {type(hidden).__name__}, and matching needs a tensor, or a tuple that begins "
            "with one; compress this model with block_matching=0"
        )
    return hidden.float()
