"""``oats eval DIR``: perplexity, or scores on tasks of lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import oats.cli.options as options
from oats.errors import ConfigError, OatsError

if TYPE_CHECKING:
    from oats.evaluate.tasks import TaskScores


def evaluate(
    directory: options.AnyModel,
    text: Annotated[
        Path | None, Option(help="UTF-8 text to evaluate on.", show_default=options.HELD_OUT)
    ] = None,
    context: options.Context = None,
    stride: options.Stride = None,
    max_tokens: options.MaxTokens = None,
    tasks: Annotated[
        str | None,
        Option(
            help="Score tasks of lm-evaluation-harness instead: names with commas between them.",
            show_default="none",
        ),
    ] = None,
    task_path: options.TaskPath = None,
    shots: Annotated[
        int | None, Option(help="Examples in the prompt of a task.", show_default="as the task says")
    ] = None,
    limit: options.Limit = None,
    batch: Annotated[int, Option(help="Sequences in one forward pass, for tasks.")] = 1,
    save: Annotated[bool, Option("--save", help="Add the perplexity to the model card of DIR.")] = False,
    dtype: options.RunDtype = None,
    activations: options.RunActivations = "exact",
    as_json: options.Json = False,
) -> None:
    """Measure the perplexity of a model on a text, or its scores on tasks; print the settings too."""
    options.use_activations(activations)
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    if dtype not in (None, "bf16", "fp32"):
        raise ConfigError(f'dtype must be "bf16" or "fp32", got {dtype!r}')
    if tasks is not None and (save or {text, context, stride, max_tokens} != {None}):
        raise ConfigError(
            "text, context, stride, max_tokens and save belong to the perplexity; leave them out with tasks"
        )

    from oats.checkpoint.loading import load_model
    from oats.checkpoint.stored_model import read_stored_model
    from oats.cli.console import print_json, progress_bar, results, settings_table, status
    from oats.compression.calibration_text import builtin_text, read_text
    from oats.compression.tokenization import bos_token_id, tokenize
    from oats.evaluate.perplexity import perplexity
    from oats.evaluate.tasks import evaluate_tasks

    if save and read_stored_model(directory).config is None:
        raise ConfigError(f"{directory} is not compressed, so it has no card of oats; leave --save out")
    source = builtin_text("second") if text is None else read_text(text)
    with status(f"Loading {directory}"):
        model, tokenizer = load_model(directory, dtype)
    if tasks is not None:
        scores = evaluate_tasks(
            model, tokenizer, tasks.split(","), task_path=task_path, shots=shots, limit=limit, batch=batch
        )
        if as_json:
            print_json(model=directory, **scores.to_dict())
        else:
            _print_scores(directory, scores)
        return
    ids = tokenize(tokenizer, source, model.get_input_embeddings().num_embeddings)[:max_tokens]
    with progress_bar("Evaluating") as bar:
        result = perplexity(
            model, ids, bos=bos_token_id(tokenizer), context=context, stride=stride,
            progress=lambda done, total, value: bar.update(done, total, f"tokens  perplexity {value:.2f}"),
        )  # fmt: skip
    if as_json:
        print_json(model=directory, **source.settings(), **result.to_dict())
    else:
        settings = {
            "perplexity": f"{result.perplexity:.4f}",
            "next token": f"{result.accuracy:.2%} predicted",
            "model": directory,
            "text": f"{source.name}, sha256 {source.sha256}",
            "split": f"{source.split}, {len(source.content)} characters",
            "tokens": f"{result.tokens} scored, each once",
            "context": f"{result.context} tokens, {'first BOS' if result.bos else 'no BOS'}",
            "stride": f"{result.stride} tokens",
            "dtype": result.dtype,
            "threads": result.threads,
            "time": f"{result.seconds:.1f} s ({result.tokens / result.seconds:.0f} tokens/s)",
        }
        results().print(settings_table(settings))
    if save:
        _save(Path(directory), {**source.settings(), "text": Path(source.name).name, **result.to_dict()})


def _save(directory: Path, evaluation: dict[str, Any]) -> None:
    from oats.checkpoint.model_card import CARD, write_model_card
    from oats.checkpoint.record import Record
    from oats.cli.console import notes

    record = Record.read(directory) or Record()
    record.add_evaluation(evaluation)
    try:
        record.write(directory)
        card = write_model_card(directory)
    except OSError as error:
        raise OatsError(
            f"cannot write into {directory}: {error.strerror}; the result is not saved"
        ) from error
    if card is None:
        notes().print(f"{directory / CARD} was not written by oats and stays as it is")


def _print_scores(directory: str, result: TaskScores) -> None:
    from oats.cli.console import plain_table, results

    columns = ("task", "metric", "score", "± stderr", "shots", "questions", "version")
    table = plain_table(*columns, left=(0, 1))
    for score in result.scores:
        error = "–" if score.stderr is None else f"{score.stderr:.4f}"
        table.add_row(
            score.task, score.metric, f"{score.value:.4f}", error, str(score.shots), str(score.samples),
            score.version,
        )  # fmt: skip
    results().print(table)
    results().print(
        f"{directory}, {result.dtype}, lm-evaluation-harness {result.harness}, {result.seconds:.0f} s"
    )
