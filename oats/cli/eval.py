"""``oats eval DIR``: perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oats.errors import ConfigError


def evaluate(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Model directory, dense or compressed; GGUF; or hub name.")
    ],
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text file.", show_default="second half of Python's pydoc_data.topics"),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window.", show_default="2048, or the model's own if less")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens scored in a window.", show_default="context: no overlap")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Use only the first tokens of the text.", show_default="all")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16 or fp32.", show_default="the model's own; GGUF: bf16")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Perplexity of a model on a text, with every setting it depends on."""
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    if dtype not in (None, "bf16", "fp32"):
        raise ConfigError(f'dtype must be "bf16" or "fp32", got {dtype!r}')

    from oats.cli.console import print_json, progress_bar, results, settings_table, status
    from oats.evaluate.perplexity import perplexity
    from oats.evaluate.text import bos_token_id, builtin_text, read_text, tokenize
    from oats.integrations.checkpoint import load_model

    source = builtin_text("second") if text is None else read_text(text)
    with status(f"Loading {directory}"):
        model, tokenizer = load_model(directory, dtype)
    ids = tokenize(tokenizer, source, model.get_input_embeddings().num_embeddings)[:max_tokens]
    with progress_bar("Evaluating") as bar:
        result = perplexity(
            model,
            ids,
            bos=bos_token_id(tokenizer),
            context=context,
            stride=stride,
            progress=lambda done, total, value: bar.update(done, total, f"tokens  perplexity {value:.2f}"),
        )
    if as_json:
        print_json({"model": directory, **source.settings(), **result.to_dict()})
        return
    results().print(
        settings_table(
            {
                "perplexity": f"{result.perplexity:.4f}",
                "model": directory,
                "text": f"{source.name}, sha256 {source.sha256}",
                "split": f"{source.split}, {len(source.content)} characters",
                "tokens": f"{result.tokens} scored, each once",
                "context": f"{result.context} tokens, {'the first of them BOS' if result.bos else 'no BOS'}",
                "stride": f"{result.stride} tokens",
                "dtype": result.dtype,
                "threads": result.threads,
                "time": f"{result.seconds:.1f} s ({result.tokens / result.seconds:.0f} tokens/s)",
            }
        )
    )
