"""Placement's bars, on one thread, beside peers where they are installed: tables.

    python benchmarks/bench_placement.py [--write] [--strict]

Needs what bench_cpu.py needs. DeepSeek's EPLB and SGLang's vectorised one are taken from an installed SGLang (`pip
install --no-deps sglang`: two of its files are loaded, nothing else of it); without it their columns say so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_cpu import seconds  # noqa: E402
from rows import Row, machine, print_table, write  # noqa: E402

from lplb import Placement, place, plan_change, rebalance_experts  # noqa: E402
from lplb.change import Change  # noqa: E402
from lplb.placement import split_evenly  # noqa: E402
from lplb.policies import imbalance  # noqa: E402
from lplb.relabel import relabel  # noqa: E402
from lplb.scenes import lognormal  # noqa: E402
from lplb.simulate import simulate  # noqa: E402
from lplb.trace import load_trace  # noqa: E402

EQUALITY = tuple(
    (8, experts, slots, groups, nodes, gpus)
    for experts, slots, groups, nodes, gpus in (
        (64, 80, 1, 1, 8),
        (64, 128, 8, 4, 16),
        (128, 160, 4, 1, 32),
        (160, 192, 8, 2, 16),
        (256, 288, 8, 4, 32),
        (256, 320, 8, 8, 64),
        (256, 512, 3, 2, 64),
        (384, 416, 1, 1, 32),
    )
    for _ in range(16)
)
SHAPES = ((58, 256, 288, 8, 4, 32), (58, 256, 320, 8, 8, 64), (94, 128, 160, 1, 4, 32))  # layers, experts, slots, …
DRIFTED = ((256, 32, 32), (256, 32, 64), (256, 16, 16), (128, 8, 8))  # experts, ranks, redundant slots
SIGMAS = (0.3, 0.6)
BARS = {
    (256, 32, 32): (1.065, 1.335),
    (256, 32, 64): (1.006, 1.11),
    (256, 16, 16): (1.035, 1.2),
    (128, 8, 8): (1.02, 1.13),
}
SEEDS = range(1000, 1016)
TOKENS = 32768
N_HISTORY, N_HELD_OUT = 64, 64
CHANGE_SEEDS = range(3000, 3016)  # others than the search was tuned with
SHIFTS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # from noise alone to another domain


def lognormal_weight(seed: int, layers: int, experts: int) -> torch.Tensor:
    """Loads of real numbers: quotients of loads and copies are then distinct."""
    return torch.from_numpy(np.random.default_rng(seed).lognormal(0, 1, (layers, experts)))


# EPLB


def exact_weight(seed: int, layers: int, experts: int) -> torch.Tensor:
    """Whole loads whose quotients by 1 to 6 and all their sums are exact in float32.

    DeepSeek adds up the loads of a GPU in float32, SGLang's copy of the code in float64: here both get the same.
    """
    draws = np.random.default_rng(seed).lognormal(0, 0.6, (layers, experts))
    return torch.from_numpy(60 * np.clip(np.rint(3000 * draws), 1, 20000).astype(np.int64))


def distinct_quotients(weight: torch.Tensor, count: torch.Tensor) -> np.ndarray:
    """Layers in which no two experts ever have the same load per copy, bool [layers]."""
    copies = np.arange(1, 7)
    quotients = weight.numpy()[:, :, None] / copies
    none = -np.arange(1.0, 1 + quotients[0].size).reshape(quotients[0].shape)
    held = np.where(copies <= count.numpy()[:, :, None], quotients, none)
    ordered = np.sort(held.reshape(len(held), -1), axis=1)
    distinct: np.ndarray = (ordered[:, 1:] != ordered[:, :-1]).all(1) & (count.numpy().max(1) <= 6)
    return distinct


def peers() -> dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """DeepSeek's and SGLang's rebalance_experts, as far as SGLang's files are there."""
    try:
        distribution = importlib.metadata.distribution("sglang")
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for name, file in (("DeepSeek", "deepseek.py"), ("SGLang", "deepseek_vec.py")):
        path = Path(str(distribution.locate_file(f"sglang/srt/eplb/eplb_algorithms/{file}")))
        spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
        if spec is None or spec.loader is None or not path.exists():
            continue
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[name] = module.rebalance_experts
    return found


