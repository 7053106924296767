"""The planner on the CPU: LPLB's interface and stages, plans, whole batches, against independent references."""

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    ReferenceLP,
    assign_reference,
    count_reference,
    exact_bottleneck,
    integer_optimum,
    rank_loads,
)

from lplb import Placement, Plan, Planner, SolveStatus, rebalance_experts, topology
from lplb.exchange import Known

# LPLB's; cases.py has another one of its own.
HYPERCUBE = np.array([[3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14], [12, 13, 14, 15, *range(12)]]).T

# name: r2o, own experts per rank, groups, redundant slots per rank and column
LAYOUTS = {
    "cube": (cases.cube(), 8, 1, 1),
    "cube_4_groups": (cases.cube(), 8, 4, 1),
    "cube_x3": (cases.cube(), 6, 1, 3),
    "ring": (cases.ring(5), 3, 1, 1),
    "ring_x2_2_groups": (cases.ring(3), 4, 2, 2),
    "torus": (cases.torus(2, 3), 4, 1, 2),
    "hypercube": (HYPERCUBE, 4, 1, 1),
    "no_columns": (np.zeros((4, 0), dtype=np.int64), 3, 2, 0),
    "no_redundant_slots": (cases.ring(4), 3, 1, 0),
}
SOLVERS = ["ipm", "flow"]


class Layout:
    """One of LAYOUTS: its sizes, and planners for it."""

    def __init__(self, name):
        self.r2o, self.n_own, self.n_groups, self.combined = LAYOUTS[name]
        self.group_size, self.n_columns = self.r2o.shape
        self.n_ranks = self.n_groups * self.group_size
        self.n_logical = self.n_ranks * self.n_own
        self.n_physical = self.n_logical + self.n_ranks * self.n_columns * self.combined
        self.identity = cases.lplb_placement(self.r2o, self.n_own, self.n_groups, self.combined)

    def planner(self, **settings):
        r2o = torch.from_numpy(self.r2o).int()
        return Planner(r2o, self.n_physical, self.n_logical, self.n_ranks, **settings)

    def classes(self, values):
        """Per slot values [n_physical] to [n_group, group_size, combined, classes], of own slots that are copied."""
        own = np.asarray(values).reshape(self.n_groups, self.group_size, -1)[:, :, : self.combined * self.n_columns]
        return own.reshape(self.n_groups, self.group_size, self.combined, self.n_columns)


@pytest.fixture(params=list(LAYOUTS))
def layout(request):
    return Layout(request.param)


def many_copies(seed=0, n_ranks=8, group_size=4, n_logical_per_group=8, slots=5):
    """phy2log with three and more copies of some experts."""
    phy2log = cases.random_placement(np.random.default_rng(seed), n_ranks, group_size, n_logical_per_group, slots)
    assert np.bincount(phy2log).max() >= 3
    return phy2log


def batch(seed, shape, n_logical, masked=0.1, dtype=torch.int64):
    """Indices with a few heavy experts, and -1 here and there."""
    rng = np.random.default_rng(seed)
    weight = rng.lognormal(0, 1.5, n_logical)
    idx = rng.choice(n_logical, size=shape, p=weight / weight.sum())
    return torch.from_numpy(np.where(rng.random(shape) < masked, -1, idx)).to(dtype)


def counts_of(idx, n_logical):
    flat = np.asarray(idx).ravel()
    return np.bincount(flat[flat >= 0], minlength=n_logical)


def check_mapped(idx, physical, phy2log, quota):
    """One rank that has the whole batch: shape, dtype, masks, belonging, and exact quotas."""
    assert physical.shape == idx.shape
    assert physical.dtype == idx.dtype
    assert physical.is_contiguous()
    logical, slots = idx.numpy().ravel(), physical.numpy().ravel()
    assert (slots[logical == -1] == -1).all()
    kept = logical >= 0
    assert (np.asarray(phy2log)[slots[kept]] == logical[kept]).all()
    assert np.bincount(slots[kept], minlength=len(phy2log)).tolist() == quota.tolist()


@contextmanager
def torch_threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# LPLB's README, names and attributes


