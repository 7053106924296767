"""What a weight on traffic buys: imbalance against tokens across nodes, on the recorded trace; and what a solve takes.

    python benchmarks/bench_traffic.py [--write]

The trace runs on 32 simulated ranks in nodes of 8, its tokens dealt out in blocks; experts are placed by EPLB as
`lplb demo` has them placed, two redundant slots a rank, anew every 16 batches. Batches before the first history count
nowhere. Traffic is counted for all experts, by `tests/reference_traffic.py`. Solve times are of one load at a time on
one thread, with and without a cost. Needs rich. With --write the rows go to benchmarks/results/traffic-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_cpu import commit, machine  # noqa: E402
from cases import cube, eplb_like_placement, lplb_placement  # noqa: E402
from direct import DirectPlan, DirectPlanner  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from reference_traffic import Traffic, traffic_of  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from lplb import _C, Placement  # noqa: E402
from lplb.replay import REFRESH, SPARE_SLOTS, WINDOW, place, split_evenly  # noqa: E402
from lplb.trace import load_trace  # noqa: E402

N_RANKS, RANKS_PER_NODE = 32, 8
WEIGHTS = (0.01, 0.1, 1.0, 3.0, 10.0, 20.0, 30.0, 50.0, 100.0, 1000.0)
N_LOADS = 200  # per size and round of the times
ROUNDS = 7
TIMED_WEIGHTS = (0.01, 0.1, 1.0)


@dataclass
class Point:
    """One line of the trade-off; shares are of all token choices."""

    name: str
    imbalance: float
    imbalance_95: float
    across_nodes: float
    within_nodes: float
    unsolved: int
    iterations: float


@dataclass
class Batch:
    """One batch of one layer: its placement and its tokens, int32 [ranks, experts]."""

    placement: Placement
    planner: DirectPlanner
    counts: NDArray[np.int32]


def batches() -> Iterator[Batch]:
    """Every batch and layer of the trace with the placement that it meets."""
    trace = load_trace()
    n_batches, n_layers = trace.indices.shape[:2]
    n_experts = trace.n_experts
    for layer in range(n_layers):
        dealt = trace.indices[:, layer].reshape(n_batches, N_RANKS, -1).astype(np.int64)
        counts = np.stack([[np.bincount(rank, minlength=n_experts) for rank in batch] for batch in dealt])
        for b in range(REFRESH, n_batches):
            if b % REFRESH == 0:
                history = torch.from_numpy(counts[b - WINDOW : b].sum(axis=(0, 1)))
                placement = place(history, n_experts + SPARE_SLOTS * N_RANKS, N_RANKS)
                planner = DirectPlanner(placement.phy2log.numpy(), n_experts, N_RANKS, N_RANKS)
            yield Batch(placement, planner, np.ascontiguousarray(counts[b], dtype=np.int32))


def point(name: str, all_batches: list[Batch], quota_of: Callable[[Batch], NDArray[np.int64] | DirectPlan]) -> Point:
    """The trade-off's line for one way to split."""
    imbalance, steps, unsolved = [], [], 0
    tokens, sent = 0, Traffic(0, 0)
    for batch in all_batches:
        quota = quota_of(batch)
        if isinstance(quota, DirectPlan):
            unsolved += int(np.count_nonzero(quota.status))
            steps += quota.iterations.tolist()
            quota = quota.quota.astype(np.int64)
        load = quota.reshape(N_RANKS, -1).sum(axis=1)
        imbalance.append(load.max() / load.mean())
        more = traffic_of(batch.placement.phy2log.numpy(), batch.counts, quota, RANKS_PER_NODE)
        sent = Traffic(sent.across_nodes + more.across_nodes, sent.within_nodes + more.within_nodes)
        tokens += int(load.sum())
    return Point(
        name,
        statistics.mean(imbalance),
        float(np.quantile(imbalance, 0.95)),
        sent.across_nodes / tokens,
        sent.within_nodes / tokens,
        unsolved,
        statistics.mean(steps) if steps else 0.0,
    )


