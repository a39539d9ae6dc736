"""Files beside a model that other libraries read: how to prepare images, how to pool a sentence's tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
_MODULES = "modules.json"


def copy_companions(source: str | Path, out: Path) -> None:
    """Copy such files from a dense model to the directory `out`, where nothing is overwritten.

    These are the files of transformers' image processors, and of sentence-transformers: its list of modules,
    and the directories of the modules that follow the model. None are if `source` is no local directory.

    >>> import tempfile
    >>> source, out = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    >>> _ = (source / "preprocessor_config.json").write_text("{}")
    >>> copy_companions(source, out)
    >>> [file.name for file in out.iterdir()]
    ['preprocessor_config.json']
    """
    source = Path(source)
    files = [source / name for name in _FILES]
    for directory in _module_directories(source):
        files += sorted(directory.rglob("*"))
    for file in files:
        target = out / file.relative_to(source)
        if file.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _module_directories(source: Path) -> list[Path]:
    """The directories inside `source` that hold modules of sentence-transformers."""
    try:
        paths = [entry["path"] for entry in json.loads((source / _MODULES).read_text(encoding="utf-8"))]
        found = [source / path for path in paths if path]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [path for path in found if path.is_dir() and path.resolve().parent == source.resolve()]
