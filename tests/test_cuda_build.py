"""The CUDA part of the build: what the compiler says of the kernels, what the extension holds, how CMake decides.

Needs nvcc, no GPU.
"""

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import native
import pytest

from lplb import _C

CUDA_SOURCES = native.ROOT / "csrc" / "cuda"
TARGETS = ("80", "90", "100", "103", "120")  # of a build that names none, as far as nvcc knows them
PTX = "compute_90"
MATHDX_TARGETS = {"sm_80", "sm_90", "sm_100"}
# What is allowed besides nothing, in bytes of stack, spill stores and spill loads, by ranks of the block: cuSolverDx
# keeps part of a matrix in registers that it indexes, and at 128 ranks there are too few of them for it and the kernel.
LIBRARY = {8: (16, 0, 0), 128: (128, 160, 256)}
# Above 64 ranks the compiler calls parts of the joint planner, which then has its own fields in local memory.
CALLED = {"joint_kernelILi2E": (1024, 0, 0)}
TOOLS = ("as", "ld", "ar", "ranlib", "nm", "uname", "sh")  # what a C++ compiler and CMake start by name


def nvcc() -> str:
    """The nvcc that an ordinary build takes, or a skip that says where it is not."""
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=f"{home}/bin") if home else None
    path = path or shutil.which("nvcc")
    wheels = [Path(folder, "nvidia") for folder in sys.path]
    for found in (found for folder in wheels for found in (*folder.glob("cu*/bin/nvcc"),)):
        path = path or str(found)
    if path is None:
        pytest.skip("needs nvcc, found neither in CUDA_HOME, nor on PATH, nor among the wheels of this interpreter")
    return path


