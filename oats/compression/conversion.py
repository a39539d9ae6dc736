"""Casting a model and its calibration data to the dtype in which layers are stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter; float32 for a model without one."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a checkpoint holds, as loading does; other buffers (rotary frequencies) stay as they are."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))


def convert_batch(batch: dict[str, Tensor], dtype: torch.dtype, stored: torch.dtype) -> dict[str, Tensor]:
    """Cast the inputs that have the model's old dtype, such as images."""
    return {k: v.to(stored) if getattr(v, "dtype", None) == dtype else v for k, v in batch.items()}
