"""Traffic costs in the LP against HiGHS, by hand, and what whole tokens make of them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cases import (
    EPLB_SHAPES,
    INT_ARRAY,
    LOADS,
    SEEDS,
    TOPOLOGIES,
    DrawnPlacement,
    eplb_like_placement,
    loads_for,
    lognormal,
    lplb_placement,
    placements,
    random_placement,
    random_speeds,
    speeds,
)
from direct import DirectPlan, DirectPlanner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import rank_loads
from reference_traffic import NODE_COST, Traffic, TrafficLP, traffic_lps, traffic_of

import lplb
from lplb import _C

GAP_TOLERANCE = 1e-4
NOISE = 1e-9  # of HiGHS and of float64, relative
MOST_STEPS = 12
N_INSTANCES = 300
WEIGHTS = [1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]


@dataclass(frozen=True, eq=False)
class SourcedInstance:
    """A placement, the tokens of every source rank, and what traffic costs."""

    name: str
    phy2log: INT_ARRAY  # [n_physical]
    group_size: int
    counts: NDArray[np.int32]  # [n_ranks, n_logical]
    ranks_per_node: int
    weight: float
    rank_speed: NDArray[np.float64] | None

    @property
    def n_ranks(self) -> int:
        return len(self.counts)

    def solve(self) -> DirectPlan:
        n_logical = self.counts.shape[1]
        planner = DirectPlanner(self.phy2log, n_logical, self.n_ranks, self.group_size, self.rank_speed)
        return planner.solve_traffic(self.counts, self.ranks_per_node, self.weight)

    def lps(self) -> list[TrafficLP]:
        table = self.counts.astype(np.int64)
        return traffic_lps(self.phy2log, table, self.ranks_per_node, self.group_size, self.rank_speed)

    def replica_tokens(self, lp: TrafficLP, group: int, quota: NDArray[np.int32]) -> NDArray[np.float64]:
        """The quotas of a group's replicas, in the order of its LP."""
        slots = self.phy2log.reshape(self.n_ranks, -1)
        held = quota.reshape(slots.shape)
        experts = [expert for expert, _ in lp.replicated]
        ranks = [(group * self.group_size + rank, experts[e]) for rank, e, _ in lp.replicas]
        return np.array([held[rank][slots[rank] == expert][0] for rank, expert in ranks], dtype=np.float64)


def spread_over_ranks(rng: np.random.Generator, loads: INT_ARRAY, n_ranks: int) -> NDArray[np.int32]:
    """Source ranks [n_ranks, n_logical] for the tokens of each expert: all alike, a few, one, or busy and idle ones."""
    kind = rng.integers(5)
    if kind == 4:
        shares = np.repeat(rng.random(n_ranks)[None] ** 4 + 1e-9, loads.size, axis=0)
        shares /= shares.sum(axis=1, keepdims=True)
    else:
        shares = rng.dirichlet(np.full(n_ranks, [1e3, 5.0, 0.3, 0.02][kind]), loads.size)
    table = [rng.multinomial(load, share) for load, share in zip(loads.tolist(), shares, strict=True)]
    return np.array(table, dtype=np.int32).T.copy()


