"""Builds the extension with CMake and ninja; everything declarative is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):  # type: ignore[misc]
    """Configures and builds CMakeLists.txt, and leaves the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        """Run CMake; called by setuptools."""
        source = Path(__file__).resolve().parent
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = source / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # pip's isolated environment has ninja at a new path each time, and the cache remembers the old one.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found; install it with `pip install cmake ninja`")
        cuda = os.environ.get("OATS_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            raise RuntimeError(f"OATS_CUDA is {cuda!r}, expected auto, 0 or 1")
        configure = [
            cmake,
            *("-S", str(source), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DOATS_CUDA={cuda}",
        ]
        if ninja := shutil.which("ninja"):
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)

        # An editable installation copies only the extension that setuptools knows, not the CUDA module.
        package = source / "oats" if self.editable_mode else module.parent
        # A CUDA module that an earlier build left might not fit this one.
        for stale in package.glob("_cuda.*.so"):
            stale.unlink()
        built = subprocess.run([cmake, "--build", str(build), "--target", "cuda_module"])
        if built.returncode != 0 and cuda == "1":
            raise RuntimeError("the CUDA kernels could not be built (see above); OATS_CUDA=0 leaves them out")
        if built.returncode != 0:
            print("oats: the CUDA kernels could not be built (see above), and are left out", file=sys.stderr)
        if package != module.parent:
            for made in module.parent.glob("_cuda.*.so"):
                shutil.copy2(made, package)


setup(ext_modules=[Extension("oats._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