def trade_off() -> list[Point]:
    """Even splits, the LP without costs, and weight after weight."""
    found = list(batches())

    def loads(batch: Batch) -> NDArray[np.int64]:
        return batch.counts.sum(axis=0, dtype=np.int64)

    points = [
        point("even splits", found, lambda batch: split_evenly(batch.placement, loads(batch))),
        point("LP, no cost", found, lambda batch: batch.planner.solve(loads(batch))),
    ]
    for weight in WEIGHTS:

        def solve(batch: Batch, weight: float = weight) -> DirectPlan:
            return batch.planner.solve_traffic(batch.counts, RANKS_PER_NODE, weight)

        points.append(point(f"weight {weight:g}", found, solve))
    return points


def solve_times() -> list[dict[str, float | str]]:
    """Median microseconds per solve, one load at a time, with and without a cost, in turn."""
    rng = np.random.default_rng(7)
    rows: list[dict[str, float | str]] = []
    for name, n_ranks, n_logical, slots, node in [
        ("8 ranks, cube, nodes of 4", 8, 64, 0, 4),
        ("32 ranks, 288 slots, nodes of 8", 32, 256, 288, 8),
        ("64 ranks, 512 slots, nodes of 8", 64, 256, 512, 8),
    ]:
        history = 1024 * rng.lognormal(0.0, 1.0, n_logical)
        phy2log = eplb_like_placement(rng, history, n_ranks, slots) if slots else lplb_placement(cube(), 8)
        drift = rng.uniform(0.3, 0.6, (N_LOADS, 1)) * rng.standard_normal((N_LOADS, n_logical))
        loads = np.rint(history * np.exp(drift)).astype(np.int64)
        sources = rng.dirichlet(np.ones(n_ranks), (N_LOADS, n_logical))
        tables = [rng.multinomial(*pair) for pair in zip(loads, sources, strict=True)]  # each [experts, ranks]
        counts = [np.ascontiguousarray(table.T, dtype=np.int32) for table in tables]
        planner = DirectPlanner(phy2log, n_logical, n_ranks, n_ranks)
        rows.append({"size": name, **time_ways(planner, loads, counts, node)})
    return rows


def time_ways(
    planner: DirectPlanner, loads: NDArray[np.int64], counts: list[NDArray[np.int32]], node: int
) -> dict[str, float | str]:
    """Microseconds and iterations for no cost and for each weight."""

    def solve(i: int, weight: float) -> DirectPlan:
        return planner.solve_traffic(counts[i], node, weight) if weight else planner.solve(loads[i])

    row: dict[str, float | str] = {}
    taken: dict[float, list[float]] = {weight: [] for weight in (0.0, *TIMED_WEIGHTS)}
    for _ in range(ROUNDS):
        for weight, times in taken.items():
            start = time.perf_counter()
            for i in range(N_LOADS):
                solve(i, weight)
            times.append((time.perf_counter() - start) / N_LOADS * 1e6)
    for weight, times in taken.items():
        row[f"{weight:g}"] = statistics.median(times)
        row[f"{weight:g}, iterations"] = statistics.mean(int(solve(i, weight).iterations[0]) for i in range(N_LOADS))
    return row


def print_tables(points: list[Point], times: list[dict[str, float | str]]) -> None:
    """The trade-off and the times."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"Recorded trace, {N_RANKS} ranks in nodes of {RANKS_PER_NODE}: imbalance against traffic")
    for heading in ("split", "max / mean", "95th percentile", "across nodes", "within nodes", "unsolved", "iterations"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for p in points:
        shares = f"{100 * p.across_nodes:.1f} %", f"{100 * p.within_nodes:.1f} %"
        ratios = f"{p.imbalance:.3f}", f"{p.imbalance_95:.3f}"
        table.add_row(p.name, *ratios, *shares, str(p.unsolved), f"{p.iterations:.1f}")
    console.print(table)
    table = Table(title="Microseconds per solve (iterations), one thread, by weight")
    table.add_column("size")
    ways = [way for way in times[0] if way != "size" and "iterations" not in way]
    for way in ways:
        table.add_column(way, justify="right")
    for row in times:
        cells = [f"{row[way]:.1f} ({row[f'{way}, iterations']:.1f})" for way in ways]
        table.add_row(str(row["size"]), *cells)
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/traffic-<date>.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    points, times = trade_off(), solve_times()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print_tables(points, times)
    if arguments.write:
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        path = ROOT / "benchmarks" / "results" / f"traffic-{date}.json"
        content = {
            "date": date,
            "commit": commit(),
            "machine": where,
            "node_cost": _C.node_cost,
            "trade_off": [asdict(p) for p in points],
            "times": times,
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
