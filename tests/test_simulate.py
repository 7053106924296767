"""Simulations against brute force, exact integers and HiGHS; their files, their refusals."""

import csv
import io
import itertools
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import cases
import numpy as np
import pytest
import reference
import torch
from reference_traffic import traffic_of

from lplb import Placement, Planner, scenes
from lplb.exchange import Known
from lplb.policies import place
from lplb.replay import CheckFailed
from lplb.simulate import results, simulate
from lplb.simulate import run as simulating
from lplb.simulate.placers import NAMES, topology_by_name
from lplb.simulate.verdict import best_columns, remark

LAYERS, EXPERTS, RANKS, SLOTS = 2, 12, 4, 20


class Random:
    """A policy that places at random, and keeps what it was given and what it returned."""

    def __init__(self, seed=0, n_ranks=RANKS, group_size=RANKS, n_logical=EXPERTS, slots=SLOTS):
        self.rng = np.random.default_rng(seed)
        self.size = n_ranks, group_size, n_logical // (n_ranks // group_size), slots // n_ranks
        self.seen, self.made = [], []

    def __call__(self, history):
        self.seen.append(history)
        self.made.append([Placement(cases.random_placement(self.rng, *self.size), self.size[0]) for _ in history])
        return self.made[-1]


def loads(n_batches=9, seed=0, sources=None, n_logical=EXPERTS, tokens=480):
    return scenes.lognormal(n_batches, LAYERS, n_logical, tokens=tokens, seed=seed, sources=sources)


def placed(result):
    """Each counted batch's row, layer, and placement."""
    for b, layer in np.ndindex(result.rank_load.shape[:2]):
        i = max(k for k, at in enumerate(result.placed_at) if at <= result.first + b)
        yield b, layer, result.placements[i][layer]


# ---- what is simulated


@pytest.mark.parametrize("group_size", [4, 2])
@pytest.mark.parametrize("solver", ["ipm", "flow"])
def test_the_lp_reaches_the_exact_optimum(solver, group_size):
    counts, policy = loads(), Random(group_size=group_size)
    result = simulate(
        counts, n_ranks=4, n_physical=SLOTS, policy=policy, group_size=group_size, refresh=3, window=2, solver=solver
    )
    assert result.placements == policy.made
    assert result.first == 3
    assert result.solved.all()
    for b, layer, placement in placed(result):
        load = counts[3 + b, layer]
        best = reference.exact_bottleneck(placement.phy2log, 4, group_size, load)
        t_star = max(reference.subset_optimum(placement.phy2log, 4, group_size, load))
        assert result.max_load[b, layer] == max(group.max_load for group in best)
        assert Fraction(result.lower_bound[b, layer]) <= t_star * (1 + Fraction(1, 10**12))
        assert result.lower_bound[b, layer] >= float(t_star) * (1 - 1.1e-4)
        assert result.rank_load[b, layer].sum() == load.sum()


def test_mean_bound_is_that_of_highs(highs):
    counts = loads(20, seed=3)
    result = simulate(counts, n_ranks=4, n_physical=SLOTS, policy=Random(3), refresh=0, window=8, solver="flow")
    best = [
        reference.ReferenceLP(p.phy2log, 4).solve(counts[8 + b, layer])[0] / (counts[8 + b, layer].sum() / 4)
        for b, layer, p in placed(result)
    ]
    assert result.summary.bound_mean == pytest.approx(np.mean(best), rel=1e-8)