@pytest.mark.usefixtures("highs")
def test_readme_example_of_lplb():
    # All 8 ranks in one process, one after the other; test_distributed.py has it in a group of 8 processes.
    n_logical_experts, n_redundants_per_rank, ep_size = 64, 2, 8
    batches = [batch(rank, (128, 6), n_logical_experts) for rank in range(ep_size)]
    counts = np.stack([counts_of(idx, n_logical_experts) for idx in batches])
    redirected, counters = [], []
    for rank in range(ep_size):
        ep_group = Known(rank, ep_size)
        ep_group.counts = torch.from_numpy(counts).int()

        avail_counter = torch.zeros(1, dtype=torch.int64, device="cpu")
        r2o = torch.tensor([[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]).T.int()
        planner = Planner(r2o, n_logical_experts + n_redundants_per_rank * ep_size, n_logical_experts, group=ep_group)
        N_SMS = 100
        indices = batches[rank]
        redirected_indices = planner.run(indices, avail_counter, N_SMS)

        redirected.append(redirected_indices)
        counters.append(avail_counter.item())
    assert counters == [1] * ep_size
    phy2log = cases.lplb_placement(r2o, 8)
    expected = assign_reference(batches, phy2log, planner.last_plan.quota, cases.ranks_per_node(8))
    assert all(np.array_equal(got, want) for got, want in zip(redirected, expected, strict=True))
    best = integer_optimum(ReferenceLP(phy2log, ep_size).solve(counts.sum(0))[0], ep_size)
    used = np.concatenate([r.numpy().ravel() for r in redirected])
    assert rank_loads(np.bincount(used[used >= 0], minlength=80), ep_size).max() == best


def test_attributes(layout):
    planner = layout.planner()
    numbers = {
        "n_group": layout.n_groups,
        "group_size": layout.group_size,
        "num_redundants": layout.n_columns,
        "combined_redundant_experts": layout.combined,
        "n_routed_experts": layout.n_physical,
        "n_logical_routed_experts": layout.n_logical,
        "ep_size": layout.n_ranks,
        "n_local_routed_experts": layout.n_own + layout.combined * layout.n_columns,
        "n_local_logical_routed_experts": layout.n_own,
        "ep_group": None,
        "deep_ep_initialized": False,
        "last_plan": None,
        "solver": "ipm",
    }
    assert {name: getattr(planner, name) for name in numbers} == numbers
    o2r = np.zeros_like(layout.r2o)
    for rank in range(layout.group_size):
        for k in range(layout.n_columns):
            o2r[layout.r2o[rank, k], k] = rank
    for name, expected in [("r2o", layout.r2o), ("o2r", o2r), ("phy2log", layout.identity)]:
        value = getattr(planner, name)
        assert value.dtype == torch.int32
        assert value.device.type == "cpu"
        assert value.tolist() == expected.tolist(), name


def test_attributes_of_a_planner_from_a_placement():
    phy2log = many_copies()
    planner = Planner.from_placement(Placement(phy2log, 8), group_size=4, solver="flow")
    assert (planner.r2o, planner.o2r, planner.ep_group, planner.last_plan) == (None, None, None, None)
    assert (planner.num_redundants, planner.combined_redundant_experts) == (0, 0)
    assert (planner.n_group, planner.group_size, planner.ep_size) == (2, 4, 8)
    assert (planner.n_routed_experts, planner.n_logical_routed_experts) == (40, 16)
    assert (planner.n_local_routed_experts, planner.solver) == (5, "flow")
    assert planner.phy2log.dtype == torch.int32
    assert planner.phy2log.tolist() == phy2log.tolist()
    whole = Planner.from_placement(Placement(phy2log, 8))
    assert (whole.n_group, whole.group_size) == (1, 8)


def test_r2o_of_any_integer_dtype_and_not_shared():
    r2o = torch.tensor([[1], [0]])
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64):
        given = r2o.to(dtype)
        planner = Planner(given, 6, 4, 2)
        given.zero_()
        assert planner.r2o.dtype == torch.int32
        assert planner.r2o.tolist() == [[1], [0]]
        assert planner.update_redundancy_mapping()[0].tolist() == [0, 1, 2, 2, 3, 0]


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), "cpu:0"])
def test_devices_that_are_the_cpu(device):
    planner = Layout("ring").planner(device=device)
    assert planner.run(torch.arange(15), torch.zeros((), dtype=torch.int32)).device.type == "cpu"
    assert planner.device == torch.zeros(1).device


# update_redundancy_mapping


def original_first(phy2log, layout):
    """log2phy [n_logical, 2] and logcnt by a loop over the slots."""
    log2phy = [[-1, -1] for _ in range(layout.n_logical)]
    per_rank = layout.n_physical // layout.n_ranks
    for slot, expert in enumerate(phy2log):
        log2phy[expert][int(slot % per_rank >= layout.n_own)] = slot
    return log2phy, [1 + (copy >= 0) for _, copy in log2phy]


