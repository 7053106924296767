"""Weights that travel for one batch: how even, with how many transfers, how quickly planned, what it is worth. Tables.

    python benchmarks/bench_llep.py [--write] [--strict]

Beside lplb runs LLEP's least-loaded assignment in plain Python (plain_lla.py), which decides as LLEP's program does.
Where there is a GPU, expert GEMMs run on it at full size. The table for an H200 is modelled, and says so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from llep_layer import at_home, bench_gemm, bench_memory, by_lla  # noqa: E402
from plain_lla import plain_lla  # noqa: E402
from reference_bounds import least_transfers  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rows import Row, machine, print_table, write  # noqa: E402

from lplb.cost import hardware_by_name, layer_time, transfer_time  # noqa: E402
from lplb.llep_scenes import FAMILIES, WHERE  # noqa: E402
from lplb.models import ModelShape  # noqa: E402
from lplb.scenes import LLEP_SCENES, LlepScene, skewed_scene, zipf_scene  # noqa: E402
from lplb.transfers import TransferPlanner  # noqa: E402

H200 = hardware_by_name("h200")
ZIPF_SEEDS = range(100)
SKEWED_SEEDS = range(20)
ULTRAEP = {1.5: 38, 2.0: 46, 3.0: 51}  # copies by the imbalance that a batch begins with


class Tried(NamedTuple):
    """What became of a scene."""

    imbalance: float
    transfers: int
    least: int  # transfers that any plan needs, proven
    plain: float  # imbalance of expert parallelism without transfers
    lla_imbalance: float
    lla_transfers: int


def plain_imbalance(counts: np.ndarray) -> float:
    """Busiest rank over mean, every rank having its block of experts."""
    load = counts.sum(0).reshape(len(counts), -1).sum(1)
    return float(load.max() / load.mean())


def span(values: list[float] | list[int], digits: int | None = None) -> str:
    """From the least to the most."""
    low, high = (str(v) if digits is None else f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


# LLEP's scenes


def tried(where: str) -> Iterator[tuple[LlepScene, Tried]]:
    """Every scene, planned for exact balance."""
    planners = {
        s.model.n_logical: TransferPlanner(s.model.n_logical, s.n_ranks, tolerance=0.0) for s in LLEP_SCENES.values()
    }
    for scene in LLEP_SCENES.values():
        counts = scene.counts(where)
        given = torch.from_numpy(counts)
        plan = planners[scene.model.n_logical].plan(given)
        lla = plain_lla(given, scene.n_ranks, alpha=1.0)
        yield (
            scene,
            Tried(
                float(plan.imbalance),
                int(plan.n_transfers),
                least_transfers(counts, scene.n_ranks),
                plain_imbalance(counts),
                lla.imbalance,
                len(lla.transfers),
            ),
        )


def bench_scenes() -> list[Row]:
    """Imbalance and transfers at tolerance 0, and how near the slowest rank comes to the ceiling."""
    rows = []
    placed = {
        "first": "hot experts together on rank 0",
        "random": "hot experts anywhere",
        "published": "as LLEP's program fills them",
    }
    for where in WHERE:
        found = list(tried(where))
        results = [t for _, t in found]
        lla = max(t.lla_imbalance for t in results)
        what = f"LLEP's scenes, {placed[where]}"
        rows.append(
            Row(
                f"{what}: imbalance, worst of {len(found)}",
                max(t.imbalance for t in results),
                "×",
                1.001,
                "<=",
                f"plain EP {span([t.plain for t in results], 2)}; LLA at α = 1 {lla:.4f}",
            )
        )
        for hot in (16, 4, 1, 0):
            some = [t for s, t in found if s.hot == hot]
            provably = max(t.least for t in some)
            rows.append(
                Row(
                    f"{what}, {f'{hot} hot' if hot else 'balanced'}: transfers, most",
                    max(t.transfers for t in some),
                    "",
                    max(11, provably),
                    "<=",
                    f"{span([t.transfers for t in some])}, proven least {span([t.least for t in some])}; "
                    f"LLA at α = 1 {span([t.lla_transfers for t in some])}",
                )
            )
        hottest = [t for s, t in found if s.share >= 0.8]
        rows.append(
            Row(
                f"{what}, 80 and 95 %: slowest rank's tokens, plain EP over lplb, of the ceiling",
                100 * min(1 / t.imbalance for t in hottest),
                "%",
                98,
                ">=",
                f"{span([t.plain / t.imbalance for t in hottest], 2)} times fewer, "
                f"ceiling {span([t.plain for t in hottest], 2)}",
            )
        )
    return rows


# The other two bars


def bench_zipf() -> list[Row]:
    """Zipf 0.8 at tolerance 0.05."""
    planner = TransferPlanner(256, 8, tolerance=0.05)
    batches = [zipf_scene(256, 8, 8, 4096, seed=seed) for seed in ZIPF_SEEDS]
    plans = [planner.plan(torch.from_numpy(counts)) for counts in batches]
    transfers, imbalance = [int(p.n_transfers) for p in plans], [float(p.imbalance) for p in plans]
    beside = []
    for alpha in (1.0, 1.01):
        lla = [plain_lla(torch.from_numpy(counts), 8, alpha) for counts in batches]
        # A total that 8 does not divide: α = 1 then has room for less than there is, and the rest is forced somewhere.
        odd = [plain_lla(torch.from_numpy(without_one(counts)), 8, alpha) for counts in batches]
        beside.append(
            f"α = {alpha:g} {np.mean([len(a.transfers) for a in lla]):.1f} "
            f"({np.mean([len(a.transfers) for a in odd]):.1f} with one choice less)"
        )
    return [
        Row(
            f"Zipf 0.8, 256 experts, 8 ranks, tolerance 0.05: transfers, mean of {len(batches)}",
            float(np.mean(transfers)),
            "transfers",
            4.5,
            "<=",
            f"{span(transfers)}; LLA: {', '.join(beside)}; quoted: cap planner 4.2",
        ),
        Row(
            "the same: imbalance, worst",
            max(imbalance),
            "×",
            1.05,
            "<=",
            f"plain EP {np.mean([plain_imbalance(c) for c in batches]):.2f} on average",
        ),
    ]


def without_one(counts: np.ndarray) -> np.ndarray:
    """The same batch without one choice."""
    less = counts.copy()
    less[0, less[0].argmax()] -= 1
    return less


def bench_ultraep() -> list[Row]:
    """64 ranks with two guest slots each; UltraEP's copies are quoted, its loads are not published."""
    planner, rows = TransferPlanner(256, 64, tolerance=0.01, slots=2), []
    for family in FAMILIES:
        for imbalance, bar in ULTRAEP.items():
            batches = [
                skewed_scene(256, 64, 8, 4096, imbalance=imbalance, family=family, seed=seed) for seed in SKEWED_SEEDS
            ]
            plans = [planner.plan(torch.from_numpy(counts)) for counts in batches]
            copies = [int(p.n_transfers) for p in plans]
            lla = [plain_lla(torch.from_numpy(counts), 64, 1.01, m=1) for counts in batches]
            rows.append(
                Row(
                    f"64 ranks, 256 experts, 2 slots, from {imbalance:g}, {family}: copies, mean of {len(batches)}",
                    float(np.mean(copies)),
                    "copies",
                    bar,
                    "<=",
                    f"{span(copies)}; imbalance at most {max(float(p.imbalance) for p in plans):.4f}, "
                    f"{sum(bool(p.feasible) for p in plans)} feasible; LLA at α = 1.01, any number of slots: "
                    f"{np.mean([len(a.transfers) for a in lla]):.1f}; UltraEP (other loads) {bar}",
                )
            )
    return rows


