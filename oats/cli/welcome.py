"""``oats`` without a command: the models in this directory, and the commands to go on with."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from oats._version import __version__

STEPS = (
    ("oats compress MODEL OUT", "a directory, a .gguf file, a hub name"),
    ("oats info OUT", "what it holds; oats report OUT draws it"),
    ("oats eval OUT", "perplexity, or --tasks"),
    ('oats generate OUT "Once upon a time"', "continue a text"),
    ("oats chat OUT", "talk in the terminal"),
    ("oats serve OUT", "answer clients of OpenAI's API"),
    ("oats bench", "time one layer against torch's"),
)
MOST_SHOWN = 8


def welcome() -> None:
    """Print the models in this directory, and the commands in the order of a first session."""
    from rich.table import Table

    from oats.cli.console import human_bytes, results

    console = results()
    console.print(f"oats {__version__}: transformers as sparse plus low-rank weights, fast on CPUs\n")
    models = _models(Path.cwd())
    if models:
        here = Table.grid(padding=(0, 2))
        for directory, kind, size, command in models[:MOST_SHOWN]:
            here.add_row(f"  {directory}", f"{kind}, {human_bytes(size)}", command)
        console.print("In this directory:")
        console.print(here)
        if len(models) > MOST_SHOWN:
            console.print(f"  and {len(models) - MOST_SHOWN} more")
        console.print()
    steps = Table.grid(padding=(0, 2))
    for command, note in STEPS:
        steps.add_row(f"  {command}", note)
    console.print("What to do next:")
    console.print(steps)
    console.print("\noats COMMAND --help has examples; oats info alone describes this installation.")
    if find_spec("transformers") is None:
        console.print("transformers is not installed, which models need: pip install 'oats-torch[hf]'")


def _models(directory: Path) -> list[tuple[str, str, int, str]]:
    """Name, kind, bytes of the weights and next command of each model in a directory."""
    found = []
    for path in sorted(directory.iterdir()):
        if path.suffix == ".gguf" and path.is_file():
            command = f"oats compress {path.name} {path.stem}-oats"
            found.append((path.name, "GGUF", path.stat().st_size, command))
            continue
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            kind = str(config["model_type"])
            method = (config.get("quantization_config") or {}).get("quant_method")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not a model
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        compressed = method == "oats"
        command = f"oats eval {path.name}" if compressed else f"oats compress {path.name} {path.name}-oats"
        found.append((path.name, f"{kind}, {'compressed' if compressed else 'dense'}", size, command))
    return found
