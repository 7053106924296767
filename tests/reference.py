"""Independent references for tests and benchmarks: NumPy, HiGHS and plain Python integers, nothing of lplb.

The same optimum is reached by three roads that share no code beyond reading the placement:

- `ReferenceLP`       the linear program of design §2, solved by HiGHS (floating point, about 1e-9 relative); only
                      this one needs highspy, and a test that uses it asks for the fixture `highs`
- `exact_optimum`     a chain of minimum cuts in Python integers, any group size (exact `Fraction`)
- `subset_optimum`    every set of ranks, tried one by one, at most 12 ranks a group (exact `Fraction`)

`exact_bottleneck` is the best there is in whole tokens. `count_reference`, `nested_proportion` and
`assign_reference` are the two token loops, one token at a time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    import highspy
except ModuleNotFoundError as error:  # everything but GroupLP and ReferenceLP works without
    if error.name != "highspy":
        raise

INT_ARRAY = NDArray[np.int64]
LARGEST_BRUTE_FORCE = 12
T = TypeVar("T")


# Placements, as the references read them


@dataclass(frozen=True)
class RankGroup:
    """One group of consecutive ranks, counted from its first, and the experts that live there."""

    n_ranks: int
    experts: tuple[int, ...]  # logical ids, ascending
    homes: tuple[tuple[int, ...], ...]  # per expert: the ranks of its replicas, ascending
    speed: tuple[float, ...]  # per rank


def rank_groups(
    phy2log: ArrayLike, n_ranks: int, group_size: int | None = None, rank_speed: ArrayLike | None = None
) -> list[RankGroup]:
    """The groups of a placement. Raises `ValueError` unless group-closed and without doubles on a rank."""
    slots = np.asarray(phy2log, dtype=np.int64).ravel()
    size = n_ranks if group_size is None else group_size
    speed = np.ones(n_ranks) if rank_speed is None else np.asarray(rank_speed, dtype=np.float64)
    if n_ranks % size or slots.size % n_ranks:
        raise ValueError(f"{slots.size} slots, {n_ranks} ranks and groups of {size} do not divide evenly")
    if speed.shape != (n_ranks,) or not np.all(speed > 0):
        raise ValueError(f"rank_speed must be {n_ranks} positive numbers, got {speed}")

    homes: dict[int, list[int]] = {}
    for slot, expert in enumerate(slots.tolist()):
        homes.setdefault(expert, []).append(slot * n_ranks // slots.size)
    members: list[list[int]] = [[] for _ in range(n_ranks // size)]
    for expert in sorted(homes):
        ranks = homes[expert]
        if len(set(ranks)) != len(ranks):
            raise ValueError(f"expert {expert} is twice on one rank: {ranks}")
        if ranks[0] // size != ranks[-1] // size:
            raise ValueError(f"expert {expert} has replicas in two groups: ranks {ranks}, group size {size}")
        members[ranks[0] // size].append(expert)
    return [
        RankGroup(
            n_ranks=size,
            experts=tuple(experts),
            homes=tuple(tuple(rank - g * size for rank in homes[expert]) for expert in experts),
            speed=tuple(speed[g * size : (g + 1) * size].tolist()),
        )
        for g, experts in enumerate(members)
    ]


# The linear program, by HiGHS


class GroupLP:
    """The LP of one group as a HiGHS model: built once, then only its row bounds follow the workload.

    Rows are the ranks, then the replicated experts; columns are t, then the replicas of each expert in turn.
    Loads are divided by the group's mean load per unit of speed, so HiGHS' absolute tolerances are relative.

    A benchmark times `set_bounds(*bounds(workload)[:2])`, `model.clearSolver()`, `model.run()`.
    """

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        homes = list(zip(group.experts, group.homes, strict=True))
        self.single = [(expert, ranks[0]) for expert, ranks in homes if len(ranks) == 1]
        self.replicated = [(expert, ranks) for expert, ranks in homes if len(ranks) > 1]
        self._single_expert = np.array([e for e, _ in self.single], dtype=np.int64)
        self._single_rank = np.array([rank for _, rank in self.single], dtype=np.int64)
        self._replicated_expert = np.array([e for e, _ in self.replicated], dtype=np.int64)
        self._rows = np.arange(group.n_ranks + len(self.replicated), dtype=np.int32)
        self.model: Any = self._build()  # highspy.Highs, whose stubs leave out most methods

    def _build(self) -> Any:
        n_ranks = self.group.n_ranks
        replicas = [(rank, n_ranks + i) for i, (_, ranks) in enumerate(self.replicated) for rank in ranks]

        lp = highspy.HighsLp()
        lp.num_col_ = 1 + len(replicas)
        lp.num_row_ = len(self._rows)
        lp.col_cost_ = np.concatenate([[1.0], np.zeros(len(replicas))])
        lp.col_lower_ = np.zeros(lp.num_col_)
        lp.col_upper_ = np.full(lp.num_col_, highspy.kHighsInf)
        lp.row_lower_, lp.row_upper_ = self._empty_bounds()
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        starts = n_ranks + 2 * np.arange(len(replicas) + 1)
        lp.a_matrix_.start_ = np.concatenate([[0], starts]).astype(np.int32)
        lp.a_matrix_.index_ = np.concatenate([np.arange(n_ranks), np.ravel(replicas)]).astype(np.int32)
        lp.a_matrix_.value_ = np.concatenate([-np.array(self.group.speed), np.ones(2 * len(replicas))])

        model: Any = highspy.Highs()  # type: ignore[no-untyped-call]
        model.setOptionValue("output_flag", False)
        model.setOptionValue("threads", 1)
        model.setOptionValue("primal_feasibility_tolerance", 1e-10)
        model.setOptionValue("dual_feasibility_tolerance", 1e-10)
        if model.passModel(lp) == highspy.HighsStatus.kError:
            raise RuntimeError(f"HiGHS refused the model of {self.group}")
        return model

    def _empty_bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        lower = np.zeros(len(self._rows))
        lower[: self.group.n_ranks] = -highspy.kHighsInf
        return lower, np.zeros(len(self._rows))

    def bounds(self, workload: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """Row bounds for a workload [n_logical], and the scale (tokens) that they were divided by."""
        loads = np.asarray(workload, dtype=np.float64)
        scale = float(loads[list(self.group.experts)].sum() / sum(self.group.speed)) or 1.0
        lower, upper = self._empty_bounds()
        np.subtract.at(upper, self._single_rank, loads[self._single_expert] / scale)
        lower[self.group.n_ranks :] = upper[self.group.n_ranks :] = loads[self._replicated_expert] / scale
        return lower, upper, scale

    def set_bounds(self, lower: NDArray[np.float64], upper: NDArray[np.float64]) -> None:
        self.model.changeRowsBounds(len(self._rows), self._rows, lower, upper)

    def solve(self, workload: ArrayLike) -> float:
        """t*, in tokens per unit of speed, from a cold start. Raises `RuntimeError` if HiGHS finds none."""
        lower, upper, scale = self.bounds(workload)
        self.set_bounds(lower, upper)
        for presolve in ("choose", "off"):
            self.model.setOptionValue("presolve", presolve)
            self.model.clearSolver()
            self.model.run()
            if self.model.getModelStatus() == highspy.HighsModelStatus.kOptimal:
                self.model.setOptionValue("presolve", "choose")
                return float(self.model.getObjectiveValue()) * scale
        raise RuntimeError(f"HiGHS ended with {self.model.getModelStatus()} on {workload!r}")


class ReferenceLP:
    """The LP of every group of a placement; `groups` holds the models."""

    def __init__(
        self,
        phy2log: ArrayLike,
        n_ranks: int,
        group_size: int | None = None,
        rank_speed: ArrayLike | None = None,
    ) -> None:
        self.groups = [GroupLP(group) for group in rank_groups(phy2log, n_ranks, group_size, rank_speed)]

    def solve(self, workload: ArrayLike) -> NDArray[np.float64]:
        """t* [n_groups] for a workload [n_logical]."""
        return np.array([group.solve(workload) for group in self.groups])


def integer_optimum(t_star: float, group_size: int, relative_noise: float = 1e-9) -> int:
    """⌈t*⌉ from a floating-point t*, for speeds 1 and whole tokens.

    The true t* is load(A) / |A|, a fraction with a denominator of at most `group_size`: a whole number, or at
    least 1/group_size away from one. That decides as long as the noise stays below half of that. Beyond, from
    about 5e8 / group_size at the default noise, no float can tell, and this raises: use `exact_bottleneck`.
    """
    noise = abs(t_star) * relative_noise
    if noise >= 0.5 / group_size:
        raise ValueError(f"t* = {t_star} is too large for noise {relative_noise}; use exact_bottleneck")
    snapped = Fraction(t_star).limit_denominator(group_size)
    if abs(snapped - Fraction(t_star)) > max(noise, 1e-12):
        raise ValueError(f"t* = {t_star} is no fraction with a denominator of at most {group_size}")
    return math.ceil(snapped)


# The same optimum in Python integers, by cuts


class MaxFlow:
    """Dinic's maximum flow in Python integers: tokens from a source through experts to ranks and a sink."""

    def __init__(self, n_nodes: int) -> None:
        self.edges_of: list[list[int]] = [[] for _ in range(n_nodes)]
        self.head: list[int] = []
        self.room: list[int] = []  # edge i and its reverse i ^ 1

    def add_edge(self, tail: int, head: int, capacity: int) -> int:
        edge = len(self.head)
        self.head += [head, tail]
        self.room += [capacity, 0]
        self.edges_of[tail].append(edge)
        self.edges_of[head].append(edge + 1)
        return edge

    def levels(self, source: int) -> list[int]:
        """Distance from the source in the residual graph, -1 where it cannot be reached."""
        level = [-1] * len(self.edges_of)
        level[source] = 0
        queue = deque([source])
        while queue:
            node = queue.popleft()
            for edge in self.edges_of[node]:
                if self.room[edge] and level[self.head[edge]] < 0:
                    level[self.head[edge]] = level[node] + 1
                    queue.append(self.head[edge])
        return level

    def run(self, source: int, sink: int) -> int:
        total = 0
        while (level := self.levels(source))[sink] >= 0:
            following = [0] * len(self.edges_of)
            path: list[int] = []
            node = source
            while True:
                if node == sink:
                    amount = min(self.room[edge] for edge in path)
                    total += amount
                    for edge in path:
                        self.room[edge] -= amount
                        self.room[edge ^ 1] += amount
                    first_full = next(i for i, edge in enumerate(path) if not self.room[edge])
                    node = self.head[path[first_full] ^ 1]
                    del path[first_full:]
                    continue
                edges = self.edges_of[node]
                while following[node] < len(edges):
                    edge = edges[following[node]]
                    if self.room[edge] and level[self.head[edge]] == level[node] + 1:
                        break
                    following[node] += 1
                if following[node] < len(edges):
                    path.append(edge)
                    node = self.head[edge]
                elif path:
                    node = self.head[path.pop() ^ 1]
                    following[node] += 1
                else:
                    break
        return total