def test_even_splits_deal_out_every_expert():
    counts = loads(seed=1)
    result = simulate(counts, n_ranks=4, n_physical=SLOTS, policy=Random(1), split="even", refresh=4)
    for b, layer, placement in placed(result):
        load = [0.0] * 4
        for slot, expert in enumerate(placement.phy2log.tolist()):
            copies = placement.phy2log.tolist().count(expert)
            load[slot // (SLOTS // 4)] += counts[4 + b, layer, expert] / copies
        # what is left of a division is less than one token for each copy on the rank
        assert np.abs(result.rank_load[b, layer] - load).max() < SLOTS // 4
        assert result.rank_load[b, layer].sum() == counts[4 + b, layer].sum()
        best = max(reference.subset_optimum(placement.phy2log, 4, None, counts[4 + b, layer]))
        assert result.lower_bound[b, layer] <= float(best) * (1 + 1e-12)


def test_without_balancing_experts_stay_in_order():
    counts = loads()
    result = simulate(counts, n_ranks=4, policy="none", refresh=2)
    assert (result.rank_load == counts[2:].reshape(-1, LAYERS, 4, 3).sum(-1)).all()
    assert np.allclose(result.lower_bound, result.max_load)
    assert result.summary.slots_moved == 0


@pytest.mark.parametrize("split", ["lp", "even"])
@pytest.mark.parametrize("n_nodes", [1, 2, 4])
def test_cross_node_tokens_are_the_fewest_that_quotas_allow(split, n_nodes, monkeypatch):
    quotas = []
    cross_node = simulating._cross_node
    monkeypatch.setattr(
        simulating, "_cross_node", lambda p, c, quota: quotas.append((p, quota)) or cross_node(p, c, quota)
    )
    sources = loads(6, sources=4, seed=2)
    result = simulate(
        sources, n_ranks=4, n_physical=SLOTS, policy=Random(2), split=split, n_nodes=n_nodes, refresh=0, window=3
    )
    assert len(quotas) == LAYERS
    for layer, (placement, quota) in enumerate(quotas):
        for b, row in enumerate(quota):
            counts = sources[3 + b, layer]
            expected = traffic_of(placement.phy2log, counts, row, 4 // n_nodes).across_nodes
            assert result.cross_node[b, layer] == expected
            # and the token-by-token split sends no fewer and no more
            sent = reference.split_reference(counts, placement.phy2log, row, 4 // n_nodes)
            slots = np.arange(SLOTS) // (SLOTS // 4) // (4 // n_nodes)
            crosses = np.arange(4)[:, None] // (4 // n_nodes) != slots
            assert result.cross_node[b, layer] == sent[crosses].sum()
    assert result.summary.cross_node_share == result.cross_node.sum() / result.rank_load.sum()


def test_simulations_say_what_planners_do():
    """The trace on 8 ranks: tokens mapped by Planner.run, on every rank, load ranks as simulated and travel as far."""
    trace = scenes.trace(8)
    counts = trace.counts[:20, :2]
    result = simulate(counts, n_ranks=8, n_physical=80, policy="eplb", n_nodes=2, refresh=16, window=16)
    chosen = torch.from_numpy(scenes.load_trace().indices[:20, :2].astype(np.int64)).view(20, 2, 8, -1)
    for b, layer, placement in placed(result):
        ranks = [Known(rank, 8) for rank in range(8)]
        load, crossing = np.zeros(8, dtype=np.int64), 0
        for rank, exchange in enumerate(ranks):
            exchange.counts = torch.from_numpy(counts[16 + b, layer].astype(np.int32))
            planner = Planner.from_placement(placement, group=exchange, ranks_per_node=4)
            target = planner.run(chosen[16 + b, layer, rank], None) // 10
            load += np.bincount(target, minlength=8)
            crossing += int((target // 4 != rank // 4).sum())
        assert (result.rank_load[b, layer] == load).all()
        assert result.cross_node[b, layer] == crossing


def test_policies_see_the_window_before_and_nothing_else():
    counts, policy = loads(13), Random()
    result = simulate(counts, n_ranks=4, n_physical=SLOTS, policy=policy, refresh=4, window=6)
    assert result.placed_at == [4, 8, 12]
    for at, history in zip(result.placed_at, policy.seen, strict=True):
        assert (history == counts[max(0, at - 6) : at].transpose(1, 0, 2)).all()


@pytest.mark.parametrize(
    ("options", "placed_at"),
    [
        ({"refresh": 0, "window": 5}, [5]),
        ({"refresh": 0, "window": 5, "warmup": 2}, [2]),
        ({"refresh": 3, "warmup": 1}, [1, 4, 7]),
        ({"refresh": 8}, [8]),
    ],
)
def test_when_experts_are_placed(options, placed_at):
    result = simulate(loads(9), n_ranks=4, n_physical=SLOTS, policy=Random(), **options)
    assert result.placed_at == placed_at
    assert result.first == placed_at[0]
    assert len(result.rank_load) == 9 - placed_at[0]


def test_moved_slots_are_experts_new_to_their_rank():
    policy = Random(5)
    result = simulate(loads(12), n_ranks=4, n_physical=SLOTS, policy=policy, refresh=3, expert_bytes=7)
    for i, layer in np.ndindex(result.slots_moved.shape):
        moved = 0
        if i:
            old, new = (p[layer].phy2log.view(4, -1).tolist() for p in policy.made[i - 1 : i + 1])
            moved = sum(len(set(b) - set(a)) for a, b in zip(old, new, strict=True))
        assert result.slots_moved[i, layer] == moved
    assert result.summary.moved_bytes == 7 * result.slots_moved.sum() > 0
    assert result.summary.refreshes == 2


def test_placements_that_stay_move_nothing():
    same = [Placement(cases.random_placement(np.random.default_rng(0), 4, 4, EXPERTS, 5), 4)] * LAYERS
    relabelled = [Placement(p.phy2log.view(4, -1).flip(1).flatten(), 4) for p in same]
    answers = iter([same, relabelled, same])
    result = simulate(loads(9), n_ranks=4, n_physical=SLOTS, policy=lambda _: next(answers), refresh=3)
    assert result.slots_moved.sum() == 0


@pytest.mark.parametrize("policy", ["eplb", "eplb-distinct", "lp"])
@pytest.mark.parametrize(("group_size", "n_nodes"), [(4, 1), (2, 1), (4, 2), (2, 2)])
def test_names_of_ranks_move_nothing(policy, group_size, n_nodes):
    """New placements are the policy's own, under the names of ranks that brute force finds to move least."""
    counts = loads(13, seed=4)
    options = {"group_size": group_size, "n_nodes": n_nodes}
    result = simulate(counts, n_ranks=4, n_physical=SLOTS, policy=policy, refresh=4, window=4, **options)
    node = 4 // n_nodes
    names = [
        order
        for order in itertools.permutations(range(4))
        if all(
            len({order[r] // size for r in range(first, first + size)}) == 1
            for size in (group_size, node)
            for first in range(0, 4, size)
        )
    ]
    least = plain = 0
    for i, layer in np.ndindex(result.slots_moved.shape):
        history = counts[4 * i : 4 * i + 4, layer]
        own = place(history, n_ranks=4, n_physical=SLOTS, policy=policy, **options)
        held, anew = (
            [set(rank) for rank in p.phy2log.view(4, -1).tolist()] for p in (result.placements[i][layer], own)
        )
        assert any([anew[r] for r in order] == held for order in names)
        if i:
            old = [set(rank) for rank in result.placements[i - 1][layer].phy2log.view(4, -1).tolist()]
            costs = [sum(len(anew[r] - old[k]) for k, r in enumerate(order)) for order in names]
            assert result.slots_moved[i, layer] == min(costs)
            least, plain = least + min(costs), plain + costs[0]
    assert least < plain


def test_nodes_that_cut_groups_keep_their_names():
    result = simulate(loads(7, n_logical=24), n_ranks=12, policy="eplb", group_size=6, n_nodes=3, refresh=3, window=3)
    own = [
        place(loads(7, n_logical=24)[3:6, layer], n_ranks=12, n_physical=48, policy="eplb", group_size=6)
        for layer in range(LAYERS)
    ]
    assert result.placements[1] == own


def test_summary_is_numpys():
    sources = loads(15, sources=2, seed=8)
    result = simulate(
        sources,
        n_ranks=4,
        n_physical=SLOTS,
        policy=Random(8),
        n_nodes=2,
        refresh=5,
        layer_seconds=lambda quota, placement: quota.reshape(len(quota), placement.n_ranks, -1).sum(2).max(1) * 1e-9,
    )
    most, mean = result.rank_load.max(2), sources.sum((2, 3))[result.first :] / 4
    s = result.summary
    assert s.imbalance_mean == pytest.approx((most / mean).mean())
    assert s.imbalance_p99 == pytest.approx(np.quantile(most / mean, 0.99))
    assert s.imbalance_max == pytest.approx((most / mean).max())
    assert s.balancedness == pytest.approx((mean / most).mean())
    assert s.bound_mean == pytest.approx((result.lower_bound / mean).mean())
    assert s.layer_seconds_mean == pytest.approx(most.mean() * 1e-9)
    assert (s.iterations_max, s.gap_max) == (result.iterations.max(), result.gap.max())
    assert s.unsolved == 0


def test_phases_have_means_of_their_own():
    result = simulate(loads(9), n_ranks=4, policy="eplb", refresh=3)
    means = result.by_phase(["a"] * 4 + ["b"] * 2 + ["a"] * 3)
    assert list(means) == ["a", "b"]
    for name, rows in (("a", [0, 3, 4, 5]), ("b", [1, 2])):
        assert means[name].batches == len(rows)
        assert means[name].imbalance_mean == pytest.approx(result.imbalance[rows].mean())
        assert means[name].imbalance_p99 == pytest.approx(np.percentile(result.imbalance[rows], 99))
        assert means[name].bound_mean == pytest.approx(result.bound_imbalance[rows].mean())
    with pytest.raises(ValueError, match="phase has 8 entries, allowed is one per batch, 9"):
        result.by_phase(["a"] * 8)


def test_a_layer_without_tokens_is_balanced():
    counts = loads()
    counts[:, 1] = 0
    result = simulate(counts, n_ranks=4, policy="eplb", refresh=3)
    assert (result.imbalance[:, 1] == 1).all()
    assert (result.bound_imbalance[:, 1] == 1).all()
    assert (result.rank_load[:, 1] == 0).all()


@pytest.mark.parametrize("policy", NAMES)
def test_every_policy_by_name(policy):
    n_ranks = {"hypercube": 16}.get(policy, 8)
    scene = scenes.make("lognormal", 20, LAYERS, 64, tokens=4096, sources=2)
    result = simulate(scene.counts, n_ranks=n_ranks, policy=policy, n_nodes=2)
    assert result.setting.n_physical == 64 + (0 if policy == "none" else 2 * n_ranks)
    assert result.solved.all()
    plain = simulate(scene.counts, n_ranks=n_ranks, policy="none")
    assert result.summary.imbalance_mean <= plain.summary.imbalance_mean
    again = simulate(scene.counts, n_ranks=n_ranks, policy=policy, n_nodes=2)
    assert (result.rank_load == again.rank_load).all()


@pytest.mark.parametrize(
    ("policy", "n_logical"), [("none", 960), ("eplb", 1024), ("eplb-distinct", 1024), ("lp", 1024), ("circulant", 960)]
)
def test_320_ranks_in_groups_of_80(policy, n_logical):
    counts = scenes.lognormal(4, 1, n_logical, tokens=1 << 20, sigma=0.4, seed=1)
    options = {"group_size": 80, "refresh": 0, "window": 3, "solver": "flow"}
    result = simulate(counts, n_ranks=320, policy=policy, **options)
    assert result.rank_load.shape == (1, 1, 320)
    assert result.rank_load.sum() == 1 << 20
    assert result.solved.all()
    best = reference.exact_bottleneck(result.placements[0][0].phy2log, 320, 80, counts[3, 0])
    assert result.max_load[0, 0] == max(group.max_load for group in best)


@pytest.mark.parametrize(
    ("n", "near", "classes"), [(32, 8, 2), (32, 1, 2), (64, 8, 4), (8, 4, 1), (16, 8, 1), (3, 1, 2)]
)
def test_circulants_leave_the_node_where_they_can(n, near, classes):
    r2o = topology_by_name("circulant", n, classes, near)
    shifts = [(int(r2o[0, k])) for k in range(classes)]
    assert len(set(shifts)) == classes
    for shift in shifts:
        assert near <= shift <= n - near
    if classes == 2 and n > 3:
        assert sum(shifts) != n  # the same pairs of ranks twice


# ---- checks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: replace(plan, quota=plan.quota.roll(1, -1)), "its copies serve"),
        (lambda plan: replace(plan, quota=_swap_copies(plan.quota)), "do not give the rank loads"),
        (lambda plan: replace(plan, lower_bound=plan.lower_bound + 1000), "below the certified bound"),
    ],
    ids=["experts", "copies", "bound"],
)
def test_a_wrong_plan_is_caught(monkeypatch, change, message):
    solve = Planner.solve
    monkeypatch.setattr(Planner, "solve", lambda self, counts: change(solve(self, counts)))
    fixed = [Placement([*range(12), 3, 0, 4, 1, 5, 2, 7, 6], 4)] * LAYERS
    with pytest.raises(CheckFailed, match=message):
        simulate(loads(), n_ranks=4, n_physical=SLOTS, policy=lambda _: fixed, refresh=3)


def _swap_copies(quota):
    """Exchange what the two copies of each of two experts serve."""
    changed = quota.clone()
    changed[..., [3, 12]] = quota[..., [12, 3]] + torch.tensor([1, -1], dtype=torch.int32)
    return changed


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "policy is 'best', allowed are 'none', 'lp', 'eplb', 'eplb-distinct', 'lp-change',"),
        ({"split": "odd"}, "split is 'odd', allowed are 'lp', 'even'"),
        ({"solver": "simplex"}, "solver is 'simplex', allowed"),
        ({"n_ranks": 0}, "n_ranks is 0, allowed is 1 or more"),
        ({"n_ranks": 5}, "n_physical is 20"),
        ({"n_physical": 11}, "n_physical is 11, allowed is 12 or more"),
        ({"n_physical": 22}, "n_physical is 22, allowed is a multiple of n_ranks = 4"),
        ({"policy": "none"}, "n_physical is 20, allowed is 12 to 12"),
        ({"group_size": 3}, "n_ranks is 4, allowed is a multiple of group_size = 3"),
        ({"group_size": 129}, "group_size is 129, allowed is 1 to 128"),
        ({"n_ranks": 320, "n_physical": 640}, "group_size is None, which stands for all 320 ranks"),
        ({"n_nodes": 3}, "n_ranks is 4, allowed is a multiple of n_nodes = 3"),
        ({"refresh": -1}, "refresh is -1, allowed is 0 or more"),
        ({"window": 0}, "window is 0, allowed is 1 or more"),
        ({"warmup": 0}, "warmup is 0, allowed is 1 or more"),
        ({"refresh": 9}, "loads has 9 batches, allowed are 10 or more: the first 9 are history"),
        ({"expert_bytes": -1}, "expert_bytes is -1"),
        ({"policy": "cube"}, "policy 'cube' has balance groups of 4 ranks, allowed are 8"),
        ({"policy": "ring", "n_physical": 12}, "policy 'ring' has 0 redundant slots per rank, allowed is a multiple"),
        ({"policy": "torus", "group_size": 2}, "allowed are products of two numbers"),
        ({"policy": "circulant", "n_physical": 28}, "has 4 redundant slots per rank, allowed are 1 to 3"),
    ],
)
def test_refuses_by_value(options, message):
    given = {"n_ranks": 4, "n_physical": SLOTS, "policy": "eplb", "refresh": 3, **options}
    if given["n_ranks"] == 5:
        message = "n_logical|n_physical|multiple"
        given["n_physical"] = 21
    with pytest.raises(ValueError, match=message):
        simulate(loads(), **given)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (lambda: loads()[0], ValueError, r"loads has shape \[2, 12\], allowed is"),
        (lambda: loads()[:0], ValueError, r"loads has shape \[0, 2, 12\], allowed is"),
        (lambda: loads().astype(float), TypeError, "loads has dtype float64, allowed is an integer"),
        (lambda: loads().tolist(), TypeError, "loads is a list, allowed is an array"),
        (lambda: loads() - 1000, ValueError, "loads has -1000, allowed are 0 to 2147483647"),
        (lambda: np.full((9, 1, 12), 2**31), ValueError, "loads has 2147483648, allowed"),
        (lambda: np.full((9, 1, 4, 12), 2**30), ValueError, "loads has 4294967296 tokens of an expert over all"),
        (lambda: loads(sources=3), ValueError, "loads has 3 sources, allowed is a multiple of n_nodes = 2"),
    ],
)
def test_refuses_loads(given, kind, message):
    with pytest.raises(kind, match=message):
        simulate(given(), n_ranks=4, policy="eplb", n_nodes=2, refresh=3)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (None, TypeError, "policy returned a NoneType, allowed is a list of 2 placements"),
        ([Placement(range(12), 4)], TypeError, "policy returned a list, allowed is a list of 2 placements"),
        ([1, 2], TypeError, "policy returned a list with a int, allowed is an lplb.Placement"),
        ([Placement(range(12), 4)] * 2, ValueError, r"a placement of \(4, 12, 12\) .*, allowed is \(4, 12, 20\)"),
    ],
)
def test_refuses_what_a_policy_returns(answer, kind, message):
    with pytest.raises(kind, match=message):
        simulate(loads(), n_ranks=4, n_physical=SLOTS, policy=lambda _: answer, refresh=3)


