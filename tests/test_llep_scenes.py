"""Batches of LLEP and UltraEP: whole choices, the shares that they promise, the same counts from the same seed."""

import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_bounds import blocks, least_transfers

from lplb import scenes
from lplb.scenes import LLEP_SCENES, llep_scene, skewed_scene, zipf_scene
from lplb.transfers import TransferPlanner

SHARES = (0.3, 0.5, 0.8, 0.95)


def imbalance(counts, n_ranks):
    """Of plain expert parallelism: experts in order, in blocks."""
    load = np.bincount(blocks(counts.shape[-1], n_ranks), counts.sum(0))
    return load.max() / load.mean()


def test_the_list_is_the_papers():
    sizes = {(s.model.n_logical, s.model.top_k, s.model.hidden, s.model.intermediate) for s in LLEP_SCENES.values()}
    assert sizes == {(128, 4, 2880, 2880), (256, 8, 7168, 2048), (384, 8, 7168, 2048)}
    assert {(s.share, s.hot) for s in LLEP_SCENES.values()} == {(0, 0), *itertools.product(SHARES, (16, 4, 1))}
    assert {s.tokens_per_rank for s in LLEP_SCENES.values()} == {16384, 32768}
    assert len(LLEP_SCENES) == 3 * 2 * 13
    assert all(s.n_ranks == 8 for s in LLEP_SCENES.values())


@pytest.mark.parametrize("where", ["first", "random", "published"])
@pytest.mark.parametrize("name", LLEP_SCENES)
def test_sources_have_their_choices_and_experts_their_shares(name, where):
    scene = LLEP_SCENES[name]
    counts = scene.counts(where, seed=7)
    n_experts, each = scene.model.n_logical, scene.tokens_per_rank * scene.model.top_k
    assert counts.shape == (8, n_experts)
    assert counts.dtype == np.int64
    assert counts.min() >= 0
    assert (counts.sum(1) == each).all()
    assert np.ptp(counts, axis=0).max() <= 1  # an expert's choices are spread over sources
    load = np.sort(counts.sum(0))[::-1]
    n_hot = min(scene.hot, scene.model.top_k) if where == "published" else scene.hot
    hot, cold = load[:n_hot], load[scene.hot :] if where != "published" else load[n_hot : n_experts - scene.hot + n_hot]
    assert hot.sum() == round(scene.share * 8 * each)
    assert np.ptp(cold) <= 1
    assert not n_hot or np.ptp(hot) <= 1
    if where != "random" and scene.hot:
        assert sorted(counts.sum(0)[:n_hot].tolist()) == sorted(hot.tolist())
    if where != "random" and scene.share >= 0.8:
        assert 6.39 <= imbalance(counts, 8) <= 7.65


def test_a_share_that_does_not_divide_is_rounded_by_lot():
    drawn = np.array([llep_scene(7, 2, 1, 25, hot=3, share=0.5, seed=seed).sum(0) for seed in range(200)])
    assert (drawn[:, :3].sum(1) == 25).all()
    assert (drawn[:, 3:].sum(1) == 25).all()
    assert set(drawn[:, :3].ravel()) == {8, 9}
    assert set(drawn[:, 3:].ravel()) == {6, 7}
    assert (drawn == drawn.max(0)).any(0).all()
    assert ((drawn[:, :3] == 9).mean(0) > 0.2).all()  # each of the three has the one left over now and then


def test_hot_experts_come_from_the_seed():
    found = [
        np.flatnonzero(llep_scene(32, 4, 2, 64, hot=3, share=0.9, where="random", seed=s).sum(0) > 50).tolist()
        for s in range(40)
    ]
    assert all(len(hot) == 3 for hot in found)
    assert len({tuple(hot) for hot in found}) > 30
    again = llep_scene(32, 4, 2, 64, hot=3, share=0.9, where="random", seed=5)
    assert (again == llep_scene(32, 4, 2, 64, hot=3, share=0.9, where="random", seed=5)).all()


def test_published_fills_hot_experts_choice_by_choice():
    """By hand: the choices of a hot token are hot experts 0, 1, 2, 0, so the first has twice as many."""
    counts = llep_scene(10, 2, 4, 500, hot=3, share=0.6, where="published")
    assert counts.sum(0)[:3].tolist() == [1200, 600, 600]


