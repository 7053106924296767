"""From quotas to tokens: conservation, the reference token by token, spread prefixes, over several ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import DrawnPlacement, placements, speeds
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import assign_reference, nested_proportion, split_reference

from lplb import Placement, Plan, Planner, SolveStatus
from lplb.exchange import Known


def draw_indices(seed: int, placement: DrawnPlacement, n_tokens: int, top_k: int) -> list[NDArray[np.int64]]:
    """Per rank [tokens, top_k], with -1 among them; ranks differ in size, and some have none."""
    rng = np.random.default_rng(seed)
    skew = rng.lognormal(0.0, rng.choice([0.0, 1.0, 3.0]), placement.n_logical)
    share = np.append(skew / skew.sum() * 0.95, 0.05)
    sizes = rng.integers(0, n_tokens + 1, placement.n_ranks) * (rng.random(placement.n_ranks) < 0.8)
    names = np.append(np.arange(placement.n_logical), -1)
    return [rng.choice(names, (size, top_k), p=share) for size in sizes]


def run_on_every_rank(
    placement: DrawnPlacement,
    indices: list[NDArray[np.int64]],
    speed: NDArray[np.float64] | None,
    dtype: torch.dtype,
    **settings: Any,
) -> tuple[list[NDArray[np.int64]], list[Plan]]:
    """Physical indices of every rank, and the plans, on whose quotas all agree."""
    n_logical, n_ranks = placement.n_logical, placement.n_ranks
    counts = np.stack([np.bincount(i.ravel() + 1, minlength=n_logical + 1)[1:] for i in indices])
    table = Placement(placement.phy2log, n_ranks, n_logical)
    physical, plans = [], []
    for rank in range(n_ranks):
        exchange = Known(rank, n_ranks)
        exchange.counts = torch.from_numpy(counts).int()
        planner = Planner.from_placement(
            table,
            group_size=placement.group_size,
            group=exchange,
            rank_speed=None if speed is None else torch.from_numpy(speed),
            **settings,
        )
        physical.append(planner.run(torch.from_numpy(indices[rank]).to(dtype), None).numpy().astype(np.int64))
        plan = planner.last_plan
        assert plan is not None
        plans.append(plan)
    for plan in plans:
        assert torch.equal(plan.quota, plans[0].quota)
    return physical, plans


@given(
    st.data(), placements(max_ranks=8), st.integers(0, 2**32 - 1), st.integers(0, 120), st.integers(1, 6), st.booleans()
)
def test_every_token_goes_where_the_reference_sends_it(
    data: st.DataObject, placement: DrawnPlacement, seed: int, n_tokens: int, top_k: int, narrow: bool
) -> None:
    indices = draw_indices(seed, placement, n_tokens, top_k)
    speed = data.draw(speeds(placement.n_ranks))
    node = data.draw(st.none() | st.integers(1, placement.n_ranks))
    settings = {"split": "plain"} if node is None else {"ranks_per_node": node}
    physical, plans = run_on_every_rank(placement, indices, speed, torch.int32 if narrow else torch.int64, **settings)
    quota = plans[0].quota.numpy().astype(np.int64)
    phy2log = placement.phy2log
    for logical, slots in zip(indices, physical, strict=True):
        assert slots.shape == logical.shape
        np.testing.assert_array_equal(np.where(slots >= 0, phy2log[slots], -1), logical)
    everywhere = np.concatenate([p.ravel() for p in physical])
    np.testing.assert_array_equal(np.bincount(everywhere + 1, minlength=phy2log.size + 1)[1:], quota)
    for slots, expected in zip(physical, assign_reference(indices, phy2log, quota, node), strict=True):
        np.testing.assert_array_equal(slots, expected)


@given(st.data(), placements(max_ranks=8), st.integers(0, 2**32 - 1), st.integers(0, 120))
def test_traffic_is_what_the_tokens_travel(
    data: st.DataObject, placement: DrawnPlacement, seed: int, n_tokens: int
) -> None:
    indices = draw_indices(seed, placement, n_tokens, 3)
    split = data.draw(st.sampled_from(["plain", "local_first"]))
    node = data.draw(st.integers(1, placement.n_ranks))
    fewest = data.draw(st.sampled_from([0, 0, 40, 10**6]))
    settings = {"split": split, "ranks_per_node": node, "min_tokens": fewest}
    physical, plans = run_on_every_rank(placement, indices, None, torch.int64, **settings)
    slots_per_rank = placement.phy2log.size // placement.n_ranks
    sent = np.stack([np.bincount(p.ravel() + 1, minlength=placement.phy2log.size + 1)[1:] for p in physical])
    stay = near = 0
    for source, slots in enumerate(physical):
        target = slots[slots >= 0] // slots_per_rank
        stay += int((target == source).sum())
        near += int((target // node == source // node).sum())
    for plan in plans:
        np.testing.assert_array_equal(plan.tokens_by_source(), sent)
        np.testing.assert_array_equal(plan.quota, sent.sum(axis=0))
        assert plan.traffic() == (stay, near - stay, int(sent.sum()) - near)
        np.testing.assert_array_equal(plan.rank_load, sent.sum(axis=0).reshape(placement.n_ranks, -1).sum(axis=1))
    replicated = np.bincount(placement.phy2log)[placement.phy2log] > 1
    assert sum(plans[0].traffic(replicated_only=True)) == sent[:, replicated].sum()


def fixed_shares(phy2log: NDArray[np.int64], n_ranks: int, node: int, source: int, expert: int) -> list[int]:
    """The weights of an expert's copies by the fixed split."""
    rank_of = np.flatnonzero(phy2log == expert) // (phy2log.size // n_ranks)
    for chosen in (rank_of == source, rank_of // node == source // node):
        if chosen.any():
            return [int(c) for c in chosen]
    return [1] * rank_of.size


def go_on(k: int, weights: list[int]) -> int:
    """The copy of token k under weights whose proportions repeat."""
    n = sum(weights)
    for copy, weight in enumerate(weights):
        before, upto = k * weight // n, (k + 1) * weight // n
        if upto > before:
            return copy
        k, n = k - before, n - weight
    raise AssertionError("weights that add up to n always place the token")


@given(st.data(), placements(max_ranks=8), st.integers(0, 2**32 - 1), st.integers(0, 120), st.booleans())
def test_small_groups_take_the_fixed_split(
    data: st.DataObject, placement: DrawnPlacement, seed: int, n_tokens: int, known: bool
) -> None:
    """`known`: under a group; else the tokens are of no rank, and every copy is as good."""
    indices = draw_indices(seed, placement, n_tokens, 2)
    node = data.draw(st.integers(1, placement.n_ranks))
    n_logical, phy2log, n_groups = placement.n_logical, placement.phy2log, placement.n_ranks // placement.group_size
    group_of = {int(e): int(slot) * n_groups // phy2log.size for slot, e in enumerate(phy2log)}
    if not known:
        indices = [np.concatenate(indices)]
    loads = np.bincount(np.concatenate([i.ravel() for i in indices]) + 1, minlength=n_logical + 1)[1:]
    tokens = np.bincount([group_of[e] for e in range(n_logical)], weights=loads, minlength=n_groups)
    fewest = data.draw(st.sampled_from([1, 10**9, *(int(t) + plus for t in tokens for plus in (0, 1))]))
    if known:
        physical, plans = run_on_every_rank(
            placement, indices, None, torch.int64, ranks_per_node=node, min_tokens=fewest
        )
        plan = plans[0]
    else:
        table = Placement(phy2log, placement.n_ranks, n_logical)
        planner = Planner.from_placement(table, group_size=placement.group_size, min_tokens=fewest)
        physical = [planner.run(torch.from_numpy(indices[0]), None).numpy()]
        plan = planner.last_plan
        assert plan is not None
    skipped = plan.status == SolveStatus.SKIPPED
    np.testing.assert_array_equal(skipped, tokens < fewest)
    load, single = plan.rank_load.numpy().reshape(n_groups, -1), np.bincount(phy2log)[phy2log] == 1
    alone = np.where(single, loads[phy2log], 0).reshape(n_groups, placement.group_size, -1).sum(axis=2)
    for g in np.flatnonzero(skipped):
        assert plan.max_load[g] == load[g].max()
        bound = max(alone[g].max(), load[g].mean())
        assert plan.lower_bound[g] == pytest.approx(bound, rel=1e-12)
        assert plan.gap[g] == pytest.approx(load[g].max() / bound - 1 if bound else 0.0, abs=1e-12)
    for source, (logical, slots) in enumerate(zip(indices, physical, strict=True)):
        seen: dict[int, int] = {}
        for e, slot in zip(logical.ravel().tolist(), slots.ravel().tolist(), strict=True):
            if e < 0 or not skipped[group_of[e]]:
                continue
            copies = np.flatnonzero(phy2log == e)
            weights = fixed_shares(phy2log, placement.n_ranks, node, source, e) if known else [1] * copies.size
            k = seen.setdefault(e, source if known else 0)
            assert slot == copies[go_on(k, weights)]
            seen[e] += 1


@given(st.data(), placements(max_ranks=8), st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_a_plan_shares_out_other_batches(
    data: st.DataObject, placement: DrawnPlacement, seed: int, n_tokens: int
) -> None:
    """Each source goes on in its own shares, or the quotas' where it had no token, or the fixed split's."""
    before, after = (draw_indices(seed + i, placement, n_tokens, 2) for i in range(2))
    node = data.draw(st.integers(1, placement.n_ranks))
    phy2log, n_ranks = placement.phy2log, placement.n_ranks
    table = Placement(phy2log, n_ranks, placement.n_logical)
    physical, plans = run_on_every_rank(placement, before, None, torch.int64, ranks_per_node=node)
    quota = plans[0].quota.numpy()
    counts = np.stack([np.bincount(i.ravel() + 1, minlength=placement.n_logical + 1)[1:] for i in before])
    rows = split_reference(counts, phy2log, quota, node)
    for source in range(n_ranks):
        planner = Planner.from_placement(
            table, group_size=placement.group_size, group=Known(source, n_ranks), ranks_per_node=node
        )
        again = planner.assign(torch.from_numpy(before[source]), plans[source])
        np.testing.assert_array_equal(again, physical[source])
        mapped = planner.assign(torch.from_numpy(after[source]), plans[source]).numpy()
        seen: dict[int, int] = {}
        for e, slot in zip(after[source].ravel().tolist(), mapped.ravel().tolist(), strict=True):
            if e < 0:
                assert slot == -1
                continue
            copies = np.flatnonzero(phy2log == e)
            if counts[:, e].sum() == 0:
                first, weights = source, fixed_shares(phy2log, n_ranks, node, source, e)
            elif counts[source, e] == 0:
                first, weights = int(counts[:source, e].sum()), quota[copies].tolist()
            else:
                first, weights = 0, rows[source, copies].tolist()
            assert slot == copies[go_on(seen.setdefault(e, first), weights)]
            seen[e] += 1


def test_the_proportions_repeat_as_they_begin() -> None:
    weights = [3, 0, 5, 1]
    assert [go_on(k, weights) for k in range(9)] == [nested_proportion(k, 9, weights) for k in range(9)]
    assert [go_on(k + 9, weights) for k in range(9)] == [go_on(k, weights) for k in range(9)]


def assign_one_expert(quotas: list[int]) -> NDArray[np.int64]:
    """Where the tokens of one expert go, in order; ranks are as fast as their quotas, so the plan is those quotas."""
    n = len(quotas)
    planner = Planner.from_placement(Placement([0] * n, n), rank_speed=[quota / 1024 for quota in quotas])
    physical = planner.run(torch.zeros(sum(quotas), dtype=torch.int64), None).numpy()
    plan = planner.last_plan
    assert plan is not None
    assert plan.quota.tolist() == quotas
    return physical


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=9))
def test_every_prefix_is_spread(quotas: list[int]) -> None:
    chosen, n = assign_one_expert(quotas), sum(quotas)
    k = np.arange(1, n + 1)
    for replica, quota in enumerate(quotas):
        so_far = np.cumsum(chosen == replica)
        assert so_far[-1] == quota
        # The first replica is within one token of its share; each level of the nest adds one.
        assert np.abs(so_far - k * quota / n).max() < replica + 1
    np.testing.assert_array_equal(np.cumsum(chosen == 0), k * quotas[0] // n)


@pytest.mark.parametrize("quotas", [[1_500_000, 1_000_001], [1, 2_000_000], [700_001, 3, 900_000, 400_007]])
def test_large_quotas(quotas: list[int]) -> None:
    chosen, n = assign_one_expert(quotas), sum(quotas)
    assert np.bincount(chosen, minlength=len(quotas)).tolist() == quotas
    k = np.arange(1, n + 1, dtype=np.int64)
    np.testing.assert_array_equal(np.cumsum(chosen == 0), k * quotas[0] // n)
