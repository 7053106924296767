"""What callers get wrong: the right exception, with the value seen and the value allowed, and nothing has changed."""

import re

import pytest
import torch

from lplb import _C, Placement, Planner, topology
from lplb.exchange import Known, Local

N_LOGICAL, N_PHYSICAL, N_RANKS = 64, 80, 8
PAIRS = [0, 1, 2, 3, 2, 3, 0, 1]  # 4 ranks of two slots: ranks 0 and 2 hold the same, and 1 and 3
BIG = 2**31 - 1


def make(**changes):
    arguments = {
        "redundant_to_original": topology.cube(),
        "n_routed_experts": N_PHYSICAL,
        "n_logical_routed_experts": N_LOGICAL,
        "ep_size": N_RANKS,
    }
    return Planner(**(arguments | changes))


def from_pairs(**settings):
    return Planner.from_placement(Placement(PAIRS, 4), **settings)


def refused(kind, seen, allowed=None):
    """Expect an exception whose message has the value seen and then the value allowed."""
    return pytest.raises(kind, match=re.escape(seen) + (".*" + re.escape(allowed) if allowed else ""))


class Watched:
    """A planner that has run once, and what must stay as it is."""

    def __init__(self):
        self.planner = make()
        self.idx = torch.arange(300) * 7 % N_LOGICAL
        self.counter = torch.full((1,), 5, dtype=torch.int64)
        self.physical = self.planner.run(self.idx, None)
        self.quota = self.planner.last_plan.quota
        self.phy2log = self.planner.phy2log.clone()

    def check_unchanged(self):
        assert self.counter.tolist() == [5]
        assert torch.equal(self.planner.last_plan.quota, self.quota)
        assert torch.equal(self.planner.phy2log, self.phy2log)
        assert torch.equal(self.planner.run(self.idx, self.counter), self.physical)
        assert self.counter.tolist() == [6]


@pytest.fixture
def watched():
    watched = Watched()
    yield watched
    watched.check_unchanged()


# The constructor


def r2o(*columns):
    return torch.tensor(columns).T


SIZES = {"n_routed_experts": 6, "n_logical_routed_experts": 4, "ep_size": 2}
WITHOUT_SIZES = {"ep_size": None}

