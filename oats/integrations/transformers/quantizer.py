"""The quantizer: what transformers calls to load, save, compress and dequantize a model."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from oats.checkpoint.config_json import QUANT_METHOD
from oats.checkpoint.layer_table import layer_table, layers_of, replacements, storable
from oats.config import OatsConfig
from oats.errors import CalibrationError, ConfigError
from oats.format.layer_spec import DTYPES
from oats.integrations.transformers.generation import generate_in_transformers_, generate_natively_
from oats.integrations.transformers.loading import prepare_
from oats.integrations.transformers.quantization_config import OatsQuantizationConfig
from oats.models.experts import split_all_
from oats.models.linear import like_linear, replace_
from oats.nn.experts import SplitExperts, fused_weights
from oats.nn.fusion import fuse_, unfuse_
from oats.nn.head import RowsOfHead, own_rows

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
        generate_natively_(model)
        return model

    def _compress(self, model: PreTrainedModel) -> None:
        from transformers.utils import logging

        from oats.compression.compress import compress_

        tokens = _calibration_tokens(model, self.quantization_config)
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
        _dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` writes for the layers that the model has now."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapters are saved
        if not layers_of(model):
            # The model is dense: a reader without this package must be able to load it.
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            return None, {}
        self.quantization_config.follow(model)
        model.config.quantization_config = self.quantization_config
        return storable(model, model), {}

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
    """Make ``save_pretrained`` write the OATS format, and ``generate`` run in the engine.

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
    generate_natively_(model)


def _calibration_tokens(model: PreTrainedModel, config: OatsQuantizationConfig) -> Tensor:
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


def _dequantize_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put dense layers with the weights ``S + U V``, in `dtype`, in the places of compressed ones."""
    with torch.device("meta"):
        original = type(model)(model.config)  # has the right kind of linear layer in each place
    experts = {name: m for name, m in model.named_modules() if isinstance(m, SplitExperts)}
    fused = split_all_(original, experts.__contains__)
    dense: dict[nn.Module, nn.Module] = {}
    for name, layer in replacements(model).items():
        if layer not in dense:
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            dense[layer] = like_linear(original.get_submodule(name), layer.weight.to(dtype), bias)
        model.set_submodule(name, dense[layer])
    for name, module in experts.items():
        for parameter, weight in fused_weights(module).items():
            fused[name].register_parameter(parameter, nn.Parameter(weight.to(dtype)))
        model.set_submodule(name, fused[name])
    for embedding in [module for module in model.modules() if isinstance(module, RowsOfHead)]:
        replace_(model, embedding, own_rows(embedding, model.get_output_embeddings().weight))
        model.config.tie_word_embeddings = True
        model.tie_weights()
    unfuse_(model)
    generate_in_transformers_(model)