def _load_by_homes(group: RankGroup, workload: Sequence[int]) -> dict[tuple[int, ...], int]:
    """Tokens per distinct set of ranks: experts with the same homes are one commodity."""
    loads: dict[tuple[int, ...], int] = {}
    for expert, ranks in zip(group.experts, group.homes, strict=True):
        if workload[expert]:
            loads[ranks] = loads.get(ranks, 0) + workload[expert]
    return loads


def overloaded_ranks(loads: dict[tuple[int, ...], int], capacities: Sequence[int]) -> set[int]:
    """Ranks that cannot carry what only they can take, by a minimum cut; empty if an integer flow exists."""
    n_ranks = len(capacities)
    source, sink = n_ranks + len(loads), n_ranks + len(loads) + 1
    flow = MaxFlow(sink + 1)
    for rank, capacity in enumerate(capacities):
        flow.add_edge(rank, sink, capacity)
    for node, (ranks, load) in enumerate(loads.items(), start=n_ranks):
        flow.add_edge(source, node, load)
        for rank in ranks:
            flow.add_edge(node, rank, load)
    if flow.run(source, sink) == sum(loads.values()):
        return set()
    # NOTE: an expert's edge to a rank is full only if its source edge is, so the cut is of ranks alone.
    level = flow.levels(source)
    return {rank for rank in range(n_ranks) if level[rank] >= 0}


