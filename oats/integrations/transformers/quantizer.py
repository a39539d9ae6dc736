"""The quantizer: what transformers calls to load, save, compress and dequantize a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer

from oats.checkpoint.layer_table import compressed_layers, layer_table, layers_of, storable
from oats.checkpoint.quantization_config import QUANT_METHOD
from oats.config import OatsConfig
from oats.errors import ConfigError
from oats.format.layer_spec import DTYPES
from oats.integrations.transformers.calibration import calibration_tokens
from oats.integrations.transformers.dequantize import dequantize_
from oats.integrations.transformers.loading import prepare_
from oats.integrations.transformers.quantization_config import OatsQuantizationConfig
from oats.nn.fusion import fuse_

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OatsQuantizer(HfQuantizer):
    """Loads and saves models with `SparseLowRankLinear` layers; called by transformers."""

    quantization_config: OatsQuantizationConfig

    def __init__(self, quantization_config: OatsQuantizationConfig | OatsConfig, **kwargs: Any) -> None:
        if isinstance(quantization_config, OatsConfig):
            quantization_config = OatsQuantizationConfig(settings=quantization_config)
        super().__init__(quantization_config, **kwargs)
        # Name of each layer that is being loaded → its file, for error messages.
        self._origin: dict[str, str] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse devices other than the CPU.

        Raises:
            ConfigError: `device_map` names another device, or the disk.
        """
        if not isinstance(device_map, dict):
            return
        elsewhere = sorted({str(d) for d in device_map.values() if str(d) != "cpu"})
        if elsewhere:
            raise ConfigError(
                f"device_map places layers on {', '.join(elsewhere)}; OATS models are loaded on the CPU, "
                'with device_map="cpu" or without device_map, and moved then'
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Any name, such as ``"auto"``, means the CPU."""
        return {"": torch.device("cpu")} if isinstance(device_map, str) else device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuse dtypes without a kernel; a dense model that will be compressed may have any.

        Raises:
            ConfigError: `dtype` is neither float32 nor bfloat16.
        """
        if self.pre_quantized and dtype not in DTYPES.values():
            raise ConfigError(
                f"an OATS model cannot be loaded as {dtype}; pass dtype=torch.bfloat16 or "
                "dtype=torch.float32 to from_pretrained"
            )
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            self._origin = prepare_(model, self.quantization_config.layers, checkpoint_files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            self._compress(model)
            return model
        for name, layer in layers_of(model).items():
            layer.pack_(f"{self._origin[name]}: {name}")
            if layer.bias is not None:
                layer.bias.requires_grad_(False)  # transformers turns it on
        self.quantization_config.follow(model)
        fuse_(model)
        return model

    def _compress(self, model: PreTrainedModel) -> None:
        from transformers.utils import logging

        from oats.compression.compress import compress_

        tokens = calibration_tokens(model, self.quantization_config)
        with logging.tqdm(desc="Compressing", unit="layer") as bar:

            def progress(done: int, total: int, name: str, error: float) -> None:
                bar.total = total
                bar.set_postfix_str(f"{name} error {error:.3f}", refresh=False)
                bar.update(1)

            compress_(model, tokens, self.quantization_config.settings, progress=progress)
        # compress_ attached another quantizer, and transformers may replace it by this one: share its config.
        self.quantization_config = model.config.quantization_config
        self.pre_quantized = True
        model.hf_quantizer = self  # type: ignore[assignment]

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # save_pretrained leaves a name in the model's configuration.
        dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` writes for the layers that the model has now."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapters are saved
        table, names = compressed_layers(model)
        if not table:
            # The model is dense: a reader without this package must be able to load it.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            return None, {}
        self.quantization_config.follow(model)
        model.config.quantization_config = self.quantization_config
        return storable(model, model.state_dict(), names), {}

    def is_serializable(self) -> bool:
        """``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained: gradients pass through the layers, which stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` takes the model."""
        return True


def attach(model: Any, config: OatsConfig) -> None:
    """Make ``save_pretrained`` write the OATS format.

    Call it before or after the model's layers are replaced: ``save_pretrained`` writes those that the model
    has then. A quantizer that the model was loaded with (GGUF) is replaced.

    Args:
        model: a ``PreTrainedModel``.
        config: the settings that its layers are compressed with.
    """
    quantizer = OatsQuantizer(OatsQuantizationConfig(settings=config, layers=layer_table(model)))
    quantizer.quantization_config.follow(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = quantizer.quantization_config