# Time of planning


def medians(actions: dict[str, Callable[[], object]], runs: int = 300) -> dict[str, float]:
    """Median microseconds of calls that take turns."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(runs + runs // 10):
        for name, action in actions.items():
            begin = time.perf_counter_ns()
            action()
            if turn >= runs // 10:
                taken[name].append((time.perf_counter_ns() - begin) / 1e3)
    return {name: float(np.median(values)) for name, values in taken.items()}


def bench_time() -> list[Row]:
    """The whole call of plan on one thread, against the same question put to a plain Python LLA."""
    rows = []
    hot = LLEP_SCENES["gpt-oss-120b, 32 Ki, 80 % in 16"].counts()
    skewed = skewed_scene(256, 64, 8, 4096, imbalance=2.0)
    for counts, tolerance, slots in ((hot, 0.0, None), (skewed, 0.01, 2)):
        n_ranks, n_experts = counts.shape
        given = torch.from_numpy(counts)
        joint = TransferPlanner(n_experts, n_ranks, tolerance=tolerance, slots=slots)
        llep = TransferPlanner(n_experts, n_ranks, strategy="llep", alpha=1 + tolerance)
        took = medians(
            {
                "joint": lambda joint=joint, given=given: joint.plan(given),  # type: ignore[misc]
                "llep": lambda llep=llep, given=given: llep.plan(given),  # type: ignore[misc]
                "lists": lambda given=given, n=n_ranks, a=1 + tolerance: plain_lla(given, n, a),  # type: ignore[misc]
                "program": lambda given=given, n=n_ranks, a=1 + tolerance: plain_lla(  # type: ignore[misc]
                    given, n, a, number_by_number=True
                ),
            }
        )
        what = f"plan, {n_ranks} ranks, {n_experts} experts"
        for name in ("joint", "llep"):
            of_program, of_lists = (100 * took[name] / took[peer] for peer in ("program", "lists"))
            beside = f"{took[name]:.1f} of {took['program']:.0f} µs"
            rows += [
                Row(f"{what}, {name}", took[name], "µs", None, "", "one thread, whole call"),
                Row(
                    f"{what}, {name}: of a plain Python LLA that reads counts one by one, as LLEP's program does",
                    of_program,
                    "%",
                    None,
                    "",
                    beside,
                ),
                Row(
                    f"{what}, {name}: of a plain Python LLA that reads them at once",
                    of_lists,
                    "%",
                    10,
                    "<=",
                    f"{took[name]:.1f} of {took['lists']:.0f} µs",
                ),
            ]
    return rows


# What it is worth on an H200, modelled


def table_h200() -> list[Row]:
    """A layer's forward pass by lplb.cost; bfloat16, as LLEP's. Nothing overlaps but what the model says."""
    table = Table(title="Modelled: a layer's forward pass on eight H200, bfloat16, 32 Ki tokens per rank (ms)")
    for heading in ("scene", "plain EP", "lplb", "of it weights", "plain EP over lplb", "over LLA, α = 1"):
        table.add_column(heading, justify="left" if heading == "scene" else "right")
    rows = []
    for name, scene in LLEP_SCENES.items():
        if "32 Ki" not in name:
            continue
        model = replace(scene.model, weight_bytes=2.0, precision="bf16", dispatch_bytes=2.0)
        counts = scene.counts()
        plan = TransferPlanner(model.n_logical, scene.n_ranks, strategy="auto", model=model).plan(
            torch.from_numpy(counts)
        )
        lla = np.array(
            [t[:3] for t in plain_lla(torch.from_numpy(counts), scene.n_ranks, 1.0).transfers], dtype=np.int64
        )
        none = np.empty((0, 3), dtype=np.int64)
        weights = transfer_time(plan.transfers, scene.n_ranks, model, H200)
        plain = modelled(at_home(counts), none, model)
        ours = modelled(plan.quota.numpy(), plan.transfers.numpy(), model)
        theirs = modelled(by_lla(counts), lla.reshape(-1, 3), model)
        gains = plain / ours, plain / theirs
        table.add_row(
            f"{name} ({plan.strategy})",
            *(f"{1e3 * seconds:.2f}" for seconds in (plain, ours, weights)),
            *(f"{gain:.2f}" for gain in gains),
        )
        rows.append(Row(f"modelled, H200: {name}: plain EP over lplb", gains[0], "×", peer=f"over LLA {gains[1]:.2f}"))
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    return rows


def modelled(quota: np.ndarray, transfers: np.ndarray, model: ModelShape) -> float:
    """Seconds of a layer with these quotas ``[n_logical, ranks]`` and transfers."""
    n_ranks = quota.shape[1]
    travel = transfer_time(transfers, n_ranks, model, H200)
    return float(layer_time(quota.T.reshape(-1), n_ranks, model, H200, transfer_seconds=travel))


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/llep-<date>.json")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a bar is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    rows = [*bench_scenes(), *bench_zipf(), *bench_ultraep(), *bench_time(), *bench_gemm(), *bench_memory()]
    modelled = table_h200()
    print_table(rows, where, "Transfers for one batch, on the CPU")
    if arguments.write:
        print("written to", write(rows + modelled, where, "llep").relative_to(ROOT))
    return int(arguments.strict and any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