CONSTRUCTORS = {
    "fixed point": (
        {"redundant_to_original": r2o([1, 0, 2])},
        ValueError, "rank 2 copies from 2", "allowed is any other rank",
    ),
    "repeat": (
        {"redundant_to_original": r2o([1, 2, 0], [2, 0, 0])},
        ValueError, "column 1, rank 2 copies from 0, as rank 1 does", "must be a permutation",
    ),
    "rank too large": ({"redundant_to_original": r2o([1, 3, 0])}, ValueError, "copies from 3", "allowed is 0 to 2"),
    "rank negative": ({"redundant_to_original": r2o([1, -1, 0])}, ValueError, "copies from -1", "allowed is 0 to 2"),
    "r2o 1-D": ({"redundant_to_original": torch.tensor([1, 0])}, ValueError, "shape [2]", "allowed is [ranks, cl"),
    "r2o without ranks": ({"redundant_to_original": torch.zeros(0, 1).int()}, ValueError, "shape [0, 1]", "one rank"),
    "r2o floating": ({"redundant_to_original": r2o([1.0, 0.0])}, TypeError, "torch.float32", "allowed is an integer"),
    "r2o bool": ({"redundant_to_original": r2o([True, False])}, TypeError, "torch.bool", "allowed is an integer"),
    "r2o list": ({"redundant_to_original": [[1], [0]]}, TypeError, "r2o is a list", "allowed is a torch.Tensor"),
    "129 ranks": (
        {"redundant_to_original": topology.ring(129), "ep_size": 129, "n_logical_routed_experts": 129,
         "n_routed_experts": 258},
        ValueError, "is 129", "allowed is 1 to 128",
    ),
    "physical not divisible": (
        {"n_routed_experts": 81}, ValueError, "n_routed_experts is 81", "allowed is a multiple of ep_size = 8",
    ),
    "logical not divisible": (
        {"n_logical_routed_experts": 63},
        ValueError, "n_logical_routed_experts is 63", "allowed is a multiple of ep_size = 8",
    ),
    "redundant not divisible": (
        {"n_routed_experts": 88}, ValueError, "n_routed_experts is 88: 3 redundant slots", "multiple of the 2 columns",
    ),
    "fewer physical": ({"n_routed_experts": 56}, ValueError, "n_routed_experts is 56: -1 redundant", "allowed is"),
    "redundant without columns": (
        {"redundant_to_original": torch.zeros(8, 0).int()},
        ValueError, "n_routed_experts is 80: 2 redundant slots", "multiple of the 0 columns",
    ),
    "more classes than own experts": (
        {"n_routed_experts": 24, "n_logical_routed_experts": 8},
        ValueError, "n_routed_experts is 24: 2 redundant slots", "allowed are at most the 1 own experts",
    ),
    "ep_size no multiple of r2o": ({"ep_size": 4}, ValueError, "ep_size is 4", "a multiple of group_size = 8"),
    "ep_size missing": ({"ep_size": None}, ValueError, "ep_size is None", "allowed without a group is the number"),
    "ep_size against group": ({"group": Known(0, 16)}, ValueError, "ep_size is 8", "the size of the group, 16"),
    "ep_size zero": ({"ep_size": 0}, ValueError, "ep_size is 0", "allowed is 1 or more"),
    "ep_size floating": ({"ep_size": 8.0}, TypeError, "ep_size is 8.0", "allowed is an int"),
    "physical floating": ({"n_routed_experts": 80.0}, TypeError, "n_routed_experts is 80.0", "allowed is an int"),
    "logical bool": ({"n_logical_routed_experts": True}, TypeError, "n_logical_routed_experts is True", "an int"),
    "logical zero": ({"n_logical_routed_experts": 0}, ValueError, "n_logical_routed_experts is 0", "1 or more"),
    "physical negative": ({"n_routed_experts": -8}, ValueError, "n_routed_experts is -8", "allowed is 1 or more"),
    "ranks_per_node zero": ({"ranks_per_node": 0}, ValueError, "ranks_per_node is 0", "allowed is 1 or more"),
    "ranks_per_node text": ({"ranks_per_node": "8"}, TypeError, "ranks_per_node is '8'", "allowed is an int"),
    "solver unknown": ({"solver": "simplex"}, ValueError, "solver is 'simplex'", "allowed is 'ipm' or 'flow'"),
    "solver list": ({"solver": ["ipm"]}, ValueError, "solver is ['ipm']", "allowed is 'ipm' or 'flow'"),
    "group int": ({"group": 8}, TypeError, "group is a int", "allowed is a torch.distributed.ProcessGroup"),
    "device without backend": ({"device": "meta"}, RuntimeError, "device is 'meta'", "no META backend"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CONSTRUCTORS))
def test_constructor(case):
    changes, kind, seen, allowed = CONSTRUCTORS[case]
    with refused(kind, seen, allowed):
        make(**changes)


