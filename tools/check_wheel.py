"""Checks that a wheel has one extension, with kernels for every instruction set, and no OpenMP runtime."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

INSTRUCTIONS = {
    "avx2": r"\tvfmadd\w+ps .*%ymm",
    "avx512": r"\tvfmadd\w+ps .*%zmm",
    "avx512_bf16": r"\tvdpbf16ps",
    "amx_bf16": r"\ttdpbf16ps",
}
"""Instruction set → pattern of an instruction that only its kernels contain."""

EXTRAS = ("hf", "peft", "serve", "eval", "plot", "docs", "dev")


def check(path: Path) -> list[str]:
    """The problems of a wheel; an empty list if it is right."""
    problems = []
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as directory:
        names = wheel.namelist()
        libraries = [name for name in names if re.search(r"\.so(\.|$)", name)]
        extensions = [name for name in libraries if name.startswith("oats/_core.")]
        if len(extensions) != 1 or libraries != extensions:
            return [f"expected oats/_core and no other library, found {libraries}"]
        extension = wheel.extract(extensions[0], directory)
        code = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", extension], capture_output=True, check=True
        )
        needed = subprocess.run(["objdump", "-p", extension], capture_output=True, check=True)
        metadata = wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    disassembly = code.stdout.decode()
    problems += [
        f"the kernels of {isa} are missing"
        for isa, instruction in INSTRUCTIONS.items()
        if not re.search(instruction, disassembly)
    ]
    if not re.search(r"NEEDED\s+libgomp\.so\.1\n", needed.stdout.decode()):
        problems.append("the extension does not ask for libgomp.so.1, the runtime that torch brings")
    if "manylinux" not in path.name:
        problems.append(f"{path.name} has no manylinux tag")
    problems += [f"no extra {extra}" for extra in EXTRAS if f"Provides-Extra: {extra}\n" not in metadata]
    return problems


def main() -> None:
    """Print the problems; the exit status is 1 if there are any."""
    problems = check(Path(sys.argv[1]))
    for problem in problems:
        print(f"{sys.argv[1]}: {problem}", file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