def test_refuses_other_seconds():
    with pytest.raises(ValueError, match=r"layer_seconds returned shape \[20\], allowed is one per batch, \[3\]"):
        simulate(loads(), n_ranks=4, n_physical=SLOTS, policy=Random(), refresh=3, layer_seconds=lambda q, _: q[0])


def test_numbers_of_numpy_are_numbers():
    n = np.int64
    options = {"n_ranks": n(4), "n_physical": n(SLOTS), "n_nodes": n(2), "refresh": n(3), "expert_bytes": n(5)}
    result = simulate(loads(sources=2), policy="eplb", group_size=n(2), window=n(4), **options)
    assert json.loads(results.to_json([result], PHASE, "x"))["simulations"][0]["setting"]["n_nodes"] == 2


# ---- what is best


def timed(seconds, policy, n_ranks=4, tokens=480):
    return simulate(
        loads(tokens=tokens),
        n_ranks=n_ranks,
        policy=policy,
        refresh=3,
        layer_seconds=lambda quota, _: np.full(len(quota), seconds),
    )


def test_least_imbalance_and_least_time_are_marked_each():
    slow, fast, other = timed(162e-6, "lp"), timed(62e-6, "none"), timed(70e-6, "none", n_ranks=2)
    assert slow.summary.imbalance_mean < fast.summary.imbalance_mean
    assert best_columns([fast, slow, other]) == [{6}, {0}, {0, 6}]
    untimed = replace(fast, layer_seconds=None), replace(slow, layer_seconds=None)
    assert best_columns(untimed) == [set(), {0}]
    assert remark(untimed, 2, 100e-6) == ""


