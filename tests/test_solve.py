"""Plans against exact references: every design instance, random placements, same bits, the iteration log."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import (
    LARGEST_LOAD,
    DrawnPlacement,
    Instance,
    design_instances,
    eplb_like_placement,
    loads_for,
    lognormal,
    placements,
    speeds,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import Bottleneck, ReferenceLP, exact_bottleneck, exact_optimum, rank_loads

import lplb
from lplb import Placement, Plan, Planner, SolveStatus

SOLVERS = ["ipm", "flow"]
GAP_TOLERANCE = 1e-4
BOUND_NOISE = 1e-9
MOST_STEPS = 8
N_CHUNKS = 24
CHUNK = 80
HIGHS_EVERY = 20  # instances


@dataclass(frozen=True)
class Optimum:
    """What the references say of one load: t* and the best in whole tokens, per group."""

    fractional: list[Fraction]
    whole: list[Bottleneck]


def optimum_of(instance: Instance) -> Optimum:
    arguments = instance.phy2log, instance.n_ranks, instance.group_size, instance.loads, instance.rank_speed
    return Optimum(exact_optimum(*arguments), exact_bottleneck(*arguments))


def planner_of(instance: Instance, **settings: bool) -> Planner:
    placement = Placement(instance.phy2log, instance.n_ranks, instance.loads.size)
    speed = None if instance.rank_speed is None else torch.from_numpy(instance.rank_speed)
    return Planner.from_placement(placement, group_size=instance.group_size, rank_speed=speed, **settings)


def check_plan(plan: Plan, instance: Instance, best: Optimum) -> None:
    """Everything a plan promises, against the references."""
    assert plan.status.tolist() == [SolveStatus.SOLVED] * len(best.whole)
    check_tokens(plan, instance)
    speed = np.ones(instance.n_ranks) if instance.rank_speed is None else instance.rank_speed
    levels = (plan.rank_load.numpy() / speed).reshape(-1, instance.group_size).max(axis=1)
    assert levels.tolist() == [b.max_load for b in best.whole]
    assert plan.max_load.tolist() == [math.ceil(b.max_load) for b in best.whole]
    for group, t_star in enumerate(best.fractional):
        check_certificate(plan, group, t_star)


def check_tokens(plan: Plan, instance: Instance) -> None:
    quota = plan.quota.numpy().astype(np.int64)
    assert quota.min() >= 0
    per_expert = np.zeros(instance.loads.size, dtype=np.int64)
    np.add.at(per_expert, instance.phy2log, quota)
    np.testing.assert_array_equal(per_expert, instance.loads)
    np.testing.assert_array_equal(plan.rank_load.numpy(), rank_loads(quota, instance.n_ranks))


def check_certificate(plan: Plan, group: int, t_star: Fraction) -> None:
    bound, gap, most = float(plan.lower_bound[group]), float(plan.gap[group]), int(plan.max_load[group])
    assert bound >= 0
    assert Fraction(bound) <= t_star * (1 + Fraction(1, 10**9))
    if plan.solver == "flow":
        assert abs(Fraction(bound) - t_star) <= t_star * Fraction(1, 10**12)
    assert bound <= most  # what is reached is no less than the optimum, and the bound no more
    assert gap >= 0
    assert gap <= GAP_TOLERANCE or most <= math.ceil(bound * (1 - BOUND_NOISE))


# Every design instance


@pytest.fixture(scope="module")
def instances() -> list[Instance]:
    return list(design_instances())


def test_the_chunks_are_all_instances(instances: list[Instance]) -> None:
    assert len(instances) == N_CHUNKS * CHUNK


@pytest.mark.parametrize("chunk", range(N_CHUNKS))
def test_design_instances(instances: list[Instance], chunk: int) -> None:
    for i in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        instance = instances[i]
        best, planner = optimum_of(instance), planner_of(instance)
        for solver in SOLVERS:
            plan = planner.solve(torch.from_numpy(instance.loads), solver=solver)
            try:
                check_plan(plan, instance, best)
                if solver == "ipm":
                    assert int(plan.iterations.max()) <= MOST_STEPS
            except AssertionError as error:
                raise AssertionError(f"{instance.name}, {solver}: {error}") from error


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.usefixtures("highs")
def test_highs_agrees(instances: list[Instance], solver: str) -> None:
    for instance in instances[::HIGHS_EVERY]:
        shape = instance.phy2log, instance.n_ranks, instance.group_size
        t_star = ReferenceLP(*shape, instance.rank_speed).solve(instance.loads)
        plan = planner_of(instance).solve(torch.from_numpy(instance.loads), solver=solver)
        bound = plan.lower_bound.numpy()
        assert np.all(bound <= t_star * (1 + 1e-8)), instance.name  # HiGHS' own noise
        reached = bound * (1 + plan.gap.numpy())
        assert np.all(t_star <= reached * (1 + 1e-8)), instance.name
        if instance.rank_speed is None:
            assert np.all(plan.max_load.numpy() >= t_star * (1 - 1e-8)), instance.name
            assert np.all(plan.max_load.numpy() <= np.ceil(t_star * (1 + 1e-8))), instance.name


# Random placements


@given(st.data(), placements())
def test_plans_are_certified_optima(data: st.DataObject, placement: DrawnPlacement) -> None:
    loads = data.draw(loads_for(placement))
    check_both(drawn_instance(placement, loads, data.draw(speeds(placement.n_ranks))))


@given(st.data(), placements(max_ranks=12))
def test_plans_of_any_loads(data: st.DataObject, placement: DrawnPlacement) -> None:
    """Loads token by token as hypothesis likes them: mixes of nothing, next to nothing and 10⁹."""
    load = st.one_of(st.integers(0, 3), st.integers(0, 4096), st.integers(0, LARGEST_LOAD), st.just(LARGEST_LOAD))
    n_logical = placement.n_logical
    loads = data.draw(st.lists(load, min_size=n_logical, max_size=n_logical))
    check_both(drawn_instance(placement, np.array(loads, dtype=np.int64), data.draw(speeds(placement.n_ranks))))


def drawn_instance(placement: DrawnPlacement, loads: NDArray[np.int64], speed: NDArray[np.float64] | None) -> Instance:
    return Instance("drawn", placement.phy2log, placement.n_ranks, placement.group_size, loads, speed)


def check_both(instance: Instance) -> None:
    best, planner = optimum_of(instance), planner_of(instance)
    for solver in SOLVERS:
        check_plan(planner.solve(torch.from_numpy(instance.loads), solver=solver), instance, best)


@pytest.mark.parametrize("solver", SOLVERS)
def test_largest_loads_that_are_allowed(solver: str) -> None:
    """2,000 experts of 2³¹ - 1 tokens on one rank: float64 noise of 1e-12 would be four tokens."""
    most = 2**31 - 1
    plan = Planner.from_placement(Placement(list(range(2000)), 1)).solve(torch.full((2000,), most), solver=solver)
    assert plan.rank_load.tolist() == plan.max_load.tolist() == [2000 * most]


@pytest.mark.parametrize("solver", SOLVERS)
def test_whole_optimum_of_huge_loads_with_speeds(solver: str) -> None:
    """Room for ⌊T·v⌋ tokens to the last token, where a relative 1e-12 of them is no longer nothing."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        placement = DrawnPlacement(24, 6, 24, 12, seed)
        loads = rng.integers(LARGEST_LOAD, 2 * LARGEST_LOAD, placement.n_logical)
        instance = drawn_instance(placement, loads, 2.0 ** rng.uniform(-1, 1, placement.n_ranks))
        check_plan(planner_of(instance).solve(torch.from_numpy(loads), solver=solver), instance, optimum_of(instance))