def _load_within(loads: dict[tuple[int, ...], int], ranks: set[int]) -> int:
    return sum(load for homes, load in loads.items() if ranks.issuperset(homes))


def _group_optimum(group: RankGroup, workload: Sequence[int]) -> Fraction:
    """max over rank sets A of load(A) / v(A): each set that cannot carry its load gives the next t."""
    loads = _load_by_homes(group, workload)
    speed = [Fraction(v) for v in group.speed]
    ranks = set(range(group.n_ranks))
    optimum = Fraction(-1)
    while ranks:
        following = _load_within(loads, ranks) / sum((speed[r] for r in ranks), Fraction(0))
        assert following > optimum, "a violated cut must raise t"
        optimum = following
        capacities = [optimum * v for v in speed]
        unit = math.lcm(*(c.denominator for c in capacities))
        scaled = {homes: load * unit for homes, load in loads.items()}
        ranks = overloaded_ranks(scaled, [int(c * unit) for c in capacities])
    return optimum


def _group_subset_optimum(group: RankGroup, workload: Sequence[int]) -> Fraction:
    if group.n_ranks > LARGEST_BRUTE_FORCE:
        raise ValueError(f"all sets of {group.n_ranks} ranks are too many; at most {LARGEST_BRUTE_FORCE}")
    n_sets = 1 << group.n_ranks
    load_within = [0] * n_sets
    for expert, ranks in zip(group.experts, group.homes, strict=True):
        load_within[sum(1 << rank for rank in ranks)] += workload[expert]
    for rank in range(group.n_ranks):
        for ranks_in in range(n_sets):
            if ranks_in >> rank & 1:
                load_within[ranks_in] += load_within[ranks_in ^ (1 << rank)]
    speed_within = [Fraction(0)] * n_sets
    for ranks_in in range(1, n_sets):
        lowest = (ranks_in & -ranks_in).bit_length() - 1
        speed_within[ranks_in] = speed_within[ranks_in & (ranks_in - 1)] + Fraction(group.speed[lowest])
    return max(Fraction(load_within[a]) / speed_within[a] for a in range(1, n_sets))


