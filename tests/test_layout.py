"""Imports between the rooms of `oats/` go one way (docs/design.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "oats"

# From the ground up. A room imports from its own floor's room and from lower floors.
FLOORS = [
    {"errors", "_version"},
    {"config"},
    {"format"},
    {"kernels"},
    {"decomposition"},
    {"nn"},
    {"models"},
    {"compression", "engine"},
    {"checkpoint"},
    {"integrations", "bench"},
    {"evaluate", "inspection"},
    {"serving"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# The compiled modules, and who may touch them.
CORE = {"_core": {"format", "kernels", "engine"}, "_cuda": {"kernels"}}

# They name every room, and import one only when a name of it is asked for: from `oats`, or by a library.
LAZY = {"__init__", "_autoload"}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything of `oats` that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "oats")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            if node.module == "oats":
                yield from ((node.lineno, f"oats.{alias.name}") for alias in node.names)
            elif node.module is not None and node.module.startswith("oats."):
                yield node.lineno, node.module


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if room_of(file) not in LAZY]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    room = room_of(file)
    assert room in FLOOR, f"{room} has no floor: name it in FLOORS, and in docs/design.md"
    for line, module in imported_modules(file):
        _, *parts = module.split(".")
        assert parts, f"{file}:{line}: import the module, not the whole package"
        if parts[0] in CORE:
            assert room in CORE[parts[0]], f"{file}:{line}: only {CORE[parts[0]]} may import {module}"
            continue
        assert parts[0] in FLOOR, f"{file}:{line}: {module} is in no room"
        allowed = parts[0] == room or FLOOR[parts[0]] < FLOOR[room]
        assert allowed, (
            f"{file}:{line}: {room} may not import {module}: it is on a higher floor, or beside it"
        )


def test_modules_form_no_circle() -> None:
    modules = {".".join(("oats", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in FILES}
    arrows: dict[str, set[str]] = {}
    for name, file in modules.items():
        arrows[name] = set()
        for _, module in imported_modules(file):
            targets = {module, f"{module}.__init__"} & modules.keys()
            for alias in imported_names(file, module):
                targets |= {f"{module}.{alias}"} & modules.keys()
            arrows[name] |= targets - {name}
    done: set[str] = set()
    while ready := {name for name in arrows.keys() - done if arrows[name] <= done}:
        done |= ready
    assert arrows.keys() == done, f"a circle among {sorted(arrows.keys() - done)}"


def imported_names(file: Path, module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            yield from (alias.name for alias in node.names)


def test_every_room_says_what_it_is() -> None:
    rooms = [path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    for room in rooms:
        assert ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))), f"{room} has no docstring"


NAMED = re.compile(r"\b(?:oats|csrc|tests|benchmarks|examples|tools|docs)/[\w./-]+\.(?:py|cpp|h|cu|md|sh)\b")


def test_files_that_are_named_exist() -> None:
    """In comments and docs: a file that moved takes its name along."""
    root = PACKAGE.parent
    texts = [root / "CMakeLists.txt", root / "Makefile", root / "CONTRIBUTING.md"]
    for folder, endings in (("docs", "md"), ("oats", "py"), ("csrc", "md cpp h cu"), ("tests", "py cpp h")):
        texts += [file for ending in endings.split() for file in (root / folder).rglob(f"*.{ending}")]
    missing = []
    for text in texts:
        for name in NAMED.findall(text.read_text(encoding="utf-8")):
            # The core's public headers are included as oats/<name>.h.
            if not (root / name).exists() and not (root / "csrc/include" / name).exists():
                missing.append(f"{text.relative_to(root)}: {name}")
    assert missing == []
