"""All kernels under compute-sanitizer: memcheck, racecheck, initcheck, synccheck.

As a script this runs every kernel on small inputs of several sizes, both solvers and all algebras of the build, and
compares with the CPU backend. It has neither torch nor a memory pool: each buffer is an allocation of its own, so that
an access beyond one is seen, and so is a read of what nobody wrote. `python tests/test_sanitizer_gpu.py [seconds]`
stops with a message when it has run longer.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import cases
import numpy as np
from sanitized_transfers import run_transfers

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERROR = 86  # what the sanitizer returns when it has found something
N = 700  # tokens
WORDS = [7, 8, 9]  # of an exchange's rows
IPM, FLOW = 0, 1
PLAIN, LOCAL_FIRST = 0, 1
RANKS_PER_NODE = 2  # of 3: the last node has one
NOBODY = 0, 0, 1, 0  # a table of no rank in particular


def extension() -> Any:
    """`lplb._C`, without lplb, which would import torch."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind an installed one
    package = importlib.util.find_spec("lplb")
    assert package is not None
    assert package.submodule_search_locations is not None
    (path,) = (f for place in package.submodule_search_locations for f in Path(place).glob("_C*.so"))
    spec = importlib.util.spec_from_file_location("lplb._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Device:
    """The first device, by the driver's own interface."""

    SMS, SHARED_BYTES = 16, 97  # CUdevice_attribute: multiprocessors; opt-in shared memory per block

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} returned {status}")

    def attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device)
        return value.value

    def empty(self, n_bytes: int) -> int:
        """Memory that nobody has written."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, n_bytes)))
        return address.value

    def zeros(self, n_bytes: int) -> int:
        address = self.empty(n_bytes)
        self._call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(0), ctypes.c_size_t(max(1, n_bytes)))
        return address

    def copy_of(self, array: np.ndarray) -> int:
        address = self.empty(array.nbytes)
        source = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.nbytes))
        return address

    def read(self, address: int, dtype: Any, *shape: int) -> np.ndarray:
        self._call("cuCtxSynchronize")
        array = np.empty(shape, dtype)
        target = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))
        return array

    def pinned(self, count: int) -> np.ndarray:
        """Zeros, int64, that both sides see at one address."""
        address = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(8 * count), 3)
        memory = np.frombuffer((ctypes.c_int64 * count).from_address(address.value or 0), np.int64)
        memory[:] = 0
        return memory


class Problem:
    """One placement, planned on both backends."""

    def __init__(
        self, native: Any, device: Device, phy2log: np.ndarray, n_ranks: int, group_size: int, linalg: str
    ) -> None:
        self.device, self.linalg = device, linalg
        self.n_logical, self.n_physical = int(phy2log.max()) + 1, phy2log.size
        self.n_ranks, self.n_groups = n_ranks, n_ranks // group_size
        shape = phy2log.tolist(), self.n_logical, n_ranks, group_size, [1.0] * n_ranks
        self.on_cpu = native.CpuPlanner(*shape, 1)
        sms, shared = device.attribute(Device.SMS), device.attribute(Device.SHARED_BYTES)
        self.sms = sms
        self.planner = native.CudaPlanner(*shape, linalg, shared, sms)
        self.faults = device.pinned(4)
        tables = np.frombuffer(self.planner.tables, np.uint8)
        scratch = device.zeros(self.planner.scratch_bytes)
        self.planner.bind(device.copy_of(tables), scratch, self.faults.ctypes.data)

    def fields(self, batch: int) -> list[tuple[Any, int]]:
        one = [(np.int64, self.n_groups), (np.float64, self.n_groups), (np.float64, self.n_groups)]
        return [
            (np.int32, batch * self.n_physical),
            (np.int64, batch * self.n_ranks),
            *((kind, batch * n) for kind, n in one),
            *[(np.int32, batch * self.n_groups)] * 2,
        ]

    def new_plan(self, batch: int) -> list[int]:
        return [self.device.empty(np.dtype(kind).itemsize * n) for kind, n in self.fields(batch)]

    def wanted_plan(self, loads: np.ndarray, solver: int) -> list[np.ndarray]:
        batch = loads.size // self.n_logical
        plan = [np.zeros(n, kind) for kind, n in self.fields(batch)]
        out = [field.ctypes.data for field in plan]
        self.on_cpu.solve(loads.ctypes.data, batch, NOBODY, 0, solver, out, 0, 1)
        return plan

    def check_plan(self, addresses: list[int], loads: np.ndarray, solver: int) -> np.ndarray:
        """The CPU's bits; with another algebra, its busiest ranks. Returns the quotas."""
        batch = loads.size // self.n_logical
        got = [self.device.read(a, kind, n) for a, (kind, n) in zip(addresses, self.fields(batch), strict=True)]
        wanted = self.wanted_plan(loads, solver)
        if self.linalg != "builtin" and solver == IPM:
            got, wanted = [got[2], got[6]], [wanted[2], wanted[6]]
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert a.tobytes() == b.tobytes(), f"field {i}: {a} is not {b}"
        return self.device.read(addresses[0], np.int32, batch, self.n_physical)

    def wanted_physical(
        self, idx: np.ndarray, table: np.ndarray, source: int, split: int, quota: np.ndarray
    ) -> np.ndarray:
        """CpuPlanner's mapping, of what is allowed."""
        allowed = np.where((idx < 0) | (idx >= self.n_logical), -1, idx).astype(idx.dtype)
        prefix, physical = np.zeros((1, self.n_logical), np.int32), np.zeros_like(allowed)
        chunks = idx.size, 1, idx.size
        assert self.on_cpu.count(allowed.ctypes.data, idx.itemsize, chunks, prefix.ctypes.data, 1) == -1
        quota = np.ascontiguousarray(quota)
        weights, starts, solved = (np.zeros(n, np.int32) for n in (self.n_physical, self.n_logical, self.n_groups))
        sources = table.ctypes.data, table.shape[1], len(table), 0 if len(table) == 1 else RANKS_PER_NODE
        shares = weights.ctypes.data, starts.ctypes.data
        self.on_cpu.shares(sources, source, split, quota.ctypes.data, solved.ctypes.data, *shares)
        self.on_cpu.assign(
            allowed.ctypes.data, idx.itemsize, chunks, prefix.ctypes.data, *shares, physical.ctypes.data, 1
        )
        return physical