# Same bits


def bits_of(plan: Plan) -> list[bytes]:
    return [tensor.contiguous().numpy().tobytes() for tensor in plan.tensors()]


def digest(plans: list[Plan]) -> str:
    return hashlib.sha256(b"".join(part for plan in plans for part in bits_of(plan))).hexdigest()


@given(st.data(), placements(max_ranks=64))
def test_same_bits_repeated_and_in_a_batch(data: st.DataObject, placement: DrawnPlacement) -> None:
    rows = [data.draw(loads_for(placement)) for _ in range(3)]
    speed = data.draw(speeds(placement.n_ranks))
    planner = planner_of(drawn_instance(placement, rows[0], speed))
    for solver in SOLVERS:
        batch = planner.solve(torch.from_numpy(np.stack(rows)), solver=solver)
        for i, row in enumerate(rows):
            alone = planner.solve(torch.from_numpy(row), solver=solver)
            assert [t[i].numpy().tobytes() for t in batch.tensors()] == bits_of(alone)
        assert bits_of(planner.solve(torch.from_numpy(np.stack(rows)), solver=solver)) == bits_of(batch)


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_bits_for_any_number_of_threads(solver: str) -> None:
    rng = np.random.default_rng(5)
    past = lognormal(1.0)(rng, 128)
    placement = Placement(eplb_like_placement(rng, past, 32, 160), 32, 128)
    loads = torch.from_numpy(np.stack([lognormal(1.5)(rng, 128) for _ in range(64)]))
    before = torch.get_num_threads()
    try:
        digests = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            digests.add(digest([Planner.from_placement(placement).solve(loads, solver=solver)]))
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