def configure(
    folder: Path, *definitions: str, python: str = sys.executable, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Configure the project in ``folder`` with no setting of this environment but ``definitions`` and ``env``."""
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11 to build the extension")
    settings = ("LPLB_CUDA", "LPLB_CUDA_TARGETS", "LPLB_MATHDX", "LPLB_NVCC_FLAGS", "MATHDX_HOME")
    return native.run(
        [
            native.tool("cmake"), "-G", "Ninja", "-S", native.ROOT, "-B", folder,
            f"-DCMAKE_MAKE_PROGRAM={native.tool('ninja')}",
            f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *definitions,
        ],
        env={**dict.fromkeys(settings, ""), **(env or {})},
        timeout=120,
    )  # fmt: skip


class Kernel(NamedTuple):
    """What ptxas says of one kernel, in bytes and registers."""

    name: str
    stack: int
    stores: int
    loads: int
    registers: int


def kernels(report: str) -> Iterator[Kernel]:
    """The kernels in the output of ``-Xptxas -v``."""
    sizes = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    for entry in report.split("Compiling entry function '")[1:]:
        numbers = re.search(sizes, entry, re.DOTALL)
        assert numbers, entry[:500]
        yield Kernel(entry.split("'")[0], *map(int, numbers.groups()))


def named_in_sources() -> set[str]:
    """The names of all __global__ functions in csrc/cuda."""
    text = "\n".join(path.read_text() for path in sorted(CUDA_SOURCES.iterdir()))
    text = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", text)
    return set(re.findall(r"__global__\s+(?:static\s+)?void\s+(\w+)\s*\(", text))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """All kernels, compiled for one device, with MathDx where it is at hand."""
    nvcc()
    folder = tmp_path_factory.mktemp("kernels")
    done = configure(folder, "-DLPLB_CUDA=1", "-DLPLB_CUDA_TARGETS=90", "-DLPLB_NVCC_FLAGS=-Xptxas -v")
    assert done.returncode == 0, done.stdout
    done = native.run([native.tool("cmake"), "--build", folder, "--target", "lplb_cuda"], timeout=600)
    assert done.returncode == 0, done.stdout[-10000:]
    return list(kernels(done.stdout))


def test_no_kernel_has_a_stack_or_spills(compiled: list[Kernel]) -> None:
    names = named_in_sources()
    assert names, "no __global__ function in csrc/cuda"
    assert not {name for name in names if not any(name in kernel.name for kernel in compiled)}, compiled
    for kernel in compiled:
        library = re.search(r"CuSolverDxILi(\d+)E", kernel.name)
        print(f"{kernel.registers:4} registers {kernel.stack:5} bytes of stack  {kernel.name}")
        allowed = LIBRARY.get(int(library[1]), (0, 0, 0)) if library else (0, 0, 0)
        allowed = next((most for name, most in CALLED.items() if name in kernel.name), allowed)
        found = (kernel.stack, kernel.stores, kernel.loads)
        assert all(seen <= most for seen, most in zip(found, allowed, strict=True)), (kernel, allowed)


def images(path: Path) -> list[set[str]]:
    """For each CUDA binary in a file, in order, its targets: sm_90 (machine code), compute_90 (PTX), lto_90 (LTO-IR).

    A binary is a header (magic, version, its own size in 2 bytes, the size of what follows in 8) and images, each with
    a header of its own: kind, version (2 bytes each), its own size (4), the size of what follows (8); at 28 the target.
    """
    kinds = {1: "compute", 2: "sm", 8: "lto"}
    data, magic = path.read_bytes(), b"\x50\xed\x55\xba\x01\x00"
    binaries, at = [], data.find(magic)
    while at >= 0:
        header, size = struct.unpack_from("<6xHQ", data, at)
        targets, image, end = set(), at + header, at + header + size
        while image < end:
            kind, image_header, image_size, target = struct.unpack_from("<H2xIQ12xI", data, image)
            targets.add(f"{kinds.get(kind, kind)}_{target}")
            image += image_header + image_size
        binaries.append(targets)
        at = data.find(magic, end)
    return binaries


def installed() -> None:
    """Skip unless the extension of this environment has CUDA; fail if it had to."""
    if not _C.cuda:
        if os.environ.get("LPLB_CUDA") != "0":
            path = nvcc()
            pytest.fail(
                f"lplb._C is built without CUDA, but there is {path}; LPLB_CUDA=0 would say that this is wanted"
            )
        pytest.skip("lplb._C is built without CUDA, as LPLB_CUDA=0 wants it")


def test_the_extension_names_every_target() -> None:
    installed()
    if PTX not in _C.cuda_targets:
        pytest.skip(f"lplb._C is built for {_C.cuda_targets} only, by LPLB_CUDA_TARGETS")
    known = native.run([nvcc(), "--list-gpu-code"], timeout=60).stdout.split()
    assert _C.cuda_targets == (*(f"sm_{n}" for n in TARGETS if f"sm_{n}" in known), PTX)
    assert re.search(rf"release {re.escape(_C.cuda_version)},", native.run([nvcc(), "--version"], timeout=60).stdout)


def test_the_extension_holds_every_target() -> None:
    installed()
    machine = {target for target in _C.cuda_targets if target.startswith("sm_")}
    binaries = images(Path(_C.__file__))
    finished = [targets for targets in binaries if not any(target.startswith("lto") for target in targets)]
    expected = [set(_C.cuda_targets)] * 5  # count, assign, solve, transfers, ranges
    if "cusolverdx" in _C.linalgs:
        expected.append(machine & MATHDX_TARGETS)
        assert re.fullmatch(r".*cuSolverDx \d+\.\d+\.\d+.*", _C.mathdx_version)
    else:
        assert _C.mathdx_version == ""
    assert sorted(map(sorted, finished)) == sorted(map(sorted, expected)), binaries


def test_the_extension_keeps_the_cuda_runtime_to_itself() -> None:
    installed()
    listed = native.run([native.tool("nm"), "-D", _C.__file__], timeout=60).stdout
    assert "PyInit__C" in listed
    assert not re.findall(r"\b(?:cuda[A-Z]|lplb_po)\w*", listed), "neither exported nor left to others"


@pytest.fixture
def bare(tmp_path: Path) -> tuple[str, dict[str, str]]:
    """An interpreter without NVIDIA's wheels, and an environment that has the compiler's tools but no nvcc."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        (tmp_path / "bin" / name).symlink_to(native.tool(name))
    env = {
        "PATH": str(tmp_path / "bin"),
        "CUDA_HOME": "",
        "PYTHONPATH": "",
        "CXX": str(shutil.which(native.compiler())),
    }
    return str(tmp_path / "venv" / "bin" / "python"), env


def test_cuda_can_be_forbidden(tmp_path: Path) -> None:
    done = configure(tmp_path / "build", env={"LPLB_CUDA": "0"})
    assert done.returncode == 0, done.stdout
    listed = native.run([native.tool("ninja"), "-C", tmp_path / "build", "-t", "commands", "_C"], timeout=60).stdout
    assert "csrc/bindings.cpp" in listed
    assert not re.search("LPLB_HAVE_CUDA|nvcc|csrc/cuda", listed)


def words(done: subprocess.CompletedProcess[str]) -> str:
    """The output on one line: CMake breaks its messages where it likes."""
    return " ".join(done.stdout.split())


def test_without_nvcc_the_build_goes_on_and_says_where_it_looked(
    tmp_path: Path, bare: tuple[str, dict[str, str]]
) -> None:
    python, env = bare
    done = configure(tmp_path / "build", python=python, env=env)
    assert done.returncode == 0, done.stdout
    assert "lplb: without CUDA" in done.stdout
    assert f"no nvcc in {env['PATH']}" in done.stdout


def test_demanded_cuda_that_is_not_there_fails(tmp_path: Path, bare: tuple[str, dict[str, str]]) -> None:
    python, env = bare
    empty = tmp_path / "toolkit"
    done = configure(tmp_path / "build", python=python, env={**env, "LPLB_CUDA": "1", "CUDA_HOME": str(empty)})
    assert done.returncode != 0
    for said in (
        "LPLB_CUDA=1, but no nvcc of CUDA 12.0 or newer",
        f"there is no {empty}/bin/nvcc",
        f"no nvcc in {env['PATH']}",
        "wheels: no NVIDIA package beside",
    ):
        assert said in words(done), done.stdout


def test_a_toolkit_that_is_too_old_is_named(tmp_path: Path, bare: tuple[str, dict[str, str]]) -> None:
    python, env = bare
    old = tmp_path / "old" / "bin" / "nvcc"
    old.parent.mkdir(parents=True)
    old.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    old.chmod(0o755)
    done = configure(tmp_path / "build", "-DLPLB_CUDA=1", f"-DCUDA_HOME={tmp_path / 'old'}", python=python, env=env)
    assert done.returncode != 0
    assert f"{old} is of CUDA 11.8, older than 12.0" in words(done), done.stdout


@pytest.mark.parametrize("name", ["LPLB_CUDA", "LPLB_MATHDX"])
def test_a_setting_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    if name == "LPLB_MATHDX":
        nvcc()  # without CUDA nobody asks for it
    done = configure(tmp_path, env={name: "yes"})
    assert done.returncode != 0
    assert f"{name} is 'yes'; it may be 0" in words(done), done.stdout


@pytest.mark.parametrize("target", ["75", "sm_1234", "90a"])
def test_an_unknown_target_is_refused(tmp_path: Path, target: str) -> None:
    nvcc()
    done = configure(tmp_path, f"-DLPLB_CUDA_TARGETS=90,{target}")
    assert done.returncode != 0
    assert re.search(rf"LPLB_CUDA_TARGETS names '{target}'; nvcc \d+\.\d+ allows 80", words(done)), done.stdout


def test_demanded_mathdx_that_is_not_there_fails(tmp_path: Path, bare: tuple[str, dict[str, str]]) -> None:
    found = Path(nvcc())
    if found.parent.parent.name.startswith("cu") and "site-packages" in found.parts:
        env = {"CUDA_HOME": str(found.parent.parent)}
    else:
        env = {}
    done = configure(tmp_path / "build", "-DLPLB_MATHDX=1", python=bare[0], env=env)
    assert done.returncode != 0
    assert re.search(r"LPLB_MATHDX=1, but neither MATHDX_HOME nor the wheel nvidia-libmathdx-cu\d+", words(done)), (
        done.stdout
    )
    done = configure(tmp_path / "build", "-DLPLB_MATHDX=1", f"-DMATHDX_HOME={tmp_path}", python=bare[0], env=env)
    assert f"include/cusolverdx/cusolverdx_version.hpp in {tmp_path}" in words(done), done.stdout
