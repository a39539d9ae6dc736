"""Models with random weights, to measure the speed and memory of an architecture without its checkpoint.

Compressed layers are made one at a time, in packed form. No dense model is built: the process never holds
more than the compressed model and one unpacked layer.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from oats.compression.targets import Target, find_targets
from oats.config import OatsConfig, parse_n_m
from oats.decomposition import budget
from oats.decomposition.selection import keep_largest
from oats.format.bitmask import encode, mask_population
from oats.format.layer_spec import LayerSpec
from oats.models.architecture import find_blocks
from oats.models.linear import weight_of
from oats.nn.fusion import fuse_
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from oats.nn.split_linear import SplitLinear

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Random numbers are drawn once and repeated, and layers of one shape are copies. Distinct numbers would take
# minutes to draw, and the speed of a kernel does not depend on them.
_DISTINCT_ROWS = 512
_DISTINCT_VALUES = 1_000_003  # a prime, so that the rows of a matrix differ


@torch.no_grad()
def random_model(
    architecture: PretrainedConfig, config: OatsConfig | None, *, dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Any:  # fmt: skip
    """A causal language model of transformers with random weights, in evaluation mode.

    Args:
        architecture: a configuration of transformers, e.g. ``LlamaConfig(hidden_size=…)``.
        config: how the linear layers in the blocks are compressed (``compression``, ``rank_ratio``,
            ``pattern``) and stored; None leaves them dense. Pattern ``"layer"`` counts as ``"row"``.
        dtype: dtype of all weights, torch.bfloat16 or torch.float32.
        seed: seed of the weights. The global random state is left as it was.

    Raises:
        UnsupportedModelError: the model has no known list of blocks, or no linear layers in them.
        ConfigError: the settings cannot be met for a layer's shape.

    >>> from transformers import LlamaConfig
    >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    >>> model = random_model(LlamaConfig(**sizes, num_attention_heads=2), OatsConfig(compression=0.5))
    >>> model.model.layers[0].mlp.up_proj.rank, model.model.layers[0].mlp.up_proj.nnz
    (1, 192)
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config is not None:
            path, blocks = find_blocks(model)
            made: dict[tuple[object, ...], nn.Module] = {}
            for targets in find_targets(model, path, blocks, config).blocks:
                for name, target in targets.items():
                    shape = (*weight_of(target.module).shape, target.module.bias is None, *target.outputs)
                    if shape in made:
                        layer = copy.deepcopy(made[shape])
                    else:
                        layer = made[shape] = _random_replacement(name, target, config)
                    model.set_submodule(name, layer)
        others = [module for module in model.modules() if not isinstance(module, SparseLowRankLinear)]
        for module in others:
            module.to_empty(device="cpu", recurse=False)
        model.tie_weights()
        for module in others:
            if isinstance(module, (nn.Linear, nn.Embedding)):
                _draw_(module.weight, 0.02)
                module.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # else drawn again below
            model._init_weights(module)  # norms, biases, and buffers such as rotary frequencies
    fuse_(model)
    return model.eval()


def _draw_(tensor: Tensor, std: float = 1.0) -> Tensor:
    """Fill with normal numbers of mean 0, or uniform codes: int8 from -127 to 127, or bytes of two int4."""
    drawn = tensor.new_empty(min(tensor.numel(), _DISTINCT_VALUES))
    if tensor.is_floating_point():
        drawn.normal_(std=std)
    else:
        drawn.random_(*((-127, 128) if tensor.dtype == torch.int8 else (0, 256)))
    for chunk in tensor.view(-1).split(max(drawn.numel(), 1)):
        chunk.copy_(drawn[: chunk.numel()])
    return tensor


def _random_replacement(name: str, target: Target, config: OatsConfig) -> nn.Module:
    layers = {}
    for part, (weight, bias) in target.matrices().items():
        part_name = f"{name}.{part}" if part else name
        d_out, d_in = weight.shape
        tensors = _random_tensors(part_name, d_out, d_in, config, weight.dtype)
        zeros = None if bias is None else torch.zeros(d_out, dtype=weight.dtype)
        layers[part] = SparseLowRankLinear.from_canonical(
            tensors, d_in, zeros, part_name, storage=config.storage, dtype=weight.dtype
        )
    return SplitLinear(layers) if target.outputs else layers[""]


def _random_tensors(
    name: str, d_out: int, d_in: int, config: OatsConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Canonical tensors as large as after a compression, scaled so that outputs are as large as inputs."""
    budget.check_pattern_divides(d_in, config.pattern, name)
    settings = config.compression, config.rank_ratio
    rank = budget.rank_for(d_out, d_in, *settings, config.pattern)
    n_m = parse_n_m(config.pattern)
    pattern, kept = (config.pattern, n_m[0]) if n_m else ("row", budget.nnz_per_row(d_in, *settings))
    # From 1 to 2, so that no kept value is zero.
    sample, _ = encode(keep_largest(torch.rand(min(d_out, _DISTINCT_ROWS), d_in).add_(1), kept, pattern))
    mask = sample[torch.randint(len(sample), (d_out,))]
    nnz = mask_population(mask, d_in)
    of_values = (d_out / max(nnz, 1)) ** 0.5
    sizes = {"values": of_values, "low_rank_u": max(rank, 1) ** -0.5, "low_rank_v": d_in**-0.5}
    tensors = {"mask": mask}
    spec = LayerSpec(d_out, d_in, rank, nnz, dtype, config.storage)
    for tensor_name, (kind, shape) in spec.tensors().items():
        if tensor_name == "values_codebook":
            tensors[tensor_name] = torch.arange(-120, 121, 16, dtype=kind)
        elif tensor_name == "input_exponent":
            # Powers of two: random ones would make most numbers infinite.
            tensors[tensor_name] = torch.zeros(shape, dtype=kind)
        elif tensor_name.endswith("_scale"):
            # The root mean square of uniform codes from -127 to 127 is 73.
            size = sizes[tensor_name.removesuffix("_scale")]
            tensors[tensor_name] = torch.full(shape, size / 73, dtype=kind)
        elif kind.is_floating_point:
            tensors[tensor_name] = _draw_(torch.empty(shape, dtype=kind), sizes[tensor_name])
        elif tensor_name != "mask":
            tensors[tensor_name] = _draw_(torch.empty(shape, dtype=kind))
    return tensors