def check_mapping(returned, planner, layout, order):
    """The layout of the identity order, with expert order[i] in place of expert i."""
    phy2log = np.asarray(order)[layout.identity].tolist()
    log2phy, logcnt = original_first(phy2log, layout)
    for value, expected in zip(returned, (phy2log, log2phy, logcnt), strict=True):
        assert value.dtype == torch.int32
        assert value.tolist() == expected
    assert planner.phy2log.tolist() == phy2log
    assert planner.phy2log.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("ranks_per_node", [None, 1, 2, 64])
def test_mapping_by_load_history(layout, ranks_per_node, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    planner = layout.planner(ranks_per_node=ranks_per_node)
    check_mapping(planner.update_redundancy_mapping(), planner, layout, range(layout.n_logical))

    history = np.random.default_rng(3).integers(0, 12, layout.n_logical)  # with ties
    per_node = min(8, layout.n_ranks) if ranks_per_node is None else ranks_per_node
    n_nodes = max(1, layout.n_ranks // per_node)
    weight = torch.from_numpy(history)[None]
    packed = rebalance_experts(weight, layout.n_logical, layout.n_groups, n_nodes, layout.n_ranks)[0]
    order = []
    for rank in packed.view(layout.n_ranks, -1).tolist():
        order += sorted(rank, key=lambda expert: -history[expert])
    returned = planner.update_redundancy_mapping(torch.from_numpy(history).to(dtype))
    check_mapping(returned, planner, layout, order)

    check_mapping(planner.update_redundancy_mapping(None), planner, layout, range(layout.n_logical))


@pytest.mark.parametrize(("devices", "ep_size", "expected"), [(0, 4, 4), (0, 16, 8), (4, 16, 4)])
def test_ranks_per_node_defaults_to_the_devices(devices, ep_size, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert Planner(topology.ring(2), 3 * ep_size, 2 * ep_size, ep_size).ranks_per_node == expected


def test_a_new_mapping_is_what_later_runs_use(layout):
    planner = layout.planner()
    idx = batch(1, (50, 6), layout.n_logical)
    planner.run(idx, None)
    history = torch.from_numpy(np.random.default_rng(2).permutation(layout.n_logical))
    phy2log = planner.update_redundancy_mapping(history)[0].tolist()
    assert planner.last_plan is None
    physical = planner.run(idx, None)
    check_mapped(idx, physical, phy2log, planner.last_plan.quota)
    assert np.array_equal(physical, assign_reference([idx], phy2log, planner.last_plan.quota)[0])


def test_returned_mapping_shares_nothing_with_the_planner():
    layout = Layout("cube")
    planner = layout.planner()
    for table in planner.update_redundancy_mapping():
        table.fill_(0)
    assert planner.phy2log.tolist() == layout.identity.tolist()
    idx = batch(0, (40,), layout.n_logical)
    check_mapped(idx, planner.run(idx, None), layout.identity, planner.last_plan.quota)


# count_workload


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("n_sms", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 600, 3000])
def test_count_workload(n, n_sms, dtype):
    planner = Layout("ring").planner()
    idx = batch(n, n, 15, dtype=dtype)
    workload, prefix = planner.count_workload(idx, n_sms)
    expected, expected_prefix = count_reference(idx, 15, n_sms)
    assert workload.dtype == prefix.dtype == torch.int32
    assert workload.tolist() == expected.tolist()
    assert prefix.tolist() == expected_prefix.tolist()


def strided(idx):
    """Views of all kinds of 3-D indices, by name."""
    return {
        "transposed": idx.transpose(0, 2),
        "every_other": idx[::2, :, 1::3],
        "backwards_in_memory": idx.permute(2, 0, 1)[1:],
        "expanded": idx[:1].expand(4, -1, -1),
        "one_element_everywhere": idx[0, 0, 0].expand(30, 20),
        "offset": idx[3:, 1:],
    }


@pytest.mark.parametrize("view", list(strided(torch.zeros(4, 4, 4))))
def test_count_workload_of_views(view):
    idx = strided(batch(1, (8, 9, 10), 15))[view]
    workload, prefix = Layout("ring").planner().count_workload(idx, 3)
    expected, expected_prefix = count_reference(idx, 15, 3)
    assert workload.tolist() == expected.tolist()
    assert prefix.tolist() == expected_prefix.tolist()


@pytest.mark.parametrize("shape", [(0,), (0, 8), (700,), (3, 100)])
def test_count_workload_of_masked_and_empty(shape):
    workload, prefix = Layout("ring").planner().count_workload(torch.full(shape, -1), 2)
    assert workload.tolist() == [0] * 15
    assert prefix.tolist() == [[0] * 15] * 2


# solve_probs


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.usefixtures("highs")
def test_solve_probs(layout, solver, reordered):
    planner = layout.planner(solver=solver)
    rng = np.random.default_rng(5)
    if reordered:
        planner.update_redundancy_mapping(torch.from_numpy(rng.random(layout.n_logical)))
    phy2log = planner.phy2log.numpy()
    for kind in ("lognormal_1", "one_hot", "mostly_zeros", "all_zeros"):
        loads = cases.LOADS[kind](rng, layout.n_logical)
        counter = torch.zeros(1, dtype=torch.int32)
        share, scaled = planner.solve_probs(torch.from_numpy(loads).int(), counter)
        assert counter.item() == layout.n_groups
        assert share.dtype == scaled.dtype == torch.float32
        assert share.shape == (layout.n_groups, layout.group_size, layout.n_columns)

        own = phy2log.reshape(layout.n_groups, layout.group_size, -1)[:, :, : layout.n_own]
        assert scaled.shape == own.shape
        np.testing.assert_allclose(scaled, loads[own] / max(1, loads.max()), rtol=1e-6)

        # The class's share in the plan is that of its originals' quotas.
        kept = layout.classes(planner.solve(torch.from_numpy(loads)).quota).sum(2)
        whole = layout.classes(loads[phy2log]).sum(2)
        np.testing.assert_allclose(share, np.where(whole > 0, kept / np.maximum(whole, 1), 1.0), rtol=1e-6)

        # One common split for the experts of a class loses nothing.
        optima = ReferenceLP(phy2log, layout.n_ranks, layout.group_size).solve(loads)
        for group in range(layout.n_groups):
            rank_load = loads[own[group]].sum(1).astype(float)
            for owner in range(layout.group_size):
                for k in range(layout.n_columns):
                    moved = (1 - float(share[group, owner, k])) * whole[group, owner, k]
                    rank_load[owner] -= moved
                    rank_load[layout.r2o[:, k].tolist().index(owner)] += moved
            assert rank_load.max() <= math.ceil(optima[group] * (1 - 1e-9)) + 1e-6 * loads.sum()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counter_is_raised_by_the_groups_solved(dtype, shape):
    layout = Layout("cube_4_groups")
    planner = layout.planner()
    counter = torch.full(shape, 7, dtype=dtype)
    planner.solve_probs(torch.ones(layout.n_logical, dtype=torch.int32), counter)
    assert counter.item() == 11
    planner.run(torch.arange(100), counter)
    assert counter.item() == 15
    assert counter.dtype == dtype
    assert counter.shape == shape
    planner.run(torch.arange(100), None)
    planner.solve_probs(torch.ones(layout.n_logical, dtype=torch.int32), None)
    assert counter.item() == 15


def test_solve_probs_sums_over_the_group():
    layout = Layout("torus")
    loads = np.random.default_rng(0).integers(0, 90, (layout.n_ranks, layout.n_logical))
    total = layout.planner().solve(torch.from_numpy(loads.sum(0)))
    kept, whole = layout.classes(total.quota).sum(2), layout.classes(loads.sum(0)[layout.identity]).sum(2)
    for rank in (0, 4):
        exchange = Known(rank, layout.n_ranks)
        exchange.counts = torch.from_numpy(loads).int()
        share, scaled = layout.planner(group=exchange).solve_probs(exchange.counts[rank].clone(), None)
        np.testing.assert_allclose(share, kept / whole, rtol=1e-6)
        np.testing.assert_allclose(scaled.flatten(), loads.sum(0) / loads.sum(0).max(), rtol=1e-6)


# weighted_select_target


@pytest.mark.parametrize("n_sms", [1, 2, 100])
@pytest.mark.parametrize("kind", ["zero", "one", "solved", "random"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_weighted_select_target(layout, kind, n_sms, dtype):
    planner = layout.planner()
    history = torch.from_numpy(np.random.default_rng(1).permutation(layout.n_logical))
    phy2log = planner.update_redundancy_mapping(history)[0].numpy()
    idx = batch(8, (300, 4), layout.n_logical, dtype=dtype)
    workload, by_sm = planner.count_workload(idx, n_sms)
    shape = (layout.n_groups, layout.group_size, layout.n_columns)
    share = {
        "zero": torch.zeros(shape),
        "one": torch.ones(shape),
        "solved": planner.solve_probs(workload, None)[0],
        "random": torch.from_numpy(np.random.default_rng(2).random(shape)),
    }[kind]
    before = idx.clone()
    physical = planner.weighted_select_target(idx, share, by_sm, n_sms)
    assert torch.equal(idx, before)

    used = np.bincount(physical[physical >= 0].numpy(), minlength=layout.n_physical)
    check_mapped(idx, physical, phy2log, used)  # masks and belonging
    count = workload.numpy()[phy2log]
    assert (used[count == 0] == 0).all()
    stays, of = layout.classes(used), layout.classes(count)
    by_class = share.numpy().astype(float)[:, :, None]
    exact = np.floor(by_class * of)
    assert (np.abs(stays - exact) <= (0 if kind in ("zero", "one") else 1)).all()


# run


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.usefixtures("highs")
def test_run_token_by_token(layout, solver, dtype):
    planner = layout.planner(solver=solver)
    for seed, shape in enumerate([(), (1,), (37,), (50, 6), (5, 4, 3)]):
        idx = batch(seed, shape, layout.n_logical, dtype=dtype)
        before = idx.clone()
        physical = planner.run(idx, None)
        assert torch.equal(idx, before)
        plan = planner.last_plan
        check_mapped(idx, physical, layout.identity, plan.quota)
        assert np.array_equal(physical, assign_reference([idx], layout.identity, plan.quota)[0])
        optima = ReferenceLP(layout.identity, layout.n_ranks, layout.group_size).solve(counts_of(idx, layout.n_logical))
        assert plan.max_load.tolist() == [integer_optimum(t, layout.group_size) for t in optima]


@pytest.mark.parametrize("view", list(strided(torch.zeros(4, 4, 4))))
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_run_on_views(view, dtype):
    phy2log = many_copies()
    planner = Planner.from_placement(Placement(phy2log, 8), group_size=4)
    storage = batch(4, (8, 9, 10), 16, dtype=dtype)
    before = storage.clone()
    idx = strided(storage)[view]
    physical = planner.run(idx, None)
    check_mapped(idx, physical, phy2log, planner.last_plan.quota)
    assert np.array_equal(physical, assign_reference([idx], phy2log, planner.last_plan.quota)[0])
    assert torch.equal(storage, before)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0, 2), (9,), (3, 5), ()])
def test_run_without_tokens(shape):
    layout = Layout("cube_4_groups")
    planner = layout.planner()
    counter = torch.zeros(1, dtype=torch.int32)
    physical = planner.run(torch.full(shape, -1, dtype=torch.int32), counter)
    assert physical.shape == shape
    assert physical.dtype == torch.int32
    assert (physical == -1).all()
    assert counter.item() == 4
    assert planner.last_plan.quota.tolist() == [0] * layout.n_physical
    assert planner.last_plan.solved


def run_all_ranks(make, batches, n_logical, n_sms=None):
    """What every rank of a group gets, one after the other, and their plans. `make(group)` returns a planner."""
    counts = torch.from_numpy(np.stack([counts_of(idx, n_logical) for idx in batches])).int()
    results, plans = [], []
    for rank, idx in enumerate(batches):
        exchange = Known(rank, len(batches))
        exchange.counts = counts
        planner = make(exchange)
        results.append(planner.run(idx, None, n_sms))
        plans.append(planner.last_plan)
    return results, plans


def check_all_ranks(make, batches, phy2log, n_logical):
    results, plans = run_all_ranks(make, batches, n_logical)
    quota = plans[0].quota
    assert all(torch.equal(plan.quota, quota) for plan in plans)
    for got, expected in zip(
        results, assign_reference(batches, phy2log, quota, cases.ranks_per_node(len(batches))), strict=True
    ):
        assert np.array_equal(got, expected)
    used = np.concatenate([physical.numpy().ravel() for physical in results])
    assert np.bincount(used[used >= 0], minlength=len(phy2log)).tolist() == quota.tolist()
    return plans[0]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.usefixtures("highs")
def test_run_of_every_rank(layout, solver):
    shapes = [(17, 4), (0, 4), (60,), (2, 5, 3)]
    batches = [batch(rank, shapes[rank % 4], layout.n_logical) for rank in range(layout.n_ranks)]
    batches[2].fill_(-1)
    plan = check_all_ranks(
        lambda group: layout.planner(group=group, solver=solver), batches, layout.identity, layout.n_logical
    )
    loads = sum(counts_of(idx, layout.n_logical) for idx in batches)
    optima = ReferenceLP(layout.identity, layout.n_ranks, layout.group_size).solve(loads)
    assert plan.max_load.tolist() == [integer_optimum(t, layout.group_size) for t in optima]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_run_of_every_rank_of_any_placement(data):
    drawn = data.draw(cases.placements(max_ranks=8))
    seed = data.draw(cases.SEEDS)
    solver = data.draw(st.sampled_from(SOLVERS))
    rank_speed = data.draw(cases.speeds(drawn.n_ranks))
    sizes = data.draw(st.lists(st.integers(0, 60), min_size=drawn.n_ranks, max_size=drawn.n_ranks))
    batches = [batch([seed, rank], size, drawn.n_logical) for rank, size in enumerate(sizes)]
    placement = Placement(drawn.phy2log, drawn.n_ranks)
    check_all_ranks(
        lambda group: Planner.from_placement(
            placement, group_size=drawn.group_size, group=group, solver=solver, rank_speed=rank_speed
        ),
        batches,
        drawn.phy2log,
        drawn.n_logical,
    )


def test_threads_do_not_change_the_result():
    phy2log = many_copies(n_ranks=4, n_logical_per_group=32, slots=20)
    placement = Placement(phy2log, 4)
    idx = batch(0, (50_100, 4), 32)  # more than three times what a thread is worth
    results = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            planner = Planner.from_placement(placement)
            results += [planner.run(idx, None, n_sms) for n_sms in (None, 1, 2, 1000)]
            workload, _ = planner.count_workload(idx, 5)
            assert workload.tolist() == counts_of(idx, 32).tolist()
    expected = assign_reference([idx], phy2log, planner.last_plan.quota)[0]
    assert all(np.array_equal(physical, expected) for physical in results)


def test_threads_do_not_change_weighted_select_target():
    layout = Layout("cube")
    idx = batch(0, (70_000,), layout.n_logical)
    share = torch.from_numpy(np.random.default_rng(0).random((1, 8, 2)))
    results = []
    for threads in (1, 2):
        with torch_threads(threads):
            planner = layout.planner()
            results.append(planner.weighted_select_target(idx, share, planner.count_workload(idx, 9)[1], 9))
    used = np.bincount(results[0][idx >= 0], minlength=layout.n_physical)
    assert np.array_equal(results[0], assign_reference([idx], layout.identity, used)[0])
    assert torch.equal(results[0], results[1])


def test_two_threads_share_a_planner():
    layout = Layout("cube_4_groups")
    planner, alone = layout.planner(), layout.planner()
    batches = [batch(seed, (4000, 4), layout.n_logical) for seed in range(2)]
    expected = []
    counts = [counts_of(idx, layout.n_logical) for idx in batches]
    for idx, count in zip(batches, counts, strict=True):
        quota = alone.solve(torch.from_numpy(count)).quota
        expected.append(assign_reference([idx], layout.identity, quota)[0])

    def work(i):
        right = 0
        for _ in range(30):
            right += np.array_equal(planner.run(batches[i], None), expected[i])
            right += np.array_equal(planner.count_workload(batches[i], 3)[0], counts[i])
        return right

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [60, 60]


def test_last_plan_is_a_copy():
    layout = Layout("cube")
    planner = layout.planner()
    assert planner.last_plan is None
    planner.solve(torch.ones(layout.n_logical))
    planner.count_workload(torch.arange(5), 1)
    assert planner.last_plan is None
    planner.run(batch(0, (60, 6), layout.n_logical), None)
    first = planner.last_plan
    kept = first.copy()
    planner.run(batch(1, (90, 6), layout.n_logical), None)
    second = planner.last_plan
    assert second.rank_load.sum() != kept.rank_load.sum()
    for before, after in zip(kept.tensors(), first.tensors(), strict=True):
        assert torch.equal(before, after)
    second.quota.zero_()
    assert planner.last_plan.quota.sum() == second.rank_load.sum()


def test_run_allocates_nothing_but_its_result():
    layout = Layout("cube")
    planner = layout.planner()
    idx = batch(0, (512, 6), layout.n_logical)
    for view in (idx, idx.int(), idx.T, idx[::2]):
        planner.run(view, None)
        workspace = planner.workspace_bytes
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            physical = planner.run(view, None)
        grown = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
        assert grown == [physical.numel() * physical.element_size()]
        assert planner.workspace_bytes == workspace > 0


# solve and plans


def fields_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def at(plan, i):
    """Load i of a batch's plan."""
    return Plan(*(tensor[i] for tensor in plan.tensors()), plan.solver, plan.rules)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.usefixtures("highs")
def test_solve_a_batch(layout, solver):
    rng = np.random.default_rng(7)
    loads = np.stack([draw(rng, layout.n_logical) for draw in cases.LOADS.values()])
    n = len(loads)
    planner = layout.planner()
    plan = planner.solve(torch.from_numpy(loads), solver=solver)
    shapes = {
        "quota": (torch.int32, (n, layout.n_physical)),
        "rank_load": (torch.int64, (n, layout.n_ranks)),
        "max_load": (torch.int64, (n, layout.n_groups)),
        "lower_bound": (torch.float64, (n, layout.n_groups)),
        "gap": (torch.float64, (n, layout.n_groups)),
        "iterations": (torch.int32, (n, layout.n_groups)),
        "status": (torch.int32, (n, layout.n_groups)),
    }
    assert {name: (getattr(plan, name).dtype, getattr(plan, name).shape) for name in shapes} == shapes
    assert plan.solver == solver
    assert plan.solved
    assert (plan.status == SolveStatus.SOLVED).all()
    lp = ReferenceLP(layout.identity, layout.n_ranks, layout.group_size)
    for i, load in enumerate(loads):
        single = planner.solve(torch.from_numpy(load), solver=solver)
        assert single.quota.shape == (layout.n_physical,)
        assert single.max_load.shape == (layout.n_groups,)
        assert fields_equal(single, at(plan, i))
        quota = single.quota.numpy()
        assert (quota >= 0).all()
        assert np.bincount(layout.identity, quota, layout.n_logical).tolist() == load.tolist()
        assert single.rank_load.tolist() == rank_loads(quota, layout.n_ranks).tolist()
        by_group = single.rank_load.numpy().reshape(layout.n_groups, -1)
        assert single.max_load.tolist() == by_group.max(1).tolist()
        optima = lp.solve(load)
        assert (single.lower_bound.numpy() <= optima * (1 + 1e-9)).all()
        if load.max() < 10**6:  # beyond, HiGHS cannot tell whole numbers apart
            assert single.max_load.tolist() == [integer_optimum(t, layout.group_size) for t in optima]
        mean = load.sum() / layout.n_ranks
        assert single.imbalance.item() == pytest.approx(by_group.max() / mean if mean else 1.0)
        assert plan.imbalance[i] == single.imbalance


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(1,), (0,)])
def test_solve_a_batch_of_one_or_none(solver, shape):
    layout = Layout("cube_4_groups")
    loads = torch.arange(layout.n_logical).expand(*shape, -1)
    plan = layout.planner().solve(loads, solver=solver)
    assert plan.quota.shape == (*shape, layout.n_physical)
    assert plan.quota.sum() == loads.sum()
    assert plan.imbalance.shape == shape
    assert str(plan).startswith(f"Plan({shape[0]} load")


