"""From quotas to tokens: conservation, the reference token by token, spread prefixes, over several ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DrawnPlacement, placements, speeds
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import assign_reference

from lplb import Placement, Planner
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
    placement: DrawnPlacement, indices: list[NDArray[np.int64]], speed: NDArray[np.float64] | None, dtype: torch.dtype
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Physical indices of every rank, and the quotas, on which all agree."""
    n_logical, n_ranks = placement.n_logical, placement.n_ranks
    counts = np.stack([np.bincount(i.ravel() + 1, minlength=n_logical + 1)[1:] for i in indices])
    table = Placement(placement.phy2log, n_ranks, n_logical)
    physical, quotas = [], []
    for rank in range(n_ranks):
        exchange = Known(rank, n_ranks)
        exchange.counts = torch.from_numpy(counts).int()
        planner = Planner.from_placement(
            table,
            group_size=placement.group_size,
            group=exchange,
            rank_speed=None if speed is None else torch.from_numpy(speed),
        )
        physical.append(planner.run(torch.from_numpy(indices[rank]).to(dtype), None).numpy().astype(np.int64))
        plan = planner.last_plan
        assert plan is not None
        quotas.append(plan.quota.numpy().astype(np.int64))
    for quota in quotas:
        np.testing.assert_array_equal(quota, quotas[0])
    return physical, quotas[0]


@given(
    st.data(), placements(max_ranks=8), st.integers(0, 2**32 - 1), st.integers(0, 120), st.integers(1, 6), st.booleans()
)
def test_every_token_goes_where_the_reference_sends_it(
    data: st.DataObject, placement: DrawnPlacement, seed: int, n_tokens: int, top_k: int, narrow: bool
) -> None:
    indices = draw_indices(seed, placement, n_tokens, top_k)
    speed = data.draw(speeds(placement.n_ranks))
    physical, quota = run_on_every_rank(placement, indices, speed, torch.int32 if narrow else torch.int64)
    phy2log = placement.phy2log
    for logical, slots in zip(indices, physical, strict=True):
        assert slots.shape == logical.shape
        np.testing.assert_array_equal(np.where(slots >= 0, phy2log[slots], -1), logical)
    everywhere = np.concatenate([p.ravel() for p in physical])
    np.testing.assert_array_equal(np.bincount(everywhere + 1, minlength=phy2log.size + 1)[1:], quota)
    for slots, expected in zip(physical, assign_reference(indices, phy2log, quota), strict=True):
        np.testing.assert_array_equal(slots, expected)


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