@dataclass(frozen=True)
class Bottleneck:
    """The best that whole tokens can do in one group.

    `load` is the smallest T, in tokens per unit of speed, such that room for ⌊T·v_r⌋ tokens on every rank is
    enough: a whole number for speeds 1. `capacities` is that room.
    """

    load: Fraction
    capacities: tuple[int, ...]

    @property
    def max_load(self) -> float:
        """T as float64, rounded once: the bits of load_r / v_r in float64 on the rank that sets it."""
        return float(self.load)


def _group_bottleneck(group: RankGroup, workload: Sequence[int]) -> Bottleneck:
    loads = _load_by_homes(group, workload)
    speed = [Fraction(v) for v in group.speed]
    lowest = _group_optimum(group, workload)
    highest = lowest + 1 / min(speed)  # ⌊(t* + 1/v_min) v_r⌋ > t* v_r: enough for every rank
    candidates = sorted({k / v for v in speed for k in range(math.ceil(lowest * v), math.floor(highest * v) + 1)})

    def room(load: Fraction) -> list[int]:
        return [math.floor(load * v) for v in speed]

    first, last = 0, len(candidates) - 1
    while first < last:
        middle = (first + last) // 2
        if overloaded_ranks(loads, room(candidates[middle])):
            first = middle + 1
        else:
            last = middle
    assert not overloaded_ranks(loads, room(candidates[first]))
    return Bottleneck(candidates[first], tuple(room(candidates[first])))


