"""What explain() says, checked by other roads: all sets of ranks one by one, exact fractions, HiGHS, plain counting."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import eplb_like_placement
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ReferenceLP, exact_optimum

from lplb import Placement
from lplb.explain import Explanation, explain


def homes_of(placement):
    """The ranks of each expert."""
    homes = {}
    for slot, e in enumerate(placement.phy2log.tolist()):
        homes.setdefault(e, set()).add(slot // placement.slots_per_rank)
    return homes


def confined_load(homes, loads, ranks):
    return sum(loads[e] for e, at in homes.items() if at <= ranks)


def all_sets(ranks):
    ranks = list(ranks)
    for bits in range(1, 1 << len(ranks)):
        yield {r for i, r in enumerate(ranks) if bits >> i & 1}


def brute_optimum(homes, loads, ranks):
    """The optimum by trying every set of ranks, and the union of all sets that reach it, which reaches it too."""
    worth = [(Fraction(confined_load(homes, loads, a), len(a)), a) for a in all_sets(ranks)]
    best = max(w for w, _ in worth)
    return best, set().union(*(a for w, a in worth if w == best))


@st.composite
def scenes(draw):
    """A small group-closed placement and whole loads, often with ties and zeros."""
    n_groups = draw(st.integers(1, 2))
    size = draw(st.integers(1, 5))
    spare = draw(st.integers(0, 2))
    n_experts = draw(st.integers(1, 2)) * size
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    slots = size * max(n_experts // size, min(n_experts // size + spare, n_experts))
    rows = [
        eplb_like_placement(rng, rng.lognormal(0, 1, n_experts), size, slots) + g * n_experts for g in range(n_groups)
    ]
    load = draw(st.sampled_from([st.integers(0, 3), st.integers(0, 10**6)]))
    loads = draw(st.lists(load, min_size=n_groups * n_experts, max_size=n_groups * n_experts))
    return Placement(np.concatenate(rows), n_groups * size), loads, size


@settings(deadline=None)
@given(scenes())
def test_bottleneck_by_brute_force(scene):
    placement, loads, size = scene
    homes = homes_of(placement)
    found = explain(placement, loads, group_size=size)
    assert [g.group for g in found.groups] == list(range(placement.n_ranks // size))
    for g in found.groups:
        ranks = set(range(g.group * size, (g.group + 1) * size))
        here = {e: at for e, at in homes.items() if at <= ranks}
        total = sum(loads[e] for e in here)
        assert g.mean_load == pytest.approx(total / size, rel=1e-12)
        even = {r: sum(Fraction(loads[e], len(at)) for e, at in here.items() if r in at) for r in ranks}
        assert g.even_load == pytest.approx(float(max(even.values())), rel=1e-12)
        assert float(even[g.even_rank]) == pytest.approx(g.even_load, rel=1e-12)
        assert set(g.even_experts) == {e for e, at in here.items() if g.even_rank in at}
        shares = [Fraction(loads[e], len(here[e])) for e in g.even_experts]
        assert shares == sorted(shares, reverse=True)
        if not total:
            assert (g.lp_load, g.lp_ranks, g.confined, g.reliefs) == (0.0, (), (), ())
            continue
        best, largest = brute_optimum(here, loads, ranks)
        assert g.lp_load == float(best)
        assert set(g.lp_ranks) == largest
        assert g.balanced == (largest == ranks)
        assert set(g.confined) == {e for e, at in here.items() if at <= largest and loads[e]}
        assert [loads[e] for e in g.confined] == sorted((loads[e] for e in g.confined), reverse=True)
        for relief in g.reliefs:
            assert relief.expert in g.confined
            assert relief.rank in ranks - largest
            more = {**here, relief.expert: here[relief.expert] | {relief.rank}}
            assert relief.lp_load == float(brute_optimum(more, loads, ranks)[0])
            assert relief.lp_load < g.lp_load
        # Few experts and ranks: all have been tried. What is not named does not help more than what is.
        best_named = min((f.lp_load for f in g.reliefs), default=g.lp_load)
        for e in g.confined:
            for r in ranks - largest:
                more = {**here, e: here[e] | {r}}
                assert float(brute_optimum(more, loads, ranks)[0]) >= best_named * (1 - 1e-9)


@settings(deadline=None)
@given(scenes())
def test_copies_by_counting(scene):
    placement, loads, size = scene
    homes = homes_of(placement)
    found = explain(placement, loads, group_size=size, most_reliefs=0)
    assert [e.expert for e in found.experts] == list(range(placement.n_logical))
    for e in found.experts:
        at = homes[e.expert]
        n, load = len(at), loads[e.expert]
        assert (e.load, e.ranks) == (load, tuple(sorted(at)))
        assert e.per_copy == pytest.approx(load / n, rel=1e-12)
        assert e.with_one_less == (None if n == 1 else pytest.approx(load / (n - 1), rel=1e-12))
        assert e.with_one_more == (None if n == size else pytest.approx(load / (n + 1), rel=1e-12))
        rivals = [
            f for f in homes if f != e.expert and min(homes[f]) // size == min(at) // size and len(homes[f]) < size
        ]
        need = [loads[f] / len(homes[f]) for f in rivals]
        assert e.earned == (n == 1 or all(load / (n - 1) >= x for x in need))
    for g in found.groups:
        assert g.reliefs == ()
        members = [e for e in found.experts if e.ranks[0] // size == g.group]
        takers = [e for e in members if len(e.ranks) < size]
        several = [e for e in members if len(e.ranks) > 1]
        assert g.next_copy == (max(takers, key=lambda e: e.per_copy).expert if takers else None)
        assert g.least_needed == (min(several, key=lambda e: e.with_one_less).expert if several else None)


@pytest.mark.parametrize(("n_ranks", "n_logical", "slots"), [(32, 256, 288), (128, 256, 384), (64, 256, 320)])
def test_optimum_at_size(n_ranks, n_logical, slots, highs):
    rng = np.random.default_rng(n_ranks)
    history = rng.lognormal(0, 0.85, n_logical)
    placement = Placement(eplb_like_placement(rng, history, n_ranks, slots), n_ranks)
    homes = homes_of(placement)
    for _ in range(3):
        loads = rng.poisson(100 * history * rng.lognormal(0, 0.6, n_logical))
        (g,) = explain(placement, loads).groups
        assert Fraction(g.lp_load) == pytest.approx(
            exact_optimum(placement.phy2log, n_ranks, None, loads)[0], rel=1e-15
        )
        assert g.lp_load == pytest.approx(ReferenceLP(placement.phy2log, n_ranks).solve(loads)[0], rel=1e-7)
        assert confined_load(homes, loads, set(g.lp_ranks)) == round(g.lp_load * len(g.lp_ranks))
        for relief in g.reliefs:
            # One more slot on every rank, for the copy or for an expert without load.
            by_rank = placement.phy2log.reshape(n_ranks, -1).tolist()
            for r, row in enumerate(by_rank):
                row.append(relief.expert if r == relief.rank else n_logical + r - (r > relief.rank))
            more = np.concatenate([loads, np.zeros(n_ranks - 1, dtype=int)])
            assert relief.lp_load == pytest.approx(float(exact_optimum(by_rank, n_ranks, None, more)[0]), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1 / 3, 1e15, 1e200])
def test_loads_in_any_unit(scale):
    rng = np.random.default_rng(5)
    placement = Placement(eplb_like_placement(rng, rng.lognormal(0, 1, 32), 8, 40), 8)
    loads = rng.integers(1, 1000, 32)
    whole, scaled = explain(placement, loads).groups[0], explain(placement, loads * scale).groups[0]
    assert scaled.lp_ranks == whole.lp_ranks
    assert scaled.lp_load == pytest.approx(whole.lp_load * scale, rel=1e-9)
    assert [(f.expert, f.rank) for f in scaled.reliefs][:1] == [(f.expert, f.rank) for f in whole.reliefs][:1]


def test_batches_are_explained_by_their_mean():
    rng = np.random.default_rng(3)
    placement = Placement(eplb_like_placement(rng, rng.lognormal(0, 1, 12), 4, 16), 4)
    batches = np.random.default_rng(4).integers(0, 100, (5, 12))
    mean = [float(Fraction(int(column.sum()), 5)) for column in batches.T]
    assert explain(placement, batches) == explain(placement, mean)
    assert explain(placement, torch.from_numpy(batches[:1])) == explain(placement, batches[0])


def test_two_bottlenecks_apart():
    # Experts 0 and 1 are each alone on a rank with 10; one more copy of either leaves the other.
    found = explain(Placement([0, 1, 2, 3], 4), [10, 10, 1, 1]).groups[0]
    assert found.lp_ranks == (0, 1)
    assert found.confined == (0, 1)
    assert found.reliefs == ()


def test_text_and_data():
    placement = Placement([0, 1, 0, 2, 3, 1], 3)
    found = explain(placement, torch.tensor([6, 30, 2, 4], dtype=torch.int32))
    text = str(found)
    # Expert 1: 15 on ranks 0 and 2; rank 2 has 3 as well: (30 + 6 + 2 + 4) / 3 = 14, but ranks 0 and 2 alone hold 34.
    assert "4 experts in 6 slots on 3 ranks" in text
    assert "LP: 17 (1.214 x mean) on ranks 0, 2 (2 of 3), which alone hold experts 1, 3: 34 in all" in text
    assert "a copy of 1 on rank 1 would lower that to 14 (1.000 x mean)" in text
    assert "even split: 19 (1.357 x mean) on rank 2, with experts 1 (15), 3 (4)" in text
    assert "the next copy is expert 1's: 15 per copy" in text
    assert "expert 0 could best do with one less: 6 per copy then" in text
    data = found.as_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["groups"][0]["lp_ranks"] == [0, 2]
    assert data["experts"][1]["with_one_less"] == 30.0
    assert "no load" in str(explain(placement, [0, 0, 0, 0]))
    assert "every rank at the mean" in str(explain(Placement([0, 1], 2), [3, 3]))
    assert "every expert has one copy" in str(explain(Placement([0, 1], 2), [3, 3]))
    assert str(explain(Placement([0, 1], 2), [3, 2], group_size=1)).count("group") == 3
    assert isinstance(found, Explanation)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([0, 1], [1, 1]), {}, TypeError, "placement is a list, allowed is a Placement"),
        ((Placement([0, 1], 2), [1, 1, 1]), {}, ValueError, r"loads has shape \[3\], allowed is \[n_logical\] = \[2\]"),
        (
            (Placement([0, 1], 2), [[1, 1, 1]]),
            {},
            ValueError,
            r"loads has shape \[1, 3\], allowed is .* \[batches, 2\]",
        ),
        ((Placement([0, 1], 2), np.ones((0, 2))), {}, ValueError, r"loads has shape \[0, 2\]"),
        ((Placement([0, 1], 2), [[1, 1], [1, -1]]), {}, ValueError, r"loads\[1, 1\] is -1.0"),
        ((Placement([0, 1], 2), torch.eye(2).to_sparse()), {}, TypeError, "sparse"),
        ((Placement([0, 1], 2), torch.ones(2, device="meta")), {}, TypeError, "meta"),
        (
            (Placement([0, 1], 2), [[1], [1, 2]]),
            {},
            ValueError,
            r"loads is no array: .* allowed is \[n_logical\] = \[2\]",
        ),
        ((Placement([0, 1], 2), [1, -1]), {}, ValueError, r"loads\[1\] is -1.0, allowed is finite and 0 or more"),
        ((Placement([0, 1], 2), [float("nan"), 1]), {}, ValueError, r"loads\[0\] is nan"),
        ((Placement([0, 1], 2), torch.tensor([1.0, float("inf")])), {}, ValueError, r"loads\[1\] is inf"),
        (
            (Placement([0, 1], 2), [1e300, 1e300]),
            {},
            ValueError,
            r"loads add up to 2e\+300, allowed is at most 1e\+300",
        ),
        ((Placement([0, 1], 2), [True, False]), {}, TypeError, "loads is a list of bool, allowed are numbers"),
        ((Placement([0, 1], 2), torch.tensor([True, False])), {}, TypeError, "loads has dtype torch.bool"),
        ((Placement([0, 1], 2), ["a", "b"]), {}, TypeError, "loads is a list of <U1, allowed are numbers"),
        ((Placement([0, 0], 2), [1]), {"group_size": 1}, ValueError, r"expert 0 has slots in groups \[0, 1\]"),
        ((Placement([0, 1], 2), [1, 1]), {"group_size": 3}, ValueError, "group_size is 3, allowed is a divisor"),
        ((Placement([0, 1], 2), [1, 1]), {"most_reliefs": -1}, ValueError, "most_reliefs is -1, allowed is 0 or more"),
    ],
)
def test_refusals(arguments, options, error, message):
    with pytest.raises(error, match=message):
        explain(*arguments, **options)
