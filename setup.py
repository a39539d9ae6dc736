"""Builds the extension with CMake and ninja; everything declarative is in pyproject.toml."""

from __future__ import annotations

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
        # pip's isolated environment puts ninja at a new path each time, which a cached configure remembers.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found; install it with `pip install cmake ninja`")
        configure = [
            cmake,
            *("-S", str(source), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if ninja := shutil.which("ninja"):
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)


setup(ext_modules=[Extension("oats._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
