"""``quantization_config`` of a compressed model, as transformers holds it in ``model.config``."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from oats.checkpoint import config_json
from oats.checkpoint.layer_table import layer_table
from oats.config import OatsConfig


@dataclass(kw_only=True, repr=False)
class OatsQuantizationConfig(QuantizationConfigMixin):
    """What ``config.json`` says about a compressed model.

    Given to ``from_pretrained`` of a dense model, it says how to compress it; an ``OatsConfig`` does too.

    Args:
        settings: of the compression run.
        layers: name of each compressed layer → its ``rank`` and ``nnz``; if it has codes, also the fields of
            its :class:`~oats.config.Storage`; for the output head also its ``embedding``.
        calibration: for a dense model: the path of a UTF-8 text, or token ids (sequences, length); None means
            the first half of ``pydoc_data.topics``. It is not stored.
        samples: number of sequences cut from a calibration text.
        length: tokens in each; fewer if the model takes fewer.
    """

    settings: OatsConfig
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    quant_method: str = config_json.QUANT_METHOD  # type: ignore[assignment]  # an enum of the methods transformers has
    calibration: Tensor | str | Path | None = field(default=None, compare=False)
    samples: int = field(default=64, compare=False)
    length: int = field(default=512, compare=False)
    _model: weakref.ref[nn.Module] | None = field(default=None, init=False, compare=False)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> OatsQuantizationConfig | tuple[OatsQuantizationConfig, dict[str, Any]]:
        """Read ``quantization_config`` of a ``config.json``.

        Raises:
            FormatError: an unsupported format version, an unknown or missing key, or a bad value.
        """
        settings, layers = config_json.parse_quantization_config(config_dict)
        config = cls(settings=settings, layers=layers)
        return (config, kwargs) if return_unused_kwargs else config

    def follow(self, model: nn.Module) -> None:
        """Take `layers` from `model` whenever this configuration is written.

        A larger model that contains `model` shares this configuration, and transformers saves it then
        without a call of the quantizer.
        """
        self._model = weakref.ref(model)

    def _update(self) -> None:
        model = self._model() if self._model is not None else None
        if model is not None:
            self.layers = layer_table(model)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the model: a copy belongs to another one, and pickle takes no weak reference."""
        self._update()
        return {**self.__dict__, "_model": None}

    @property
    def format_version(self) -> int:
        """The lowest version of the format that can describe the layers."""
        return config_json.lowest_format_version(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        self._update()
        return config_json.quantization_dict(self.settings, self.layers)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Items of :meth:`to_dict`, so that ``dict(config)`` works."""
        yield from self.to_dict().items()