def test_says_where_balance_is_not_the_fastest():
    slow, fast, other = timed(162e-6, "lp"), timed(62e-6, "none"), timed(70e-6, "none", n_ranks=2)
    said = remark([fast, slow, other], 2, 100e-6)
    assert (
        "on 4 ranks (60 tokens, 120 choices, per rank) lp / lp 162 µs, none 62 µs." in said
    )  # 480 choices, 2 of each token, 4 ranks
    assert "There the 100 µs that are assumed for the planner cost more than balance saves" in said
    assert "2 ranks" not in said
    assert "--scale" in said
    assert "lplb advise" in said
    assert "once more each, and the 90 µs that" in remark([fast, slow], 2, 90e-6)
    dealt = replace(slow, setting=replace(slow.setting, split="even"))
    assert "once more each, cost more" in remark([fast, dealt], 2, 90e-6)
    assert remark([slow, timed(170e-6, "none")], 2, 100e-6) == ""


# ---- files


@pytest.fixture(scope="module")
def two():
    counts = loads(9, sources=4, seed=6)
    options = {"refresh": 3, "n_nodes": 2, "expert_bytes": 10}
    model = {"layer_seconds": lambda quota, placement: quota.sum(1) * 1e-9}
    return [
        simulate(counts, n_ranks=4, policy="eplb", **options, **model),
        simulate(counts.sum(2), n_ranks=2, policy="none", refresh=3),
    ]


