"""The references against each other, and the generators against what they promise."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from cases import (
    LARGEST_LOAD,
    LOADS,
    DrawnPlacement,
    Instance,
    cube,
    design_instances,
    eplb_like_placement,
    hypercube16,
    loads_for,
    lplb_placement,
    placements,
    ring,
    speeds,
    torus,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import (
    ReferenceLP,
    assign_reference,
    count_reference,
    exact_bottleneck,
    exact_optimum,
    integer_optimum,
    nested_proportion,
    overloaded_ranks,
    rank_groups,
    rank_loads,
    subset_optimum,
)

QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def instances() -> list[Instance]:
    return list(design_instances())


# Optima


@QUICK
@given(st.data(), placements(max_ranks=16, max_group_size=8))
@pytest.mark.usefixtures("highs")
def test_cuts_subsets_and_highs_agree(data: st.DataObject, placement: DrawnPlacement) -> None:
    loads = data.draw(loads_for(placement))
    speed = data.draw(speeds(placement.n_ranks))
    shape = placement.phy2log, placement.n_ranks, placement.group_size
    exact = exact_optimum(*shape, loads, speed)
    assert exact == subset_optimum(*shape, loads, speed)
    solved = ReferenceLP(*shape, speed).solve(loads)
    np.testing.assert_allclose(solved, [float(t) for t in exact], rtol=1e-8)


@QUICK
@given(st.data(), placements(max_ranks=16, max_group_size=8))
def test_bottleneck_is_the_smallest_that_carries(data: st.DataObject, placement: DrawnPlacement) -> None:
    loads = data.draw(loads_for(placement))
    speed = data.draw(speeds(placement.n_ranks))
    shape = placement.phy2log, placement.n_ranks, placement.group_size
    optimum = subset_optimum(*shape, loads, speed)
    groups = rank_groups(*shape, speed)
    for t, best, group in zip(optimum, exact_bottleneck(*shape, loads, speed), groups, strict=True):
        rates = [Fraction(v) for v in group.speed]
        assert t <= best.load
        assert best.capacities == tuple(math.floor(best.load * v) for v in rates)
        if speed is None:
            assert best.load == math.ceil(t)
        tokens = [(homes, int(loads[e])) for e, homes in zip(group.experts, group.homes, strict=True)]
        assert _carries(tokens, best.capacities)
        if best.load:
            # The next breakpoint below: every rank that sits on a whole token loses one.
            below = tuple(c - (c == best.load * v) for c, v in zip(best.capacities, rates, strict=True))
            assert below != best.capacities
            assert not _carries(tokens, below)


def _carries(tokens: list[tuple[tuple[int, ...], int]], capacities: tuple[int, ...]) -> bool:
    """Hall's condition for every set of ranks; per expert its ranks and its tokens."""
    n_ranks = len(capacities)
    masks = [(sum(1 << rank for rank in ranks), load) for ranks, load in tokens]
    for chosen in range(1, 1 << n_ranks):
        room = sum(c for rank, c in enumerate(capacities) if chosen >> rank & 1)
        if sum(load for mask, load in masks if mask & ~chosen == 0) > room:
            return False
    return True


@pytest.mark.usefixtures("highs")
def test_highs_agrees_with_cuts_on_the_design_instances(instances: list[Instance]) -> None:
    for instance in instances[::31]:
        shape = instance.phy2log, instance.n_ranks, instance.group_size
        solver = ReferenceLP(*shape, instance.rank_speed)
        exact = exact_optimum(*shape, instance.loads, instance.rank_speed)
        np.testing.assert_allclose(
            solver.solve(instance.loads), [float(t) for t in exact], rtol=1e-8, err_msg=instance.name
        )


@pytest.mark.usefixtures("highs")
def test_a_solver_is_not_coloured_by_the_workload_before() -> None:
    phy2log = lplb_placement(cube(), 8)
    solver = ReferenceLP(phy2log, 8)
    rng = np.random.default_rng(1)
    workloads = [draw(rng, 64) for draw in LOADS.values()]
    first = [solver.solve(w) for w in workloads]
    np.testing.assert_array_equal(first[::-1], [solver.solve(w) for w in workloads[::-1]])


def test_two_ranks_by_hand() -> None:
    phy2log = [0, 1, 2, 0]  # expert 0 on both ranks, 1 on the first, 2 on the second
    assert exact_optimum(phy2log, 2, None, [5, 3, 1]) == [Fraction(9, 2)]
    assert exact_bottleneck(phy2log, 2, None, [5, 3, 1])[0].capacities == (5, 5)
    assert exact_optimum(phy2log, 2, None, [5, 30, 1]) == [30]
    assert exact_optimum(phy2log, 2, None, [6, 0, 0], [2.0, 1.0]) == [2]
    assert exact_bottleneck(phy2log, 2, None, [6, 1, 0], [2.0, 1.0])[0].load == Fraction(5, 2)
    assert exact_optimum(phy2log, 2, None, [0, 0, 0]) == [0]
    assert overloaded_ranks({(0,): 3, (0, 1): 5}, [2, 9]) == {0}