def test_solve_takes_whole_numbers_of_any_dtype():
    layout = Layout("torus")
    planner = layout.planner()
    loads = torch.from_numpy(np.random.default_rng(0).integers(0, 2000, layout.n_logical))
    expected = planner.solve(loads)
    assert expected.rank_load.sum() == loads.sum()
    for dtype in (torch.int32, torch.float16, torch.float32, torch.float64):
        assert fields_equal(planner.solve(loads.to(dtype)), expected), dtype
    wide = torch.stack([loads, loads + 1], dim=1)
    assert fields_equal(planner.solve(wide[:, 0]), expected)
    assert fields_equal(planner.solve(loads.expand(3, -1)[1:]), planner.solve(torch.stack([loads, loads])))


def test_solve_the_largest_loads():
    layout = Layout("cube")
    for dtype in (torch.int32, torch.int64, torch.float64):
        loads = torch.full((layout.n_logical,), 2**31 - 1, dtype=dtype)
        plan = layout.planner().solve(loads)
        assert plan.rank_load.sum().item() == layout.n_logical * (2**31 - 1)
        assert plan.max_load.tolist() == [8 * (2**31 - 1)]
        assert (plan.quota >= 0).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_solve_zero_loads(layout, solver):
    plan = layout.planner(solver=solver).solve(torch.zeros(2, layout.n_logical))
    assert plan.solved
    assert plan.quota.sum() == plan.max_load.sum() == plan.lower_bound.sum() == plan.gap.sum() == 0
    assert plan.imbalance.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array, lambda v: torch.tensor(v, dtype=torch.float32)])
