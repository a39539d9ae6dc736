"""``oats generate DIR "prompt"``."""

from __future__ import annotations

import time
from typing import Annotated

from typer import Argument, Option

from oats.cli.options import AnyModel, Json, RunDtype, SamplingSeed
from oats.errors import ConfigError


def generate(
    directory: AnyModel,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, Option(help="Most tokens to generate.")] = 100,
    temperature: Annotated[float, Option(help="0 takes the most likely token each time.")] = 0.0,
    seed: SamplingSeed = 0,
    dtype: RunDtype = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt; print the text while it is generated."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 or more, got {temperature}")

    import torch
    from transformers import TextStreamer

    from oats.checkpoint.loading import load_model
    from oats.cli.console import print_json, status

    with status(f"Loading {directory}"):
        model, tokenizer = load_model(directory, dtype)
    inputs = tokenizer(prompt, return_tensors="pt")
    given = inputs.input_ids.numel()
    if given == 0:
        raise ConfigError("the prompt is empty and this model has no BOS token; give some text to continue")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    started = time.perf_counter()
    output = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=max_new_tokens,
        streamer=None if as_json else TextStreamer(tokenizer, skip_special_tokens=True), **sampling,
    )  # fmt: skip
    if as_json:
        print_json(
            model=directory, prompt=prompt, text=tokenizer.decode(output[0], skip_special_tokens=True),
            tokens=output.shape[1] - given, seconds=time.perf_counter() - started,
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            dtype=str(model.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
        )  # fmt: skip