def test_cuda_device_names_the_fix():
    if _C.cuda:
        pytest.skip("this build has the CUDA backend")
    for device in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(RuntimeError, match=r"device is 'cuda.*no CUDA backend.*tensor\.cpu\(\), or device='cpu'"):
            make(device=device)
        with pytest.raises(RuntimeError, match=r"device is 'cuda.*no CUDA backend.*tensor\.cpu\(\), or device='cpu'"):
            from_pairs(device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device for a CUDA tensor")
def test_a_planner_on_the_cpu_refuses_cuda_tensors(watched):
    with refused(ValueError, "idx is on 'cuda:0'", "allowed is the planner's device, 'cpu'"):
        watched.planner.run(watched.idx.cuda(), watched.counter)


# Placements

PLACEMENTS = {
    "not group-closed": (
        {"group_size": 2}, ValueError, "expert 0 has slots in groups [0, 1] (of 2 ranks each)", "allowed is one group",
    ),
    "group_size no divisor": ({"group_size": 3}, ValueError, "group_size is 3", "allowed is a divisor of n_ranks = 4"),
    "group_size zero": ({"group_size": 0}, ValueError, "group_size is 0", "allowed is 1 to 128"),
    "group_size 129": ({"group_size": 129}, ValueError, "group_size is 129", "allowed is 1 to 128"),
    "group_size floating": ({"group_size": 2.0}, TypeError, "group_size is 2.0", "allowed is an int"),
    "group of another size": ({"group": Local()}, ValueError, "ep_size is 4", "allowed is the size of the group, 1"),
    "group text": ({"group": "nccl"}, TypeError, "group is a str", "allowed is a torch.distributed.ProcessGroup"),
    "speeds too few": ({"rank_speed": [1.0] * 3}, ValueError, "rank_speed has shape [3]", "allowed is [n_ranks] = [4]"),
    "speeds 2-D": ({"rank_speed": torch.ones(2, 2)}, ValueError, "rank_speed has shape [2, 2]", "[n_ranks] = [4]"),
    "speed zero": ({"rank_speed": [1, 1, 0, 1]}, ValueError, "rank_speed has 0.0", "allowed are 1e-6 to 1e6"),
    "speed negative": ({"rank_speed": [1, 1, -2, 1]}, ValueError, "rank_speed has -2.0", "allowed are 1e-6 to 1e6"),
    "speed NaN": ({"rank_speed": [1, float("nan"), 1, 1]}, ValueError, "rank_speed has nan", "allowed are 1e-6"),
    "speed infinite": ({"rank_speed": [1, float("inf"), 1, 1]}, ValueError, "rank_speed has inf", "allowed are 1e-6"),
    "speed text": ({"rank_speed": "fast"}, TypeError, "rank_speed is 'fast'", "allowed are 4 numbers"),
    "speed None": ({"rank_speed": [None] * 4}, TypeError, "rank_speed is [None", "allowed are 4 numbers"),
    "solver unknown": ({"solver": "ILP"}, ValueError, "solver is 'ILP'", "allowed is 'ipm' or 'flow'"),
    "ranks_per_node negative": ({"ranks_per_node": -1}, ValueError, "ranks_per_node is -1", "allowed is 1 or more"),
    "device without backend": ({"device": "meta"}, RuntimeError, "device is 'meta'", "no META backend"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(PLACEMENTS))
def test_from_placement(case):
    changes, kind, seen, allowed = PLACEMENTS[case]
    with refused(kind, seen, allowed):
        from_pairs(**changes)


@pytest.mark.parametrize("value", [PAIRS, torch.tensor(PAIRS), None])
def test_from_placement_needs_a_placement(value):
    with refused(TypeError, f"placement is a {type(value).__name__}", "allowed is an lplb.Placement"):
        Planner.from_placement(value)


def test_more_ranks_than_a_group_may_have():
    placement = Placement(torch.arange(129), 129)
    with refused(ValueError, "stands for all 129 ranks", "allowed are 1 to 128"):
        Planner.from_placement(placement)
    assert Planner.from_placement(placement, group_size=43).n_group == 3


@pytest.mark.parametrize(
    ("phy2log", "message"),
    [
        ([0, 1, 3, 0], "1 of 4 experts have no slot: 2; allowed is at least one"),
        ([0, 0, 1, 2], "expert 0 .*rank 0"),
        ([0, 1, 2], "3 slots.*n_ranks = 2"),
    ],
)
def test_placements_with_a_missing_or_doubled_expert(phy2log, message):
    with pytest.raises(ValueError, match=message):
        Placement(phy2log, 2)


# Indices and counters, for every stage that takes them

BAD_INDICES = {
    "too large": (torch.tensor([[0, 3], [64, 5]]), ValueError, "idx has 64 at flat position 2", "n_logical - 1 = 63"),
    "below -1": (torch.tensor([5, -2, 70]), ValueError, "idx has -2 at flat position 1", "-1 (masked) or 0 to"),
    "int32": (torch.tensor([1, 64], dtype=torch.int32), ValueError, "idx has 64 at flat position 1", "= 63"),
    "largest int32": (torch.tensor([BIG], dtype=torch.int32), ValueError, f"idx has {BIG}", "= 63"),
    "smallest int32": (torch.tensor([-BIG - 1], dtype=torch.int32), ValueError, f"idx has {-BIG - 1}", "= 63"),
    "largest int64": (torch.tensor([2**63 - 1]), ValueError, f"idx has {2**63 - 1}", "= 63"),
    "smallest int64": (torch.tensor([-(2**63)]), ValueError, f"idx has {-(2**63)}", "= 63"),
    "only in the low half": (torch.tensor([2**32 + 1]), ValueError, f"idx has {2**32 + 1}", "= 63"),
    "transposed view": (torch.tensor([[0, 3], [64, 5]]).T, ValueError, "idx has 64 at flat position 1", "= 63"),
    "among many": (
        torch.zeros(200_000).long().index_fill_(0, torch.tensor([150_000, 199_999]), 99),
        ValueError, "idx has 99 at flat position 150000", "= 63",
    ),
    "float": (torch.zeros(3), TypeError, "idx has dtype torch.float32", "allowed is torch.int32 or torch.int64"),
    "int16": (torch.zeros(3).short(), TypeError, "idx has dtype torch.int16", "allowed is torch.int32 or torch.int64"),
    "bool": (torch.zeros(3).bool(), TypeError, "idx has dtype torch.bool", "allowed is torch.int32 or torch.int64"),
    "list": ([0, 1], TypeError, "idx is a list", "allowed is a torch.Tensor"),
    "None": (None, TypeError, "idx is a NoneType", "allowed is a torch.Tensor"),
    "elsewhere": (torch.zeros(3, device="meta").long(), ValueError, "idx is on 'meta'", "planner's device, 'cpu'"),
    "too many": (torch.zeros(1).long().expand(2**31), ValueError, "idx has 2147483648 elements", f"{BIG} per call"),
}  # fmt: skip


@pytest.mark.parametrize("stage", ["run", "count_workload", "weighted_select_target"])
@pytest.mark.parametrize("case", list(BAD_INDICES))
def test_indices(watched, case, stage):
    idx, kind, seen, allowed = BAD_INDICES[case]
    planner = watched.planner
    calls = {
        "run": lambda: planner.run(idx, watched.counter),
        "count_workload": lambda: planner.count_workload(idx, 4),
        "weighted_select_target": lambda: planner.weighted_select_target(idx, torch.ones(1, 8, 2), torch.ones(1), 1),
    }
    with refused(kind, seen, allowed):
        calls[stage]()


BAD_COUNTERS = {
    "float": (torch.zeros(1), TypeError, "avail_counter is a torch.float32 tensor [1]", "torch.int32 or torch.int64"),
    "int16": (torch.zeros(1).short(), TypeError, "a torch.int16 tensor [1]", "torch.int32 or torch.int64, or None"),
    "int": (0, TypeError, "avail_counter is a int", "torch.int32 or torch.int64, or None"),
    "two": (torch.zeros(2).int(), ValueError, "avail_counter has 2 elements", "allowed is 1"),
    "empty": (torch.zeros(0).int(), ValueError, "avail_counter has 0 elements", "allowed is 1"),
    "elsewhere": (
        torch.zeros(1, device="meta").int(), ValueError, "avail_counter is on 'meta'", "planner's device, 'cpu'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_COUNTERS))
def test_counters(watched, case):
    counter, kind, seen, allowed = BAD_COUNTERS[case]
    with refused(kind, seen, allowed):
        watched.planner.run(watched.idx, counter)
    with refused(kind, seen, allowed):
        watched.planner.solve_probs(torch.zeros(N_LOGICAL).int(), counter)


@pytest.mark.parametrize(
    ("n_sms", "kind", "allowed"),
    [(0, ValueError, "1 or more"), (-3, ValueError, "1 or more"), (1.5, TypeError, "int"), (True, TypeError, "int")],
)
def test_n_sms(watched, n_sms, kind, allowed):
    planner = watched.planner
    with refused(kind, f"n_sms is {n_sms}", allowed):
        planner.run(watched.idx, watched.counter, n_sms)
    with refused(kind, f"n_sms is {n_sms}", allowed):
        planner.count_workload(watched.idx, n_sms)
    with refused(kind, f"n_sms is {n_sms}", allowed):
        planner.weighted_select_target(watched.idx, torch.ones(1, 8, 2), torch.ones(1, N_LOGICAL), n_sms)


# Loads


def loads(value, dtype=None):
    return torch.tensor([value] + [1] * (N_LOGICAL - 1), dtype=dtype)


BAD_LOADS = {
    "negative": (loads(-1), ValueError, "workload has -1", f"allowed are 0 to {BIG}"),
    "too large": (loads(2**31), ValueError, "workload has 2147483648", f"allowed are 0 to {BIG}"),
    "too large float32": (loads(2.0**31), ValueError, "workload has 2147483648.0", f"allowed are 0 to {BIG}"),
    "fractional": (loads(2.5), ValueError, "workload has 2.5", "allowed are whole numbers"),
    "negative fraction": (loads(-0.5), ValueError, "workload has -0.5", "allowed are whole numbers"),
    "NaN": (loads(float("nan")), ValueError, "workload has nan", "allowed are whole numbers"),
    "infinite": (loads(float("inf")), ValueError, "workload has inf", f"allowed are 0 to {BIG}"),
    "minus infinite": (loads(float("-inf")), ValueError, "workload has -inf", f"allowed are 0 to {BIG}"),
    "float64": (loads(2.5, torch.float64), ValueError, "workload has 2.5", "allowed are whole numbers"),
    "int16": (loads(1, torch.int16), TypeError, "workload has dtype torch.int16", "int32, int64 or floating"),
    "bool": (loads(1, torch.bool), TypeError, "workload has dtype torch.bool", "allowed is int32, int64 or floating"),
    "complex": (loads(1j), TypeError, "workload has dtype torch.complex64", "allowed is int32, int64 or floating"),
    "too few": (torch.ones(63), ValueError, "workload has shape [63]", "[n_logical] = [64]"),
    "none": (torch.ones(0), ValueError, "workload has shape [0]", "[n_logical] = [64]"),
    "list": ([1] * N_LOGICAL, TypeError, "workload is a list", "allowed is a torch.Tensor"),
    "elsewhere": (torch.ones(N_LOGICAL, device="meta"), ValueError, "workload is on 'meta'", "device, 'cpu'"),
}


@pytest.mark.parametrize("stage", ["solve", "solve_probs"])
@pytest.mark.parametrize("case", list(BAD_LOADS))
def test_loads(watched, case, stage):
    workload, kind, seen, allowed = BAD_LOADS[case]
    with refused(kind, seen, allowed):
        if stage == "solve":
            watched.planner.solve(workload)
        else:
            watched.planner.solve_probs(workload, watched.counter)


@pytest.mark.parametrize("shape", [(), (2, 3, 64), (64, 1), (2, 63)])
def test_shapes_of_loads(watched, shape):
    with refused(ValueError, f"workload has shape {list(shape)}", "allowed is [n_logical] = [64] or a batch [n, 64]"):
        watched.planner.solve(torch.ones(shape))


def test_one_bad_load_in_a_batch(watched):
    batch = torch.ones(5, N_LOGICAL)
    batch[3, 7] = -4
    with refused(ValueError, "workload has -4.0", f"allowed are 0 to {BIG}"):
        watched.planner.solve(batch)


@pytest.mark.parametrize("solver", ["lp", "", 0, ["flow"]])
def test_solver_of_a_solve(watched, solver):
    with refused(ValueError, f"solver is {solver!r}", "allowed is 'ipm' or 'flow'"):
        watched.planner.solve(torch.ones(N_LOGICAL), solver=solver)


HISTORIES = {
    "NaN": (loads(float("nan")), ValueError, "is nan", "allowed is finite and 0 or more"),
    "infinite": (loads(float("inf")), ValueError, "is inf", "allowed is finite and 0 or more"),
    "negative": (loads(-2.0), ValueError, "is -2.0", "allowed is finite and 0 or more"),
    "bool": (loads(1, torch.bool), TypeError, "dtype torch.bool", "allowed is a real dtype"),
    "complex": (loads(1j), TypeError, "dtype torch.complex64", "allowed is a real dtype"),
    "too few": (torch.ones(63), ValueError, "workload has shape [63]", "allowed is [n_logical] = [64]"),
    "2-D": (torch.ones(1, 64), ValueError, "workload has shape [1, 64]", "allowed is [n_logical] = [64]"),
    "list": ([1.0] * 64, TypeError, "workload is a list", "allowed is a torch.Tensor"),
    "elsewhere": (torch.ones(64, device="meta"), ValueError, "workload is on 'meta'", "planner's device, 'cpu'"),
}


@pytest.mark.parametrize("case", list(HISTORIES))
def test_load_histories(watched, case):
    history, kind, seen, allowed = HISTORIES[case]
    with refused(kind, seen, allowed):
        watched.planner.update_redundancy_mapping(history)


def test_a_refused_history_keeps_the_order_before(watched):
    ordered = make()
    ordered.update_redundancy_mapping(torch.arange(64))
    before = ordered.phy2log.clone()
    with refused(ValueError, "workload has shape [3]", "[64]"):
        ordered.update_redundancy_mapping(torch.ones(3))
    assert torch.equal(ordered.phy2log, before)
    assert not torch.equal(before, watched.phy2log)


# Shares

SHARES = {
    "too large": (torch.full((1, 8, 2), 1.5), ValueError, "o_weight has 1.5", "allowed are shares from 0 to 1"),
    "negative": (torch.full((1, 8, 2), -0.5), ValueError, "o_weight has -0.5", "allowed are shares from 0 to 1"),
    "NaN": (torch.full((1, 8, 2), float("nan")), ValueError, "o_weight has nan", "allowed are shares from 0 to 1"),
    "shape": (torch.ones(8, 2), ValueError, "o_weight has shape [8, 2]", "allowed is [1, 8, 2]"),
    "dtype": (torch.ones(1, 8, 2).int(), TypeError, "o_weight is a torch.int32 tensor", "a floating tensor [1, 8, 2]"),
    "list": ([[1.0]], TypeError, "o_weight is a list", "allowed is a floating tensor [1, 8, 2]"),
    "elsewhere": (torch.ones(1, 8, 2, device="meta"), ValueError, "o_weight is on 'meta'", "planner's device, 'cpu'"),
}


@pytest.mark.parametrize("case", list(SHARES))
def test_shares(watched, case):
    share, kind, seen, allowed = SHARES[case]
    by_sm = watched.planner.count_workload(watched.idx, 2)[1]
    with refused(kind, seen, allowed):
        watched.planner.weighted_select_target(watched.idx, share, by_sm, 2)


@pytest.mark.parametrize("case", ["other counts", "other n_sms", "dtype", "list", "elsewhere"])
def test_workload_by_sm(watched, case):
    by_sm = watched.planner.count_workload(watched.idx, 2)[1]
    given, seen, allowed = {
        "other counts": (by_sm + 1, "a torch.int32 tensor [2, 64]", "allowed is int32 [2, 64] with the counts of idx"),
        "other n_sms": (by_sm[:1], "a torch.int32 tensor [1, 64]", "allowed is int32 [2, 64] with the counts of idx"),
        "dtype": (by_sm.long(), "a torch.int64 tensor [2, 64]", "allowed is int32 [2, 64] with the counts of idx"),
        "list": (by_sm.tolist(), "a list", "allowed is int32 [2, 64] with the counts of idx"),
        "elsewhere": (by_sm.to("meta"), "local_workload_by_sm is on 'meta'", "planner's device, 'cpu'"),
    }[case]
    with refused(ValueError, seen, allowed):
        watched.planner.weighted_select_target(watched.idx, torch.ones(1, 8, 2), given, 2)


# Calls that a planner cannot do


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("update_redundancy_mapping", ()),
        ("solve_probs", (torch.ones(4).int(), None)),
        ("weighted_select_target", (torch.zeros(3).long(), torch.ones(1, 4, 1), torch.ones(1, 4), 1)),
    ],
)
def test_stages_of_lplb_need_its_topology(name, arguments):
    planner = from_pairs()
    expected = planner.run(torch.arange(4), None)
    with refused(RuntimeError, f"{name} needs the redundancy topology (r2o)", "use solve and run"):
        getattr(planner, name)(*arguments)
    assert torch.equal(planner.run(torch.arange(4), None), expected)


def test_what_is_no_deep_ep_buffer(watched):
    with refused(TypeError, "buffer is a object without the attribute group", "a deep_ep.Buffer or"):
        watched.planner.init_from_deep_ep(object())
    assert watched.planner.deep_ep_initialized is False
    assert watched.planner.ep_group is None


# Exchanges


@pytest.mark.parametrize("rank", [-1, 4])
def test_rank_of_a_known_exchange(rank):
    with refused(ValueError, f"rank is {rank}", "allowed is 0 to size - 1 = 3"):
        Known(rank, 4)


def known_pairs():
    exchange = Known(1, 4)
    return exchange, from_pairs(group=exchange)


def test_counts_of_a_known_exchange():
    exchange, planner = known_pairs()
    counter = torch.zeros(1, dtype=torch.int64)
    idx = torch.tensor([0, 1, 1])
    for counts, seen in [(None, "shape None"), (torch.zeros(4, 3).int(), "shape (4, 3)")]:
        exchange.counts = counts
        with refused(ValueError, seen, "allowed is (4, 4)"):
            planner.run(idx, counter)
    exchange.counts = torch.zeros(4, 4, dtype=torch.int32)
    with refused(ValueError, "rank 1 counted other tokens than counts[1]"):
        planner.run(idx, counter)
    assert counter.item() == 0
    assert planner.last_plan is None
    exchange.counts[1] = torch.tensor([1, 2, 0, 0])
    assert sorted(planner.run(idx, counter).tolist()) in ([0, 1, 7], [1, 6, 7])
    assert counter.item() == 1


def test_more_tokens_over_all_ranks_than_a_quota_holds():
    exchange, planner = known_pairs()
    exchange.counts = torch.zeros(4, 4, dtype=torch.int32)
    exchange.counts[0, 1] = BIG
    exchange.counts[1, 1] = 1
    with refused(ValueError, f"an expert has {2**31} tokens over all ranks", f"allowed are {BIG}"):
        planner.run(torch.tensor([1]), None)
    assert planner.last_plan is None
    exchange.counts[0, 1] = BIG - 1
    assert planner.run(torch.tensor([1]), None).item() in (1, 7)
    assert planner.last_plan.rank_load.sum().item() == BIG


def test_bad_indices_of_a_replayed_rank():
    exchange, planner = known_pairs()
    exchange.counts = torch.zeros(4, 4, dtype=torch.int32)
    with refused(ValueError, "idx has 9 at flat position 1", "n_logical - 1 = 3"):
        planner.run(torch.tensor([0, 9]), None)
    assert planner.run(torch.full((3,), -1), None).tolist() == [-1] * 3
