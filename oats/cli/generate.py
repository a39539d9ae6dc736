"""``oats generate DIR "prompt"``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from oats.cli.options import AnyModel, Json, RunActivations, RunDtype, SamplingSeed, use_activations
from oats.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def generate(
    directory: AnyModel,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, Option(help="Most tokens to generate.")] = 100,
    temperature: Annotated[float, Option(help="0 takes the most likely token each time.")] = 0.0,
    seed: SamplingSeed = 0,
    dtype: RunDtype = None,
    activations: RunActivations = "exact",
    as_json: Json = False,
) -> None:
    """Continue a prompt; print the text while it is generated, and its speed on stderr."""
    use_activations(activations)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 or more, got {temperature}")

    import torch

    from oats.checkpoint.loading import load_model
    from oats.cli.console import note_fallback, notes, print_json, status
    from oats.engine.engine import Engine
    from oats.serving.next_token import NextToken, end_tokens, generation_config
    from oats.serving.request import Sampling

    with status(f"Loading {directory}"):
        model, tokenizer = load_model(directory, dtype)
        engine = Engine(model)
    ids = tokenizer(prompt).input_ids
    if not ids:
        raise ConfigError("the prompt is empty and this model has no BOS token; give some text to continue")
    if engine.reason is None:
        engine.check_text(ids, max_new_tokens)
    note_fallback(engine.reason)
    ends = end_tokens(model, tokenizer)
    config = generation_config(model, ends, Sampling(max_new_tokens, temperature))
    arriving = _Arriving(tokenizer, ids, shown=not as_json)
    if engine.reason is None:
        choose = NextToken(model, config, ids, seed)
        engine.generate(
            [ids], max_new_tokens, ends=ends, choose=choose, on_token=lambda _, token: arriving.push(token)
        )
    else:
        torch.manual_seed(seed)
        prompts = torch.tensor([ids])
        model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config,
            streamer=arriving,
        )  # fmt: skip
    arriving.end()
    speed = {"prefill_tokens_per_s": arriving.prefill_rate, "decode_tokens_per_s": arriving.decode_rate}
    if as_json:
        print_json(
            model=directory, prompt=prompt, text=arriving.text, prompt_tokens=len(ids),
            tokens=len(arriving.times), seconds=arriving.times[-1] - arriving.started, **speed,
            engine="transformers" if engine.reason else "native", reason=engine.reason,
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            dtype=str(model.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
        )  # fmt: skip
        return
    decode = "" if arriving.decode_rate is None else f", decode {arriving.decode_rate:.1f} tokens/s"
    notes().print(
        f"{len(arriving.times)} tokens, prefill {arriving.prefill_rate:.0f} tokens/s{decode}", style="dim"
    )


class _Arriving:
    """Prints tokens as they come, and remembers when; a streamer of transformers too.

    `text` is all of it, the prompt included.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], shown: bool) -> None:
        from oats.serving.decoding import IncrementalDecoder

        self._decoder, self._shown = IncrementalDecoder(tokenizer), shown
        self._prompt, self._prompt_seen, self._ended = len(prompt), False, False
        self.text = ""
        self._show("".join(map(self._decoder.push, prompt)))
        self.times: list[float] = []
        self.started = time.perf_counter()

    def push(self, token: int) -> None:
        """Take one new token."""
        self.times.append(time.perf_counter())
        self._show(self._decoder.push(token))

    def put(self, value: Tensor) -> None:
        """Called by transformers with the prompt first, then with each token."""
        if self._prompt_seen:
            self.push(int(value))
        self._prompt_seen = True

    def end(self) -> None:
        """Print what was held back; a second call does nothing."""
        if not self._ended:
            self._show(self._decoder.flush() + ("\n" if self._shown else ""))
        self._ended = True

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt a second, up to the first new token."""
        return self._prompt / (self.times[0] - self.started)

    @property
    def decode_rate(self) -> float | None:
        """New tokens a second after the first; None if there is one only."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])

    def _show(self, text: str) -> None:
        self.text += text
        if self._shown:
            print(text, end="", flush=True)