def call_peer(name: str, function: Callable[..., Any], weight: torch.Tensor, sizes: Sequence[int]) -> Any:
    """A peer's (phy2log, log2phy, logcnt)."""
    slots, groups, nodes, gpus = sizes
    hierarchical = groups % nodes == 0
    if name == "SGLang":
        return function(weight[None], slots, slots // gpus, groups, nodes, hierarchical)
    return function(weight, slots, groups, nodes, gpus, hierarchical)


def timed(calls: dict[str, tuple[int, Callable[[], Any]]]) -> dict[str, float]:
    """Median milliseconds of calls that take turns, each as often as it says."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(often for often, _ in calls.values())):
        for name, (often, call) in calls.items():
            if turn < often:
                times[name].append(seconds(call))
    return {name: 1e3 * float(np.median(values)) for name, values in times.items()}


def bench_eplb() -> list[Row]:
    """Equal to DeepSeek's, how fast, and how good without doubles."""
    rows, found = [], peers()
    if "DeepSeek" in found:
        equal = total = 0
        for seed, (layers, experts, *sizes) in enumerate(EQUALITY):
            weight = exact_weight(seed, layers, experts)
            ours, theirs = rebalance_experts(weight, *sizes), call_peer("DeepSeek", found["DeepSeek"], weight, sizes)
            for i in np.flatnonzero(distinct_quotients(weight, ours[2])):
                # An expert's copies have equal loads, which torch's default sort may put in any order.
                equal += all(torch.equal(ours[k][i], theirs[k][i]) for k in (0, 2))
                total += 1
        what = f"EPLB: layers with distinct quotients equal to DeepSeek's, of {total:,}"
        rows.append(Row(what, equal, "layers", total, ">=", "expert of each slot, copies of each expert"))
    for layers, experts, *sizes in SHAPES:
        weight = lognormal_weight(7, layers, experts)
        ms = timed(
            {
                "lplb": (15, partial(rebalance_experts, weight, *sizes)),
                "distinct": (15, partial(rebalance_experts, weight, *sizes, distinct=True)),
                **{name: (3, partial(call_peer, name, function, weight, sizes)) for name, function in found.items()},
            }
        )
        peer = (
            ", ".join(f"{name} {ms[name]:.0f} ms" for name in found) or "SGLang, which has DeepSeek's code, not there"
        )
        shape = f"{layers} layers, {experts} experts, {sizes[0]} slots, {sizes[3]} GPUs"
        rows.append(
            Row(f"EPLB, {shape}", ms["lplb"], "ms", 2, "<=", f"{peer}; without doubles {ms['distinct']:.2f} ms")
        )
    return rows + bench_distinct()


def spread(phy2log: torch.Tensor, weight: torch.Tensor, n_gpus: int) -> tuple[np.ndarray, np.ndarray]:
    """Each layer's max/mean of an even split's rank loads, and how many slots repeat an expert of their rank."""
    slots = phy2log.numpy().reshape(len(phy2log), n_gpus, -1)
    count = np.stack([np.bincount(row, minlength=weight.shape[1]) for row in phy2log.numpy()])
    share = np.take_along_axis(weight.numpy() / count, phy2log.numpy(), axis=1).reshape(slots.shape)
    load = share.sum(2)
    ordered = np.sort(slots, axis=2)
    return load.max(1) / load.mean(1), (ordered[:, :, 1:] == ordered[:, :, :-1]).sum((1, 2))


def bench_distinct() -> list[Row]:
    """EPLB without doubles beside EPLB, over several kinds of load."""
    rng, plain, distinct, doubles, doubled = np.random.default_rng(3), [], [], 0, 0
    for layers, experts, *sizes in SHAPES:
        loads = [rng.lognormal(0, sigma, (layers, experts)) for sigma in (0.3, 0.6, 1.0, 1.5, 2.0)]
        loads += [rng.permuted(np.tile(np.arange(1, experts + 1) ** -a, (layers, 1)), axis=1) for a in (0.5, 0.8, 1.2)]
        loads += [rng.dirichlet(np.full(experts, a), layers) for a in (0.3, 1.0)]
        for values in loads:
            weight = torch.from_numpy(values)
            of_plain, twice = spread(rebalance_experts(weight, *sizes)[0], weight, sizes[3])
            of_distinct, none = spread(rebalance_experts(weight, *sizes, distinct=True)[0], weight, sizes[3])
            plain.append(of_plain)
            distinct.append(of_distinct)
            doubled += int(twice.sum())
            doubles += int(none.sum())
    a, b = np.concatenate(plain), np.concatenate(distinct)
    no_worse = 100 * float(np.mean(b <= a * (1 + 1e-6)))
    name = "EPLB without doubles"
    plain_mean = float(a.mean())
    return [
        Row(f"{name}: slots that repeat an expert of their rank", doubles, "slots", 0, "<=", f"EPLB {doubled}"),
        Row(f"{name}: max / mean, mean over layers", float(b.mean()), "×", plain_mean, "<=", "the bar is EPLB's"),
        Row(f"{name}: layers no worse, of {len(a):,}", no_worse, "%", 99, ">="),
    ]


# Placements for the LP


def drawn(seed: int, experts: int, sigma: float) -> np.ndarray:
    """The bars' loads: N_HISTORY batches of history, then N_HELD_OUT, int64 [batches, experts]."""
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0, 0.85, experts)
    batches = []
    for _ in range(N_HISTORY + N_HELD_OUT):
        share = base * rng.lognormal(0, sigma, experts)
        batches.append(rng.multinomial(TOKENS, share / share.sum()))
    return np.array(batches)