def _each_group(
    solve: Callable[[RankGroup, Sequence[int]], T],
    phy2log: ArrayLike,
    n_ranks: int,
    group_size: int | None,
    workload: ArrayLike,
    rank_speed: ArrayLike | None,
) -> list[T]:
    tokens = [int(w) for w in np.asarray(workload).tolist()]
    return [solve(group, tokens) for group in rank_groups(phy2log, n_ranks, group_size, rank_speed)]


def exact_optimum(
    phy2log: ArrayLike,
    n_ranks: int,
    group_size: int | None,
    workload: ArrayLike,
    rank_speed: ArrayLike | None = None,
) -> list[Fraction]:
    """t* per group, exact, for any group size. Speeds are taken as the float64 values they are."""
    return _each_group(_group_optimum, phy2log, n_ranks, group_size, workload, rank_speed)


def subset_optimum(
    phy2log: ArrayLike,
    n_ranks: int,
    group_size: int | None,
    workload: ArrayLike,
    rank_speed: ArrayLike | None = None,
) -> list[Fraction]:
    """t* per group, exact, by trying every set of ranks; groups of at most 12."""
    return _each_group(_group_subset_optimum, phy2log, n_ranks, group_size, workload, rank_speed)


def exact_bottleneck(
    phy2log: ArrayLike,
    n_ranks: int,
    group_size: int | None,
    workload: ArrayLike,
    rank_speed: ArrayLike | None = None,
) -> list[Bottleneck]:
    """The best whole-token load per group, exact, for any group size and speeds."""
    return _each_group(_group_bottleneck, phy2log, n_ranks, group_size, workload, rank_speed)


def rank_loads(quota: ArrayLike, n_ranks: int) -> INT_ARRAY:
    """Tokens per rank of quotas [n_physical]."""
    loads: INT_ARRAY = np.asarray(quota, dtype=np.int64).reshape(n_ranks, -1).sum(axis=1)
    return loads


# The token loops


def count_reference(idx: Any, n_logical: int, n_sms: int) -> tuple[INT_ARRAY, INT_ARRAY]:
    """Workload [n_logical] and its inclusive prefix [n_sms, n_logical] over chunks of the flat indices.

    Chunk i is the flat range [i·m, (i+1)·m), clipped, with m = 256·⌈⌈n / n_sms⌉ / 256⌉. -1 counts nowhere.
    """
    flat = [int(e) for e in np.asarray(idx).ravel().tolist()]
    chunk = 256 * math.ceil(math.ceil(len(flat) / n_sms) / 256)
    prefix = np.zeros((n_sms, n_logical), dtype=np.int64)
    counts = [0] * n_logical
    for i in range(n_sms):
        for expert in flat[i * chunk : (i + 1) * chunk]:
            if not -1 <= expert < n_logical:
                raise ValueError(f"expert {expert} is outside [-1, {n_logical})")
            if expert >= 0:
                counts[expert] += 1
        prefix[i] = counts
    return np.array(counts, dtype=np.int64), prefix


def nested_proportion(k: int, n: int, quotas: Sequence[int]) -> int:
    """The replica, an index into `quotas`, of token k of n; the quotas add up to n (design §4)."""
    if not 0 <= k < n or sum(quotas) != n:
        raise ValueError(f"token {k} of {n} with quotas {list(quotas)}")
    for replica, quota in enumerate(quotas):
        before, upto = k * quota // n, (k + 1) * quota // n
        if upto > before:
            return replica
        k, n = k - before, n - quota
    raise AssertionError("quotas that add up to n always place the token")