def test_no_tokens_and_one_rank():
    assert not llep_scene(8, 4, 2, 0, hot=1, share=0.8).any()
    assert llep_scene(8, 1, 2, 50, hot=1, share=1.0).tolist() == [[100, 0, 0, 0, 0, 0, 0, 0]]


def test_zipf_is_drawn_by_its_exponent():
    counts = zipf_scene(256, 8, 8, 1 << 22, seed=3)
    assert (counts.sum(1) == 8 << 22).all()
    load = np.sort(counts.sum(0))[::-1]
    expected = np.arange(1, 257) ** -0.8
    assert np.allclose(load / load.sum(), expected / expected.sum(), rtol=0.02)
    assert (zipf_scene(256, 8, 8, 512, seed=3) == zipf_scene(256, 8, 8, 512, seed=3)).all()
    assert zipf_scene(256, 8, 8, 512, seed=3).sum(0).argmax() != zipf_scene(256, 8, 8, 512, seed=4).sum(0).argmax()


@pytest.mark.parametrize("family", ["lognormal", "zipf"])
@pytest.mark.parametrize("target", [1.5, 2, 3])
def test_skewed_batches_begin_as_uneven_as_asked(family, target):
    for seed in range(5):
        counts = skewed_scene(256, 64, 8, 4096, imbalance=target, family=family, seed=seed)
        assert (counts.sum(1) == 4096 * 8).all()
        assert imbalance(counts, 64) == pytest.approx(target, rel=1e-3)
        share = np.sort(counts.sum(0))[::-1].clip(1)
        if family == "zipf":  # a straight line in logarithms
            slope = np.diff(np.log(share[[0, 15, 255]])) / np.diff(np.log([1, 16, 256]))
            assert slope[0] == pytest.approx(slope[1], rel=0.02)
    other = skewed_scene(256, 64, 8, 4096, imbalance=target, family=family, seed=1)
    assert (counts != other).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: llep_scene(1, 1, 1, 1, hot=1, share=0.5), "n_logical is 1, allowed is 2"),
        (lambda: llep_scene(8, 2, 9, 1, hot=1, share=0.5), "top_k is 9, allowed is 1 to 8"),
        (lambda: llep_scene(8, 2, 1, -1, hot=1, share=0.5), "tokens_per_rank is -1, allowed is 0"),
        (lambda: llep_scene(8, 2, 1, 1 << 50, hot=1, share=0.5), "tokens_per_rank is 1125899906842624, allowed is 0"),
        (lambda: llep_scene(8, 2, 1, 1, hot=8, share=0.5), "hot is 8, allowed is 1 to 7"),
        (lambda: llep_scene(8, 2, 1, 1, hot=0, share=0.5), "hot is 0, allowed is 1 to 7"),
        (lambda: llep_scene(8, 2, 1, 1, hot=1, share=80), "share is 80.0, allowed are 0 to 1"),
        (lambda: llep_scene(8, 2, 1, 1, hot=1, share=float("nan")), "share is nan, allowed are 0 to 1"),
        (lambda: llep_scene(8, 2, 1, 1, hot=1, share=0.5, where="last"), "where is 'last', allowed are 'first'"),
        (lambda: llep_scene(8, 2, 1, 1, hot=1, share=0.5, seed=-1), "seed is -1"),
        (lambda: zipf_scene(8, 2, 1, 1, exponent=-1), "exponent is -1.0, allowed are 0 to 10"),
        (lambda: skewed_scene(9, 2, 1, 1, imbalance=1.5), "n_logical is 9, allowed is a multiple"),
        (lambda: skewed_scene(8, 2, 1, 1, imbalance=2.5), "imbalance is 2.5, allowed are 1 to 2"),
        (lambda: skewed_scene(8, 2, 1, 1, imbalance=1.5, family="pareto"), "family is 'pareto', allowed are 'logn"),
    ],
)
def test_refuses_by_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_by_type():
    with pytest.raises(TypeError, match=r"share is '0\.5', allowed is a number"):
        llep_scene(8, 2, 1, 1, hot=1, share="0.5")
    with pytest.raises(TypeError, match=r"hot is 1\.0, allowed is an int"):
        llep_scene(8, 2, 1, 1, hot=1.0, share=0.5)


def test_they_are_scenes_too():
    assert scenes.llep_scene is llep_scene
    assert set(scenes.__all__) >= {"LLEP_SCENES", "LlepScene", "llep_scene", "skewed_scene", "zipf_scene"}


