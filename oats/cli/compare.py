"""``oats compare MODEL``: methods by compressions, in one table and one picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from oats.cli.options import (
    HELD_OUT,
    CalibrationText,
    Context,
    DenseModel,
    Json,
    Length,
    Limit,
    MaxTokens,
    Pattern,
    RankRatio,
    Samples,
    Seed,
    StoredDtype,
    Stride,
    TaskPath,
)
from oats.config import OatsConfig
from oats.errors import ConfigError


def compare(
    model: DenseModel,
    out: Annotated[
        Path, typer.Option(help="Directory of the results; one with finished cells is continued.")
    ] = Path("comparison"),
    methods: Annotated[
        str,
        typer.Option(
            help="Out of oats, oats-hessian, magnitude, wanda, sparsegpt, dsnot; +match behind a name tunes "
            "each block too, +int8 or +int4 behind that stores the kept values as such codes. dense+int8, "
            "+int4, +q8_0, +q4_0 and +q4_k round the dense weights to nearest in that format."
        ),
    ] = "magnitude,wanda,dsnot,sparsegpt,oats,oats-hessian",
    compressions: Annotated[
        str, typer.Option(help="Shares of each layer's parameters to remove.")
    ] = "0.3,0.4,0.5,0.6",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text to evaluate on; may be repeated.", show_default=HELD_OUT),
    ] = None,
    context: Context = None,
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="Score the share of next tokens that are predicted too.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Score tasks of lm-evaluation-harness too: names with commas between them.",
            show_default="none",
        ),
    ] = None,
    task_path: TaskPath = None,
    limit: Limit = None,
    calibration: CalibrationText = None,
    samples: Samples = 64,
    length: Length = 512,
    rank_ratio: RankRatio = OatsConfig.rank_ratio,
    pattern: Pattern = OatsConfig.pattern,
    iterations: Annotated[int | None, typer.Option(help="Alternations at most.", show_default="40")] = None,
    dtype: StoredDtype = None,
    seed: Seed = OatsConfig.seed,
    plot: Annotated[bool, typer.Option(help="Draw the picture too; needs matplotlib.")] = True,
    as_json: Json = False,
) -> None:
    """Compress MODEL by each method at each compression, and evaluate what comes out.

    Every method has the same walk over the model, budget, calibration and evaluation. Nothing but the results
    is written; what is finished is not measured again.
    """
    common = OatsConfig(
        rank_ratio=rank_ratio,
        pattern=pattern,
        iterations=iterations,
        dtype=dtype,  # type: ignore[arg-type]  # OatsConfig checks it
        seed=seed,
    )
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    names = [path.name for path in text or ()]
    if len(set(names)) < len(names):
        raise ConfigError(f"two of the texts have the same file name: {', '.join(names)}; rename one")

    import torch

    from oats._version import __version__
    from oats.checkpoint.atomic_file import write_text
    from oats.checkpoint.loading import load_model
    from oats.cli.comparison_table import print_table
    from oats.cli.console import notes, print_json, progress_bar, results, settings_table, status
    from oats.compression.calibration_text import builtin_text, calibration_text, read_text
    from oats.compression.tokenization import bos_token_id, calibration_sequences, tokenize
    from oats.evaluate.comparison import (
        Cell,
        Cells,
        Planned,
        apply_,
        complete,
        format_score,
        markdown,
        plan,
    )  # fmt: skip
    from oats.evaluate.perplexity import default_context, perplexity
    from oats.evaluate.tasks import evaluate_tasks, require_harness
    from oats.kernels import ops

    planned = plan(
        common, _listed(methods, "methods"), [_number(each) for each in _listed(compressions, "compressions")]
    )
    if plot:
        from oats.bench.plots import require_matplotlib

        require_matplotlib()
    if tasks:
        require_harness()
    source = calibration_text(calibration)
    texts = [read_text(path) for path in text] if text else [builtin_text("second")]
    with status(f"Loading {model}"):
        network, tokenizer = load_model(model, dtype)
    vocabulary, bos = network.get_input_embeddings().num_embeddings, bos_token_id(tokenizer)
    window = default_context(network) if context is None else context
    windows = calibration_sequences(tokenizer, source, vocabulary, samples, length)
    ids = {
        f"perplexity, {Path(each.name).name if text else each.split}": tokenize(tokenizer, each, vocabulary)[
            :max_tokens
        ]
        for each in texts
    }
    settings = {
        "model": model,
        "tokenizer": f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, "
        + ("BOS before every window" if bos is not None else "no BOS"),
        "dtype": str(network.dtype).removeprefix("torch."),
        **{
            f"evaluation {i + 1}": f"{each.name}, {each.split}, sha256 {each.sha256}, {len(tokens)} tokens"
            for i, (each, tokens) in enumerate(zip(texts, ids.values(), strict=True))
        },
        "context": window,
        "stride": window if stride is None else stride,
        "calibration": f"{samples} x {length} tokens, {source.name}, {source.split}, sha256 {source.sha256}",
        "rank ratio": rank_ratio,
        "pattern": pattern,
        "iterations": common.resolved_iterations,
        "seed": seed,
        "versions": f"oats {__version__}, torch {torch.__version__}, instruction set {ops.active_isa()}",
    }
    if accuracy:
        settings["accuracy"] = "share of the next tokens of the evaluation texts that are predicted"
    if tasks:
        settings["tasks"] = f"{tasks}, " + (
            "all questions" if limit is None else f"at most {limit} questions"
        )
    cells = Cells(out, settings)

    networks = [network]  # the one that is loaded, for the first cell
    del network

    def measure(what: Planned | None) -> tuple[dict[str, float], int, int, float]:
        network = networks.pop() if networks else load_model(model, dtype)[0]
        started = time.perf_counter()
        sizes = apply_(network, what, windows, common)
        if what is None:
            networks.append(network)
        seconds = time.perf_counter() - started
        scores = {}
        for score, tokens in ids.items():
            measured = perplexity(network, tokens, bos=bos, context=context, stride=stride)
            scores[score] = measured.perplexity
            if accuracy:
                scores[score.replace("perplexity", "accuracy of the next token")] = measured.accuracy
        if tasks:
            names = _listed(tasks, "tasks")
            for each in evaluate_tasks(network, tokenizer, names, task_path=task_path, limit=limit).scores:
                if each.metric == "acc":
                    scores[f"accuracy, {each.task}"] = each.value
        return scores, *sizes, seconds

    with progress_bar("Comparing") as bar:

        def progress(done: int, total: int, name: str, cell: Cell | None) -> None:
            bar.update(done, total, name)
            if cell is not None:
                scores = ", ".join(format_score(*score) for score in cell.scores.items())
                notes().print(f"{name}: {scores}  (compressed in {cell.seconds:.0f} s)")

        finished = complete(cells, planned, measure, progress)
    write_text(out / "table.md", markdown(finished, settings))
    if plot:
        from oats.evaluate.comparison_plot import draw

        draw(finished, [out / "plot.png", out / "plot.svg"])
    if as_json:
        print_json({"settings": settings, "cells": [vars(cell) for cell in finished]})
        return
    print_table(results(), finished)
    results().print(settings_table(settings))
    results().print(f"\nwritten: {out}/table.md" + (", plot.png, plot.svg" if plot else ""))


def _listed(value: str, what: str) -> list[str]:
    items = list(dict.fromkeys(item.strip() for item in value.split(",") if item.strip()))
    if not items:
        raise ConfigError(f"{what} is empty; give names or numbers with commas between them")
    return items


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"compressions must be numbers with commas between them, got {value!r}") from None
