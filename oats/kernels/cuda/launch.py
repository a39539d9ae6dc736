"""Where and on which stream a CUDA kernel is launched."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside it, kernels are launched on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def stream_and_capability(tensor: Tensor) -> tuple[int, int]:
    """The current stream of the tensor's device, and the major number of its compute capability."""
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    return stream, torch.cuda.get_device_capability(tensor.device)[0]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def side_stream(device: torch.device, main: int) -> torch.cuda.Stream:
    """A second stream beside the stream `main`.

    Each main stream gets its own, as far as torch's pool of streams reaches: if they shared one, capturing a
    graph on one main stream would capture what another one queues.
    """
    return torch.cuda.Stream(device)