def draw(rng: np.random.Generator, n_logical: int, dtype: Any) -> np.ndarray:
    """Tokens, a few of them masked and a few not allowed."""
    idx = rng.choice(n_logical, N, p=rng.dirichlet(np.full(n_logical, 0.3))).astype(dtype)
    idx[::50] = -1
    idx[[3, 77]] = n_logical, -5
    return idx


def counts_of(idx: np.ndarray, n_logical: int) -> np.ndarray:
    return np.bincount(idx[(idx >= 0) & (idx < n_logical)], minlength=n_logical)


def run_whole(p: Problem, rng: np.random.Generator, solver: int, dtype: Any) -> None:
    """The three kernels of a planner without a group."""
    idx = draw(rng, p.n_logical, dtype)
    loads = counts_of(idx, p.n_logical).astype(np.int64)
    plan, row = p.new_plan(1), p.device.empty(4 * p.n_logical)
    counter, physical = p.device.zeros(8), p.device.empty(idx.nbytes)
    outside = int(p.faults[0])
    p.planner.run(
        p.device.copy_of(idx), idx.itemsize, N, p.sms, row, 0, p.device.empty(8 * p.n_logical), solver, plan, counter,
        8, physical, 0,
    )  # fmt: skip
    quota = p.check_plan(plan, loads, solver)
    table = loads.astype(np.int32)[None]
    got = p.device.read(physical, idx.dtype, N)
    assert np.array_equal(got, p.wanted_physical(idx, table, 0, PLAIN, quota))
    assert p.faults[0] == outside + 2
    assert p.device.read(counter, np.int64, 1)[0] == p.n_groups


def run_stages(p: Problem, rng: np.random.Generator, solver: int, dtype: Any) -> None:
    """The stages apart, as rank 1 of 3, in place; then with a row that is not as it must be."""
    idx = draw(rng, p.n_logical, dtype)
    blocks, length = p.planner.blocks(N, 3)
    there, prefix = p.device.copy_of(idx), p.device.empty(4 * p.sms * p.n_logical)
    row = p.device.empty(4 * p.n_logical)
    p.planner.count(there, idx.itemsize, N, blocks, length, prefix, row, 0)
    table = rng.integers(0, 300, (3, p.n_logical + 4)).astype(np.int32)
    table[1, : p.n_logical] = counts_of(idx, p.n_logical)
    table[:, p.n_logical :] = [0, *WORDS]
    assert np.array_equal(p.device.read(row, np.int32, p.n_logical), table[1, : p.n_logical])
    loads = table[:, : p.n_logical].sum(0, dtype=np.int64)
    plan, counter = p.new_plan(1), p.device.zeros(4)
    log = p.device.empty(8 * 6 * 21 * p.n_groups)

    def solve(rows: np.ndarray) -> tuple[int, int, int, int]:
        sources = p.device.copy_of(rows), rows.shape[1], 3, RANKS_PER_NODE
        p.planner.solve_table(sources, WORDS, 0, p.device.empty(8 * p.n_logical), solver, plan, counter, 4, log, 0)
        return sources

    sources = solve(table)
    quota = p.check_plan(plan, loads, solver)
    for split in (PLAIN, LOCAL_FIRST):
        there = p.device.copy_of(idx)
        p.planner.assign(there, idx.itemsize, N, blocks, length, prefix, sources, 1, split, plan, there, 0)
        assert np.array_equal(p.device.read(there, idx.dtype, N), p.wanted_physical(idx, table, 1, split, quota))
    assert p.device.read(counter, np.int32, 1)[0] == p.n_groups
    odd = table.copy()
    odd[2, -1] += 1
    there = p.device.copy_of(idx)
    p.planner.count(there, idx.itemsize, N, blocks, length, prefix, row, 0)
    sources = solve(odd)
    p.planner.assign(there, idx.itemsize, N, blocks, length, prefix, sources, 1, LOCAL_FIRST, plan, there, 0)
    assert (p.device.read(there, idx.dtype, N) == -1).all()
    assert p.faults[1] == 3
    p.faults[1] = 0


