"""A cycle's plan: gates, budgets for all layers together, odd layers, and digests that tell any difference."""

import dataclasses
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from cases import random_placement
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import exact_optimum
from test_distributed import on_ranks

from lplb import _C
from lplb.change import plan_change
from lplb.dynamic.planning import POLICIES, Problem, Settings, plan, plans_digest
from lplb.placement import Placement
from lplb.policies import place

N_LOGICAL, N_RANKS, N_PHYSICAL = 32, 4, 36
TOKENS = 8192


def counts(rng, base, rows, tokens=TOKENS):
    return rng.multinomial(tokens, base / base.sum(), size=rows).astype(np.int64)


def scene(seed, layers=3, rows=32, shift=1.0, **settings):
    """Placements made for loads that have since gone `shift` of the way to others."""
    rng = np.random.default_rng(seed)
    placements, history = [], []
    for _ in range(layers):
        old, new = rng.lognormal(0, 0.85, (2, N_LOGICAL))
        placements.append(place(counts(rng, old, 32), n_ranks=N_RANKS, n_physical=N_PHYSICAL))
        history.append(counts(rng, np.exp((1 - shift) * np.log(old) + shift * np.log(new)), rows))
    return Problem(tuple(placements), np.stack(history), None, Settings(**settings))


def mean_imbalance(placement, loads):
    """By minimum cuts in whole numbers."""
    return np.mean(
        [
            float(max(exact_optimum(placement.phy2log.numpy(), placement.n_ranks, None, row)))
            * placement.n_ranks
            / row.sum()
            for row in loads
        ]
    )


def written(before, after):
    """Experts on ranks that did not have them."""
    rows = zip(*(p.phy2log.view(p.n_ranks, -1).tolist() for p in (before, after)), strict=True)
    return sum(len(set(there) - set(here)) for here, there in rows)


# ---- policies behind one gate


@pytest.mark.parametrize(("policy", "mode"), [*product(POLICIES, ("A2A", "AG")), ("change", "EX")])
@pytest.mark.parametrize("seed", range(2))
def test_changed_loads_move_what_lowers_the_busiest_rank(seed, policy, mode):
    budget = {"max_moves": 20} if mode == "EX" else {}
    problem = scene(seed, policy=policy, mode=mode, **budget)
    plans = plan(problem)
    assert any(p.worth for p in plans)
    for before, p, rows in zip(problem.placements, plans, problem.history, strict=True):
        assert p.imbalance_before == pytest.approx(mean_imbalance(before, rows[16:]), rel=1e-9)
        assert p.imbalance_after == pytest.approx(mean_imbalance(p.placement, rows[16:]), rel=1e-9)
        assert p.n_moves == written(before, p.placement) == int((p.placement.phy2log != before.phy2log).sum())
        assert p.worth == (p.n_moves > 0)
        if p.worth:
            assert p.imbalance_after < p.imbalance_before - 0.01
        else:
            assert p.placement == before


@pytest.mark.parametrize("policy", POLICIES)
def test_noise_moves_nothing(policy):
    for seed in range(10):
        problem = scene(seed, shift=0.0, rows=64, policy=policy)
        for before, p in zip(problem.placements, plan(problem), strict=True):
            assert not p.worth
            assert p.placement == before


def test_a_placement_made_anew_keeps_the_names_by_which_most_stays():
    problem = scene(0, policy="lp")
    for before, p, rows in zip(problem.placements, plan(problem), problem.history, strict=True):
        if p.worth:
            anew = place(rows[:16], n_ranks=N_RANKS, n_physical=N_PHYSICAL)
            assert p.n_moves <= written(before, anew)
            assert mean_imbalance(p.placement, rows[16:]) == pytest.approx(mean_imbalance(anew, rows[16:]), rel=1e-12)


def test_without_budgets_a_layer_is_planned_as_by_plan_change():
    problem = scene(1)
    for before, p, rows in zip(problem.placements, plan(problem), problem.history, strict=True):
        assert p.placement == plan_change(before, rows).placement


# ---- quality