def test_rank_speed(solver, kind):
    phy2log = many_copies()
    speed = [0.5, 2.0, 1.0, 1.5, 1.0, 1.0, 0.75, 1.25]
    planner = Planner.from_placement(Placement(phy2log, 8), group_size=4, rank_speed=kind(speed), solver=solver)
    rng = np.random.default_rng(11)
    for draw in ("lognormal_1", "zipf", "mostly_zeros"):
        loads = cases.LOADS[draw](rng, 16)
        plan = planner.solve(torch.from_numpy(loads))
        best = exact_bottleneck(phy2log, 8, 4, loads, speed)
        per_speed = (plan.rank_load.double() / torch.tensor(speed)).view(2, 4).amax(1)
        assert per_speed.tolist() == pytest.approx([b.max_load for b in best], rel=1e-12)
        assert plan.max_load.tolist() == [math.ceil(b.load) for b in best]


def test_solver_of_planner_is_the_default():
    layout = Layout("cube")
    loads = torch.arange(layout.n_logical)
    flow = layout.planner(solver="flow")
    assert flow.solve(loads).solver == "flow"
    assert flow.solve(loads, solver="ipm").solver == "ipm"
    assert layout.planner().solve(loads).solver == "ipm"
    flow.run(torch.arange(9), None)
    assert flow.last_plan.solver == "flow"


