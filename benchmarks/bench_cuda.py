"""The CUDA backend's bars on one device: every row checked against the CPU backend first, then timed; one table.

    python benchmarks/bench_cuda.py [--write] [--label NAME] [--compare FILE] [--only WORD] [--plan]

Needs a CUDA device, hypothesis and rich. With --write the rows also go to benchmarks/results/<device>-<date>.json,
with --label to <device>-<date>-<label>.json: build a variant of the kernels, give it a label, and --compare it with
the file of another. --plan prints what would be timed, as it would be launched on an H200, and needs no device.

How a row is timed: a CUDA graph holds one call for each of several sets of inputs, so that caches hold no single one.
Replays are queued behind each other, with events between them; a row is the median time of a replay, divided by its
calls. So it has in it what a call adds to a graph of other kernels, and not the launch of the graph. Rows called
"alone" are one call on an idle device, from event to event; rows called "cold" follow 256 MB of other traffic.

The algebra's floor is benchmarks/gpu_floor.cu, compiled on the spot. Environment, where that cannot be:
LPLB_GPU_FLOOR, a folder with the programs gpu_floor and gpu_floor_cusolverdx, as --compile-floor FOLDER makes them;
LPLB_MATHDX_FOLDER, the folder mathdx of a build with cuSolverDx (by default the newest below build/); LPLB_COMMIT, the
commit where there is no git; LPLB_RESULTS, where --write writes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]
if (ROOT / "lplb" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists():  # else the lplb that is installed
    sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from cases import cube, eplb_like_placement, lplb_placement  # noqa: E402
from cuda_transfer_rows import Timed, TransferCase, transfer_cases  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rows import commit  # noqa: E402

import lplb  # noqa: E402
from lplb import _C, Placement, Planner, devices  # noqa: E402
from lplb.plan import Plan, empty_plan  # noqa: E402

DEVICE = "cuda"
SETS = 16  # of inputs, in turn
REPLAYS = 41
WARM_UP = 5
EAGER_CALLS = 200
CPU_ROUNDS = 3
DRIFTS = (0.3, 0.6)  # of loads since EPLB placed by them, as log-normal sigmas
COPY_BYTES = 1 << 30
FLUSH_BYTES = 256 << 20
SHARE_OF_BOUND = 0.6  # of the time that the bytes moved need
H200_SMS, H200_SHARED_BYTES = 132, 232448  # what --plan plans for


# What is timed


@dataclass(frozen=True)
class Problem:
    """A placement, and loads int64 [SETS, n_logical] that have drifted since it was made."""

    name: str
    placement: Placement
    group_size: int
    loads: torch.Tensor


@dataclass(frozen=True)
class Solve:
    """A row of solves: `layers` loads in one launch."""

    problem: Problem
    bar: float | None
    layers: int = 1

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"solve, {self.problem.name}" + (f", {self.layers} layers in one launch" if self.layers > 1 else "")


@dataclass(frozen=True)
class Batch:
    """A row of whole runs, or of count and assign: tokens x picks indices."""

    problem: Problem
    tokens: int
    picks: int
    dtype: torch.dtype
    bar: float | None = None
    bar_eager: float | None = None

    @property
    def name(self) -> str:
        """As the table has it."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.tokens} x {self.picks} {kind}, {self.problem.name}"

    def indices(self, n_sets: int) -> list[torch.Tensor]:
        """Router indices, on the CPU; each set has its own popular experts."""
        rng = np.random.default_rng(23)
        sets = []
        for load in self.problem.loads[:n_sets].numpy():
            share = load / load.sum()
            sets.append(torch.from_numpy(rng.choice(share.size, (self.tokens, self.picks), p=share)).to(self.dtype))
        return sets