@pytest.mark.parametrize(("n_logical", "n_ranks", "most"), [(64, 8, 1.005), (256, 32, 1.005), (256, 64, 1.01)])
@pytest.mark.parametrize("seed", range(2))
def test_steady_loads_placed_anew_leave_the_busiest_rank_near_the_mean(seed, n_logical, n_ranks, most):
    """Dirichlet(0.5), one spare slot per rank; no expert has more than its rank's share times the ranks."""
    rng = np.random.default_rng(seed)
    loads = rng.multinomial(32768 * n_ranks, rng.dirichlet(np.full(n_logical, 0.5))).astype(np.int64)
    own = np.arange(n_logical).reshape(n_ranks, -1)
    current = Placement(np.c_[own, np.roll(own[:, 0], 1)].ravel(), n_ranks)
    result = plan(Problem((current,), loads[None, None], None, Settings(policy="lp", steady=True)))[0]
    assert result.worth
    assert mean_imbalance(result.placement, loads[None]) <= most
    assert result.imbalance_after == pytest.approx(mean_imbalance(result.placement, loads[None]), rel=1e-9)


def over_time(seed, shift, cycles=3):
    """A placement, and 64 rows from before a shift and 16 for every cycle after it."""
    rng = np.random.default_rng(seed)
    old, new = rng.lognormal(0, 0.85, (2, N_LOGICAL))
    placement = place(counts(rng, old, 64), n_ranks=N_RANKS, n_physical=N_PHYSICAL)
    return placement, np.concatenate([counts(rng, old, 64), counts(rng, new if shift else old, 16 * cycles)])


def test_a_change_is_seen_after_16_rows_of_a_window_of_64():
    seen = 0
    for seed in range(12):
        placement, rows = over_time(seed, shift=True)
        before = mean_imbalance(placement, rows[80:88])
        result = plan(Problem((placement,), rows[None, 16:80], None, Settings()))[0]
        if result.worth:
            seen += 1
            assert "newest 16 rows" in result.reason
            assert mean_imbalance(result.placement, rows[80:88]) < before - 0.01
        else:
            assert before < 1.03
    assert seen >= 10


def test_without_a_change_nothing_moves_as_rows_come_in():
    for seed in range(20):
        placement, rows = over_time(seed, shift=False)
        for end in range(16, len(rows) + 1, 16):
            assert not plan(Problem((placement,), rows[None, max(0, end - 64) : end], None, Settings()))[0].worth


# ---- budgets


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["EX", "A2A"])
def test_a_budget_is_kept_by_all_layers_together_and_more_is_no_loss(seed, mode):
    saved = []
    for most in (0, 1, 2, 5, 9, 14, 1000):
        problem = scene(seed, mode=mode, max_moves=most)
        plans = plan(problem)
        assert sum(map(written, problem.placements, [p.placement for p in plans])) <= most
        saved.append(sum(p.imbalance_before - p.imbalance_after for p in plans))
    assert saved == sorted(saved)
    assert saved[0] == 0.0 < saved[-1]


def test_a_budget_of_bytes_is_as_many_experts_as_fit():
    problem = scene(2, mode="EX", max_bytes=6 * 1000 + 999, expert_bytes=1000)
    by_moves = dataclasses.replace(problem, settings=Settings(mode="EX", max_moves=6))
    plans = plan(problem)
    assert 0 < sum(p.n_moves for p in plans) <= 6
    assert [p.placement for p in plans] == [p.placement for p in plan(by_moves)]


def test_the_layer_that_gains_most_comes_first():
    """One layer is off by far, the others by a little."""
    far, little = scene(3, layers=1, shift=1.0), scene(4, layers=4, shift=0.3)
    problem = Problem(
        (*little.placements, *far.placements),
        np.concatenate([little.history, far.history]),
        None,
        Settings(mode="EX", max_moves=2),
    )
    plans = plan(problem)
    assert plans[-1].n_moves == 2


def test_a_placement_made_anew_is_taken_whole_or_not():
    free = plan(scene(0, policy="lp"))
    wanted = sorted(p.n_moves for p in free if p.worth)
    plans = plan(scene(0, policy="lp", max_moves=wanted[0]))
    assert sum(p.n_moves for p in plans) in (0, wanted[0])


