"""Placements, loads and speeds for tests and benchmarks: seeded, valid by construction, NumPy only.

`design_instances()` is the fixed list behind the figures of design §3. The hypothesis strategies at the end
draw a shape and a seed, so that drawing is quick and shrinking still leads to few ranks and few experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

INT_ARRAY = NDArray[np.int64]
LoadKind = Callable[[np.random.Generator, int], INT_ARRAY]

TOKENS = 1024  # per expert, where a kind of load has a typical size
LARGEST_LOAD = 10**9


@dataclass(frozen=True, eq=False)
class Instance:
    """One problem: a placement, tokens per logical expert, and a speed per rank or None for all 1."""

    name: str
    phy2log: INT_ARRAY  # [n_physical]
    n_ranks: int
    group_size: int
    loads: INT_ARRAY  # [n_logical]
    rank_speed: NDArray[np.float64] | None  # [n_ranks]

    @property
    def n_redundant(self) -> int:
        return self.phy2log.size - self.loads.size


# Placements at random


def random_placement(
    rng: np.random.Generator, n_ranks: int, group_size: int, n_logical_per_group: int, slots_per_rank: int
) -> INT_ARRAY:
    """phy2log [n_ranks * slots_per_rank]: group-closed, no expert missing or twice on a rank.

    Replica counts are 1 to group_size, and which group an expert lives in is random too. Needs
    slots_per_rank <= n_logical_per_group <= group_size * slots_per_rank, else no such placement exists.
    """
    if n_ranks % group_size or not slots_per_rank <= n_logical_per_group <= group_size * slots_per_rank:
        raise ValueError(
            f"no placement of {n_logical_per_group} experts on groups of {group_size} (of {n_ranks}) ranks"
            f" with {slots_per_rank} slots each"
        )
    n_groups = n_ranks // group_size
    names = rng.permutation(n_groups * n_logical_per_group).reshape(n_groups, n_logical_per_group)
    return np.concatenate([_random_group(rng, names[g], group_size, slots_per_rank) for g in range(n_groups)])


def _random_group(rng: np.random.Generator, names: INT_ARRAY, n_ranks: int, slots: int) -> INT_ARRAY:
    counts = _random_replica_counts(rng, names.size, n_ranks, n_ranks * slots)
    # Dealt like cards, round after round: at most n_ranks copies in a row never meet on a rank.
    by_rank = np.repeat(names, counts).reshape(slots, n_ranks).T[rng.permutation(n_ranks)].copy()
    held = [set(row.tolist()) for row in by_rank]
    for a, b, i, j in rng.integers(0, [n_ranks, n_ranks, slots, slots], (2 * by_rank.size, 4)).tolist():
        mine, yours = int(by_rank[a, i]), int(by_rank[b, j])
        if mine in held[b] or yours in held[a]:
            continue
        by_rank[a, i], by_rank[b, j] = yours, mine
        held[a] ^= {mine, yours}
        held[b] ^= {mine, yours}
    return np.asarray(rng.permuted(by_rank, axis=1).ravel(), dtype=np.int64)


def _random_replica_counts(rng: np.random.Generator, n_experts: int, most: int, slots: int) -> INT_ARRAY:
    """Counts of 1 to `most` that add up to `slots`: evenly spread, or in bursts of up to `most`."""
    counts = np.ones(n_experts, dtype=np.int64)
    burst = int(rng.integers(1, most + 1))
    while (left := slots - int(counts.sum())) > 0:
        for expert in rng.permutation(np.flatnonzero(counts < most)):
            added = min(int(rng.integers(1, burst + 1)), left, most - int(counts[expert]))
            counts[expert] += added
            left -= added
            if not left:
                break
    return counts


def eplb_like_placement(rng: np.random.Generator, loads: ArrayLike, n_ranks: int, slots: int) -> INT_ARRAY:
    """phy2log [slots] after the manner of DeepSeek's EPLB, one group, never an expert twice on a rank.

    Spare slots go one at a time to the expert with the largest load per replica; then replicas go, heaviest
    first, each to the lightest rank with room. `slots` is a multiple of n_ranks, and
    slots / n_ranks <= n_logical <= slots.
    """
    load = np.asarray(loads, dtype=np.float64)
    per_rank = slots // n_ranks
    if slots % n_ranks or not per_rank <= load.size <= slots:
        raise ValueError(f"no placement of {load.size} experts in {slots} slots on {n_ranks} ranks")

    tie = rng.permutation(load.size)
    counts = np.ones(load.size, dtype=np.int64)
    for _ in range(slots - load.size):
        share = np.where(counts < n_ranks, load / counts, -1.0)
        ties = np.flatnonzero(share == share.max())
        counts[ties[np.argmin(counts[ties] * load.size + tie[ties])]] += 1

    order = np.lexsort((tie, -load / counts))
    held: list[list[int]] = [[] for _ in range(n_ranks)]
    weight = np.zeros(n_ranks)
    for expert in np.repeat(order, counts[order]).tolist():
        by_weight = np.argsort(weight, kind="stable").tolist()
        open_ranks = [r for r in by_weight if len(held[r]) < per_rank]
        target = next((r for r in open_ranks if expert not in held[r]), None)
        if target is None:
            # Only ranks that hold the expert have room: a full one passes something on to make room.
            target = next(r for r in by_weight if expert not in held[r])
            taker = open_ranks[0]
            passed = next(e for e in reversed(held[target]) if e not in held[taker])
            held[target].remove(passed)
            held[taker].append(passed)
            weight[[target, taker]] += np.array([-1, 1]) * load[passed] / counts[passed]
        held[target].append(expert)
        weight[target] += load[expert] / counts[expert]
    return np.array(held, dtype=np.int64).ravel()


# Placements by topology, as LPLB lays them out

# Column k: rank r holds a copy of an expert of rank r2o[r, k].


def ranks_per_node(n_ranks: int) -> int:
    """What a planner takes for a node unless it is told."""
    import torch  # here: test_sanitizer_gpu.py does without

    return torch.cuda.device_count() or min(8, n_ranks)


def cube() -> INT_ARRAY:
    """r2o [8, 2]: the edges of a cube and its four diagonals: two rings of four, and what joins them."""
    return np.array([[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]], dtype=np.int64).T


def hypercube16() -> INT_ARRAY:
    """r2o [16, 2]: the 32 edges of a four-dimensional cube: Gray-code rings over low and high bits."""
    following = np.array([1, 3, 0, 2])
    low, high = np.arange(16) % 4, np.arange(16) // 4
    return np.stack([4 * high + following[low], 4 * following[high] + low], axis=1).astype(np.int64)


def torus(m: int, n: int) -> INT_ARRAY:
    """r2o [m * n, 2]: rank (i, j) = i * n + j copies from ((i + 1) % m, j) and (i, (j + 1) % n)."""
    i, j = np.divmod(np.arange(m * n), n)
    return np.stack([(i + 1) % m * n + j, i * n + (j + 1) % n], axis=1).astype(np.int64)


def ring(n: int) -> INT_ARRAY:
    """r2o [n, 1]: rank r copies from rank r + 1."""
    return ((np.arange(n) + 1) % n)[:, None].astype(np.int64)


def lplb_placement(r2o: ArrayLike, n_own: int, n_groups: int = 1, combined: int = 1) -> INT_ARRAY:
    """phy2log of LPLB's layout: rank r owns experts r * n_own .. , then combined * K redundant slots.

    Redundant slot c * K + k of rank r copies own slot c * K + k of rank r2o[r, k], within its group.
    """
    origin = np.asarray(r2o, dtype=np.int64)
    size, n_columns = origin.shape
    if combined * n_columns > n_own:
        raise ValueError(f"{combined} times {n_columns} columns need more than {n_own} own experts")
    ranks = []
    for rank in range(n_groups * size):
        first = rank // size * size
        ranks.append(
            [rank * n_own + i for i in range(n_own)]
            + [
                int(first + origin[rank % size, k]) * n_own + c * n_columns + k
                for c in range(combined)
                for k in range(n_columns)
            ]
        )
    return np.array(ranks, dtype=np.int64).ravel()


# Loads


def lognormal(sigma: float) -> LoadKind:
    return lambda rng, n: _tokens(TOKENS * rng.lognormal(0.0, sigma, n))


def _tokens(loads: NDArray[np.float64]) -> INT_ARRAY:
    return np.minimum(np.rint(loads), LARGEST_LOAD).astype(np.int64)


def _zipf(rng: np.random.Generator, n: int) -> INT_ARRAY:
    return _tokens(rng.permutation(TOKENS * n / 2 / np.arange(1, n + 1) ** 1.2))


def _one_hot(rng: np.random.Generator, n: int) -> INT_ARRAY:
    loads = rng.integers(0, TOKENS // 8, n)
    loads[rng.integers(n)] = TOKENS * n
    return loads


def _mostly_zeros(rng: np.random.Generator, n: int) -> INT_ARRAY:
    return np.where(rng.random(n) < 0.15, rng.integers(1, 4 * TOKENS, n), 0)


def _single_token(rng: np.random.Generator, n: int) -> INT_ARRAY:
    loads = np.zeros(n, dtype=np.int64)
    loads[rng.integers(n)] = 1
    return loads


# Each draws int64 [n] from (rng, n).
LOADS: dict[str, LoadKind] = {
    "all_zeros": lambda rng, n: np.zeros(n, dtype=np.int64),
    "single_token": _single_token,
    "all_equal": lambda rng, n: np.full(n, rng.integers(1, 4 * TOKENS), dtype=np.int64),
    "uniform": lambda rng, n: rng.integers(0, 2 * TOKENS, n),
    "lognormal_0.3": lognormal(0.3),
    "lognormal_1": lognormal(1.0),
    "lognormal_2": lognormal(2.0),
    "lognormal_3": lognormal(3.0),
    "zipf": _zipf,
    "one_hot": _one_hot,
    "mostly_zeros": _mostly_zeros,
    "huge": lambda rng, n: rng.integers(0, LARGEST_LOAD + 1, n),
}


def random_speeds(rng: np.random.Generator, n_ranks: int) -> NDArray[np.float64]:
    """Speeds of 0.5 to 2, evenly spread by ratio."""
    return 2.0 ** rng.uniform(-1.0, 1.0, n_ranks)


# The instances of design §3

SHARE_WITH_SPEEDS = 1 / 3
# One repetition each: how far loads have moved since EPLB placed by them, as a log-normal sigma. A placement
# far off leaves one overfull rank and an easy optimum; a near one leaves large sets of ranks to balance.
DRIFTS = (0.0, 0.2, 0.4, 0.8, 1.6)

# name, r2o, own experts per rank, groups, combined
TOPOLOGIES: list[tuple[str, INT_ARRAY, int, int, int]] = [
    ("ring_4x2", ring(4), 4, 1, 2),
    ("ring_8", ring(8), 8, 1, 1),
    ("ring_16x4", ring(16), 8, 1, 4),
    ("ring_32", ring(32), 8, 1, 1),
    ("ring_64", ring(64), 4, 1, 1),
    ("ring_64x4", ring(64), 4, 1, 4),
    ("cube", cube(), 8, 1, 1),
    ("cube_x2", cube(), 4, 1, 2),
    ("cube_x4", cube(), 8, 1, 4),
    ("cube_4_groups", cube(), 8, 4, 1),
    ("hypercube", hypercube16(), 8, 1, 1),
    ("hypercube_x2", hypercube16(), 4, 1, 2),
    ("hypercube_2_groups", hypercube16(), 8, 2, 2),
    ("torus_2x2", torus(2, 2), 8, 1, 1),
    ("torus_2x4", torus(2, 4), 8, 1, 1),
    ("torus_4x4", torus(4, 4), 8, 1, 2),
    ("torus_4x8", torus(4, 8), 8, 1, 1),
    ("torus_8x8", torus(8, 8), 4, 1, 1),
    ("torus_8x8x2", torus(8, 8), 4, 1, 2),
]

# ranks, logical experts, slots
EPLB_SHAPES: list[tuple[int, int, int]] = [
    (4, 16, 24),
    (4, 60, 72),
    (8, 32, 64),
    (8, 64, 72),
    (8, 256, 288),
    (16, 64, 128),
    (16, 128, 144),
    (32, 32, 128),
    (32, 128, 256),
    (32, 256, 288),
    (64, 64, 256),
    (64, 256, 320),
    (64, 256, 512),
]


def design_instances() -> Iterator[Instance]:
    """1,920 instances, the same on every call: 4 to 64 ranks, 8 to 256 redundant slots, all kinds of load."""
    rng = np.random.default_rng(20250)
    for repetition, drift in enumerate(DRIFTS):
        for kind, draw in LOADS.items():
            for name, r2o, n_own, n_groups, combined in TOPOLOGIES:
                phy2log = lplb_placement(r2o, n_own, n_groups, combined)
                loads = draw(rng, n_groups * r2o.shape[0] * n_own)
                yield _instance(rng, f"{name}-{kind}-{repetition}", phy2log, n_groups, len(r2o), loads)
            for n_ranks, n_logical, slots in EPLB_SHAPES:
                name = f"eplb_{n_ranks}_{n_logical}_{slots}"
                loads = draw(rng, n_logical)
                past = loads * rng.lognormal(0.0, drift, n_logical)
                phy2log = eplb_like_placement(rng, past, n_ranks, slots)
                yield _instance(rng, f"{name}-{kind}-{repetition}", phy2log, 1, n_ranks, loads)


def _instance(
    rng: np.random.Generator, name: str, phy2log: INT_ARRAY, n_groups: int, group_size: int, loads: INT_ARRAY
) -> Instance:
    n_ranks = n_groups * group_size
    if rng.random() < SHARE_WITH_SPEEDS:
        return Instance(name + "-speeds", phy2log, n_ranks, group_size, loads, random_speeds(rng, n_ranks))
    return Instance(name, phy2log, n_ranks, group_size, loads, None)


# Hypothesis

SEEDS = st.integers(0, 2**32 - 1)
MOST_RANKS = 128


@dataclass(frozen=True)
class DrawnPlacement:
    """A drawn placement, shown by the arguments and the seed of `random_placement` that make it again."""

    n_ranks: int
    group_size: int
    n_logical_per_group: int
    slots_per_rank: int
    seed: int

    @property
    def n_logical(self) -> int:
        return self.n_ranks // self.group_size * self.n_logical_per_group

    @property
    def phy2log(self) -> INT_ARRAY:
        rng = np.random.default_rng(self.seed)
        return random_placement(rng, self.n_ranks, self.group_size, self.n_logical_per_group, self.slots_per_rank)


@st.composite
def placements(draw: st.DrawFn, max_ranks: int = MOST_RANKS, max_group_size: int = MOST_RANKS) -> DrawnPlacement:
    """1 to `max_ranks` ranks in one to several groups, up to 16 slots a rank, 1 to all replicas."""
    largest = min(max_ranks, max_group_size)
    group_size = draw(st.one_of(st.integers(1, min(8, largest)), st.integers(1, largest)))
    n_groups = draw(st.integers(1, min(4, max_ranks // group_size)))
    slots = draw(st.integers(1, 16 if group_size <= 16 else 4))
    n_logical = draw(st.integers(slots, group_size * slots))
    return DrawnPlacement(n_groups * group_size, group_size, n_logical, slots, draw(SEEDS))


@st.composite
def loads_for(draw: st.DrawFn, placement: DrawnPlacement) -> INT_ARRAY:
    """int64 [n_logical] of any kind in `LOADS`."""
    kind = draw(st.sampled_from(list(LOADS)))
    return LOADS[kind](np.random.default_rng(draw(SEEDS)), placement.n_logical)


@st.composite
def speeds(draw: st.DrawFn, n_ranks: int) -> NDArray[np.float64] | None:
    """None, or float64 [n_ranks] of 0.5 to 2: any values, or a few round ones so that ranks tie."""
    kind = draw(st.sampled_from(["none", "round", "any"]))
    if kind == "none":
        return None
    rng = np.random.default_rng(draw(SEEDS))
    return random_speeds(rng, n_ranks) if kind == "any" else rng.choice([0.5, 1.0, 1.5, 2.0], n_ranks)
