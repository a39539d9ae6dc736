"""When a kernel may be called directly, past torch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

# By name here: looking them up through their modules takes as long as the calls.
_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack


def is_plain(x: Tensor) -> bool:
    """True if a kernel may read the memory of `x`, and no compiler, tracer, mode or transform has to see it.

    It does not say whether autograd follows `x`.
    """
    return (
        type(x) is Tensor
        and (x.is_cpu or x.is_cuda)
        and not _is_compiling()
        and _tracing_state() is None
        and not x.is_neg()
        and _dispatch_modes() == 0
        and _transform() is None
        and forward_ad._current_level < 0
    )
