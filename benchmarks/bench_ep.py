"""What expert parallelism gets from lplb beside balance: traffic, and what planning costs. One table and one curve.

    python benchmarks/bench_ep.py [--write] [--strict]

Needs highspy and rich (`pip install lplb[test]`). With --write the rows also go to benchmarks/results/ep-<date>.json.
With --strict the exit code is 1 when a bar is missed.

Traffic is counted on the recorded router trace, on 32 simulated ranks in 4 nodes of 8; placements are made every 16
batches from the 16 before. Tokens of replicated experts only: the others have no choice. The layer runs on four gloo
processes, with tokens of one domain: noise around one direction, so that its router prefers few experts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from cases import eplb_like_placement  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rows import Row, machine, print_table, write  # noqa: E402

from lplb import Placement, Plan, Planner, place, topology  # noqa: E402
from lplb.exchange import Known  # noqa: E402
from lplb.nn import ExpertParallelMoE  # noqa: E402
from lplb.replay import REFRESH, WINDOW  # noqa: E402
from lplb.trace import load_trace  # noqa: E402

N_RANKS, NODE, N_SLOTS, N_EXPERTS = 32, 8, 128, 64
WEIGHTS = (0.0, 0.001, 0.1, 1.0, 3.0, 10.0, 30.0)
TOP_K = 6
CURVE_EVERY = 4  # batches of the trace for a point of the curve
RUNS = 300

PLACEMENTS: dict[str, Callable[[torch.Tensor, Known, float], Planner]] = {
    "circulant (11, 18)": lambda history, ranks, weight: on_topology(
        topology.circulant(32, 11, 18), history, ranks, weight
    ),
    "4×8 torus": lambda history, ranks, weight: on_topology(topology.torus(4, 8), history, ranks, weight),
    "EPLB": lambda history, ranks, weight: Planner.from_placement(
        place(history, n_ranks=N_RANKS, n_physical=N_SLOTS, policy="eplb"),
        group=ranks,
        ranks_per_node=NODE,
        traffic_weight=weight,
    ),
}


def on_topology(r2o: torch.Tensor, history: torch.Tensor, ranks: Known, weight: float) -> Planner:
    """LPLB's placement by a history."""
    planner = Planner(r2o, N_SLOTS, N_EXPERTS, group=ranks, ranks_per_node=NODE, traffic_weight=weight)
    planner.update_redundancy_mapping(history)
    return planner


def counts_of(chosen: torch.Tensor) -> torch.Tensor:
    """Tokens of every rank by expert, int32 [ranks, experts]; consecutive tokens are a rank's."""
    return torch.stack([row.bincount(minlength=N_EXPERTS) for row in chosen.reshape(N_RANKS, -1)]).int()


def plans(name: str, weight: float, every: int) -> Iterator[Plan]:
    """The plans of every `every`-th batch with a history, layer by layer."""
    chosen = torch.from_numpy(load_trace().indices).long()
    for layer in chosen.unbind(1):
        for first in range(REFRESH, len(layer), REFRESH):
            history = layer[first - WINDOW : first].flatten().bincount(minlength=N_EXPERTS)
            ranks = Known(0, N_RANKS)
            planner = PLACEMENTS[name](history, ranks, weight)
            for batch in layer[first : first + REFRESH : every]:
                ranks.counts = counts_of(batch)
                planner.run(batch.reshape(N_RANKS, -1)[0], None)
                plan = planner.last_plan
                assert plan is not None
                yield plan


