"""The extension built with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests that exercise it."""

import re
import shutil
import sys
from pathlib import Path

import native
import pytest

SANITIZERS = "address,undefined"
TESTS = (
    "test_solve.py",
    "test_planner.py",
    "test_assign.py",
    "test_bad_input.py",
    "test_traffic.py",
    "test_eplb.py",
    "test_eplb_distinct.py",
    "test_explain.py",
    "test_policies.py",
    "test_change.py",
    "test_routes.py",
)
EXAMPLES = "10"  # per hypothesis test, see conftest.py

# Runs inside the child: says where the extension came from.
PLUGIN = """
import sys


def pytest_terminal_summary(terminalreporter):
    module = sys.modules.get("lplb._C")
    terminalreporter.write_line(f"extension: {module and module.__file__}")
"""


def _runtime(library: str) -> str:
    """The path of a library that comes with the compiler, or a skip that names it."""
    path = native.run([native.compiler(), f"-print-file-name={library}"], timeout=60).stdout.strip()
    if not Path(path).is_file():  # the compiler repeats the bare name of what it does not have
        pytest.skip(f"needs {library} of {native.compiler()}")
    return path


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which ``import lplb`` takes a sanitized extension."""
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11 to build the extension")
    folder = tmp_path_factory.mktemp("sanitized")
    native.sanitized_command(SANITIZERS, folder)
    native.build(
        folder / "build",
        "install",
        SANITIZERS,
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_INSTALL_PREFIX={folder}",
    )
    package = native.ROOT / "lplb"
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package, folder / "lplb", ignore=unwanted, dirs_exist_ok=True)
    (folder / "sanitized_run.py").write_text(PLUGIN)
    return folder


def test_the_extension_is_clean_under_its_own_tests(sanitized: Path) -> None:
    (extension,) = (sanitized / "lplb").glob("_C*.so")
    assert b"__asan_init" in extension.read_bytes()

    # libstdc++ as well: AddressSanitizer looks for __cxa_throw when it starts, and Python has not loaded it by then.
    env = {
        "LD_PRELOAD": f"{_runtime('libasan.so')} {_runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(sanitized),
        "LPLB_HYPOTHESIS_EXAMPLES": EXAMPLES,
    }
    tests = [native.ROOT / "tests" / name for name in TESTS]
    config = native.ROOT / "pyproject.toml"
    # From the folder itself: where python -m pytest starts comes before PYTHONPATH.
    command = [sys.executable, "-m", "pytest", "-q", "-c", config, "-p", "no:cacheprovider", "-p", "sanitized_run"]
    done = native.run([*command, *tests], env=env, cwd=sanitized, timeout=300)

    assert done.returncode == 0, done.stdout[-10000:]
    assert f"extension: {extension}" in done.stdout, done.stdout[-2000:]
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout[-2000:]