@pytest.mark.parametrize("group_size", [1, 2, 7, 64, 128])
@pytest.mark.parametrize("noise", [0.0, -4e-10, 4e-10])
def test_integer_optimum_sees_through_noise(group_size: int, noise: float) -> None:
    for tokens in (0, 1, 1000, 10**6):
        for extra in (Fraction(0), Fraction(1, group_size), Fraction(group_size - 1, group_size)):
            t = tokens + extra
            assert integer_optimum(float(t) * (1 + noise), group_size) == math.ceil(t)


def test_integer_optimum_refuses_what_a_float_cannot_tell() -> None:
    with pytest.raises(ValueError, match="too large"):
        integer_optimum(1e9, 64)
    with pytest.raises(ValueError, match="no fraction"):
        integer_optimum(10.4, 2)
    assert integer_optimum(1e9, 64, relative_noise=1e-12) == 10**9


@pytest.mark.parametrize(
    ("phy2log", "message"), [([0, 0, 1, 2], "twice on one rank"), ([0, 1, 1, 2, 2, 3, 0, 3], "two groups")]
)
def test_wrong_placements_are_refused(phy2log: list[int], message: str) -> None:
    n_ranks = len(phy2log) // 2
    with pytest.raises(ValueError, match=message):
        rank_groups(phy2log, n_ranks, 2)


# Tokens


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_nested_proportion_meets_quotas_and_spreads_prefixes(quotas: list[int]) -> None:
    n = sum(quotas)
    chosen = [nested_proportion(k, n, quotas) for k in range(n)]
    assert [chosen.count(i) for i in range(len(quotas))] == quotas
    for prefix in range(n + 1):
        # Each nesting level before a replica shifts its share by less than one token.
        for i, quota in enumerate(quotas):
            assert abs(chosen[:prefix].count(i) - prefix * quota / n) < i + 1


def test_nested_proportion_by_hand() -> None:
    assert [nested_proportion(k, 6, [2, 0, 3, 1]) for k in range(6)] == [3, 2, 0, 2, 2, 0]
    assert nested_proportion(10**18 - 1, 10**18, [10**18 - 1, 1]) == 0
    with pytest.raises(ValueError, match="token 3 of 3"):
        nested_proportion(3, 3, [3])
    with pytest.raises(ValueError, match="quotas"):
        nested_proportion(0, 3, [1, 1])


