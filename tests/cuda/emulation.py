"""The CUDA kernels on a CPU: their own sources, compiled with `emulation.h` in the place of CUDA."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from oats.kernels.cuda import availability, launch
from tests.compiler import COMPILER

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"


@functools.cache
def emulated_kernels() -> ModuleType:
    """What ``oats._cuda`` would be, for tensors on the CPU; built once for each state of the sources."""
    if not SOURCES.is_dir():
        pytest.skip(f"{SOURCES} is not there: these tests compile the kernels' sources")
    compiler = shutil.which(COMPILER)
    if compiler is None:
        pytest.skip(f"no C++ compiler ({COMPILER}) to compile the emulated kernels with")
    files = sorted([*SOURCES.iterdir(), ROOT / "tests" / "cuda" / "emulation.h"])
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    built = ROOT / "build" / f"emulation-{state}" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        units = [f'#include "{file}"\n' for file in files if file.suffix in (".cu", ".cpp")]
        command = [
            *(compiler, "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-fvisibility=hidden"),
            *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
            *("-I", str(SOURCES), "-I", str(ROOT / "tests" / "cuda")),
            # torch brings pybind11's headers.
            *("-isystem", str(Path(torch.__file__).parent / "include")),
            *("-isystem", sysconfig.get_paths()["include"], "-x", "c++", "-", "-o", f"{built}.{os.getpid()}"),
        ]
        done = subprocess.run(command, input="".join(units), text=True, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        os.replace(f"{built}.{os.getpid()}", built)
    spec = importlib.util.spec_from_file_location("emulated._cuda", built)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulated(multiprocessors: int = 4) -> Iterator[None]:
    """Let `oats.kernels.cuda` compute with the emulated kernels, on tensors of the CPU.

    Args:
        multiprocessors: that the device seems to have; with many, blocks share the inputs of a strip.
    """
    before = availability.compiled, launch.stream_and_capability, launch.multiprocessors
    availability.compiled = emulated_kernels()
    launch.stream_and_capability = lambda tensor: (0, 9)  # type: ignore[assignment]
    launch.multiprocessors = lambda device: multiprocessors  # type: ignore[assignment]
    try:
        yield
    finally:
        availability.compiled, launch.stream_and_capability, launch.multiprocessors = before