# ---- the bound that benchmarks print beside numbers of transfers


def served(tokens, home, n_ranks, cap, transfers):
    """Whether the ranks can serve all tokens within the cap with these transfers; augmenting paths, token by token."""
    holds = [{int(home[e])} | {to for expert, to in transfers if expert == e} for e in range(len(tokens))]
    on = [[0] * n_ranks for _ in tokens]
    load = [0] * n_ranks

    def place(e, seen):
        for rank in holds[e] - seen:
            seen.add(rank)
            if load[rank] < cap:
                load[rank] += 1
                on[e][rank] += 1
                return True
            for other in range(len(tokens)):
                if on[other][rank] and other != e:
                    on[other][rank] -= 1
                    load[rank] -= 1
                    if place(other, seen):
                        load[rank] += 1
                        on[e][rank] += 1
                        return True
                    on[other][rank] += 1
                    load[rank] += 1
        return False

    return all(place(e, set()) for e, n in enumerate(tokens) for _ in range(n))


def fewest_by_trying(tokens, n_ranks):
    """The least number of transfers for exact balance: all sets of them, smallest first."""
    home, cap = blocks(len(tokens), n_ranks), max(1, -(-sum(tokens) // n_ranks))
    possible = [(e, r) for e in range(len(tokens)) for r in range(n_ranks) if r != home[e] and tokens[e]]
    for n in range(len(possible) + 1):
        if any(served(tokens, home, n_ranks, cap, chosen) for chosen in itertools.combinations(possible, n)):
            return n
    raise AssertionError("every expert everywhere is balanced")


def test_no_plan_has_fewer_transfers_than_the_bound():
    rng, tight = np.random.default_rng(11), 0
    for _ in range(60):
        tokens = np.minimum(rng.pareto(0.7, 5) * 2, 20).astype(int).tolist()
        bound, found = least_transfers(np.array(tokens), 3), fewest_by_trying(tokens, 3)
        assert bound <= found
        tight += bound == found
    assert tight >= 50


def test_sixteen_hot_experts_on_one_rank_need_fourteen_transfers():
    """The seven other ranks lack more than one hot expert has: two each. As LLEP's program fills them one will do."""
    for name, scene in LLEP_SCENES.items():
        if scene.hot:
            assert least_transfers(scene.counts("first"), 8) == (14 if scene.hot == 16 else 7), name
            assert least_transfers(scene.counts("published"), 8) == 7, name


# ---- the peer of benchmarks


@pytest.fixture
def plain_lla(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("plain_lla").plain_lla


def test_the_peer_by_hand(plain_lla):
    """Capacity 10: rank 0 keeps 8 of expert 0 beside the 2 of expert 1; 6 go where 4 are, and 6 where 4 are."""
    made = plain_lla(torch.tensor([[12, 1, 1, 2, 2, 0], [8, 1, 0, 1, 0, 2], [0] * 6]), 3, alpha=1.0, m=1)
    assert made.transfers == [(0, 0, 1, 6), (0, 0, 2, 6)]
    assert made.rank_load == [10, 10, 10]
    assert made.imbalance == 1


@pytest.mark.parametrize("number_by_number", [False, True])
@pytest.mark.parametrize(("alpha", "m"), [(1.0, 1), (1.0, 1024), (1.1, 1024), (1.01, 1), (1.3, 200)])
def test_the_peer_decides_as_the_compatible_strategy(alpha, m, number_by_number, plain_lla):
    batches = [llep_scene(64, 8, 4, 4096, hot=h, share=s, where="random", seed=h) for h in (1, 4, 16) for s in SHARES]
    batches += [zipf_scene(64, 8, 4, 1000 + seed, exponent=1.1, seed=seed) for seed in range(10)]
    batches[-1][0, 0] += 3  # a total that 8 does not divide
    planner = TransferPlanner(64, 8, strategy="llep", compat=True, alpha=alpha, m=m, lam=1.0)
    for counts in map(torch.from_numpy, batches):
        made, plan = plain_lla(counts, 8, alpha, m, number_by_number=number_by_number), planner.plan(counts)
        assert made.rank_load == plan.rank_load.tolist()
        travelled = {tuple(row) for row in plan.transfers[: plan.n_transfers].tolist()}
        assert {t[:3] for t in made.transfers} == travelled
        assert sum(made.rank_load) == int(counts.sum())
