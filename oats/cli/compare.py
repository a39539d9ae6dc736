"""``oats compare MODEL``: several methods at several compressions, in one table and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

import oats.cli.options as options
from oats.config import OatsConfig
from oats.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from oats.evaluate.cells import Cell


def compare(
    model: options.DenseModel,
    out: Annotated[
        Path, Option(help="Directory of the results; a comparison that is there is continued.")
    ] = Path("comparison"),
    methods: Annotated[
        str,
        Option(
            help="Some of oats, oats-hessian, magnitude, wanda, sparsegpt, dsnot. A name may end in +match "
            "(tune each block too), and then in +int8 or +int4 (store the kept values as such codes). "
            "dense+int8, +int4, +q8_0, +q4_0 and +q4_k round the dense weights to that format."
        ),
    ] = "magnitude,wanda,dsnot,sparsegpt,oats,oats-hessian",
    compressions: Annotated[
        str, Option(help="Shares of each layer's parameters to remove.")
    ] = "0.3,0.4,0.5,0.6",
    text: Annotated[
        list[Path] | None,
        Option(help="UTF-8 text to evaluate on; may be repeated.", show_default=options.HELD_OUT),
    ] = None,
    context: options.Context = None,
    stride: options.Stride = None,
    max_tokens: options.MaxTokens = None,
    accuracy: Annotated[
        bool, Option("--accuracy", help="Score the share of next tokens that are predicted, too.")
    ] = False,
    tasks: Annotated[
        str | None,
        Option(
            help="Score these tasks of lm-evaluation-harness, too: names with commas.", show_default="none"
        ),
    ] = None,
    task_path: options.TaskPath = None,
    limit: options.Limit = None,
    calibration: options.CalibrationText = None,
    samples: options.Samples = 64,
    length: options.Length = 512,
    rank_ratio: options.RankRatio = OatsConfig.rank_ratio,
    pattern: options.Pattern = OatsConfig.pattern,
    iterations: Annotated[int | None, Option(help="Alternations at most.", show_default="40")] = None,
    dtype: options.StoredDtype = None,
    seed: options.Seed = OatsConfig.seed,
    plot: Annotated[bool, Option(help="Draw the picture; needs matplotlib.")] = True,
    as_json: options.Json = False,
) -> None:
    """Compress MODEL with each method at each compression, and evaluate the results.

    All methods get the same budget, calibration and evaluation. Compressed models are not kept. A second run
    with the same settings skips what is finished.
    """
    common = OatsConfig(
        rank_ratio=rank_ratio, pattern=pattern, iterations=iterations, seed=seed,
        dtype=dtype,  # type: ignore[arg-type]  # OatsConfig checks it
    )  # fmt: skip
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    names = [path.name for path in text or ()]
    if len(set(names)) < len(names):
        raise ConfigError(f"two of the texts have the same file name: {', '.join(names)}; rename one")

    import torch

    from oats._version import __version__
    from oats.checkpoint.atomic import write_text
    from oats.checkpoint.loading import load_model
    from oats.cli.console import notes, print_json, progress_bar, results, settings_table, status
    from oats.compression.calibration_text import builtin_text, calibration_text, read_text
    from oats.compression.tokenization import calibration_sequences
    from oats.evaluate.cells import Cells
    from oats.evaluate.comparison import Measured, Planned, complete, measure_, plan
    from oats.evaluate.comparison_table import format_score, markdown
    from oats.evaluate.language_model import Scoring
    from oats.evaluate.tasks import require_harness
    from oats.kernels.isa import active_isa

    planned = plan(
        common, _listed(methods, "methods"), [_number(each) for each in _listed(compressions, "compressions")]
    )
    if plot:
        from oats.bench.plots import require_matplotlib

        require_matplotlib()
    if tasks:
        require_harness()
    source = calibration_text(calibration)
    half = builtin_text("second")
    texts = {path.name: read_text(path) for path in text} if text else {half.split: half}
    with status(f"Loading {model}"):
        network, tokenizer = load_model(model, dtype)
    score = Scoring(
        network, tokenizer, texts, context=context, stride=stride, max_tokens=max_tokens, accuracy=accuracy,
        tasks=_listed(tasks, "tasks") if tasks else (), task_path=task_path, limit=limit,
    )  # fmt: skip
    windows = calibration_sequences(
        tokenizer, source, network.get_input_embeddings().num_embeddings, samples, length
    )
    settings = {
        "model": model,
        "tokenizer": f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, "
        + ("no BOS" if score.bos is None else "BOS before every window"),
        "dtype": str(network.dtype).removeprefix("torch."),
        **score.settings(),
        "calibration": f"{samples} x {length} tokens, {source.name}, {source.split}, sha256 {source.sha256}",
        "rank ratio": rank_ratio,
        "pattern": pattern,
        "iterations": common.resolved_iterations,
        "seed": seed,
        "versions": f"oats {__version__}, torch {torch.__version__}, instruction set {active_isa()}",
    }
    if accuracy:
        settings["accuracy"] = "share of the next tokens of the evaluation texts that are predicted"
    if tasks:
        settings["tasks"] = f"{tasks}, " + (
            "all questions" if limit is None else f"at most {limit} questions"
        )
    cells = Cells(out, settings)
    networks = [network]  # the dense model that is loaded, for the first cell
    del network

    def measure(what: Planned | None) -> Measured:
        network = networks.pop() if networks else load_model(model, dtype)[0]
        if what is None:
            networks.append(network)  # still dense
        return measure_(network, what, windows, common, score)

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
        print_json(settings=settings, cells=[vars(cell) for cell in finished])
        return
    print_table(results(), finished)
    results().print(settings_table(settings))
    results().print(f"\nwritten: {out}/table.md" + (", plot.png, plot.svg" if plot else ""))


def print_table(console: Console, cells: Sequence[Cell]) -> None:
    """Print the cells of :func:`oats.evaluate.comparison.complete`, a line each."""
    from oats.cli.console import plain_table
    from oats.evaluate.comparison_table import header, rows

    table = plain_table()
    for i, column in enumerate(header(cells)):
        table.add_column(column, justify="right" if i else "left")
    for row in rows(cells):
        table.add_row(*row)
    console.print(table)


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
