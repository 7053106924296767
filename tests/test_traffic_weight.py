"""`traffic_weight` in a planner: what it buys, what it may not change, and what is refused."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import DrawnPlacement
from pretend_cuda import pretend
from test_assign import run_on_every_rank
from test_bad_input import refused
from test_distributed import batch, on_ranks, ring_planner

from lplb import Planner, SolveStatus, topology
from lplb.exchange import Known

N_RANKS, NODE, N_LOGICAL = 8, 2, 64
CUBE = topology.cube()


def counts(seed):
    """Every rank has favourites of its own."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        rng.multinomial(2000, rng.dirichlet(np.full(N_LOGICAL, 0.3), N_RANKS).mean(0), N_RANKS)
    ).int()


def plan_of(table, **settings):
    ranks = Known(0, N_RANKS)
    ranks.counts = table
    planner = Planner(CUBE, 80, N_LOGICAL, group=ranks, ranks_per_node=NODE, **settings)
    planner.run(torch.repeat_interleave(torch.arange(N_LOGICAL), table[0]), None)
    return planner.last_plan


def cost(plan, weight):
    """What is minimised, for whole tokens of replicated experts that travel as the split lets them."""
    way = plan.traffic(replicated_only=True)
    return int(plan.max_load) + weight * (way.cross_nodes + way.cross_ranks / 8) / N_RANKS


@pytest.mark.parametrize("seed", range(6))
def test_a_weight_buys_traffic_with_balance(seed):
    table = counts(seed)
    free = plan_of(table)
    before = free
    for weight in (0.01, 0.3, 3.0, 100.0):
        plan = plan_of(table, traffic_weight=weight)
        assert plan.solved
        assert plan.rank_load.sum() == table.sum()
        # a token per replica is what rounding may cost
        assert cost(plan, weight) <= cost(before, weight) + 80 * max(1.0, weight) / N_RANKS
        assert float(plan.lower_bound) <= cost(plan, weight) * (1 + 1e-9)
        assert plan.traffic().cross_nodes <= before.traffic().cross_nodes + 80
        assert int(plan.max_load) >= int(free.max_load)
        before = plan
    assert before.traffic().cross_nodes < free.traffic().cross_nodes


def test_small_groups_are_skipped_all_the_same():
    plan = plan_of(counts(0), traffic_weight=1.0, min_tokens=10**6)
    assert plan.status.tolist() == [SolveStatus.SKIPPED]
    assert torch.equal(plan.quota, plan_of(counts(0), min_tokens=10**6).quota)


def test_tokens_go_where_the_plan_says():
    placement = DrawnPlacement(n_ranks=8, group_size=8, n_logical_per_group=32, slots_per_rank=6, seed=3)
    indices = [batch([5, rank], (300, 2), 32).numpy() for rank in range(8)]
    physical, plans = run_on_every_rank(placement, indices, None, torch.int64, ranks_per_node=2, traffic_weight=0.5)
    used = np.bincount(np.concatenate([p.ravel() for p in physical]) + 1, minlength=placement.phy2log.size + 1)[1:]
    np.testing.assert_array_equal(used, plans[0].quota)


@pytest.mark.parametrize(
    ("settings", "kind", "seen", "allowed"),
    [
        ({"traffic_weight": -0.1}, ValueError, "traffic_weight is -0.1", "allowed are 0 to 1000"),
        ({"traffic_weight": float("nan")}, ValueError, "traffic_weight is nan", "allowed are 0 to 1000"),
        ({"traffic_weight": 1001}, ValueError, "traffic_weight is 1001", "allowed are 0 to 1000"),
        ({"traffic_weight": "1"}, TypeError, "traffic_weight is '1'", "allowed is a number"),
        ({"traffic_weight": True}, TypeError, "traffic_weight is True", "allowed is a number"),
        ({"traffic_weight": 0.1, "solver": "flow"}, ValueError, "traffic_weight is 0.1", "with solver 'flow' is 0"),
    ],
)
def test_bad_weights(settings, kind, seen, allowed):
    with refused(kind, seen, allowed):
        Planner(CUBE, 80, N_LOGICAL, group=Known(0, N_RANKS), **settings)


def test_sources_must_be_known():
    with refused(ValueError, "traffic_weight is 0.1", "allowed without a group"):
        Planner(CUBE, 80, N_LOGICAL, 8, traffic_weight=0.1)


def test_kernels_have_no_costs(monkeypatch):
    pretend(monkeypatch.setattr)
    with refused(ValueError, "traffic_weight is 0.1", "allowed on CUDA is 0"):
        Planner(CUBE, 80, N_LOGICAL, group=Known(0, N_RANKS), traffic_weight=0.1)


def weights_that_differ(rank):
    try:
        ring_planner(2, dist.group.WORLD, traffic_weight=0.1 * rank)
    except ValueError as error:
        return [str(error)]
    return ["nothing raised"]


def test_ranks_agree_on_the_weight(tmp_path):
    for (message,) in on_ranks(2, tmp_path, weights_that_differ):
        assert message.startswith("rank 1 has another placement or other settings than rank 0")
        assert "traffic_weight" in message