# ---- odd layers


def test_a_layer_without_loads_stays():
    problem = scene(0)
    history = problem.history.copy()
    history[1] = 0
    plans = plan(Problem(problem.placements, history, None, Settings()))
    assert plans[1].placement is problem.placements[1]
    assert (plans[1].worth, plans[1].reason, plans[1].n_moves) == (False, "no loads", 0)
    assert plans[0] == plan(problem)[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_experts_and_rows_without_loads(policy):
    problem = scene(1, policy=policy)
    history = problem.history.copy()
    history[:, :, 5] = 0
    history[:, ::7] = 0
    for p in plan(Problem(problem.placements, history, None, problem.settings)):
        assert p.placement.logcnt.min() >= 1


@pytest.mark.parametrize("policy", POLICIES)
def test_loads_that_are_all_equal_move_nothing(policy):
    placement = Placement(np.arange(32), 4)
    history = np.full((1, 32, 32), 7)
    assert not plan(Problem((placement,), history, None, Settings(policy=policy)))[0].worth


@pytest.mark.parametrize("policy", POLICIES)
def test_one_rank_has_nowhere_to_move_to(policy):
    history = np.random.default_rng(0).integers(0, 1000, (1, 32, 6))
    result = plan(Problem((Placement(range(6), 1),), history, None, Settings(policy=policy)))[0]
    assert (result.worth, result.imbalance_before) == (False, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_without_spare_slots_experts_change_places(seed):
    rng = np.random.default_rng(seed)
    placement = Placement(rng.permutation(32), 4)
    history = counts(rng, np.r_[np.full(8, 4.0), np.ones(24)][placement.phy2log.argsort().numpy()], 32)[None]
    result = plan(Problem((placement,), history, None, Settings()))[0]
    assert result.worth
    assert result.n_moves % 2 == 0
    assert result.imbalance_after == pytest.approx(mean_imbalance(result.placement, history[0, 16:]), rel=1e-9)
    assert result.imbalance_after < 1.05 < result.imbalance_before


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [1, 2, 15])
def test_few_rows_move_something_only_if_they_are_steady(policy, rows):
    problem = scene(0, rows=rows, policy=policy)
    assert not any(p.worth for p in plan(problem))
    steady = dataclasses.replace(problem, settings=Settings(policy=policy, steady=True))
    assert any(p.worth for p in plan(steady))


def test_groups_and_nodes_are_kept():
    rng = np.random.default_rng(0)
    placement = Placement(random_placement(rng, 4, 2, 16, 9), 4, 32)
    history = counts(rng, rng.lognormal(0, 1, 32), 32)[None]
    for policy in POLICIES:
        result = plan(Problem((placement,), history, None, Settings(policy=policy, group_size=2)))[0]
        result.placement.check_groups(2)
    result = plan(Problem((placement,), history, None, Settings(n_nodes=2)))[0]
    for here, there in zip(*(p.phy2log.view(2, -1) for p in (placement, result.placement)), strict=True):
        assert set(here.tolist()) == set(there.tolist())


def test_ranks_placed_anew_stand_on_the_nodes_that_send_to_them():
    """What a node has is what `place` gave it; only within nodes do ranks change places."""
    problem = scene(0, layers=1, policy="lp", n_nodes=2)
    sources = np.zeros((1, N_RANKS, N_LOGICAL), dtype=np.int64)
    sources[0, :2, ::2] = sources[0, 2:, 1::2] = problem.history[0].sum(0)[::2].mean().astype(np.int64)
    result = plan(dataclasses.replace(problem, sources=sources))[0]
    placed = place(problem.history[0, :16], n_ranks=N_RANKS, n_physical=N_PHYSICAL, n_nodes=2, sources=sources[0])
    assert result.worth
    for here, there in zip(result.placement.phy2log.view(2, -1), placed.phy2log.view(2, -1), strict=True):
        assert sorted(here.tolist()) == sorted(there.tolist())


# ---- what placements are rated by


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 3), (12, 12), (80, 80)]), st.integers(1, 4))
def test_placements_rated_one_after_another_have_their_exact_imbalance(seed, ranks, slots):
    """Each solve begins with what was left of another placement; the optimum is that of minimum cuts in integers."""
    rng = np.random.default_rng(seed)
    n_ranks, group_size = ranks
    in_group = int(rng.integers(slots, group_size * slots + 1))
    made = [random_placement(rng, n_ranks, group_size, in_group, slots).astype(np.int32) for _ in range(3)]
    n_logical = in_group * n_ranks // group_size
    loads = rng.integers(0, 10 ** int(rng.integers(1, 9)), (3, n_logical)) * (rng.random((3, n_logical)) < 0.8)
    loads[:, 0] += 1
    rating = _C.PlacementRating(
        made[0].ctypes.data, len(made[0]), n_logical, n_ranks, group_size, loads.ctypes.data, len(loads)
    )
    for phy2log in (*made, made[0]):
        found = np.empty(3)
        rating.rate(phy2log.ctypes.data, found.ctypes.data)
        exact = [float(max(exact_optimum(phy2log, n_ranks, group_size, row))) * n_ranks / row.sum() for row in loads]
        assert found == pytest.approx(exact, rel=1e-12)