def every_seventh_digest() -> str:
    plans = []
    for instance in islice(design_instances(), 0, 800, 7):
        planner = planner_of(instance)
        plans += [planner.solve(torch.from_numpy(instance.loads), solver=solver) for solver in SOLVERS]
    return digest(plans)


def test_same_bits_on_any_instruction_set() -> None:
    program = "import test_solve as t; from lplb import _C; print(_C.instruction_set, t.every_seventh_digest())"
    here, root = Path(__file__).parent, Path(lplb.__file__).parents[1]
    environment = {**os.environ, "LPLB_ISA": "portable", "PYTHONPATH": f"{here}{os.pathsep}{root}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["portable", every_seventh_digest()]


# The iteration log


def logged_rows(text: str) -> list[list[float]]:
    """The iteration table's rows of numbers, without the steps: group, it, objective, bound, gap, mu."""
    fields = [line.split() for line in text.splitlines()]
    return [[float(x) for x in row[:6]] for row in fields if len(row) >= 6 and row[0].isdigit() and row[1].isdigit()]


def test_iteration_log(capsys: pytest.CaptureFixture[str]) -> None:
    for instance in islice(design_instances(), 9, 600, 32):
        plan = planner_of(instance, verbose=True).solve(torch.from_numpy(instance.loads))
        rows = logged_rows(capsys.readouterr().out)
        for group in range(instance.n_ranks // instance.group_size):
            mine = [row for row in rows if row[0] == group]
            if not mine:  # nothing to share out
                assert int(plan.iterations[group]) == 0, instance.name
                continue
            assert [row[1] for row in mine] == list(range(int(plan.iterations[group]) + 1)), instance.name
            bounds = [row[3] for row in mine]
            assert bounds == sorted(bounds), instance.name
            assert all(row[2] >= row[3] - 1e-6 for row in mine), instance.name  # six digits are printed
            # Rounding may meet a set of ranks that proves more, so the plan's gap may be smaller than the log's.
            assert float(plan.gap[group]) <= mine[-1][4] * 1.05 + 1e-9, instance.name
            if mine[-1][4] <= GAP_TOLERANCE:
                assert abs(float(plan.gap[group]) - mine[-1][4]) <= GAP_TOLERANCE, instance.name
