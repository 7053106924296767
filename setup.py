"""Hands the extension over to CMake; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Builds lplb._C with CMake and Ninja, where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and install the one extension."""
        source = Path(__file__).resolve().parent
        prefix = Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={prefix}",
            f"-DLPLB_SANITIZE={os.environ.get('LPLB_SANITIZE', '')}",
        ]
        subprocess.run(["cmake", "-G", "Ninja", "-S", source, "-B", build, *configure], check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        subprocess.run(["cmake", "--install", build], check=True)


setup(ext_modules=[Extension("lplb._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
