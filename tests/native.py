"""Builds and runs what tests need of the C++ sources, with the CMake and Ninja of this interpreter or the PATH."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_NO_TSAN_MEMORY = "unexpected memory mapping"  # what TSan says under more address randomisation than it knows


def tool(name: str) -> str:
    """The path of a program, or a skip that names it."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    path = shutil.which(name, path=os.pathsep.join(places))
    if path is None:
        pytest.skip(f"needs {name}, found neither beside {sys.executable} nor on PATH (pip install {name})")
    return path


def compiler() -> str:
    """The C++ compiler that CMake takes."""
    return os.environ.get("CXX") or tool("c++")


def run(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run with captured text; stderr goes into stdout, in order."""
    return subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        timeout=timeout,
        check=False,
    )


def build(folder: Path, target: str, sanitizer: str, *definitions: str) -> None:
    """Configure the project in ``folder``, without CUDA unless ``definitions`` say so, and build one target."""
    cmake = tool("cmake")
    configure: list[str | Path] = [
        cmake, "-G", "Ninja", "-S", ROOT, "-B", folder,
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DLPLB_SANITIZE={sanitizer}", "-DLPLB_CUDA=0",
        *definitions,
    ]  # fmt: skip
    make: list[str | Path] = [cmake, "--build", folder, "--target", target]
    for command in (configure, make):
        done = run(command, timeout=300)
        assert done.returncode == 0, done.stdout


def sanitized_command(sanitizer: str, folder: Path) -> list[str]:
    """What to put before a program built with ``-fsanitize=sanitizer``, or a skip that says why none can run."""
    if not sanitizer:
        return []
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() {}\n")
    built = run([compiler(), f"-fsanitize={sanitizer}", source, "-o", program], timeout=60)
    if built.returncode:
        pytest.skip(f"{compiler()} cannot link -fsanitize={sanitizer}: {built.stdout.strip()[-300:]}")
    if _NO_TSAN_MEMORY not in run([program], timeout=60).stdout:
        return []
    setarch = shutil.which("setarch")
    if setarch is None or run([setarch, "-R", program], timeout=60).returncode:
        pytest.skip(f"-fsanitize={sanitizer} fails with {_NO_TSAN_MEMORY!r}, and setarch -R is missing or fails")
    return [setarch, "-R"]