def instances() -> Iterator[SourcedInstance]:
    """Topologies, EPLB and random placements with all kinds of load; nodes of 1 to 8 ranks; some with speeds."""
    rng = np.random.default_rng(31)
    for i in range(N_INSTANCES):
        n_groups = 1
        if i % 3 == 0:
            name, r2o, n_own, n_groups, combined = TOPOLOGIES[rng.integers(len(TOPOLOGIES))]
            group_size, n_logical = len(r2o), n_groups * len(r2o) * n_own
            phy2log = lplb_placement(r2o, n_own, n_groups, combined)
        elif i % 3 == 1:
            group_size, n_logical, slots = EPLB_SHAPES[rng.integers(len(EPLB_SHAPES))]
            name = f"eplb_{group_size}_{n_logical}_{slots}"
            phy2log = eplb_like_placement(rng, lognormal(1.0)(rng, n_logical), group_size, slots)
        else:
            group_size, per_rank = int(rng.integers(1, 33)), int(rng.integers(1, 9))
            n_logical = int(rng.integers(per_rank, group_size * per_rank + 1))
            name = f"random_{group_size}_{n_logical}_{group_size * per_rank}"
            phy2log = random_placement(rng, group_size, group_size, n_logical, per_rank)
        kind = list(LOADS)[rng.integers(len(LOADS))]
        counts = spread_over_ranks(rng, LOADS[kind](rng, n_logical), n_groups * group_size)
        node, weight = int(rng.integers(1, 9)), float(rng.choice(WEIGHTS))
        speed = random_speeds(rng, len(counts)) if rng.random() < 1 / 3 else None
        label = f"{i}: {name}, {kind}, nodes of {node}, weight {weight}{', speeds' if speed is not None else ''}"
        yield SourcedInstance(label, phy2log, group_size, counts, node, weight, speed)


def check(instance: SourcedInstance, plan: DirectPlan, most_steps: int) -> None:
    assert plan.status.tolist() == [0] * len(plan.status)
    assert plan.iterations.max() <= most_steps
    check_tokens(instance, plan)
    for group, lp in enumerate(instance.lps()):
        optimum = lp.solve(instance.weight)
        bound, objective = float(plan.lower_bound[group]), float(plan.objective[group])
        assert 0 <= plan.gap[group] <= GAP_TOLERANCE
        assert bound <= optimum * (1 + NOISE)
        assert optimum * (1 - NOISE) <= objective <= optimum * (1 + GAP_TOLERANCE + NOISE)
        check_whole(instance, plan, group, lp)


def check_tokens(instance: SourcedInstance, plan: DirectPlan) -> None:
    quota = plan.quota.astype(np.int64)
    assert quota.min() >= 0
    per_expert = np.zeros(instance.counts.shape[1], dtype=np.int64)
    np.add.at(per_expert, instance.phy2log, quota)
    np.testing.assert_array_equal(per_expert, instance.counts.sum(axis=0, dtype=np.int64))
    np.testing.assert_array_equal(plan.rank_load, rank_loads(quota, instance.n_ranks))
    speed = np.ones(instance.n_ranks) if instance.rank_speed is None else instance.rank_speed
    level = (plan.rank_load / speed).reshape(-1, instance.group_size).max(axis=1)
    assert plan.max_load.tolist() == np.ceil(level).astype(np.int64).tolist()


def check_whole(instance: SourcedInstance, plan: DirectPlan, group: int, lp: TrafficLP) -> None:
    """Rounding adds at most one token per speed to the level, and moves a token per replica at most."""
    tokens = instance.replica_tokens(lp, group, plan.quota)
    load = plan.rank_load[group * instance.group_size :][: instance.group_size]
    level, price = (load / lp.speed).max(), instance.weight / lp.speed.sum()
    whole = level + price * lp.cost_of(tokens)
    objective = float(plan.objective[group])
    assert whole >= plan.lower_bound[group] * (1 - NOISE)
    assert whole <= objective * (1 + NOISE) + 1 / lp.speed.min() + price * len(tokens)


@pytest.fixture(scope="module")
def all_instances() -> list[SourcedInstance]:
    return list(instances())


@pytest.mark.usefixtures("highs")
@pytest.mark.parametrize("part", range(10))
def test_certified_optima(all_instances: list[SourcedInstance], part: int) -> None:
    for instance in all_instances[part::10]:
        try:
            check(instance, instance.solve(), MOST_STEPS)
        except AssertionError as error:
            raise AssertionError(f"{instance.name}: {error}") from error