def problem(name: str, n_ranks: int, group_size: int, n_logical: int, slots: int | None) -> Problem:
    """An EPLB placement, or LPLB's cubes where `slots` is None."""
    rng = np.random.default_rng(7 + n_ranks)
    history = 1024 * rng.lognormal(0.0, 1.0, n_logical)
    if slots is None:
        phy2log = lplb_placement(cube(), n_logical // n_ranks, n_ranks // group_size)
    else:
        phy2log = eplb_like_placement(rng, history, n_ranks, slots)
    drift = rng.uniform(*DRIFTS, (SETS, 1)) * rng.standard_normal((SETS, n_logical))
    loads = torch.from_numpy(np.rint(history * np.exp(drift)).astype(np.int64))
    return Problem(name, Placement(phy2log, n_ranks, n_logical), group_size, loads)


def solves() -> list[Solve]:
    """The rows of the solve kernel."""
    cubes = [
        problem(f"{g} groups of 8, cube" if g > 1 else "8 ranks, cube", 8 * g, 8, 64 * g, None) for g in (1, 4, 16, 64)
    ]
    ranks_32 = problem("32 ranks, 288 slots", 32, 32, 256, 288)
    return [
        *(Solve(p, 20) for p in cubes),
        Solve(problem("16 ranks, 160 slots", 16, 16, 128, 160), 32),
        Solve(ranks_32, 50),
        Solve(problem("64 ranks, 512 slots", 64, 64, 256, 512), 80),
        Solve(problem("128 ranks, 1024 slots", 128, 128, 512, 1024), None),
        Solve(cubes[0], None, layers=132),
        Solve(cubes[1], None, layers=58),
        Solve(ranks_32, None, layers=58),
    ]


def runs() -> list[Batch]:
    """The rows of whole runs."""
    groups = problem("4 groups of 8", 32, 8, 256, None)
    ranks_64 = problem("64 ranks, 512 slots", 64, 64, 256, 512)
    return [
        Batch(groups, 4096, 8, torch.int64, bar=33, bar_eager=60),
        Batch(ranks_64, 4096, 8, torch.int64, bar=95),
        Batch(groups, 64, 8, torch.int64),
    ]


def token_batches() -> list[Batch]:
    """The rows of count and assign."""
    groups = problem("4 groups of 8", 32, 8, 256, None)
    return [
        Batch(groups, 64 << 10, 8, torch.int64, bar=14),
        Batch(groups, 64 << 10, 8, torch.int32),
        Batch(groups, 1 << 20, 8, torch.int64),
        Batch(groups, 1 << 20, 8, torch.int32),
    ]


# How it is timed


@dataclass
class Row:
    """One line of the table. Times in microseconds; low and high hold nine tenths of the replays."""

    name: str
    median_us: float
    bar_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    cpu_us: float | None = None
    note: str = ""
    of: dict[str, Any] = field(default_factory=dict)  # facts for other rows: solver, linalg, iterations, ...

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without one."""
        return None if self.bar_us is None else self.median_us <= self.bar_us


Call = Callable[[], Any]


def captured(calls: list[Call]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A graph of the calls, in their order, and what they returned."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return graph, results


def replay_times(graph: torch.cuda.CUDAGraph) -> list[float]:
    """Microseconds of each of REPLAYS replays, queued one behind the other."""
    for _ in range(WARM_UP):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def single_times(action: Call, times: int) -> list[float]:
    """Microseconds from event to event of an action on an idle device; what the host takes is in it."""
    found = []
    for i in range(WARM_UP + times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        action()
        end.record()
        end.synchronize()
        if i >= WARM_UP:
            found.append(1e3 * begin.elapsed_time(end))
    return found


def row(name: str, times: list[float], calls: int = 1, **more: Any) -> Row:
    """The median of times, per call."""
    ordered = sorted(t / calls for t in times)
    edge = len(ordered) // 20
    return Row(name, statistics.median(ordered), low_us=ordered[edge], high_us=ordered[-1 - edge], **more)


def cold_row(name: str, calls: list[Call], flush: torch.Tensor, **more: Any) -> Row:
    """Each call after other traffic, which is timed by itself and taken off."""

    def other() -> None:
        flush.add_(1)

    both, _ = captured([step for call in calls for step in (other, call)])
    alone, _ = captured([other] * len(calls))
    off = statistics.median(replay_times(alone))
    return row(name, [max(0.0, t - off) for t in replay_times(both)], len(calls), **more)


def cpu_microseconds(actions: list[Call]) -> float:
    """Mean of the CPU backend's calls, the median of some rounds."""
    rounds = []
    for _ in range(CPU_ROUNDS):
        start = time.perf_counter()
        for action in actions:
            action()
        rounds.append(1e6 * (time.perf_counter() - start) / len(actions))
    return statistics.median(rounds)


@contextlib.contextmanager
def linear_algebra(name: str) -> Iterator[None]:
    """Planners made inside have this one."""
    before = os.environ.get("LPLB_LINALG")
    os.environ["LPLB_LINALG"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["LPLB_LINALG"]
        else:
            os.environ["LPLB_LINALG"] = before


class Repeated:
    """An exchange for one process: every rank sends what this one does. A copy on the device, as graphs need it."""

    def __init__(self, rank: int, size: int) -> None:
        """Rank of size."""
        self.rank, self.size = rank, size

    def gather(self, row: torch.Tensor, table: torch.Tensor) -> None:
        """Fill the table with this rank's row."""
        table.copy_(row.expand_as(table))


# Checks: what is not right is not timed


def check_plan(name: str, got: Plan, wanted: Plan, loads: torch.Tensor, phy2log: torch.Tensor, exact: bool) -> None:
    """The CPU's plan bit for bit, or, with another algebra, an optimum like it."""
    if exact:
        fields = ["quota", "rank_load", "max_load", "lower_bound", "gap", "iterations", "status"]
        differing = [
            f for f, a, b in zip(fields, got.tensors(), wanted.tensors(), strict=True) if not torch.equal(a.cpu(), b)
        ]
        if differing:
            raise RuntimeError(f"{name}: {', '.join(differing)} differ from the CPU backend's")
        return
    totals = torch.zeros_like(loads).index_add_(-1, phy2log.long(), got.quota.cpu().long())
    if not got.solved or not torch.equal(got.max_load.cpu(), wanted.max_load) or not torch.equal(totals, loads):
        raise RuntimeError(
            f"{name}: status {got.status.tolist()}, busiest ranks {got.max_load.tolist()}, "
            f"allowed is solved with {wanted.max_load.tolist()} and quotas that add up to the loads"
        )


def check_same(name: str, got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """The CPU's indices."""
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if not torch.equal(a.cpu(), b):
            raise RuntimeError(f"{name}: {int((a.cpu() != b).sum())} of {b.numel()} indices of set {i} differ")


def poison(tensors: list[torch.Tensor]) -> None:
    """What a call leaves unwritten shows."""
    for tensor in tensors:
        tensor.fill_(-7)


# The rows


def bench_solve(case: Solve, solver: str, linalg: str, flush: torch.Tensor) -> list[Row]:
    """One row, and a cold one for single loads with a bar."""
    p = case.problem
    name = f"{case.name}: {solver}" + ("" if solver == "flow" else f", {linalg}")
    on_cpu = Planner.from_placement(p.placement, group_size=p.group_size)
    with linear_algebra(linalg):
        planner = Planner.from_placement(p.placement, group_size=p.group_size, device=DEVICE)
    shape = () if case.layers == 1 else (case.layers,)
    loads = [p.loads[[(i + k) % SETS for k in range(case.layers)]].reshape(*shape, -1) for i in range(SETS)]
    wanted = [on_cpu.solve(load, solver=solver) for load in loads]
    backend, there = planner._backend, [load.to(DEVICE) for load in loads]
    plans = [empty_plan(shape, planner._rules, solver, planner.device) for _ in loads]

    def call(i: int) -> Call:
        return lambda: backend.solve(there[i], plans[i], None)

    def check() -> None:
        for got, want, load in zip(plans, wanted, loads, strict=True):
            check_plan(name, got, want, load, p.placement.phy2log, linalg == "builtin" or solver == "flow")

    calls = [call(i) for i in range(SETS)]
    with backend.guard:
        for plan in plans:
            poison(list(plan.tensors()))
        for step in calls:
            step()
        check()
        graph, _ = captured(calls)
        for plan in plans:
            poison(list(plan.tensors()))
        times = replay_times(graph)
        check()
        iterations = torch.stack([plan.iterations.double().amax(-1) for plan in plans]).mean().item()
        facts = {
            "solver": solver,
            "linalg": linalg,
            "ranks": p.group_size,
            "layers": case.layers,
            "iterations": iterations,
        }
        cpu = cpu_microseconds([lambda load=load: on_cpu.solve(load, solver=solver) for load in loads])
        rows = [row(name, times, SETS, bar_us=case.bar, cpu_us=cpu, of=facts)]
        if solver == "ipm":
            rows[0].note = f"{iterations:.1f} iterations"
        if (
            case.layers == 1
            and case.bar is not None
            and planner.n_group == 1
            and linalg == "builtin"
            and solver == "ipm"
        ):
            rows.append(cold_row(f"{name}, cold", calls[:8], flush))
    return rows


def bench_run(case: Batch, solver: str, linalg: str, flush: torch.Tensor) -> list[Row]:
    """In a graph, alone in one, cold, and eager."""
    p = case.problem
    name = f"run, {case.name}: {solver}" + ("" if solver == "flow" else f", {linalg}")
    shape: dict[str, Any] = {"group_size": p.group_size, "solver": solver}
    on_cpu = Planner.from_placement(p.placement, **shape)
    with linear_algebra(linalg):
        planner = Planner.from_placement(p.placement, device=DEVICE, **shape)
    sets = case.indices(SETS)
    wanted = [on_cpu.run(idx, None) for idx in sets]
    there = [idx.to(DEVICE) for idx in sets]
    counter = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def call(i: int) -> Call:
        return lambda: planner.run(there[i], counter)

    exact = linalg == "builtin" or solver == "flow"
    calls = [call(i) for i in range(SETS)]
    got = [step() for step in calls]
    if exact:
        check_same(name, got, wanted)
    graph, results = captured(calls)
    poison(results)
    times = replay_times(graph)
    if exact:
        check_same(name, results, wanted)
    elif not torch.equal(planner.phy2log.long()[results[-1]].cpu(), sets[-1].long()):
        raise RuntimeError(f"{name}: physical experts are not copies of the logical ones")
    cpu = cpu_microseconds([lambda idx=idx: on_cpu.run(idx, None) for idx in sets])
    rows = [row(f"{name}, in a graph", times, SETS, bar_us=case.bar, cpu_us=cpu)]
    if linalg == "builtin" and solver == "ipm" and case.bar is not None:
        one, _ = captured(calls[:1])
        rows.append(row(f"{name}, graph alone", single_times(one.replay, REPLAYS)))
        rows.append(cold_row(f"{name}, in a graph, cold", calls[:8], flush))
        following = iter(calls * (2 + (WARM_UP + EAGER_CALLS) // SETS))
        eager = single_times(lambda: next(following)(), EAGER_CALLS)
        rows.append(row(f"{name}, eager", eager, bar_us=case.bar_eager))
    return rows


def bench_gathered_run(case: Batch, flush: torch.Tensor) -> list[Row]:
    """A run whose table has a row for every rank; a copy on the device stands for the collective."""
    p = case.problem
    name = f"run, {case.name}: ipm, builtin, table of all ranks, in a graph"
    ranks = p.placement.n_ranks
    with linear_algebra("builtin"):
        planner = Planner.from_placement(p.placement, group_size=p.group_size, group=Repeated(3, ranks), device=DEVICE)
    on_cpu = Planner.from_placement(p.placement, group_size=p.group_size, group=Repeated(3, ranks))
    sets = case.indices(SETS)
    there = [idx.to(DEVICE) for idx in sets]
    calls: list[Call] = [lambda idx=idx: planner.run(idx, None) for idx in there]
    wanted = [on_cpu.run(idx, None) for idx in sets]
    check_same(name, [step() for step in calls], wanted)
    graph, results = captured(calls)
    poison(results)
    times = replay_times(graph)
    check_same(name, results, wanted)
    return [row(name, times, SETS)]


def bench_tokens(case: Batch, copy_rate: float) -> list[Row]:
    """Count and assign, and count by itself; large batches against the time their bytes need."""
    p = case.problem
    name = f"count + assign, {case.name}"
    n_sets = 4 if case.tokens >= 1 << 20 else SETS
    on_cpu = Planner.from_placement(p.placement, group_size=p.group_size)
    planner = Planner.from_placement(p.placement, group_size=p.group_size, device=DEVICE)
    sets = case.indices(n_sets)
    counts = [torch.bincount(idx.flatten().long(), minlength=p.placement.n_logical) for idx in sets]
    quotas = [on_cpu.solve(count).quota for count in counts]
    wanted = [on_cpu._backend.assign(idx, quota) for idx, quota in zip(sets, quotas, strict=True)]
    backend = planner._backend
    there = [(idx.to(DEVICE), quota.to(DEVICE)) for idx, quota in zip(sets, quotas, strict=True)]
    both: list[Call] = [lambda idx=idx, quota=quota: backend.assign(idx, quota) for idx, quota in there]
    count: list[Call] = [lambda idx=idx: backend.count_own(idx, None) for idx, _ in there]
    with backend.guard:
        check_same(name, [step() for step in both], wanted)
        graph, results = captured(both)
        poison(results)
        times = replay_times(graph)
        check_same(name, results, wanted)
        count_times = replay_times(captured(count)[0])
    n = case.tokens * case.picks
    moved = 3 * n * sets[0].element_size()  # read by both kernels, written by one
    bound = 1e6 * moved / copy_rate
    bar = case.bar if case.bar is not None or case.tokens < 1 << 20 else bound / SHARE_OF_BOUND
    cpu = cpu_microseconds([lambda: on_cpu._backend.assign(sets[0], quotas[0])])
    whole = row(name, times, n_sets, bar_us=bar, cpu_us=cpu)
    whole.note = f"{moved / 1e6:.1f} MB need {bound:.1f} us: {100 * bound / whole.median_us:.0f} % of the bound"
    return [whole, row(f"count alone, {case.name}", count_times, n_sets)]


def bench_transfers(case: TransferCase) -> list[Row]:
    """A plan with transfers, and for the joint one the mapping of a rank's tokens by it."""
    name = f"transfers, {case.name}: {case.strategy}"
    timed = Timed(case, DEVICE)
    timed.poison()
    for call in timed.calls:
        call()
    timed.check()
    graph, _ = captured(timed.calls)
    timed.poison()
    times = replay_times(graph)
    timed.check()
    cpu = cpu_microseconds(timed.on_cpu)
    rows = [row(name, times, len(timed.calls), bar_us=case.bar, cpu_us=cpu)]
    rows[0].note = f"{timed.transfers:.1f} transfers"
    if case.strategy == "joint":
        tokens = int(case.counts[0][1].sum())
        routes, wanted = timed.routes(tokens)
        check_same(name, [call().slots for call in routes], wanted)
        graph, results = captured(routes)
        poison([routed.slots for routed in results])
        times = replay_times(graph)
        check_same(name, [routed.slots for routed in results], wanted)
        rows.append(row(f"route by range, {case.name}: {tokens} tokens int64", times, len(routes)))
    return rows


def copy_rate() -> float:
    """Bytes per second, read and written, of large copies on the device."""
    buffers = [torch.ones(COPY_BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(3)]
    graph, _ = captured([lambda i=i: buffers[i].copy_(buffers[i - 1]) for i in range(3)])
    return 2 * 3 * COPY_BYTES / (1e-6 * statistics.median(replay_times(graph)))


# The algebra's floor


def nvcc() -> str | None:
    """CUDA_HOME's, PATH's, or the one of NVIDIA's wheels beside this Python."""
    home = os.environ.get("CUDA_HOME")
    found = [f"{home}/bin/nvcc"] if home else []
    found += filter(None, [shutil.which("nvcc")])
    for place in sys.path:
        found += map(str, sorted(Path(place).glob("nvidia/cu*/bin/nvcc"), reverse=True))
    return next((path for path in found if Path(path).is_file()), None)


def mathdx_folder() -> Path | None:
    """Where a build with cuSolverDx left its LTO-IR."""
    given = os.environ.get("LPLB_MATHDX_FOLDER")
    if given:
        return Path(given)
    found = sorted(ROOT.glob("build/**/mathdx/potrf_8.fatbin"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def compile_floor(folder: Path, target: str) -> dict[str, str]:
    """Compile gpu_floor, and gpu_floor_cusolverdx where its parts are; what failed, by program.

    target: "90" for sm_90.
    """
    compiler, source = nvcc(), str(ROOT / "benchmarks" / "gpu_floor.cu")
    if compiler is None:
        return dict.fromkeys(("gpu_floor", "gpu_floor_cusolverdx"), "no nvcc: neither in CUDA_HOME nor on PATH")
    words = ["-std=c++17", "-O3"]
    machine = ["-gencode", f"arch=compute_{target},code=sm_{target}"]
    steps: dict[str, list[list[str]]] = {
        "gpu_floor": [[compiler, *words, "-fmad=false", *machine, "-o", str(folder / "gpu_floor"), source]]
    }
    failed = {}
    parts = mathdx_folder()
    if parts is None:
        failed["gpu_floor_cusolverdx"] = "no build with MathDx below build/, and LPLB_MATHDX_FOLDER is not set"
    else:
        linker = (
            parts / "toolkit" / "bin" / "nvcc"
        )  # where the toolkit at hand lacks nvvm/lib64, see cmake/mathdx.cmake
        link = str(linker) if linker.exists() else compiler
        generation = "90" if int(target) >= 90 else "80"
        intermediate = ["-gencode", f"arch=compute_{generation},code=lto_{generation}"]
        lto = [str(path) for path in sorted(parts.glob("*.fatbin"))]
        made, linked = str(folder / "floor.o"), str(folder / "floor_link.o")
        program = str(folder / "gpu_floor_cusolverdx")
        define = ["-DLPLB_HAVE_CUSOLVERDX"]
        teams = re.search(r"set\(LPLB_MATHDX_TEAMS ([^)]*)\)", (ROOT / "cmake" / "mathdx.cmake").read_text())
        for team in teams[1].split() if teams else []:
            define.append("-DLPLB_CUSOLVERDX_THREADS_{}={}".format(*team.split(":")))
        steps["gpu_floor_cusolverdx"] = [
            [compiler, *words, "-dc", "-fmad=true", *define, *intermediate, "-o", made, source],
            [link, "-dlink", "-dlto", *machine, "-Xnvlink=-Xnvvm=-fma=0", made, *lto, "-o", linked],
            [compiler, "-nodlink", made, linked, "-o", program],
        ]
    for program, commands in steps.items():
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                failed[program] = f"{' '.join(command[:2])} ...: {(done.stderr or done.stdout).strip()[-500:]}"
                break
    return failed


def target_of_device() -> str:
    """ "90" for sm_90."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def bench_floor() -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of the algebra alone, and the latencies as gpu_floor prints them."""
    rows: list[Row] = []
    facts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        given = os.environ.get("LPLB_GPU_FLOOR")
        failed = {} if given else compile_floor(Path(made), target_of_device())
        for program in ("gpu_floor", "gpu_floor_cusolverdx"):
            path = Path(given or made) / program
            if program in failed or not path.exists():
                facts.append({"kind": "missing", "name": program, "why": failed.get(program, f"there is no {path}")})
                continue
            done = subprocess.run([str(path)], capture_output=True, text=True, check=False)
            facts += [json.loads(line) for line in done.stdout.splitlines()]
            if done.returncode:
                raise RuntimeError(f"{program} returned {done.returncode}: {done.stderr.strip()} {done.stdout[-2000:]}")
    for fact in facts:
        if fact["kind"] == "algebra":
            name = f"algebra alone, {fact['name']}, {fact['width']} wide, {fact['threads']} threads"
            note = f"factor and two solves {fact['factor_us']:.2f}, one more {fact['solve_us']:.2f}"
            note += f"; residual {fact['residual']:.0e}"
            rows.append(Row(name, fact["factor_us"] + fact["solve_us"], note=note, of=fact))
    return rows, facts


def note_floors(rows: list[Row], floors: list[Row], threads: dict[int, int]) -> None:
    """Beside each interior-point row the algebra of its iterations, and how many times that it takes."""
    for each in rows:
        if each.of.get("solver") != "ipm" or each.of.get("layers") != 1:
            continue
        ranks, linalg = each.of["ranks"], each.of["linalg"]
        width = padded(ranks)
        for floor in floors:
            same = floor.of["name"] == linalg and floor.of["width"] == width
            if same and (linalg != "builtin" or floor.of["threads"] == threads[ranks]):
                least = each.of["iterations"] * floor.median_us
                each.note += f", their algebra {least:.1f} us: {each.median_us / least:.2f} times that"


def padded(n_ranks: int) -> int:
    """The least of the sizes that gpu_floor times."""
    return next(width for width in (8, 16, 32, 64, 128) if n_ranks <= width)


# What is printed and written


def launches(
    placement: Placement, group_size: int, linalg: str, n: int, index_bytes: int, batch: int, sms: int, shared: int
) -> list[tuple[str, int, int, int]]:
    """(kernel, blocks, threads, shared bytes) as the host plans them."""
    speed = [1.0] * placement.n_ranks
    planner = _C.CudaPlanner(
        placement.phy2log.tolist(), placement.n_logical, placement.n_ranks, group_size, speed, linalg, shared, sms
    )
    return planner.launches(n, index_bytes, sms, batch)


def print_plan() -> int:
    """Every row, as it would be launched."""
    if not _C.cuda:
        print(next(devices.missing()))
        return 2
    sms, shared = H200_SMS, H200_SHARED_BYTES
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=f"what would be timed on an H200: {sms} multiprocessors, {shared} bytes per block")
    for heading in ("row", "bar, us", "kernel", "blocks", "threads", "shared bytes"):
        table.add_column(heading, justify="left" if heading in ("row", "kernel") else "right")

    def add(name: str, bar: str, lines: list[tuple[str, int, int, int]]) -> None:
        for i, line in enumerate(lines):
            table.add_row(name if i == 0 else "", bar if i == 0 else "", *map(str, line))

    for solve in solves():
        for linalg in _C.linalgs:
            p = solve.problem
            every = launches(p.placement, p.group_size, linalg, 1, 8, solve.layers, sms, shared)
            add(f"{solve.name}: {linalg}", f"{solve.bar or ''}", [line for line in every if line[0] == "solve"])
    for kind, cases in (("run", runs()), ("count + assign", token_batches())):
        for case in cases:
            p, n = case.problem, case.tokens * case.picks
            bar = f"{case.bar or ''}" + (f" ({case.bar_eager:g} eager)" if case.bar_eager else "")
            every = launches(p.placement, p.group_size, "builtin", n, case.dtype.itemsize, 1, sms, shared)
            add(f"{kind}, {case.name}", bar, [line for line in every if kind == "run" or line[0] != "solve"])
    for case in transfer_cases(1):
        add(f"transfers, {case.name}: {case.strategy}", f"{case.bar or ''}", case.launches(sms, shared))
    console.print(table)
    return 0


def versions() -> dict[str, str]:
    """Of what has a part in the figures."""
    driver = getattr(torch._C, "_cuda_getDriverVersion", int)()
    return {
        "lplb": lplb.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of the build": _C.cuda_version,
        "CUDA of torch": torch.version.cuda or "none",
        "CUDA of the driver": f"{driver // 1000}.{driver % 1000 // 10}",
        "MathDx": _C.mathdx_version or "none",
        "targets": " ".join(_C.cuda_targets),
    }


def print_table(rows: list[Row], before: dict[str, float], heading: str) -> None:
    """One table, under the device's name."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(heading, markup=False, highlight=False)
    table = Table(title="lplb on CUDA, microseconds")
    for name in ("what", "median", "5 to 95 %", "bar", "met", "before", "CPU backend", "note"):
        table.add_column(name, justify="left" if name in ("what", "met", "note") else "right")
    for each in rows:
        spread = "" if each.low_us is None else f"{each.low_us:.2f} to {each.high_us:.2f}"
        bar = "" if each.bar_us is None else f"≤ {each.bar_us:.0f}"
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[each.met]
        earlier = f"{before[each.name]:.2f}" if each.name in before else ""
        cpu = "" if each.cpu_us is None else f"{each.cpu_us:.1f}"
        table.add_row(each.name, f"{each.median_us:.2f}", spread, bar, met, earlier, cpu, each.note)
    console.print(table)


def write(rows: list[Row], facts: list[dict[str, Any]], rate: float, label: str | None) -> Path:
    """Write the rows, each with where it comes from, to benchmarks/results, or to LPLB_RESULTS."""
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    device = torch.cuda.get_device_name()
    where = {"device": device, "commit": commit(), "date": date, "versions": versions()}
    stem = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + f"-{date}" + (f"-{label}" if label else "")
    folder = Path(os.environ.get("LPLB_RESULTS") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    content = {
        **where,
        "copy_bytes_per_second": rate,
        "floor": facts,
        "rows": [{**{k: v for k, v in asdict(each).items() if k != "of"}, **where} for each in rows],
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def solve_threads(problems: list[Solve]) -> dict[int, int]:
    """Threads of the builtin solve, by group size."""
    found = {}
    for case in problems:
        p = case.problem
        shared = devices.shared_bytes(torch.cuda.current_device())
        every = launches(p.placement, p.group_size, "builtin", 1, 8, 1, H200_SMS, shared)
        found[p.group_size] = next(threads for kernel, _, threads, _ in every if kernel == "solve")
    return found


def measure(only: str) -> tuple[list[Row], list[dict[str, Any]], float]:
    """All rows whose group's name has the word."""
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=DEVICE)
    rate = copy_rate()
    wanted = [name for name in ("floor", "solve", "run", "count", "transfers") if only in name]
    rows, facts = bench_floor() if "floor" in wanted else ([], [])
    floors = list(rows)
    cases = solves() if "solve" in wanted else []
    for case in cases:
        for linalg in _C.linalgs:
            rows += bench_solve(case, "ipm", linalg, flush)
        rows += bench_solve(case, "flow", "builtin", flush)
    note_floors(rows, floors, solve_threads(cases))
    for batch in runs() if "run" in wanted else []:
        for linalg in _C.linalgs:
            rows += bench_run(batch, "ipm", linalg, flush)
        rows += bench_run(batch, "flow", "builtin", flush)
        if batch.problem.placement.n_ranks == 64:
            rows += bench_gathered_run(batch, flush)
    for batch in token_batches() if "count" in wanted else []:
        rows += bench_tokens(batch, rate)
    for transfer_case in transfer_cases(SETS) if "transfers" in wanted else []:
        rows += bench_transfers(transfer_case)
    return rows, facts, rate


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/<device>-<date>.json")
    parser.add_argument("--label", help="a variant's name, which goes into the file's name")
    parser.add_argument("--compare", type=Path, help="a file of earlier rows, for the column before")
    parser.add_argument("--only", default="", help="floor, solve, run, count or transfers")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a bar is missed")
    parser.add_argument("--compile-floor", type=Path, metavar="FOLDER", help="compile gpu_floor.cu and stop")
    parser.add_argument("--target", help="for --compile-floor: 90 for sm_90; by default the device's")
    parser.add_argument("--plan", action="store_true", help="print the rows and launches; needs no device")
    arguments = parser.parse_args()
    if arguments.plan:
        return print_plan()
    if arguments.compile_floor:
        arguments.compile_floor.mkdir(parents=True, exist_ok=True)
        failed = compile_floor(arguments.compile_floor, arguments.target or target_of_device())
        for program, why in failed.items():
            print(f"{program}: {why}")
        return int("gpu_floor" in failed)
    lacking = next(devices.missing(), None) or devices.no_code_for(torch.cuda.get_device_capability())
    if lacking:
        print(lacking, file=sys.stderr)
        return 2
    rows, facts, rate = measure(arguments.only)
    before = {}
    if arguments.compare:
        before = {each["name"]: each["median_us"] for each in json.loads(arguments.compare.read_text())["rows"]}
    heading = (
        f"{torch.cuda.get_device_name()}, copies at {rate / 1e12:.2f} TB/s, {torch.get_num_threads()} CPU threads, "
    )
    heading += ", ".join(f"{key} {value}" for key, value in versions().items())
    for fact in facts:
        if fact["kind"] in ("latency", "launch", "clock", "missing"):
            heading += f"\n{fact['kind']}: " + ", ".join(f"{k} {v}" for k, v in fact.items() if k != "kind")
    print_table(rows, before, heading)
    if arguments.write:
        print(f"written to {write(rows, facts, rate, arguments.label)}")
    return int(arguments.strict and any(each.met is False for each in rows))


if __name__ == "__main__":
    sys.exit(main())
