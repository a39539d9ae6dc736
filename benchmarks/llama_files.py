"""Models for llama.cpp: GGUF files of given shapes, and a process that runs them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from model_process import ModelProcess
from transformers import Phi3Config, PretrainedConfig

BENCH = Path(__file__).parent.parent / ".bench/llama"
PEER = Path(__file__).parent / "peers/llama_model.py"

# Width of the narrow model whose quantised blocks fill a file of random weights. Every block size divides it.
_NARROW = 256


class LlamaModel(ModelProcess):
    """llama.cpp. It loads ``{"file": "model.gguf"}``.

    Raises:
        PeerError: it is not installed (`benchmarks/install_peers.sh`), or does not start.
    """

    def __init__(self) -> None:
        """Start the process."""
        environment = {"PYTHONPATH": str(BENCH / "source"), "LLAMA_CPP_LIB_PATH": str(BENCH / "build/bin")}
        python = str(BENCH / "venv/bin/python")
        super().__init__("llama.cpp", [python, str(PEER)], environment=environment)

    def load(self, model: Mapping[str, Any], context: int) -> None:
        """See `ModelProcess`."""
        super().load(model, context)
        self.bytes_per_token, _ = weight_bytes(Path(model["file"]))

    def quantize(
        self, source: Path, file: Path, kind: str, *, embedding: str | None = None, pure: bool = False
    ) -> None:
        """Write `file`, quantised as llama.cpp does it for ``kind``, such as "Q4_K_M".

        Args:
            source: a GGUF file; it may be quantised already.
            file: the file to write.
            kind: a file type of llama.cpp.
            embedding: type of the token embedding and the head; None leaves it to the file type.
            pure: give all other weights the one type that the file type is named for.
        """
        paths = {"source": str(source), "file": str(file)}
        number = None if embedding is None else int(GGMLQuantizationType[embedding])
        self.ask(do="quantize", **paths, type=kind, embedding=number, pure=pure)


def weight_bytes(file: Path) -> tuple[int, int]:
    """Bytes of the weights that a token reads, and the part of them in the blocks.

    A file whose head shares the weight of the embedding has no tensor called output.
    """
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    unread = tensors["token_embd.weight"] if "output.weight" in tensors else 0
    blocks = sum(size for name, size in tensors.items() if name.startswith("blk."))
    return sum(tensors.values()) - unread, blocks


def write_random(file: Path, architecture: PretrainedConfig, quantize: Callable[[Path, Path], None]) -> None:
    """Write a model of given shapes with random weights.

    llama.cpp quantises a narrow model with as many layers. The file has the same types, and repeats its
    blocks.

    Args:
        file: the file to write.
        architecture: a configuration of Phi-3 or of Llama.
        quantize: called with the narrow file and the file to write; it chooses the type of each tensor.
    """
    narrow = copy.deepcopy(architecture)
    narrow.num_attention_heads = architecture.num_attention_heads // architecture.num_key_value_heads
    narrow.num_key_value_heads = 1
    narrow.hidden_size = narrow.vocab_size = narrow.intermediate_size = _NARROW
    plain, quantised = file.with_suffix(".narrow"), file.with_suffix(".quantised")
    generator = np.random.default_rng(0)
    _write(plain, narrow, lambda _, shape: generator.normal(0, 0.02, shape).astype(np.float32))
    quantize(plain, quantised)
    blocks = {tensor.name: tensor for tensor in GGUFReader(quantised).tensors}

    def repeated(name: str, shape: tuple[int, ...]) -> tuple[Any, GGMLQuantizationType]:
        tensor = blocks[name]
        block, size = GGML_QUANT_SIZES[tensor.tensor_type]
        row = shape[-1] // block * size
        data = np.resize(tensor.data.reshape(-1).view(np.uint8), prod(shape[:-1]) * row)
        return data.reshape(*shape[:-1], row), tensor.tensor_type

    _write(file, architecture, repeated)
    plain.unlink()
    quantised.unlink()


def _write(file: Path, architecture: PretrainedConfig, data: Callable[[str, tuple[int, ...]], Any]) -> None:
    phi = isinstance(architecture, Phi3Config)
    writer = GGUFWriter(file, "phi3" if phi else "llama")
    hidden, heads = architecture.hidden_size, architecture.num_attention_heads
    writer.add_context_length(architecture.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(architecture.num_hidden_layers)
    writer.add_feed_forward_length(architecture.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(architecture.num_key_value_heads)
    writer.add_layer_norm_rms_eps(architecture.rms_norm_eps)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(architecture.rope_parameters["rope_theta"])
    writer.add_vocab_size(architecture.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    shapes = _shapes(architecture, phi)
    for name, shape in shapes.items():
        first, kind = _described(data(name, shape))
        writer.add_tensor_info(name, first.shape, first.dtype, first.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        writer.write_tensor_data(_described(data(name, shape))[0])
    writer.close()


def _described(data: Any) -> tuple[Any, GGMLQuantizationType | None]:
    return data if isinstance(data, tuple) else (data, None)


def _shapes(architecture: PretrainedConfig, phi: bool) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocabulary = (
        architecture.hidden_size,
        architecture.intermediate_size,
        architecture.vocab_size,
    )
    key = hidden // architecture.num_attention_heads * architecture.num_key_value_heads
    if phi:
        layers = {"attn_qkv": (hidden + 2 * key, hidden), "ffn_up": (2 * inner, hidden)}
    else:
        layers = {
            **{"attn_q": (hidden, hidden), "attn_k": (key, hidden), "attn_v": (key, hidden)},
            **{"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)},
        }
    layers |= {"attn_output": (hidden, hidden), "ffn_down": (hidden, inner)}
    block = {**layers, "attn_norm": (hidden,), "ffn_norm": (hidden,)}
    return {
        "token_embd.weight": (vocabulary, hidden),
        **{
            f"blk.{index}.{name}.weight": shape
            for index in range(architecture.num_hidden_layers)
            for name, shape in block.items()
        },
        "output_norm.weight": (hidden,),
        "output.weight": (vocabulary, hidden),
    }