@pytest.mark.usefixtures("highs")
@given(st.data(), placements(max_ranks=32))
def test_any_placement_and_sources(data: st.DataObject, placement: DrawnPlacement) -> None:
    rng = np.random.default_rng(data.draw(SEEDS))
    counts = spread_over_ranks(rng, data.draw(loads_for(placement)), placement.n_ranks)
    node = data.draw(st.integers(1, placement.n_ranks + 1))
    weight = data.draw(st.floats(1e-6, 1e4))
    speed = data.draw(speeds(placement.n_ranks))
    instance = SourcedInstance("drawn", placement.phy2log, placement.group_size, counts, node, weight, speed)
    check(instance, instance.solve(), _C.max_iterations)


# By hand


@pytest.mark.parametrize(
    ("ranks_per_node", "weight", "quota"),
    [
        (1, 1.9, [50, 50]),  # a token that crosses lowers the maximum by 1 and costs weight / 2
        (1, 2.1, [100, 0]),
        (2, 15.0, [50, 50]),  # weight / 16 within a node
        (2, 17.0, [100, 0]),
    ],
)
def test_tokens_stay_when_crossing_costs_more_than_balance(
    ranks_per_node: int, weight: float, quota: list[int]
) -> None:
    counts = np.array([[100], [0]], dtype=np.int32)
    plan = DirectPlanner([0, 0], 1, 2, 2).solve_traffic(counts, ranks_per_node, weight)
    assert np.abs(plan.quota - quota).max() <= 1  # gap_tolerance of 100 tokens, and a last one
    cost = {1: quota[1], 2: NODE_COST * quota[1]}[ranks_per_node]
    assert plan.objective[0] == pytest.approx(max(quota) + weight * cost / 2, rel=1e-4)


