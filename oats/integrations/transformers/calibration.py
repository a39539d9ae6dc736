"""Calibration data for a dense model that ``from_pretrained`` compresses."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from oats.errors import CalibrationError
from oats.integrations.transformers.quantization_config import OatsQuantizationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def calibration_tokens(model: PreTrainedModel, config: OatsQuantizationConfig) -> Tensor:
    """Token ids that `config` asks for, (sequences, length)."""
    from transformers import AutoTokenizer

    from oats.compression.calibration_text import calibration_text
    from oats.compression.tokenization import calibration_sequences
    from oats.models.architecture import context_limit

    if isinstance(config.calibration, Tensor):
        return config.calibration
    text = calibration_text(config.calibration)
    source = model.config.name_or_path
    tokenizer: Any = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        tokenizer = AutoTokenizer.from_pretrained(source)
    # Some versions make an empty tokenizer if there is none: it turns every text into one unknown token.
    if tokenizer is None or len(tokenizer(text.content[:100], add_special_tokens=False).input_ids) < 2:
        raise CalibrationError(
            f"{source} has no tokenizer that turns {text.name} into tokens; pass token ids, (sequences, "
            "length), as OatsQuantizationConfig(settings=…, calibration=ids)"
        )
    vocabulary = cast(int, model.get_input_embeddings().num_embeddings)
    length = min(config.length, context_limit(model) or config.length)
    return calibration_sequences(tokenizer, text, vocabulary, config.samples, length)
