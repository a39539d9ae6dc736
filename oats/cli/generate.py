"""``oats generate DIR "prompt"``."""

from __future__ import annotations

from typing import Annotated

import typer

from oats.errors import ConfigError


def generate(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Model directory, dense or compressed; GGUF; or hub name.")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a prompt, printing the text as it is made."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 or more, got {temperature}")

    import torch
    from transformers import TextStreamer

    from oats.cli.console import status
    from oats.integrations.checkpoint import load_model

    with status(f"Loading {directory}"):
        model, tokenizer = load_model(directory)
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs.input_ids.numel() == 0:
        raise ConfigError("the prompt is empty and this model has no BOS token; give some text to continue")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
