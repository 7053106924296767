"""The CPU's bars, in one process, on one thread, against peers on the same inputs: one table.

    python benchmarks/bench_cpu.py [--write] [--strict]

Needs highspy, hypothesis and rich (`pip install lplb[test]`). With --write the rows also go to
benchmarks/results/cpu-<date>.json. With --strict the exit code is 1 when a bar is missed.

Peers are measured in turn with lplb, round by round, and medians of the rounds are compared, so that a machine whose
speed drifts does not favour either.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from cases import cube, design_instances, eplb_like_placement, lplb_placement  # noqa: E402
from reference import GroupLP, ReferenceLP, exact_bottleneck, exact_optimum, rank_groups  # noqa: E402
from rows import Row, machine, print_table, write  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

import lplb  # noqa: E402
from lplb import Placement, Planner  # noqa: E402

N_LOADS = 1000
N_PEER_LOADS = 200
HIGHS_EVERY = 10  # of the design instances
ROUNDS = 5
DRIFTS = (0.3, 0.6)  # of loads since EPLB placed by them, as log-normal sigmas
IMPORT_PAIRS = 9


def seconds(action: Callable[[], Any], times: int = 1) -> float:
    """Mean wall time of an action."""
    start = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - start) / times


# Certificates


def bench_certificates() -> list[Row]:
    """Every design instance, both solvers, against the exact optimum; HiGHS beside it on every tenth."""
    best = {"ipm": 0, "flow": 0}
    worst_bound = {"ipm": -math.inf, "flow": -math.inf}
    n_instances = steps = unsolved = 0
    off_highs = 0.0
    for instance in design_instances():
        speed = np.ones(instance.n_ranks) if instance.rank_speed is None else instance.rank_speed
        shape = instance.phy2log, instance.n_ranks, instance.group_size
        optimum = [float(t) for t in exact_optimum(*shape, instance.loads, speed)]
        whole = [b.max_load for b in exact_bottleneck(*shape, instance.loads, speed)]
        if n_instances % HIGHS_EVERY == 0:
            for t, highs in zip(optimum, ReferenceLP(*shape, speed).solve(instance.loads), strict=True):
                off_highs = max(off_highs, abs(highs / t - 1) if t else highs)
        n_instances += 1
        placement = Placement(instance.phy2log, instance.n_ranks, instance.loads.size)
        planner = Planner.from_placement(placement, group_size=instance.group_size, rank_speed=torch.from_numpy(speed))
        for solver in best:
            plan = planner.solve(torch.from_numpy(instance.loads), solver=solver)
            levels = (plan.rank_load.numpy() / speed).reshape(-1, instance.group_size).max(axis=1)
            best[solver] += levels.tolist() == whole
            for bound, t in zip(plan.lower_bound.tolist(), optimum, strict=True):
                worst_bound[solver] = max(worst_bound[solver], bound / t - 1 if t else bound)
            unsolved += not plan.solved
            if solver == "ipm":
                steps = max(steps, int(plan.iterations.max()))
    peer = f"exact t*; HiGHS off by {off_highs:.0e} at most"
    rows = []
    for solver in best:
        name = f"{solver}: instances at the whole-token optimum, of {n_instances:,}"
        rows.append(Row(name, 100 * best[solver] / n_instances, "%", 100, ">=", peer))
        rows.append(Row(f"{solver}: largest lower_bound / t* - 1", worst_bound[solver], "", 1e-9, "<=", peer))
    rows.append(Row("both: instances not solved", unsolved, "", 0, "<="))
    rows.append(Row("ipm: most iterations", steps, "", 8, "<="))
    return rows


# LP time


@dataclass(frozen=True)
class LoadSet:
    """A placement and loads int64 [N_LOADS, n_logical] that have drifted since it was made."""

    name: str
    planner: Planner
    model: GroupLP
    loads: torch.Tensor


def load_sets() -> list[LoadSet]:
    """The three sizes of the bars."""
    rng = np.random.default_rng(7)
    sets = []
    for name, n_ranks, n_logical, slots in [
        ("8 ranks, cube", 8, 64, 0),
        ("32 ranks, 288 slots", 32, 256, 288),
        ("64 ranks, 512 slots", 64, 256, 512),
    ]:
        history = 1024 * rng.lognormal(0.0, 1.0, n_logical)
        if slots:
            phy2log = eplb_like_placement(rng, history, n_ranks, slots)
        else:
            phy2log = lplb_placement(cube(), n_logical // n_ranks)
        drift = rng.uniform(*DRIFTS, (N_LOADS, 1)) * rng.standard_normal((N_LOADS, n_logical))
        loads = np.rint(history * np.exp(drift)).astype(np.int64)
        planner = Planner.from_placement(Placement(phy2log, n_ranks, n_logical))
        sets.append(LoadSet(name, planner, GroupLP(rank_groups(phy2log, n_ranks)[0]), torch.from_numpy(loads)))
    return sets


def solve_seconds(case: LoadSet, solver: str) -> float:
    """Mean time per load of one batch."""
    return seconds(lambda: case.planner.solve(case.loads, solver=solver)) / N_LOADS


def highs_seconds(model: GroupLP, rows: list[tuple[Any, Any, float]], presolve: str) -> float:
    """Mean time of bounds, clearSolver and run over prepared bounds."""
    model.model.setOptionValue("presolve", presolve)
    start = time.perf_counter()
    for lower, upper, _ in rows:
        model.set_bounds(lower, upper)
        model.model.clearSolver()
        model.model.run()
    return (time.perf_counter() - start) / len(rows)


def reset_tolerances(model: GroupLP) -> None:
    """Back to HiGHS' default options, apart from one thread and no output."""
    model.model.setOptionValue("primal_feasibility_tolerance", 1e-7)
    model.model.setOptionValue("dual_feasibility_tolerance", 1e-7)