def single(placed: Placement | list[Placement]) -> Placement:
    """The placement of one layer."""
    assert isinstance(placed, Placement)
    return placed


def bench_lp_policy() -> list[Row]:
    """The LP on the lp policy's placements, held-out batches, with the paired gain over EPLB."""
    rows = []
    for experts, ranks, redundant in DRIFTED:
        for sigma, bar in zip(SIGMAS, BARS[experts, ranks, redundant], strict=True):
            reached = {policy: [] for policy in ("lp", "eplb", "lp, all batches")}  # type: dict[str, list[float]]
            for seed in SEEDS:
                loads = drawn(seed, experts, sigma)
                history, held_out = loads[:N_HISTORY], loads[N_HISTORY:]
                for name, values in reached.items():
                    given = history if name == "lp, all batches" else history.mean(0)
                    policy = name.partition(",")[0]
                    placed = single(place(given, n_ranks=ranks, n_physical=experts + redundant, policy=policy))
                    values.append(float(imbalance(placed, held_out).mean()))
            mean = {name: float(np.mean(values)) for name, values in reached.items()}
            gain = np.array(reached["eplb"]) - np.array(reached["lp"])
            error = gain.std(ddof=1) / np.sqrt(len(gain))
            rows.append(
                Row(
                    f"LP on policy lp, {experts} experts, {ranks} ranks, {redundant} redundant, σ {sigma}: imbalance",
                    mean["lp"],
                    "×",
                    bar,
                    "<=",
                    f"on EPLB {mean['eplb']:.3f}, gain {gain.mean():.3f} ± {error:.3f}; "
                    f"placed from all batches {mean['lp, all batches']:.3f}",
                )
            )
    return rows


