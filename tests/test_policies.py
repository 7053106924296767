"""`lplb.policies`: scores against HiGHS, and placements of every policy."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from reference import ReferenceLP
from reference_eplb import rebalance_reference

from lplb.formats import with_equal_loads
from lplb.history import LoadHistory
from lplb.placement import Placement
from lplb.planner import Planner
from lplb.policies import FALLBACKS, POLICIES, imbalance, likely_loads, optima, place

ROUNDING = 1e-8  # of a mean rank load

GEOMETRIES = [
    # n_logical, n_ranks, group_size, n_physical
    (16, 4, 4, 24),
    (24, 6, 3, 36),
    (64, 32, 32, 128),
    (128, 128, 128, 256),
    (5, 4, 4, 20),
]


def history(seed, n_logical, batches=None):
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0, 0.85, n_logical)
    shape = (n_logical,) if batches is None else (batches, n_logical)
    loads = base * rng.lognormal(0, 0.4, shape)
    return loads


@pytest.mark.parametrize(("n_logical", "n_ranks", "group_size", "n_physical"), GEOMETRIES)
@pytest.mark.parametrize("whole", [True, False])
def test_optima_are_those_of_the_linear_program(highs, n_logical, n_ranks, group_size, n_physical, whole):
    past = history(1, n_logical, 4)
    placement = place(past, n_ranks=n_ranks, n_physical=n_physical, group_size=group_size, policy="eplb")
    loads = history(2, n_logical, 6)
    if whole:
        loads = np.floor(loads * 1000)
        loads[0, ::2] = 0
    loads[1] = 0
    found = optima(placement, loads, group_size)
    reference = ReferenceLP(placement.phy2log.numpy(), n_ranks, group_size)
    expected = np.array([reference.solve(load) for load in loads])
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_array_equal(optima(placement, torch.from_numpy(loads), group_size, threads=3), found)
    np.testing.assert_array_equal(optima(placement, loads[2], group_size), found[2])

    worst = expected.max(axis=1)
    mean = loads.sum(axis=1) / n_ranks
    ratio = np.where(mean > 0, worst / np.where(mean > 0, mean, 1), 1)
    np.testing.assert_allclose(imbalance(placement, loads, group_size), ratio, rtol=1e-9)


@st.composite
def geometries(draw):
    """n_logical, n_ranks, n_physical, group_size, n_groups, n_nodes that `place` serves."""
    group_size = draw(st.integers(1, 8))
    n_ranks = group_size * draw(st.integers(1, 4))
    per_node = draw(st.sampled_from([n for n in range(1, n_ranks + 1) if n_ranks % n == 0]))
    n_nodes = n_ranks // per_node
    nested = per_node % group_size == 0 or group_size % per_node == 0
    n_groups = draw(st.integers(1, 4)) * (n_nodes if nested and draw(st.booleans()) else 1)
    n_logical = n_groups * draw(st.integers(1, 12))
    limited = n_nodes > 1 and n_groups % n_nodes == 0
    parts = n_ranks // min(group_size, per_node) if limited else n_ranks // group_size
    assume(n_logical >= parts and (nested or not limited))
    least = -(-n_logical // n_ranks)
    most = n_logical // n_nodes // max(1, per_node // group_size) if limited else n_logical // parts
    assume(least <= most)
    n_physical = n_ranks * draw(st.integers(least, most))
    return n_logical, n_ranks, n_physical, group_size, n_groups, n_nodes


@given(geometries(), st.sampled_from(POLICIES), st.sampled_from(FALLBACKS), st.integers(1, 3), st.integers(0, 999))
def test_every_policy_serves_every_geometry(geometry, policy, fallback, batches, seed):
    n_logical, n_ranks, n_physical, group_size, n_groups, n_nodes = geometry
    past = history(seed, n_logical, batches)
    past[:, np.random.default_rng(seed).random(n_logical) < 0.2] = 0
    past[0, 0] += 1
    placement = place(
        past,
        n_ranks=n_ranks,
        n_physical=n_physical,
        policy=policy,
        group_size=group_size,
        n_groups=n_groups,
        n_nodes=n_nodes,
        fallback=fallback,
    )
    assert isinstance(placement, Placement)  # which is checked as it is made
    assert (placement.n_logical, placement.n_ranks, placement.n_physical) == (n_logical, n_ranks, n_physical)
    placement.check_groups(group_size)
    if n_groups % n_nodes == 0:
        node_of = placement.rank_of.numpy() // (n_ranks // n_nodes)
        group_of = placement.phy2log.numpy() // (n_logical // n_groups)
        for group in range(n_groups):
            assert len(set(node_of[group_of == group])) == 1


def even_split(placement, loads):
    """The largest rank load of every load when experts are dealt out evenly over their copies."""
    slots = (loads / placement.logcnt.numpy())[:, placement.phy2log.numpy()]
    return slots.reshape(len(loads), placement.n_ranks, -1).sum(axis=2).max(axis=1)


def no_worse(past, n_ranks, n_physical, group_size):
    """Check ``"lp"`` against both EPLBs by what it minimises, with either fallback."""
    where = {"n_ranks": n_ranks, "n_physical": n_physical, "group_size": group_size}
    loads = likely_loads(past)

    def lp(placement):
        return optima(placement, loads, group_size).max(axis=1).mean() * n_ranks

    def both(placement):
        return lp(placement) + even_split(placement, loads).mean() * n_ranks

    for policy in ("eplb", "eplb-distinct"):
        eplb = place(past, policy=policy, **where)
        assert lp(place(past, **where)) <= lp(eplb) + ROUNDING
        assert both(place(past, fallback="even", **where)) <= both(eplb) + ROUNDING


SIZES = [(256, 32, 288), (64, 32, 128), (128, 8, 136), (24, 6, 36)]


@pytest.mark.parametrize(("n_logical", "n_ranks", "n_physical"), SIZES)
@pytest.mark.parametrize("batches", [None, 8])
def test_lp_is_never_worse_than_eplb_by_what_it_minimises(n_logical, n_ranks, n_physical, batches):
    for seed in range(5):
        for group_size in {n_ranks, n_ranks // 2}:
            no_worse(history(seed, n_logical, batches), n_ranks, n_physical, group_size)


@given(geometries(), st.integers(1, 4), st.integers(0, 999))
@example((9, 3, 12, 3, 1, 1), 8, 202)  # where the published EPLB, spread, is best
def test_lp_is_never_worse_than_eplb_on_any_geometry(geometry, batches, seed):
    n_logical, n_ranks, n_physical, group_size, _, _ = geometry
    parts = n_ranks // group_size
    assume(n_logical >= parts and n_physical <= n_logical // parts * n_ranks)
    no_worse(np.random.default_rng(seed).lognormal(0, 1, (batches, n_logical)), n_ranks, n_physical, group_size)


def imbalance_of(placement, loads):
    return imbalance(placement, loads).mean()


@pytest.mark.parametrize(
    ("n_logical", "n_ranks", "redundant", "drift", "gain"),
    [(256, 32, 32, 0.3, 0.05), (256, 32, 32, 0.6, 0.08), (256, 32, 64, 0.6, 0.06), (128, 8, 8, 0.6, 0.02)],
)
def test_lp_levels_loads_to_come_better_than_eplb(n_logical, n_ranks, redundant, drift, gain):
    gains = []
    for seed in range(2000, 2004):
        rng = np.random.default_rng(seed)
        base = rng.lognormal(0, 0.85, n_logical)
        loads = base * rng.lognormal(0, drift, (96, n_logical))
        past, future = loads[:64], loads[64:]
        where = {"n_ranks": n_ranks, "n_physical": n_logical + redundant}
        eplb = imbalance_of(place(past, policy="eplb", **where), future)
        gains.append([eplb - imbalance_of(place(h, **where), future) for h in (past.mean(axis=0), past)])
    assert np.mean(gains, axis=0).min() > gain


def test_experts_that_drift_together_are_kept_apart():
    """Only a history of batches shows it, not their mean."""
    n_logical, n_ranks = 128, 8
    where = {"n_ranks": n_ranks, "n_physical": n_logical + n_ranks}
    blind, seeing = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        cluster = rng.integers(0, 8, n_logical)
        common = rng.lognormal(0, 0.5, (128, 8))[:, cluster]
        loads = rng.lognormal(0, 0.85, n_logical) * common * rng.lognormal(0, 0.2, (128, n_logical))
        past, future = loads[:64], loads[64:]
        blind.append(imbalance_of(place(past.mean(axis=0), **where), future))
        seeing.append(imbalance_of(place(past, **where), future))
    assert np.mean(seeing) - 1 < 0.6 * (np.mean(blind) - 1)


def test_experts_that_drift_far_get_copies():
    rng = np.random.default_rng(3)
    sigma = np.where(np.arange(64) < 8, 0.9, 0.1)
    past = rng.lognormal(-(sigma**2) / 2, sigma, (64, 64))
    copies = place(past, n_ranks=8, n_physical=72).logcnt
    assert int(copies[:8].sum()) - 8 >= 6


def sent_away(placement, sent):
    """The share of tokens that cross nodes when the LP's quotas are filled with a node's own tokens first.

    sent: whole tokens [batches, n_nodes, n_logical].
    """
    quota = Planner.from_placement(placement).solve(torch.from_numpy(sent.sum(axis=1))).quota.numpy()
    node = placement.rank_of.numpy() * sent.shape[1] // placement.n_ranks
    held = np.zeros(sent.shape)
    for slot, expert in enumerate(placement.phy2log.tolist()):
        held[:, node[slot], expert] += quota[:, slot]
    return 1 - np.minimum(held, sent).sum() / sent.sum()


@pytest.mark.parametrize(("n_logical", "n_ranks", "redundant", "n_nodes"), [(64, 16, 32, 4), (128, 32, 64, 4)])
def test_ranks_stand_where_their_tokens_are(n_logical, n_ranks, redundant, n_nodes):
    where = {"n_ranks": n_ranks, "n_physical": n_logical + redundant}
    rng = np.random.default_rng(0)
    base = rng.lognormal(0, 0.85, n_logical) * rng.lognormal(0, 0.8, (n_nodes, n_logical))
    sent = rng.poisson(3000 * base / base.mean() * rng.lognormal(0, 0.3, (32, n_nodes, n_logical)))
    past, future = sent[:16].sum(axis=1), sent[16:]
    sources = np.repeat(sent[:16].sum(axis=0), n_ranks // n_nodes, axis=0)
    anywhere = place(past, **where)
    by_copies = place(past, n_nodes=n_nodes, **where)
    by_sources = place(past, n_nodes=n_nodes, sources=sources, **where)
    assert by_sources == place(past[None], n_nodes=n_nodes, sources=sources[None], **where)[0]
    away = [sent_away(p, future) for p in (anywhere, by_copies, by_sources)]
    assert away[2] < 0.9 * away[1] < away[0]
    # the same ranks in another order: to balance it is all one
    ranks = [sorted(map(sorted, p.phy2log.view(n_ranks, -1).tolist())) for p in (anywhere, by_copies, by_sources)]
    assert ranks[0] == ranks[1] == ranks[2]


def test_placements_depend_on_nothing_but_the_arguments():
    layers = np.stack([history(seed, 64, 5) for seed in range(4)])
    where = {"n_ranks": 16, "n_physical": 96}
    for policy in POLICIES:
        placed = place(layers, policy=policy, **where)
        assert placed == place(torch.from_numpy(layers), policy=policy, threads=3, **where)
        assert placed == [place(layer.tolist(), policy=policy, **where) for layer in layers]
        # a power of two changes no bit but exponents; whole batches may have any number of tokens
        assert placed == place(layers * 2.0**20, policy=policy, **where)


def test_placements_are_the_same_on_every_instruction_set():
    script = (
        "import numpy as np; from lplb.policies import place; rng = np.random.default_rng(5);"
        "placed = place(rng.lognormal(0, 0.8, (2, 4, 64)), n_ranks=16, n_physical=96);"
        "print([p.phy2log.tolist() for p in placed])"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, **env}, capture_output=True, text=True, check=True
        ).stdout
        for env in ({}, {"LPLB_ISA": "portable"})
    ]
    assert said[0] == said[1]
    assert len(said[0]) > 2 * 96


def test_eplb_is_the_published_one():
    past = history(1, 32)
    where = {"n_ranks": 8, "n_physical": 40}
    published, _, _ = rebalance_reference(torch.from_numpy(past / past.sum())[None].float(), 40, 4, 2, 8)
    rows = published.reshape(8, 5)
    assert all(len(set(row.tolist())) == 5 for row in rows), "the seed was chosen so that no copies meet"
    placement = place(past, policy="eplb", n_groups=4, n_nodes=2, **where)
    assert placement.phy2log.tolist() == published[0].tolist()


def test_eplb_takes_no_copy_beyond_one_on_each_rank():
    rng = np.random.default_rng(6)
    for n_logical, n_ranks, n_physical in [(8, 4, 16), (16, 8, 40), (32, 32, 640)]:
        past = rng.lognormal(0, 2, n_logical)
        past[: n_logical // 2] *= rng.random(n_logical // 2) < 0.5
        count = rebalance_reference(torch.from_numpy(past / past.sum())[None].float(), n_physical, 1, 1, n_ranks)[2]
        assert count.max() > n_ranks, "the seed was chosen so that there are more"
        copies = place(past, n_ranks=n_ranks, n_physical=n_physical, policy="eplb").logcnt.numpy()
        assert (copies[count[0] >= n_ranks] == n_ranks).all()
        assert (copies >= np.minimum(count[0], n_ranks)).all()


def test_the_unit_of_loads_does_not_matter():
    past = history(3, 8, 4)
    placed = place(past, **GOOD)
    ratio = imbalance(placed, past)
    for exponent in (-664, -500, 90):  # 2^-664 is 1e-200
        assert place(past * 2.0**exponent, **GOOD) == placed
    for scale in (1e-200, 1e-150, 1e28):
        np.testing.assert_allclose(imbalance(placed, past * scale), ratio, rtol=1e-9)
    for scale in (1e-202, 1e-300, 1e-305, 1e-320):
        with pytest.raises(ValueError, match=r"loads\[0\] adds up to .*e-.*, allowed is 0, or 1e-200 or more"):
            imbalance(placed, past * scale)
    past[2] *= 1e-305
    with pytest.raises(ValueError, match=r"history\[2\] adds up to"):
        place(past, **GOOD)
    with pytest.raises(ValueError, match="history adds up to"):
        place(past[2], **GOOD)


def test_likely_loads_of_a_mean_drift_by_three_and_by_six_tenths():
    mean = history(1, 500)
    loads = likely_loads(mean) * mean.sum()
    np.testing.assert_allclose(loads.sum(axis=1), mean.sum())
    drift = np.log(loads / mean)
    sigma = np.sort(drift.std(axis=1))
    assert len(sigma) % 2 == 0
    sigma = sigma.reshape(2, -1).mean(axis=1)
    np.testing.assert_allclose(sigma, [0.3, 0.6], rtol=0.05)
    np.testing.assert_allclose(loads.mean(axis=0) / mean, 1, atol=0.1)


def test_likely_loads_of_a_history_drift_and_correlate_as_it_does():
    rng = np.random.default_rng(2)
    n_logical, batches = 60, 200
    base = rng.lognormal(0, 0.8, n_logical)
    sigma = np.where(np.arange(n_logical) < 30, 0.35, 0.7)
    common = 0.8 * rng.standard_normal((batches, 1)) * (np.arange(n_logical) % 2)
    past = base * np.exp(sigma * rng.standard_normal((batches, n_logical)) + common)
    past[5] = 0  # an empty batch says nothing
    seen = past[past.sum(axis=1) > 0]
    share = seen / seen.sum(axis=1, keepdims=True)
    loads = likely_loads(past)
    spread = loads.std(axis=0) / loads.mean(axis=0), share.std(axis=0) / share.mean(axis=0)
    assert 0.7 < np.median(spread[0] / spread[1]) < 1.2
    assert np.corrcoef(*spread)[0, 1] > 0.6
    together = [np.corrcoef(x.T)[1::2, 1::2].mean() for x in (loads, share)]
    assert 0.5 * together[1] < together[0] < together[1]


GOOD = {"n_ranks": 4, "n_physical": 12}


@pytest.mark.parametrize(
    ("past", "changed", "error", "message"),
    [
        ([1.0, -2.0], {}, ValueError, r"history\[1\] is -2.0, allowed are 0 to"),
        ([1.0, float("nan")], {}, ValueError, r"history\[1\] is nan"),
        ([[1.0, float("inf")]], {}, ValueError, r"history\[0, 1\] is inf"),
        ([0.0] * 8, {}, ValueError, "history is 0 everywhere, allowed is at least one load above 0"),
        ([[[1.0] * 8], [[0.0] * 8]], {}, ValueError, "history is 0 everywhere in layer 1"),
        ([], {}, ValueError, r"history has shape \[0\]"),
        (np.ones((1, 1, 1, 8)), {}, ValueError, r"history has shape \[1, 1, 1, 8\]"),
        ([[1.0, 2.0], [1.0]], {}, ValueError, "history is no array"),
        ([True] * 8, {}, TypeError, "history has dtype bool"),
        (torch.ones(8, dtype=torch.complex64), {}, TypeError, "history has dtype torch.complex64"),
        ("12345678", {}, TypeError, "history is a str"),
        ([1.0] * 8, {"n_physical": 4}, ValueError, "n_physical is 4, allowed is n_logical = 8 or more"),
        ([1.0] * 8, {"n_physical": 36}, ValueError, "n_physical is 36, allowed is at most 32: 8 slots on each rank"),
        ([1.0] * 8, {"n_physical": 13}, ValueError, "n_physical is 13, allowed is a multiple of n_ranks = 4"),
        ([1.0] * 8, {"group_size": 2, "n_physical": 20}, ValueError, "n_physical is 20, allowed is at most 16"),
        ([1.0] * 8, {"group_size": 3}, ValueError, "n_ranks is 4, allowed is a multiple of group_size = 3"),
        ([1.0] * 8, {"n_ranks": 256, "n_physical": 256}, ValueError, "group_size is None"),
        ([1.0] * 8, {"n_groups": 3}, ValueError, "n_logical is 8, allowed is a multiple of n_groups = 3"),
        ([1.0] * 8, {"n_nodes": 3}, ValueError, "n_ranks is 4, allowed is a multiple of n_nodes = 3"),
        (
            [1.0] * 12,
            {"n_ranks": 12, "n_groups": 3, "n_nodes": 3, "group_size": 6},
            ValueError,
            "group_size is 6, allowed with 3 nodes is a divisor or a multiple of the 4 ranks",
        ),
        ([1.0] * 8, {"policy": "best"}, ValueError, "policy is 'best', allowed are 'lp', 'eplb', 'eplb-distinct'"),
        ([1.0] * 8, {"fallback": "odd"}, ValueError, "fallback is 'odd', allowed are 'lp', 'even'"),
        ([1.0] * 8, {"sources": np.ones((3, 8))}, ValueError, r"sources has shape \[3, 8\], allowed is .* \[4, 8\]"),
        ([1.0] * 8, {"sources": -np.ones((4, 8))}, ValueError, r"sources\[0, 0\] is -1.0"),
        ([1.0] * 8, {"threads": 0}, ValueError, "threads is 0"),
        ([1.0] * 8, {"threads": 100000}, ValueError, "threads is 100000, allowed is 1 to 1024"),
        ([1.0] * 8, {"n_ranks": 4.0}, TypeError, "n_ranks is 4.0, allowed is an int"),
    ],
)
def test_bad_input_is_named(past, changed, error, message):
    with pytest.raises(error, match=message):
        place(past, **{**GOOD, **changed})


def test_scores_refuse_what_does_not_fit():
    placement = place([1.0] * 8, **GOOD)
    with pytest.raises(ValueError, match=r"loads has shape \[7\], allowed is \[n_logical\] = \[8\]"):
        optima(placement, [1.0] * 7)
    with pytest.raises(ValueError, match=r"loads\[0\] is -1.0"):
        imbalance(placement, [-1.0] * 8)
    for score in (optima, imbalance):
        with pytest.raises(ValueError, match="threads is 100000, allowed is 1 to 1024"):
            score(placement, [1.0] * 8, threads=100000)
    with pytest.raises(TypeError, match="placement is a list"):
        optima([0, 1], [1.0, 1.0])
    with pytest.raises(ValueError, match="history has 3 dimensions"):
        likely_loads(np.ones((1, 1, 8)))


@pytest.mark.parametrize("number", [torch.tensor(3.0), np.array(3.0)])
def test_a_number_is_no_history(number):
    with pytest.raises(ValueError, match=r"history has shape \[\], allowed is"):
        place(number, n_ranks=1, n_physical=1)


@pytest.mark.parametrize("odd", [torch.eye(8).to_sparse(), torch.ones(8, device="meta")])
def test_tensors_without_values_are_refused(odd):
    with pytest.raises(TypeError, match=r"history has layout .*allowed is torch.strided"):
        place(odd, **GOOD)


def test_layers_without_loads_are_refused_and_can_be_filled():
    loads = np.random.default_rng(5).integers(1, 99, (3, 2, 8))
    loads[0] = 0
    with pytest.raises(ValueError, match=r"0 everywhere in layer 0.*lplb\.formats\.with_equal_loads"):
        place(loads, **GOOD)
    placed = place(with_equal_loads(loads), **GOOD)
    assert placed[0] == place(np.ones((2, 8)), **GOOD)
    assert placed[1:] == place(loads[1:], **GOOD)
    assert not loads[0].any()


def test_two_dimensions_are_batches_and_means_of_layers_want_an_axis():
    history = LoadHistory(3, 8)
    history.add(np.random.default_rng(6).integers(1, 99, (3, 8)))
    placed = place(history.mean()[:, None], **GOOD)
    assert placed == [place(mean, **GOOD) for mean in history.mean()]
    assert isinstance(place(history.mean(), **GOOD), Placement)