def test_statuses_have_a_sentence_each():
    assert [status.name.lower() for status in SolveStatus] == [
        "solved",
        "iteration_limit",
        "numerical",
        "skipped",
        "refused",
    ]
    sentences = [status.sentence for status in SolveStatus]
    assert len(set(sentences)) == 5
    assert all(s[0].isupper() and s.endswith(".") for s in sentences)


def test_unsolved_plans_say_so():
    plan = Layout("cube").planner().solve(torch.arange(64).expand(2, -1))
    assert str(plan).startswith("Plan(2 loads on 8 ranks, ipm: imbalance 1.")
    assert str(plan).endswith(", solved)")
    plan.status[1, 0] = SolveStatus.NUMERICAL
    assert not plan.solved
    assert str(plan).endswith(", solved, numerical)")


# verbose


def test_verbose_prints_problem_settings_and_iterations(capsys):
    layout = Layout("cube_4_groups")
    loads = cases.LOADS["lognormal_1"](np.random.default_rng(0), layout.n_logical)
    quiet = layout.planner().solve(torch.from_numpy(loads))
    assert capsys.readouterr().out == ""
    plan = layout.planner(verbose=True).solve(torch.from_numpy(loads))
    assert fields_equal(plan, quiet)
    lines = capsys.readouterr().out.splitlines()
    assert "32 ranks in 4 groups of 8" in lines[0]
    assert "n_logical=256, n_physical=320" in lines[0]
    assert f"{loads.sum()} tokens" in lines[0]
    assert "solver ipm, gap tolerance 0.0001, at most 20 iterations" in lines[1]
    rows = [line.split() for line in lines[2:] if line[:5].strip().isdigit()]
    heads = [line for line in lines if line.startswith("group  it ")]
    assert len(heads) == 4
    for group in range(4):
        of_group = [row for row in rows if row[0] == str(group)]
        assert [int(row[1]) for row in of_group] == list(range(plan.iterations[group] + 1))
        objective, bound, gap = map(float, of_group[-1][2:5])
        scale = loads.reshape(4, -1)[group].sum() / 8
        assert bound * scale == pytest.approx(plan.lower_bound[group].item(), rel=1e-5)
        assert objective >= bound
        assert gap <= 1e-4
        summary = next(line for line in lines if line.startswith(f"group {group}:"))
        assert f"busiest rank {plan.max_load[group]} tokens" in summary
        assert f"{plan.iterations[group]} iterations" in summary
        assert SolveStatus.SOLVED.sentence in summary


def test_verbose_flow_batches_and_runs(capsys):
    layout = Layout("cube_4_groups")
    planner = layout.planner(verbose=True, solver="flow")
    planner.solve(torch.arange(layout.n_logical))
    out = capsys.readouterr().out
    assert "solver flow" in out
    assert out.count(" cuts. ") == 4
    for n in (0, 1, 3):
        plan = planner.solve(torch.arange(layout.n_logical).expand(n, -1))
        assert capsys.readouterr().out.splitlines()[2].strip() == str(plan)
    planner.run(torch.arange(100), None)
    assert "; 100 tokens" in capsys.readouterr().out


def test_workspace_bytes_cover_the_plan():
    layout = Layout("cube")
    planner = layout.planner()
    before = planner.workspace_bytes
    plan_bytes = 4 * layout.n_physical + 8 * layout.n_ranks + 3 * 8 * layout.n_groups + 2 * 4 * layout.n_groups
    assert before > plan_bytes + 8 * layout.n_logical
    for seed in range(3):
        planner.run(batch(seed, (300, 6), layout.n_logical), None)
        planner.solve(torch.arange(layout.n_logical))
    assert planner.workspace_bytes == before