def bench_trace() -> list[Row]:
    """The recorded trace, domain by domain: placed from the first tenth of a domain's batches."""
    trace = load_trace()
    n_batches, n_layers, _, _ = trace.indices.shape
    counts = np.zeros((n_batches, n_layers, trace.n_experts), dtype=np.int64)
    for b in range(n_batches):
        for layer in range(n_layers):
            counts[b, layer] = np.bincount(trace.indices[b, layer].ravel(), minlength=trace.n_experts)
    rows, domains = [], np.array(trace.domain)
    for ranks in (8, 32):
        for domain in dict.fromkeys(trace.domain):
            loads = counts[domains == domain]
            first = max(1, len(loads) // 10)
            found = {name: [] for name in ("even", "LP on EPLB", "LP on lp", "bound")}  # type: dict[str, list[float]]
            for layer in range(n_layers):
                history, rest = loads[:first, layer], loads[first:, layer]
                eplb, lp = (
                    single(place(history, n_ranks=ranks, n_physical=trace.n_experts + 2 * ranks, policy=policy))
                    for policy in ("eplb", "lp")
                )
                even = np.array([split_evenly(eplb, batch).reshape(ranks, -1).sum(1).max() for batch in rest])
                mean = rest.sum(1) / ranks
                found["even"] += list(even / mean)
                found["LP on EPLB"] += list(imbalance(eplb, rest))
                found["LP on lp"] += list(imbalance(lp, rest))
                found["bound"] += list(np.maximum(1, rest.max(1) / ranks / mean))
            mean_of = {name: float(np.mean(values)) for name, values in found.items()}
            rows.append(
                Row(
                    f"trace, {domain}, {ranks} ranks, {len(loads) - first} batches: LP on policy lp",
                    mean_of["LP on lp"],
                    "×",
                    min(mean_of["even"], mean_of["LP on EPLB"]),
                    "<=",
                    f"even split on EPLB {mean_of['even']:.3f}, LP on EPLB {mean_of['LP on EPLB']:.3f}, "
                    f"no placement below {mean_of['bound']:.3f}",
                )
            )
    return rows


def bench_place_time() -> list[Row]:
    """60 layers at once."""
    rng = np.random.default_rng(11)
    base = rng.lognormal(0, 0.85, (60, 1, 256))
    history = rng.poisson(TOKENS / 256 * base * rng.lognormal(0, 0.3, (60, 64, 256)) / base.mean(2, keepdims=True))
    times = [seconds(lambda: place(history, n_ranks=64, n_physical=320)) for _ in range(3)]
    eplb = [seconds(lambda: place(history, n_ranks=64, n_physical=320, policy="eplb-distinct")) for _ in range(3)]
    return [
        Row(
            "place, policy lp, 60 layers, 256 experts, 320 slots, 64 ranks",
            float(np.median(times)),
            "s",
            1,
            "<=",
            f"eplb-distinct {1e3 * float(np.median(eplb)):.0f} ms",
        )
    ]


# Changing a placement


def mixed(seed: int, shift: float, sigma: float) -> list[np.ndarray]:
    """History before, history after and held-out batches, where the logarithm of loads goes ``shift`` of the way.

    Each batch is that times log-normal factors of its own, multinomial.
    """
    rng = np.random.default_rng(seed)
    old, new = rng.lognormal(0, 0.85, (2, 256))
    later = np.exp((1 - shift) * np.log(old) + shift * np.log(new))
    drawn = []
    for base in (old, later, later):
        share = base * rng.lognormal(0, sigma, (64, 256))
        drawn.append(np.stack([rng.multinomial(TOKENS, row / row.sum()) for row in share]))
    return drawn


def new_to_ranks(before: Placement, after: Placement) -> int:
    """How many slots of all hold an expert that their rank did not have."""
    return sum(
        len(set(new) - set(old))
        for old, new in zip(before.phy2log.view(32, -1).tolist(), after.phy2log.view(32, -1).tolist(), strict=True)
    )


def bench_change() -> list[Row]:
    """Few moves for most of a full re-solve's gain, over shifts of the load; 256 experts, 288 slots, 32 ranks."""
    rows = []
    for sigma in (0.0, 0.3):
        for shift in SHIFTS:
            found = []
            for seed in CHANGE_SEEDS:
                before, after, held_out = mixed(seed, shift, sigma)
                current = single(place(before, n_ranks=32, n_physical=288))
                change = plan_change(current, after)
                assert isinstance(change, Change)
                resolved = single(place(after, n_ranks=32, n_physical=288))
                reached = [imbalance(p, held_out).mean() for p in (current, change.placement, resolved)]
                found.append([*reached, change.n_moves, new_to_ranks(current, relabel(current, resolved))])
            rows += change_rows(np.array(found), shift, sigma)
    return rows


def change_rows(found: np.ndarray, shift: float, sigma: float) -> list[Row]:
    """One point of the curve; the bars are those of the ends without drift."""
    before, after, resolve, moves, all_moves = found.mean(axis=0)
    name = f"plan_change, shift {shift:g}" + (f", batches drift by σ {sigma:g}" if sigma else "")
    if not shift:
        most = float(found[:, 3].max())
        return [Row(f"{name}: most moves", most, "moves", 0, "<=", f"noise alone, {len(found)} seeds")]
    barred = shift == 1 and not sigma
    beside = f"imbalance {before:.3f} → {after:.3f}, re-solve {resolve:.3f} with {all_moves:.0f} moves (relabelled)"
    count = f"{moves:.1f} moves, at most {found[:, 3].max():.0f}; {100 * moves / 288:.1f} % of all slots"
    gain, share = 100 * (before - after) / max(before - resolve, 1e-9), 100 * moves / all_moves
    return [
        Row(f"{name}: share of a re-solve's gain", gain, "%", 90 if barred else None, ">=", beside),
        Row(f"{name}: share of its moves", share, "%", 25 if barred else None, "<=", count),
    ]


# Simulation


def bench_simulate() -> list[Row]:
    """1000 batches, 4 layers, 64 ranks, placed anew every 16 batches."""
    loads = lognormal(1000, 4, 256)
    took = {policy: seconds(partial(simulate, loads, n_ranks=64, policy=policy)) for policy in ("lp", "eplb")}
    beside = f"of which placing is most; with policy eplb {took['eplb']:.1f} s"
    return [Row("simulate, 1000 batches × 4 layers × 64 ranks, policy lp", took["lp"], "s", 10, "<=", beside)]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/placement-<date>.json")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a bar is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    rows = [
        *bench_eplb(),
        *bench_lp_policy(),
        *bench_trace(),
        *bench_place_time(),
        *bench_change(),
        *bench_simulate(),
    ]
    print_table(rows, where, "Placement on the CPU")
    if arguments.write:
        print("written to", write(rows, where, "placement").relative_to(ROOT))
    return int(arguments.strict and any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
