"""`lplb.policies`: scores against HiGHS, and placements of every policy."""

import numpy as np
import pytest
import torch
from reference import ReferenceLP

from lplb.placement import Placement
from lplb.policies import POLICIES, imbalance, optima, place

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


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("n_logical", "n_ranks", "group_size", "n_physical"), GEOMETRIES)
def test_every_policy_serves_every_geometry(policy, n_logical, n_ranks, group_size, n_physical):
    past = history(3, n_logical, 3)
    placement = place(past, n_ranks=n_ranks, n_physical=n_physical, group_size=group_size, policy=policy)
    assert isinstance(placement, Placement)
    assert (placement.n_logical, placement.n_ranks, placement.n_physical) == (n_logical, n_ranks, n_physical)
    placement.check_groups(group_size)