# ---- the same everywhere


def digests(rank):
    """Of problems and plans, in every policy, on one rank of a group or in a process of its own."""
    found = []
    for policy in POLICIES:
        for few in ({}, {"max_moves": 7}):
            problem = scene(5, policy=policy, **few)
            found += [problem.digest(), plans_digest(plan(problem))]
    return found


def test_ranks_and_instruction_sets_plan_alike(tmp_path):
    here = digests(0)
    assert on_ranks(2, tmp_path / "ranks", digests) == [here, here]
    code = "import test_dynamic_planning as t; print(*t.digests(0))"
    portable = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LPLB_ISA": "portable", "PYTHONHASHSEED": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert portable.stdout.split() == here


# ---- digests


def test_digests_differ_when_anything_does():
    problem = scene(0, layers=2, rows=16)
    sources = np.ones((2, N_RANKS, N_LOGICAL), dtype=np.int64)
    more = problem.history.copy()
    more[1, 3, 4] += 1
    swapped = problem.placements[0].phy2log.clone().view(N_RANKS, -1)
    swapped = Placement(swapped.flip(0).reshape(-1), N_RANKS)
    other_settings = [
        {"mode": "AG"}, {"mode": "EX", "max_moves": 1}, {"policy": "lp"}, {"gain": 0.97}, {"min_gain": 0.02},
        {"max_moves": 1}, {"max_moves": 2}, {"expert_bytes": 1}, {"expert_bytes": 2}, {"group_size": 4}, {"n_nodes": 2},
        {"steady": True}, {"expert_bytes": 1, "max_bytes": 1}, {"token_cost": 1.0}, {"byte_cost": 1.0},
        {"expert_bytes": 1, "token_cost": 1.0, "byte_cost": 1.0, "horizon": 1.0},
    ]  # fmt: skip
    problems = [
        problem,
        Problem(problem.placements, more, None, problem.settings),
        Problem(problem.placements, problem.history[:, ::-1].copy(), None, problem.settings),
        Problem(problem.placements, problem.history[::-1].copy(), None, problem.settings),
        Problem(problem.placements[::-1], problem.history, None, problem.settings),
        Problem((swapped, problem.placements[1]), problem.history, None, problem.settings),
        Problem(problem.placements, problem.history, sources, problem.settings),
        Problem(problem.placements, problem.history, sources + 1, problem.settings),
        *(Problem(problem.placements, problem.history, None, Settings(**s)) for s in other_settings),
    ]
    assert len({p.digest() for p in problems}) == len(problems)


def test_digests_are_equal_when_nothing_differs():
    problem = scene(0)
    again = Problem(
        tuple(Placement(p.phy2log.tolist(), N_RANKS) for p in problem.placements),
        np.asfortranarray(problem.history),
        None,
        Settings(gain=np.float64(0.98), n_nodes=np.int64(1), steady=np.bool_(False)),
    )
    assert again.digest() == problem.digest()
    assert plans_digest(plan(again)) == plans_digest(plan(problem))
    assert plan(again) == plan(problem)