def bench_lp_times() -> list[Row]:
    """Per LP: batches of a thousand loads against HiGHS on two hundred of them."""
    rows = []
    for case, ipm_bar in zip(load_sets(), (30, 6, 6), strict=True):
        reset_tolerances(case.model)
        bounds = [case.model.bounds(load) for load in case.loads[:N_PEER_LOADS].numpy()]
        times: dict[str, list[float]] = {"ipm": [], "flow": [], "choose": [], "off": []}
        for _ in range(ROUNDS):
            for solver in ("ipm", "flow"):
                times[solver].append(solve_seconds(case, solver))
            for presolve in ("choose", "off"):
                times[presolve].append(highs_seconds(case.model, bounds, presolve))
        micros = {name: 1e6 * statistics.median(values) for name, values in times.items()}
        for solver, bar in (("ipm", ipm_bar), ("flow", 100)):
            name = f"{solver}: {case.name}"
            rows.append(Row(f"{name}, per LP", micros[solver], "µs"))
            peer = f"HiGHS {micros['choose']:.0f} µs"
            rows.append(Row(f"{name}, faster than HiGHS", micros["choose"] / micros[solver], "×", bar, ">=", peer))
            peer = f"HiGHS {micros['off']:.0f} µs"
            rows.append(Row(f"{name}, than HiGHS, presolve off", micros["off"] / micros[solver], "×", peer=peer))
    return rows


# run


def run_case() -> tuple[Planner, torch.Tensor]:
    """4096 x 8 int64 indices, 256 experts, 32 ranks in cube groups of 8, two redundant slots a rank."""
    r2o = torch.from_numpy(cube()).int()
    planner = Planner(r2o, 256 + 64, 256, 32)
    rng = np.random.default_rng(11)
    share = rng.lognormal(0.0, 1.0, 256)
    return planner, torch.from_numpy(rng.choice(256, (4096, 8), p=share / share.sum()))


def bench_run() -> list[Row]:
    """One `run` against torch's count and one table look-up."""
    planner, idx = run_case()
    counter = torch.zeros(1, dtype=torch.int64)
    table, flat = torch.arange(256), idx.flatten()

    def peer() -> torch.Tensor:
        torch.bincount(flat, minlength=256)
        return table[idx]

    times: dict[str, list[float]] = {"ipm": [], "flow": [], "peer": []}
    flow = Planner(planner.r2o, 256 + 64, 256, 32, solver="flow")
    for _ in range(41):
        times["ipm"].append(seconds(lambda: planner.run(idx, counter), 10))
        times["peer"].append(seconds(peer, 10))
        times["flow"].append(seconds(lambda: flow.run(idx, counter), 10))
    micros = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    told = f"bincount + look-up {micros['peer']:.0f} µs"
    rows = [
        Row("run, 4096 x 8 indices, ipm", micros["ipm"], "µs"),
        Row("run / (bincount + look-up), ipm", micros["ipm"] / micros["peer"], "×", 2.0, "<=", told),
        Row("run, 4096 x 8 indices, flow", micros["flow"], "µs"),
        Row("run / (bincount + look-up), flow", micros["flow"] / micros["peer"], "×", peer=told),
    ]
    result_bytes = idx.numel() * idx.element_size()
    allocated = allocated_in(lambda: planner.run(idx, counter))
    if allocated < result_bytes:
        raise RuntimeError(f"the profiler saw {allocated} bytes, less than the result's {result_bytes}")
    told = f"result {result_bytes} bytes"
    rows.append(Row("run, bytes allocated besides its result", allocated - result_bytes, "bytes", 0, "<=", told))
    rows.append(Row("workspace of this planner", planner.workspace_bytes, "bytes"))
    return rows


def allocated_in(action: Callable[[], Any]) -> int:
    """Bytes that torch's allocator hands out in a call; what is freed again counts too."""
    action()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = action()
    del result
    asked = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.nbytes() > 0:
            asked += event.nbytes()
    return asked


# import


def bench_import() -> list[Row]:
    """`import lplb` against `import torch`, in pairs of fresh processes."""
    environment = {**os.environ, "PYTHONPATH": str(Path(lplb.__file__).parents[1])}

    def start(module: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, "-c", f"import {module}"], env=environment, check=True))

    start("lplb")
    pairs = [(start("lplb"), start("torch")) for _ in range(IMPORT_PAIRS)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return [
        Row("import lplb", ours, "s"),
        Row("import lplb / import torch", ratio, "×", 1.2, "<=", f"import torch {theirs:.2f} s"),
    ]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cpu-<date>.json")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a bar is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    rows = [*bench_lp_times(), *bench_run(), *bench_import(), *bench_certificates()]
    note = (
        f"LP times: planner.solve of a batch of {N_LOADS} loads; EPLB placed by log-normal loads (sigma 1), which then "
        f"drift by log-normal sigma {DRIFTS[0]} to {DRIFTS[1]}. HiGHS: {N_PEER_LOADS} of the same loads, model "
        f"prebuilt, bounds updated, clearSolver(), run(); default options. Medians of {ROUNDS} rounds in turn."
    )
    print_table(rows, where, "lplb on the CPU, one thread", note)
    if arguments.write:
        print("written to", write(rows, where, "cpu").relative_to(ROOT))
    return int(arguments.strict and any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
