"""The C++ and CUDA kernels as functions and operators of torch.

`isa`: instruction sets of this CPU. `packing`: from a layer's stored tensors to the layout that kernels read,
and back. `sparse_low_rank_linear`: the product, as an operator, as a direct call, and of several layers at
once. `to_dense`: a packed weight, or some rows of it, as a dense matrix. `keep_largest`: which
entries of a matrix stay. `rms_norm`: the norm. `eager`: when a kernel may be called directly. `cuda`: what is
behind these functions on a CUDA device.
"""

from __future__ import annotations

import os

# torch first: it loads the OpenMP runtime whose threads the core then shares.
import torch  # noqa: F401

from oats import _core

# A forked child has none of its parent's threads. Without this, its first parallel region, torch's or ours,
# would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_core.release_threads)