def test_the_near_replica_is_asked_first() -> None:
    """Rank 0's tokens may go to its node's rank 1 or to rank 2 beyond; both would balance as well."""
    counts = np.array([[90, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], dtype=np.int32)
    phy2log = [1, 0, 0, 2]  # rank 0 has a single expert without tokens
    plan = DirectPlanner(phy2log, 3, 4, 4).solve_traffic(counts, 2, 0.01)
    assert plan.max_load[0] == 45  # balance weighs more than this little traffic
    plan = DirectPlanner(phy2log, 3, 4, 4).solve_traffic(counts, 2, 8.0)
    assert np.abs(plan.quota - [0, 90, 0, 0]).max() <= 1


def test_ranks_outside_of_the_group_count_as_neighbours() -> None:
    """Groups of two ranks in nodes of four: rank 2's tokens for expert 0 are on the node of both its replicas."""
    counts = np.array([[0, 0], [0, 0], [80, 0], [0, 0]], dtype=np.int32)
    phy2log = [0, 0, 1, 1]
    plan = DirectPlanner(phy2log, 2, 4, 2).solve_traffic(counts, 4, 1.0)
    assert plan.quota.tolist() == [40, 40, 0, 0]
    assert plan.objective[0] == pytest.approx(40 + 80 * NODE_COST / 2, rel=1e-4)
    plan = DirectPlanner(phy2log, 2, 4, 2).solve_traffic(counts, 2, 1.0)
    assert plan.objective[0] == pytest.approx(40 + 80 / 2, rel=1e-4)


def test_nothing_to_share_out() -> None:
    counts = np.array([[7, 0, 0], [2, 5, 0]], dtype=np.int32)
    plan = DirectPlanner([0, 2, 1, 2], 3, 2, 2).solve_traffic(counts, 1, 1.0)  # the replicas' expert has no tokens
    assert (plan.quota.tolist(), plan.max_load.tolist(), plan.lower_bound.tolist()) == ([9, 0, 5, 0], [9], [9.0])
    plan = DirectPlanner([0, 2, 1, 2], 3, 2, 2).solve_traffic(np.zeros_like(counts), 1, 1.0)
    assert (plan.quota.tolist(), plan.max_load.tolist(), plan.lower_bound.tolist()) == ([0, 0, 0, 0], [0], [0.0])
    assert (plan.status.tolist(), plan.gap.tolist(), plan.iterations.tolist()) == ([0], [0.0], [0])


def test_columns_behind_the_experts_are_not_read() -> None:
    rng = np.random.default_rng(3)
    placement = DrawnPlacement(8, 8, 20, 4, 3)
    counts = spread_over_ranks(rng, lognormal(1.0)(rng, 20), 8)
    wide = np.full((8, 24), -(2**31), dtype=np.int32)
    wide[:, :20] = counts
    planner = DirectPlanner(placement.phy2log, 20, 8, 8)
    assert planner.solve_traffic(wide, 4, 0.5).bits() == planner.solve_traffic(counts, 4, 0.5).bits()


# What a weight buys


def test_a_large_weight_leaves_only_the_traffic_that_must_be(all_instances: list[SourcedInstance]) -> None:
    """Tokens of experts that their node has not must cross nodes, and of those that their rank has not, ranks."""
    for instance in all_instances:
        if instance.group_size != instance.n_ranks:
            continue
        starts = np.arange(0, instance.n_ranks, instance.ranks_per_node)
        slots = instance.phy2log
        on_rank = np.zeros(instance.counts.shape, dtype=bool)
        on_rank[np.arange(slots.size) * instance.n_ranks // slots.size, slots] = True
        on_node = np.add.reduceat(on_rank.astype(np.int64), starts) > 0
        tokens = instance.counts.astype(np.int64)
        across_nodes = int(np.add.reduceat(tokens, starts)[~on_node].sum())
        across_ranks = int(tokens[~on_rank].sum())
        least = across_nodes + NODE_COST * (across_ranks - across_nodes)

        planner = DirectPlanner(slots, on_rank.shape[1], instance.n_ranks, instance.group_size)
        plan = planner.solve_traffic(instance.counts, instance.ranks_per_node, 1e5)
        sent = traffic_of(slots, instance.counts, plan.quota, instance.ranks_per_node)
        room = GAP_TOLERANCE * plan.objective[0] * instance.n_ranks / 1e5 + slots.size
        assert least - 1e-6 <= sent.cost <= least + room, instance.name


def test_costs_are_those_of_the_plans_traffic(all_instances: list[SourcedInstance]) -> None:
    """What the LP charges for whole quotas is what `traffic_of` counts, but for experts that have no choice."""
    for instance in all_instances:
        plan, lps = instance.solve(), instance.lps()
        charged = sum(lp.cost_of(instance.replica_tokens(lp, g, plan.quota)) for g, lp in enumerate(lps))
        replicated = {expert for lp in lps for expert, _ in lp.replicated}
        of_replicas = np.array([expert in replicated for expert in range(instance.counts.shape[1])])
        counts = np.where(of_replicas, instance.counts, 0)
        quota = np.where(of_replicas[instance.phy2log], plan.quota, 0)
        sent = traffic_of(instance.phy2log, counts, quota, instance.ranks_per_node)
        assert sent.cost == pytest.approx(charged), instance.name


# traffic_of itself


@pytest.mark.usefixtures("highs")
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), SEEDS)
def test_traffic_of_is_the_cheapest_way(n_ranks: int, slots: int, ranks_per_node: int, seed: int) -> None:
    """Against the transport problem of every expert, solved by HiGHS."""
    rng = np.random.default_rng(seed)
    n_logical = int(rng.integers(slots, n_ranks * slots + 1))
    phy2log = random_placement(rng, n_ranks, n_ranks, n_logical, slots)
    counts = rng.integers(0, 20, (n_ranks, n_logical))
    quota = np.zeros(phy2log.size, dtype=np.int64)
    cost = 0.0
    for e in range(n_logical):
        where = np.flatnonzero(phy2log == e)
        quota[where] = rng.multinomial(counts[:, e].sum(), rng.dirichlet(np.full(where.size, 0.5)))
        cost += cheapest_way(counts[:, e], where // slots, quota[where], ranks_per_node)
    sent = traffic_of(phy2log, counts, quota, ranks_per_node)
    assert sent.cost == pytest.approx(cost, abs=1e-6)


def cheapest_way(have: INT_ARRAY, ranks: INT_ARRAY, want: INT_ARRAY, ranks_per_node: int) -> float:
    import highspy

    sources = np.arange(have.size)[:, None]
    cost = np.where(sources == ranks, 0.0, np.where(sources // ranks_per_node == ranks // ranks_per_node, NODE_COST, 1))
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    sent = [[model.addVariable(obj=c) for c in row] for row in cost.tolist()]
    for row, tokens in zip(sent, have.tolist(), strict=True):
        model.addConstr(sum(row) == tokens)
    for column, tokens in zip(zip(*sent, strict=True), want.tolist(), strict=True):
        model.addConstr(sum(column) == tokens)
    model.run()
    assert model.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return float(model.getObjectiveValue())


def test_traffic_of_by_hand() -> None:
    counts = np.array([[6, 0], [2, 1], [0, 4], [3, 0]])
    phy2log = [0, 1, 0, 1]  # nodes {0, 1} and {2, 3}
    # expert 0: 6 of 8 wanted on rank 0, 2 from rank 1; rank 2 wants 3, all from rank 3.
    # expert 1: rank 1 wants 1, its own; rank 3 wants 4, all from rank 2.
    assert traffic_of(phy2log, counts, [8, 1, 3, 4], 2) == Traffic(across_nodes=0, within_nodes=9)
    assert traffic_of(phy2log, counts, [11, 0, 0, 5], 2) == Traffic(across_nodes=4, within_nodes=6)
    assert traffic_of(phy2log, counts, [8, 1, 3, 4], 3) == Traffic(across_nodes=7, within_nodes=2)  # rank 3 alone


# Same bits


def test_solves_do_not_depend_on_each_other(all_instances: list[SourcedInstance]) -> None:
    for instance in all_instances[::20]:
        shape = instance.phy2log, instance.counts.shape[1], instance.n_ranks, instance.group_size, instance.rank_speed
        loads = instance.counts.sum(axis=0, dtype=np.int64)
        planner = DirectPlanner(*shape)
        first = planner.solve_traffic(instance.counts, instance.ranks_per_node, instance.weight).bits()
        assert planner.solve(loads).bits() == DirectPlanner(*shape).solve(loads).bits()
        assert planner.solve_traffic(instance.counts, instance.ranks_per_node, instance.weight).bits() == first


def digest_of_instances() -> str:
    return hashlib.sha256(b"".join(instance.solve().bits() for instance in instances())).hexdigest()


def test_same_bits_on_any_instruction_set() -> None:
    program = "import test_traffic as t; from lplb import _C; print(_C.instruction_set, t.digest_of_instances())"
    here, root = Path(__file__).parent, Path(lplb.__file__).parents[1]
    environment = {**os.environ, "LPLB_ISA": "portable", "PYTHONPATH": f"{here}{os.pathsep}{root}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["portable", digest_of_instances()]


# The iteration log


def test_iteration_log(all_instances: list[SourcedInstance]) -> None:
    rows = 0
    for instance in all_instances[::10]:
        shape = instance.phy2log, instance.counts.shape[1], instance.n_ranks, instance.group_size, instance.rank_speed
        planner = DirectPlanner(*shape)
        plan = planner.solve_traffic(instance.counts, instance.ranks_per_node, instance.weight)
        for group, steps in enumerate(plan.iterations.tolist()):
            log = planner.log[group]
            assert not log[steps + 1 :].any(), instance.name
            if not steps:
                continue
            objective, bound = log[: steps + 1, 0], log[: steps + 1, 1]
            assert np.all(objective >= bound * (1 - NOISE)), instance.name
            assert np.all(np.diff(bound) >= 0), instance.name
            assert log[steps, 2] == pytest.approx(plan.gap[group], abs=1e-12), instance.name
            rows += steps
    assert rows > 0