@dataclass
class Way:
    """Where tokens of replicated experts went, over all batches."""

    tokens: int = 0
    plain: int = 0
    local_first: int = 0
    least: int = 0
    imbalance: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)

    def add(self, plan: Plan) -> None:
        """Count a plan's traffic under both splits, and the least that its placement could have."""
        assert plan.counts is not None
        plain, local = (
            replace(plan, rules=replace(plan.rules, split=split)).traffic(replicated_only=True)
            for split in ("plain", "local_first")
        )
        experts, slots = torch.tensor(plan.rules.phy2log), len(plan.rules.phy2log)
        held = torch.zeros(N_RANKS // NODE, N_EXPERTS, dtype=torch.bool)
        held[torch.arange(slots) * N_RANKS // slots // NODE, experts] = True
        by_node = plan.counts.long().view(N_RANKS // NODE, NODE, N_EXPERTS).sum(1)
        self.tokens += sum(plain)
        self.plain += plain.cross_nodes
        self.local_first += local.cross_nodes
        self.least += int(by_node[:, experts.bincount() > 1][~held[:, experts.bincount() > 1]].sum())
        self.imbalance.append(float(plan.imbalance))
        self.iterations.append(int(plan.iterations.max()))


def way(name: str, weight: float = 0.0, every: int = 1) -> Way:
    """The traffic of a placement on the trace."""
    out = Way()
    for plan in plans(name, weight, every):
        out.add(plan)
    return out


def bench_traffic() -> list[Row]:
    """Cross-node tokens by split, for each placement; balance is the same."""
    rows = []
    for name in PLACEMENTS:
        w = way(name)
        best = 100 * (1 - w.least / w.plain)
        rows.append(
            Row(
                f"cross-node tokens of replicated experts, {name}: local first below plain",
                100 * (1 - w.local_first / w.plain),
                "%",
                25 if name.startswith("circulant") else None,
                ">=",
                f"plain {100 * w.plain / w.tokens:.1f} % of tokens; {best:.1f} % if balance did not matter; "
                f"imbalance {statistics.fmean(w.imbalance):.3f}",
            )
        )
    return rows


def print_curve() -> list[Row]:
    """Balance against traffic, by traffic_weight."""
    table = Table(title="traffic_weight: 32 ranks in 4 nodes, circulant (11, 18), local first")
    for heading in ("traffic_weight", "cross-node tokens", "imbalance, mean", "iterations, mean and most"):
        table.add_column(heading, justify="right")
    rows = []
    for weight in WEIGHTS:
        w = way("circulant (11, 18)", weight, CURVE_EVERY)
        cross, imbalance = 100 * w.local_first / w.tokens, statistics.fmean(w.imbalance)
        steps = f"{statistics.fmean(w.iterations):.1f}, {max(w.iterations)}"
        table.add_row(f"{weight:g}", f"{cross:.2f} %", f"{imbalance:.4f}", steps)
        rows.append(Row(f"traffic_weight {weight:g}: cross-node tokens", cross, "%", peer=f"imbalance {imbalance:.4f}"))
    table.add_row("any", f"{100 * w.least / w.tokens:.2f} %", "not bounded", "")
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    return rows


def medians_in_turn(*actions: Callable[[], object]) -> list[float]:
    """Median microseconds of each."""
    times: list[list[float]] = [[] for _ in actions]
    for i in range(RUNS):
        for action, taken in zip(actions, times, strict=True):
            start = time.perf_counter()
            action()
            if i >= RUNS // 10:
                taken.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(taken) for taken in times]


def bench_split() -> list[Row]:
    """The source-aware split as a part of `run`: 4096 x 8 indices, 256 experts."""
    rows = []
    for n_ranks, n_slots in ((32, 288), (64, 512)):
        rng = np.random.default_rng(n_ranks)
        weight = rng.lognormal(0, 1, 256)
        phy2log = eplb_like_placement(rng, weight, n_ranks, n_slots)
        idx = [torch.from_numpy(rng.choice(256, (4096, 8), p=weight / weight.sum())) for _ in range(n_ranks)]
        ranks = Known(n_ranks // 2, n_ranks)
        ranks.counts = torch.stack([i.flatten().bincount(minlength=256) for i in idx]).int()
        planner = Planner.from_placement(Placement(phy2log, n_ranks), group=ranks, ranks_per_node=NODE)
        backend = planner._backend
        addresses = backend.plan.quota.data_ptr(), backend.plan.status.data_ptr()
        out = torch.zeros(n_slots, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)

        def run(planner: Planner = planner, own: torch.Tensor = idx[n_ranks // 2]) -> None:
            planner.run(own, None)

        def split(backend=backend, ranks=ranks, addresses=addresses, out=out) -> None:  # type: ignore[no-untyped-def]
            backend._planner.shares(
                backend._sources(backend._table), ranks.rank, 1, *addresses, *(t.data_ptr() for t in out)
            )

        whole, part = medians_in_turn(run, split)
        rows.append(
            Row(
                f"source-aware split, part of run, {n_ranks} ranks, {n_slots} slots",
                100 * part / whole,
                "%",
                20,
                "<=",
                f"split {part:.1f} µs, run {whole:.0f} µs",
            )
        )
    return rows


# The layer, on four processes


@dataclass
class Times:
    """Seconds of this thread's CPU time, over all batches."""

    layer: float = 0.0
    planner: float = 0.0
    experts: float = 0.0


def timed(owner: object, name: str, times: Times, field_name: str) -> None:
    """Add what a method takes to the times."""
    method = getattr(owner, name)

    def call(*given: object, **named: object) -> object:
        start = time.thread_time()
        try:
            return method(*given, **named)
        finally:
            setattr(times, field_name, getattr(times, field_name) + time.thread_time() - start)

    setattr(owner, name, call)


def run_layer(rank: int, folder: str, hidden: int, ffn: int, tokens: int, batches: int) -> None:
    """One rank: tokens of one domain through a layer without and with balancing; results to a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    group, found = dist.group.WORLD, []
    domain = 2 * torch.randn(hidden, generator=torch.Generator().manual_seed(7))
    for balanced in (False, True):
        planner = Planner(topology.torus(2, 2), N_EXPERTS + 32, N_EXPERTS, group=group) if balanced else None
        torch.manual_seed(0)
        layer = ExpertParallelMoE(hidden, ffn, N_EXPERTS, TOP_K, group=group, balancer=planner)
        draw, times, slowest = torch.Generator().manual_seed(rank), Times(), []
        if planner is not None:
            timed(planner, "run", times, "planner")
        timed(layer, "_serve", times, "experts")
        with torch.no_grad():
            for batch in range(batches + 1):
                x = domain + torch.randn(tokens, hidden, generator=draw)
                if batch == 1:  # the first is to warm up
                    times.layer = times.planner = times.experts = 0.0
                start = time.thread_time()
                layer(x)
                times.layer += time.thread_time() - start
                assert layer.received is not None
                plan = None if planner is None else planner.last_plan
                slowest.append((int(layer.received.sum()), 0 if plan is None else int(plan.rank_load[rank])))
        found.append((times, slowest))
    torch.save([(vars(times), slowest) for times, slowest in found], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def bench_layer() -> list[Row]:
    """The real layer on four gloo processes: what ranks get against the plan, and what planning costs."""
    rows = []
    for name, hidden, ffn, tokens, batches in (
        ("the trace model's layer (128, 64)", 128, 64, 2048, 8),
        ("hidden 512, ffn 1024", 512, 1024, 4096, 2),
    ):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_layer, (folder, hidden, ffn, tokens, batches), 4)
            plain, balanced = zip(*(torch.load(f"{folder}/{rank}.pt") for rank in range(4)), strict=True)
        off = max(abs(got - planned) for _, ranks in balanced for got, planned in ranks)
        busiest = [max(ranks[-1][0] for _, ranks in side) for side in (plain, balanced)]
        cpu = ["/".join(f"{times['experts']:.2f}" for times, _ in side) for side in (plain, balanced)]
        part = max(times["planner"] / times["layer"] for times, _ in balanced)
        shape = f"{name}, {tokens} tokens per rank, 64 experts, top-{TOP_K}"
        rows += [
            Row(
                f"{shape}: a rank's tokens against the plan",
                off,
                "tokens",
                1,
                "<=",
                f"busiest rank {busiest[0]} without, {busiest[1]} with; expert CPU s {cpu[0]}, {cpu[1]}",
            ),
            Row(
                f"{shape}: planner and exchange, CPU time of the thread",
                100 * part,
                "%",
                3 if hidden == 512 else None,
                "<=",
                "of the layer's forward pass, the largest of 4 ranks",
            ),
        ]
    return rows


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/ep-<date>.json")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a bar is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    rows = [*bench_split(), *bench_traffic(), *bench_layer(), *print_curve()]
    print_table([row for row in rows if not row.name.startswith("traffic_weight")], where, "lplb in expert parallelism")
    if arguments.write:
        print("written to", write(rows, where, "ep").relative_to(ROOT))
    return int(arguments.strict and any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