PHASE = [f"p, {i}" for i in range(9)]


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_of_batches_has_every_number(two):
    lines = rows(results.batches_csv(two, PHASE))
    assert list(lines[0]) == list(results.BATCH_COLUMNS)
    assert len(lines) == 2 * 6 * LAYERS
    for s, part in zip(two, (lines[:12], lines[12:]), strict=True):
        for line, (b, layer) in zip(part, np.ndindex(6, LAYERS), strict=True):
            at = b, layer
            assert (line["configuration"], int(line["n_ranks"])) == (s.setting.name, s.setting.n_ranks)
            assert (int(line["batch"]), int(line["layer"]), line["phase"]) == (3 + b, layer, PHASE[3 + b])
            assert int(line["tokens"]) == s.rank_load[at].sum()
            assert int(line["max_load"]) == s.rank_load[at].max()
            assert float(line["mean_load"]) == s.rank_load[at].mean()
            assert float(line["imbalance"]) == s.imbalance[at]
            assert float(line["lower_bound"]) == s.lower_bound[at]
            assert float(line["bound_imbalance"]) == s.bound_imbalance[at]
            assert (int(line["iterations"]), float(line["gap"])) == (s.iterations[at], s.gap[at])
            assert line["solved"] == "1"
            assert line["cross_node_tokens"] == ("" if s.cross_node is None else str(s.cross_node[at]))
            assert line["layer_seconds"] == ("" if s.layer_seconds is None else str(s.layer_seconds[at]))
            moved = s.slots_moved[1][layer] if b == 3 else 0
            assert (int(line["slots_moved"]), int(line["moved_bytes"])) == (moved, moved * s.expert_bytes)


