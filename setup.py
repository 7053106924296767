"""Hands the extension over to CMake; everything else is in pyproject.toml."""

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def with_tools() -> dict[str, str]:
    """The environment, with the CMake and Ninja of Python packages, where installed, ahead of the system's."""
    folders = [os.environ.get("PATH", os.defpath)]
    for package, folder in (("ninja", "BIN_DIR"), ("cmake", "CMAKE_BIN_DIR")):
        with contextlib.suppress(ImportError):
            folders.insert(0, getattr(importlib.import_module(package), folder))
    return {**os.environ, "PATH": os.pathsep.join(folders)}


class CMakeBuild(build_ext):
    """Builds lplb._C with CMake and Ninja, where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and install the one extension. What CMake reads of the environment is in cmake/*.cmake."""
        source = Path(__file__).resolve().parent
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        # setuptools gives an editable build a new temporary folder each time; CUDA is worth compiling once.
        kept = source / "build" / f"editable-{sys.implementation.cache_tag}"
        build = kept if self.editable_mode else Path(self.build_temp).resolve() / "cmake"
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={prefix}",
            f"-DLPLB_SANITIZE={os.environ.get('LPLB_SANITIZE', '')}",
        ]
        # --fresh: a cache of another build environment, or of another place, would name tools that are gone
        for arguments in (
            ["--fresh", "-G", "Ninja", "-S", source, "-B", build, *configure],
            ["--build", build],
            ["--install", build],
        ):
            subprocess.run(["cmake", *arguments], check=True, env=with_tools())


setup(ext_modules=[Extension("lplb._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