def run_batch(p: Problem, rng: np.random.Generator, solver: int) -> None:
    """Several loads in one launch, one of them without a token."""
    loads = rng.integers(0, 2000, (3, p.n_logical))
    loads[1] = 0
    plan = p.new_plan(3)
    p.planner.solve(p.device.copy_of(loads), 3, solver, plan, 0, 0)
    p.check_plan(plan, loads, solver)


def placements() -> list[tuple[str, np.ndarray, int, int]]:
    """Every kernel: warps up to 16 ranks, blocks of both kinds above; widths that need padding, too."""
    rng = np.random.default_rng(5)

    def eplb(n_ranks: int, n_logical: int, slots: int) -> np.ndarray:
        return cases.eplb_like_placement(rng, rng.lognormal(0, 1, n_logical), n_ranks, slots)

    return [
        ("two cubes of 8 ranks", cases.lplb_placement(cases.cube(), 4, 2), 16, 8),
        ("5 ranks", eplb(5, 12, 20), 5, 5),
        ("16 ranks", eplb(16, 32, 48), 16, 16),
        ("33 ranks", eplb(33, 66, 99), 33, 33),
        ("64 ranks", eplb(64, 96, 192), 64, 64),
        ("128 ranks", eplb(128, 128, 256), 128, 128),
    ]


def main(seconds: float) -> int:
    """Run everything, as far as the time goes."""
    native, device, begin = extension(), Device(), time.perf_counter()
    run_transfers(native, device)
    for name, phy2log, n_ranks, group_size in placements():
        for linalg in native.linalgs:
            problem = Problem(native, device, phy2log, n_ranks, group_size, linalg)
            for solver in (IPM, FLOW) if linalg == "builtin" else (IPM,):
                if time.perf_counter() - begin > seconds:
                    print(f"stopped before {name}: {seconds:g} s are over")
                    return 1
                rng = np.random.default_rng(n_ranks)
                run_whole(problem, rng, solver, np.int64)
                run_stages(problem, rng, solver, np.int32)
                run_batch(problem, rng, solver)
                took = time.perf_counter() - begin
                print(
                    f"{name}, {linalg}, {'ipm' if solver == IPM else 'flow'}: as on the CPU, {took:.1f} s", flush=True
                )
    return 0


def sanitizer() -> str | None:
    """compute-sanitizer: CUDA_HOME's, or the PATH's."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin"] if home else []
    return shutil.which("compute-sanitizer", path=os.pathsep.join([*places, os.environ.get("PATH", os.defpath)]))


def command(tool: str, seconds: float) -> list[str]:
    """What runs this file under a tool."""
    words = [sanitizer() or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(ERROR)]
    if tool == "memcheck":
        words += ["--leak-check", "no"]
    return [*words, sys.executable, str(Path(__file__).resolve()), str(seconds)]


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 1e9))
else:
    import subprocess

    import pytest

    @pytest.mark.gpu
    @pytest.mark.parametrize("tool", TOOLS)
    def test_no_kernel_does_what_the_sanitizer_objects_to(tool: str) -> None:
        from lplb import devices

        lacking = next(devices.missing(), None)
        if lacking:
            pytest.skip(lacking.partition(":")[0])
        if sanitizer() is None:
            pytest.skip(
                "needs compute-sanitizer, found neither in CUDA_HOME nor on PATH (it comes with the CUDA toolkit)"
            )
        done = subprocess.run(command(tool, 200), capture_output=True, text=True, timeout=300, check=False)
        if "Device not supported" in done.stdout + done.stderr:
            pytest.skip("compute-sanitizer says: Device not supported")
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards displayed" in done.stdout, done.stdout[-2000:]
