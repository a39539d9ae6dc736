"""Ask ``oats serve`` for texts from several clients at once, and print tokens a second.

    python examples/serving_rates.py .demo/oats-50 --clients 1,2,4,8 --max-batch 1,8

Each ``--max-batch`` gets a server of its own; the servers take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
from rich.box import SIMPLE_HEAD
from rich.table import Table

from oats.cli.console import progress_bar, results, status

PROMPT = "In Python, a dictionary is a collection of"


@contextlib.contextmanager
def serving(directory: str, max_batch: int) -> Iterator[openai.OpenAI]:
    """A client of a server that runs inside this context."""
    command = [sys.executable, "-m", "oats", "serve", directory, "--port", "0", "--max-batch", str(max_batch)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r" at (http://\S+/v1)", line):
                break
        else:
            sys.exit("".join(said))
        yield openai.OpenAI(base_url=found[1], api_key="none")
    finally:
        process.terminate()
        process.wait()


def ask(client: openai.OpenAI, model: str, tokens: int, number: int) -> tuple[float, int]:
    """Seconds to the first text of an answer, and tokens of the whole answer."""
    started, first, received = time.perf_counter(), 0.0, 0
    stream = client.completions.create(
        model=model, prompt=f"{number}. {PROMPT}", max_tokens=tokens, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    for chunk in stream:
        first = first or time.perf_counter() - started
        if chunk.usage is not None:
            received = chunk.usage.completion_tokens
    return first, received


def turn(client: openai.OpenAI, model: str, clients: int, tokens: int) -> tuple[float, float]:
    """Tokens a second of all clients together, and seconds to the slowest first text."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda number: ask(client, model, tokens, number), range(clients)))
    seconds = time.perf_counter() - started
    return sum(received for _, received in answers) / seconds, max(first for first, _ in answers)


def numbers(text: str) -> list[int]:
    """The numbers of an option, with commas between them."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="DIR", help="model directory, compressed or dense")
    parser.add_argument("--clients", type=numbers, default=[1, 2, 4, 8], help="at once (1,2,4,8)")
    parser.add_argument("--max-batch", type=numbers, default=[8], help="of the server (8)")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (48)")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each (5)")
    options = parser.parse_args()

    cases = [(clients, most) for clients in options.clients for most in options.max_batch]
    found: dict[tuple[int, int], list[tuple[float, float]]] = {case: [] for case in cases}
    with contextlib.ExitStack() as stack:
        with status("Starting the servers"):
            servers = {most: stack.enter_context(serving(options.model, most)) for most in options.max_batch}
            model = next(iter(servers.values())).models.list().data[0].id
            for client in servers.values():
                turn(client, model, max(options.clients), 8)
        total = options.repetitions * len(cases)
        with progress_bar("Asking") as bar:
            for done in range(total):
                case = cases[done % len(cases)]
                found[case].append(turn(servers[case[1]], model, case[0], options.tokens))
                bar.update(done + 1, total, f"{case[0]} clients")

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("clients", "--max-batch", "tokens/s, all clients", "slowest first text, s"):
        table.add_column(column, justify="right")
    for (clients, most), turns in found.items():
        rates, firsts = zip(*turns, strict=True)
        spread = f"({min(rates):.1f} to {max(rates):.1f})"
        rate = f"{statistics.median(rates):.1f} {spread}"
        table.add_row(str(clients), str(most), rate, f"{statistics.median(firsts):.2f}")
    console = results()
    console.print(table)
    console.print(
        f"Medians of {options.repetitions} turns (least to most), {options.tokens} tokens an answer, greedy, "
        "streamed to the openai client on the same machine."
    )


if __name__ == "__main__":
    main()