def split_reference(counts: ArrayLike, phy2log: ArrayLike, quota: ArrayLike, ranks_per_node: int) -> INT_ARRAY:
    """Tokens of every source on every slot, [ranks, n_physical]: own rank first, then own node, then the rest.

    Token by token: what is left of a node's tokens, in the order of their ranks, meets what is left of its slots'
    quotas, in the order of the slots; then the same over all ranks.
    """
    table, experts, left = (np.asarray(x).astype(np.int64) for x in (counts, phy2log, quota))
    n_ranks = len(table)
    rank_of = np.arange(experts.size) // (experts.size // n_ranks)
    out: INT_ARRAY = np.zeros((n_ranks, experts.size), dtype=np.int64)
    for expert in range(table.shape[1]):
        slots = np.flatnonzero(experts == expert)
        for slot in slots:
            out[rank_of[slot], slot] = min(table[rank_of[slot], expert], left[slot])
        table[:, expert] -= out[:, slots].sum(axis=1)
        left[slots] -= out[:, slots].sum(axis=0)
        nodes = [range(first, min(first + ranks_per_node, n_ranks)) for first in range(0, n_ranks, ranks_per_node)]
        for ranks in [*nodes, range(n_ranks)]:
            tokens = [rank for rank in ranks for _ in range(table[rank, expert])]
            room = [slot for slot in slots if rank_of[slot] in ranks for _ in range(left[slot])]
            for rank, slot in zip(tokens, room, strict=False):
                out[rank, slot] += 1
                table[rank, expert] -= 1
                left[slot] -= 1
    if table.any() or left.any():
        raise ValueError("quotas and counts do not add up to the same totals")
    return out


def assign_reference(
    indices_per_rank: Sequence[Any], phy2log: ArrayLike, quota: ArrayLike, ranks_per_node: int | None = None
) -> list[INT_ARRAY]:
    """Physical indices of every source rank's logical ones, shapes kept; -1 stays -1.

    By the plain split tokens of an expert are numbered over the source ranks in order, then by row-major position. With
    `ranks_per_node` sources use copies of their own rank and node first, and number their own tokens.
    """
    if ranks_per_node is not None:
        n_logical = int(np.asarray(phy2log).max()) + 1
        counts = [np.bincount(np.asarray(i).ravel() + 1, minlength=n_logical + 1)[1:] for i in indices_per_rank]
        rows = split_reference(np.stack(counts), phy2log, quota, ranks_per_node)
        return [assign_reference([i], phy2log, row)[0] for i, row in zip(indices_per_rank, rows, strict=True)]
    slots_of: dict[int, list[int]] = {}
    for slot, expert in enumerate(np.asarray(phy2log).ravel().tolist()):
        slots_of.setdefault(expert, []).append(slot)
    tokens_of_slot = np.asarray(quota).ravel().tolist()
    quotas_of = {e: [int(tokens_of_slot[slot]) for slot in slots] for e, slots in slots_of.items()}
    total_of = {e: sum(quotas) for e, quotas in quotas_of.items()}

    seen = dict.fromkeys(slots_of, 0)
    physical = []
    for indices in indices_per_rank:
        logical = np.asarray(indices)
        out = np.full(logical.size, -1, dtype=np.int64)
        for position, expert in enumerate(logical.ravel().tolist()):
            if expert == -1:
                continue
            replica = nested_proportion(seen[expert], total_of[expert], quotas_of[expert])
            out[position] = slots_of[expert][replica]
            seen[expert] += 1
        physical.append(out.reshape(logical.shape))
    if seen != total_of:
        wrong = next(e for e in seen if seen[e] != total_of[e])
        raise ValueError(f"expert {wrong} has {seen[wrong]} tokens but quotas for {total_of[wrong]}")
    return physical