def test_digests_of_plans_differ_when_anything_does():
    plans = plan(scene(0))
    first = plans[0]
    other = [
        dataclasses.replace(first, **changed)
        for changed in (
            {"placement": plans[1].placement}, {"worth": not first.worth}, {"reason": "x"}, {"imbalance_before": 3.0},
            {"imbalance_after": np.nextafter(first.imbalance_after, 2)}, {"n_moves": first.n_moves + 1},
        )
    ]  # fmt: skip
    given = [plans, plans[::-1], plans[:2], *((o, *plans[1:]) for o in other)]
    assert len(set(map(plans_digest, given))) == len(given)


# ---- what is refused


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"mode": "BG"}, ValueError, "mode is 'BG', allowed are 'A2A', 'AG', 'EX'"),
        ({"mode": None}, TypeError, "mode is a NoneType, allowed is a str"),
        ({"policy": "best"}, ValueError, "policy is 'best', allowed are 'change'"),
        ({"mode": "EX"}, ValueError, "max_moves and max_bytes are None, allowed in mode 'EX'"),
        ({"mode": "EX", "policy": "lp", "max_moves": 1}, ValueError, "policy is 'lp', allowed in mode 'EX'"),
        ({"max_bytes": 1}, ValueError, "max_bytes is 1 and expert_bytes None"),
        ({"max_moves": -1}, ValueError, "max_moves is -1, allowed is 0"),
        ({"max_moves": True}, TypeError, "max_moves is True, allowed is an int"),
        ({"gain": 0.0}, ValueError, "gain is 0.0, allowed is finite, above 0"),
        ({"min_gain": float("nan")}, ValueError, "min_gain is nan"),
        ({"horizon": 1.0}, ValueError, "horizon is 1.0 and token_cost None"),
        ({"steady": 1}, TypeError, "steady is a int, allowed is a bool"),
        ({"n_nodes": 0}, ValueError, "n_nodes is 0, allowed is 1"),
        ({"group_size": 0}, ValueError, "group_size is 0, allowed is 1"),
    ],
)
def test_settings_refuse(given, error, message):
    with pytest.raises(error, match=message):
        Settings(**given)


def test_problems_refuse():
    placement, history, settings = Placement([0, 1, 2, 0, 3, 1], 2), np.ones((1, 3, 4), dtype=np.int64), Settings()
    refused = [
        (([1], history, None, settings), TypeError, r"placements.0. is a int"),
        (((), history, None, settings), ValueError, "placements has no layers"),
        ((placement, history, None, settings), TypeError, "placements is a Placement"),
        (((placement, Placement([0, 1, 2, 3], 2)), history, None, settings), ValueError, r"placements.1. is Placement"),
        (((placement,), history.tolist(), None, settings), TypeError, "history is a list, allowed is a NumPy array"),
        (((placement,), history * 1.0, None, settings), TypeError, "history has dtype float64, allowed is int64"),
        (((placement,), -history, None, settings), ValueError, "history has -1, allowed are 0"),
        (((placement,), history << 45, None, settings), ValueError, r"history has .*, and 2\*\*45 tokens in a row"),
        (((placement,), history[0], None, settings), ValueError, r"history has shape .3, 4., allowed is .layers"),
        (((placement,), history[:, :0], None, settings), ValueError, r"history has shape .1, 0, 4."),
        (((placement,), history, history, settings), ValueError, r"sources has shape .1, 3, 4., allowed .* .1, 2, 4."),
        (((placement,), history, None, Settings(group_size=1)), ValueError, "expert 0 has slots in groups"),
        (((placement,), history, None, Settings(n_nodes=3)), ValueError, "n_ranks is 2, allowed is a multiple of"),
        (((placement,), history, None, {}), TypeError, "settings is a dict, allowed"),
    ]
    for arguments, error, message in refused:
        with pytest.raises(error, match=message):
            Problem(*arguments)
