"""What callers have set around a planner: default devices, inference mode, copies."""

import copy
import pickle

import pytest
import torch

from lplb import Placement, Planner, rebalance_experts, topology
from lplb.eplb import spread_copies

N_LOGICAL, N_PHYSICAL, N_RANKS = 64, 80, 8


def everything(planner, idx):
    """One result of every method."""
    counter = torch.zeros(1, dtype=torch.int64, device="cpu")
    count, prefix = planner.count_workload(idx, 3)
    share, load = planner.solve_probs(count, counter)
    chosen = planner.weighted_select_target(idx, share, prefix, 3)
    plan = planner.solve(count)
    physical = planner.run(idx, counter)
    mapping = planner.update_redundancy_mapping(count)
    moved = planner.run(idx, counter)
    return [count, prefix, share, load, chosen, plan.quota, plan.lower_bound, physical, *mapping, moved, counter]


@pytest.fixture
def idx():
    return torch.randint(-1, N_LOGICAL, (500, 6), generator=torch.Generator().manual_seed(0))


def cube_planner():
    return Planner(topology.cube(), N_PHYSICAL, N_LOGICAL, N_RANKS)


def test_any_default_device(idx):
    expected = everything(cube_planner(), idx)
    planner = cube_planner()
    with torch.device("meta"):  # as engines build models with "cuda"
        got = everything(planner, idx)
        built_there = everything(cube_planner(), idx)
        weight = torch.ones(1, N_LOGICAL, device="cpu")
        phy2log = spread_copies(rebalance_experts(weight, N_PHYSICAL, 1, 1, N_RANKS)[0][0], N_RANKS)
        placed = Planner.from_placement(Placement(phy2log, N_RANKS), rank_speed=[1.0] * N_RANKS).run(idx, None)
    for a, b, c in zip(expected, got, built_there, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert torch.equal(phy2log[placed[placed >= 0]], idx[idx >= 0])


def test_built_in_inference_mode_used_outside(idx):
    expected = everything(cube_planner(), idx)
    with torch.inference_mode():
        planner = cube_planner()
        planner.update_redundancy_mapping()
    for a, b in zip(expected, everything(planner, idx), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda planner: pickle.loads(pickle.dumps(planner))])
def test_a_copy_plans_alike_and_apart(idx, copied):
    planner = cube_planner()
    planner.update_redundancy_mapping(torch.arange(N_LOGICAL))
    before = planner.run(idx, None)
    other = copied(planner)
    assert other.last_plan is None
    assert torch.equal(other.run(idx, None), before)
    other.update_redundancy_mapping()
    assert not torch.equal(other.phy2log, planner.phy2log)
    assert torch.equal(planner.run(idx, None), before)
