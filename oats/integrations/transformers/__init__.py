"""OATS checkpoints in transformers: ``save_pretrained`` and ``from_pretrained``.

Importing this package registers the quantization method ``"oats"`` with transformers; if torch's entry
points are on, that happens by itself (:mod:`oats._autoload`). A compressed model is then saved and loaded
like any other, and its dense weights are never built.

Without this package, transformers does not know the method: it logs ``Unknown quantization type, got oats …
we will skip the quantization`` and builds dense layers, which it would fill with random values. To make that
fail, each layer also has a *marker*: a one-element tensor with the name of its dense weight. transformers
refuses a tensor of the wrong shape, so ``from_pretrained`` raises and returns no random model (unless
``ignore_mismatched_sizes=True`` asks for one). With this package, the marker is ignored.

On loading:

- ``dtype=torch.float32`` and ``torch.bfloat16`` work, whatever was stored; the values are cast.
- the device is the CPU; ``device_map="auto"`` means the CPU. Move the model afterwards.
- with ``quantization_config=OatsConfig(…)`` a dense model is compressed once its weights are loaded.
- each file's header is checked against ``config.json`` before a tensor is read, and each mask against its
  values afterwards: a checkpoint that contradicts itself raises :class:`~oats.errors.FormatError`.
"""

from __future__ import annotations

from transformers.quantizers import auto

from oats.checkpoint.config_json import QUANT_METHOD
from oats.compression.saving_hook import register_saving_hook
from oats.integrations.transformers.quantization_config import OatsQuantizationConfig
from oats.integrations.transformers.quantizer import OatsQuantizer, attach

__all__ = ["OatsQuantizationConfig", "OatsQuantizer", "attach"]

# register_quantizer() would raise if the method is known already.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = OatsQuantizationConfig
auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = OatsQuantizer
register_saving_hook(attach)