def test_assignment_meets_quotas_and_keeps_experts() -> None:
    rng = np.random.default_rng(2)
    phy2log = eplb_like_placement(rng, rng.lognormal(0, 1, 16), 4, 24)
    indices = [rng.integers(-1, 16, shape) for shape in [(50, 4), (0, 4), (33, 4), (7, 4)]]
    workload = np.bincount(np.concatenate([i.ravel() for i in indices]) + 1, minlength=17)[1:]
    quota = np.zeros(24, dtype=np.int64)
    for expert in range(16):
        slots = np.flatnonzero(phy2log == expert)
        quota[slots] = rng.multinomial(workload[expert], np.full(slots.size, 1 / slots.size))
    physical = assign_reference(indices, phy2log, quota)
    flat = np.concatenate([p.ravel() for p in physical])
    np.testing.assert_array_equal(np.bincount(flat[flat >= 0], minlength=24), quota)
    for logical, slots in zip(indices, physical, strict=True):
        assert slots.shape == logical.shape
        np.testing.assert_array_equal(np.where(slots >= 0, phy2log[slots], -1), logical)
    # Numbering runs on over ranks: cutting the same tokens elsewhere changes nothing.
    whole = assign_reference([np.concatenate(indices)], phy2log, quota)
    np.testing.assert_array_equal(np.concatenate(physical), whole[0])
    np.testing.assert_array_equal(rank_loads(quota, 4), np.bincount(flat[flat >= 0] // 6, minlength=4))
    quota[0] += 1
    with pytest.raises(ValueError, match="but quotas for"):
        assign_reference(indices, phy2log, quota)


@pytest.mark.parametrize(("n_tokens", "n_sms"), [(0, 3), (1, 4), (256, 1), (257, 1), (1000, 3), (4096, 16), (4097, 16)])
def test_count_prefixes(n_tokens: int, n_sms: int) -> None:
    idx = np.random.default_rng(3).integers(-1, 7, n_tokens)
    workload, prefix = count_reference(idx, 7, n_sms)
    np.testing.assert_array_equal(workload, np.bincount(idx + 1, minlength=8)[1:])
    np.testing.assert_array_equal(prefix[-1], workload)
    chunk = next(m for m in range(0, n_tokens + 256, 256) if m * n_sms >= n_tokens)
    for i in range(n_sms):
        np.testing.assert_array_equal(prefix[i], np.bincount(idx[: (i + 1) * chunk] + 1, minlength=8)[1:])


def test_count_refuses_unknown_experts() -> None:
    with pytest.raises(ValueError, match=r"expert 7 is outside \[-1, 7\)"):
        count_reference([[0, 7]], 7, 1)


# Generators


@given(placements())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_drawn_placements_are_valid(placement: DrawnPlacement) -> None:
    phy2log = placement.phy2log
    assert phy2log.size == placement.n_ranks * placement.slots_per_rank
    assert set(phy2log.tolist()) == set(range(placement.n_logical))
    assert all(group.experts for group in rank_groups(phy2log, placement.n_ranks, placement.group_size))


def test_random_placements_reach_one_and_all_replicas() -> None:
    counts = Counter(
        len(homes) for seed in range(20) for homes in rank_groups(DrawnPlacement(8, 8, 24, 6, seed).phy2log, 8)[0].homes
    )
    assert set(counts) == set(range(1, 9))


@pytest.mark.parametrize(
    ("n_ranks", "n_logical", "slots"), [(1, 3, 3), (4, 4, 16), (5, 7, 15), (8, 9, 64), (64, 256, 320)]
)
@pytest.mark.parametrize("kind", LOADS)
def test_eplb_like_placements_are_valid(n_ranks: int, n_logical: int, slots: int, kind: str) -> None:
    rng = np.random.default_rng(4)
    phy2log = eplb_like_placement(rng, LOADS[kind](rng, n_logical), n_ranks, slots)
    assert set(phy2log.tolist()) == set(range(n_logical))
    assert len(rank_groups(phy2log, n_ranks)) == 1


@pytest.mark.parametrize(
    ("r2o", "n_edges"),
    [(cube(), 16), (hypercube16(), 32), (torus(4, 4), 32), (torus(4, 8), 64), (ring(8), 8)],
    ids=["cube", "hypercube16", "torus_4x4", "torus_4x8", "ring_8"],
)
def test_topologies_join_each_pair_once_and_evenly(r2o: np.ndarray, n_edges: int) -> None:
    edges = {frozenset((rank, int(origin))) for rank, row in enumerate(r2o) for origin in row}
    assert len(edges) == n_edges == r2o.size
    assert all(len(edge) == 2 for edge in edges)
    for column in r2o.T:
        assert sorted(column.tolist()) == list(range(len(r2o)))


def test_hypercube_edges_differ_in_one_bit() -> None:
    differences = np.arange(16)[:, None] ^ hypercube16()
    assert set(differences.ravel().tolist()) == {1, 2, 4, 8}


def test_lplb_layout_by_hand() -> None:
    assert lplb_placement(ring(2), 2, n_groups=2, combined=2).reshape(4, 4).tolist() == [
        [0, 1, 2, 3],
        [2, 3, 0, 1],
        [4, 5, 6, 7],
        [6, 7, 4, 5],
    ]
    assert lplb_placement(torus(2, 2), 3)[:5].tolist() == [0, 1, 2, 6, 4]


def test_design_instances_cover_what_the_design_says(instances: list[Instance]) -> None:
    assert len(instances) == 1920
    assert 500 < sum(i.rank_speed is not None for i in instances) < 780
    assert len({i.name for i in instances}) == len(instances)
    for instance in instances:
        rank_groups(instance.phy2log, instance.n_ranks, instance.group_size, instance.rank_speed)
        assert set(instance.phy2log.tolist()) == set(range(instance.loads.size))
        assert instance.loads.dtype == np.int64
        assert 0 <= instance.loads.min() <= instance.loads.max() <= LARGEST_LOAD
        assert instance.rank_speed is None or all(0.5 <= v <= 2 for v in instance.rank_speed)
    assert {min(i.n_redundant for i in instances), max(i.n_redundant for i in instances)} == {8, 256}
    assert {min(i.n_ranks for i in instances), max(i.n_ranks for i in instances)} == {4, 64}
    again = design_instances()
    for instance in instances[:400]:
        same = next(again)
        assert same.name == instance.name
        np.testing.assert_array_equal(same.phy2log, instance.phy2log)
        np.testing.assert_array_equal(same.loads, instance.loads)