def test_csv_of_rank_loads_and_summaries(two):
    lines = rows(results.rank_loads_csv(two))
    assert [int(lines[0][f"rank_{r}"]) for r in range(4)] == two[0].rank_load[0, 0].tolist()
    assert [lines[12][f"rank_{r}"] for r in range(4)] == [*map(str, two[1].rank_load[0, 0]), "", ""]
    summary = rows(results.summary_csv(two))
    assert list(summary[0]) == list(results.SUMMARY_COLUMNS)
    for s, line in zip(two, summary, strict=True):
        assert float(line["imbalance_mean"]) == s.imbalance.mean()
        assert int(line["slots_moved"]) == s.slots_moved.sum()
        assert line["layer_seconds_mean"] == ("" if s.layer_seconds is None else str(s.layer_seconds.mean()))


def test_json_has_everything(two):
    data = json.loads(results.to_json(two, PHASE, "a name"))
    assert (data["format"], data["version"], data["loads"]) == ("lplb.simulations", 1, "a name")
    assert data["phase"] == PHASE
    for s, got in zip(two, data["simulations"], strict=True):
        assert got["setting"]["policy"] == s.setting.policy
        assert {*got["setting"], *got["summary"]} == set(results.SUMMARY_COLUMNS)
        assert got["summary"]["imbalance_mean"] == s.summary.imbalance_mean
        assert set(got["batches"]) - {"rank_load"} <= set(results.BATCH_COLUMNS)
        for name, values in got["batches"].items():
            expected = {"cross_node_tokens": s.cross_node}.get(name, getattr(s, name, None))
            assert values is None if expected is None else np.array_equal(values, expected)
        for at, answer, placements in zip(s.placed_at, got["placements"], s.placements, strict=True):
            assert answer["before_batch"] == at
            assert [Placement(phy2log, s.setting.n_ranks) for phy2log in answer["phy2log"]] == placements


def test_files_are_written(two, tmp_path):
    paths = results.write_files(tmp_path / "new" / "folder", two, PHASE, "x")
    assert sorted(p.rsplit("/")[-1] for p in paths) == [
        "batches.csv",
        "rank_loads.csv",
        "simulation.json",
        "summary.csv",
    ]
    assert (tmp_path / "new" / "folder" / "summary.csv").read_text() == results.summary_csv(two)


def test_the_manual_has_every_column():
    manual = (Path(__file__).parents[1] / "docs" / "simulate.md").read_text()
    for columns in (results.SUMMARY_COLUMNS, results.BATCH_COLUMNS):
        for name, meaning in columns.items():
            assert f"| `{name}` | {meaning} |" in manual
