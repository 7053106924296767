"""EPLB's placements against a naive reading of the algorithm and one in NumPy, and the spreading of doubled experts."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_eplb import rebalance_reference

from lplb.eplb import MODES, rebalance_experts, spread_copies

# The example of EPLB's README, and the placement printed there.
README_WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_SIZES = (16, 4, 2, 8)
README_PHY2LOG = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def naive_pack(loads, n_packs):
    """Return the items of each pack: heaviest first, to the lightest pack with room, low index on ties.

    Packs take n / n_packs items; what is left of the division goes to whom it comes first, one each.
    """
    room, more = divmod(len(loads), n_packs)
    if (room, more) == (1, 0):
        return [[item] for item in range(len(loads))]
    packs = [[] for _ in range(n_packs)]
    totals = [np.float32(0)] * n_packs
    for item in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        larger = sum(len(pack) > room for pack in packs)
        has_room = [k for k in range(n_packs) if len(packs[k]) < room or (len(packs[k]) == room and larger < more)]
        best = min(has_room, key=lambda k: (totals[k], k))
        packs[best].append(item)
        totals[best] = totals[best] + loads[item]
    return packs


def naive_node(loads, n_slots, n_gpus):
    """Return (expert, copy) of each slot of one node, GPU by GPU."""
    slots = [(e, 0) for e in range(len(loads))]
    count = [1] * len(loads)
    while len(slots) < n_slots:
        shares = [load / np.float32(c) for load, c in zip(loads, count, strict=True)]
        e = shares.index(max(shares))
        slots.append((e, count[e]))
        count[e] += 1
    gpus = naive_pack([loads[e] / np.float32(count[e]) for e, _ in slots], n_gpus)
    return [slots[s] for gpu in gpus for s in gpu]


def naive_layer(weight, num_replicas, num_groups, num_nodes, num_gpus, mode="auto"):
    """Return (expert, copy) of each slot of one layer; weight is a list of np.float32."""
    if mode == "global" or (mode == "auto" and num_groups % num_nodes):
        num_groups = num_nodes = 1
    size = len(weight) // num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    # The published code adds up a group with torch, whose order of additions is its own.
    totals = [np.float32(torch.tensor([[weight[e] for e in group]]).sum(-1).item()) for group in groups]
    placed = []
    for node in naive_pack(totals, num_nodes):
        experts = [e for g in node for e in groups[g]]
        slots = naive_node([weight[e] for e in experts], num_replicas // num_nodes, num_gpus // num_nodes)
        placed += [(experts[local], copy) for local, copy in slots]
    return placed


def assert_naive(weight, sizes, mode="auto"):
    phy2log, log2phy, logcnt = rebalance_experts(weight, *sizes, mode=mode)
    assert phy2log.dtype == log2phy.dtype == logcnt.dtype == torch.int64
    assert log2phy.shape == (*weight.shape, logcnt.max().item())
    for layer, loads in enumerate(weight.float().numpy()):
        placed = naive_layer(list(loads), *sizes, mode)
        assert phy2log[layer].tolist() == [e for e, _ in placed]
        expected = np.full(log2phy.shape[1:], -1)
        for slot, (e, copy) in enumerate(placed):
            expected[e, copy] = slot
        assert log2phy[layer].tolist() == expected.tolist()
        assert logcnt[layer].tolist() == (expected >= 0).sum(1).tolist()


def test_readme_example():
    weight = torch.tensor(README_WEIGHT)
    phy2log, log2phy, logcnt = rebalance_experts(weight, *README_SIZES)
    assert phy2log.tolist() == README_PHY2LOG
    assert logcnt.tolist() == [[row.count(e) for e in range(12)] for row in README_PHY2LOG]
    for layer, row in enumerate(README_PHY2LOG):
        for e in range(12):
            slots = [s for s in log2phy[layer, e].tolist() if s >= 0]
            assert sorted(slots) == [s for s, held in enumerate(row) if held == e]
    assert_naive(weight, README_SIZES)


@st.composite
def cases(draw):
    """Draw weights full of ties and sizes for either policy."""
    num_nodes = draw(st.integers(1, 3))
    num_groups = draw(st.integers(1, 2)) * (num_nodes if draw(st.booleans()) else 1)
    n_logical = num_groups * draw(st.integers(1, 4))
    num_gpus = num_nodes * draw(st.integers(1, 3))
    slots_per_gpu = -(-n_logical // num_gpus) + draw(st.integers(0, 3))
    load = draw(st.sampled_from([st.integers(0, 3), st.integers(0, 10**7)]))
    row = st.lists(load, min_size=n_logical, max_size=n_logical)
    weight = torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))
    return weight, (num_gpus * slots_per_gpu, num_groups, num_nodes, num_gpus)


@settings(deadline=None)
@given(cases())
@example((torch.zeros(2, 8), (16, 4, 2, 4)))
@example((torch.tensor([[5]]), (6, 1, 1, 3)))
@example((torch.tensor([[3, 1, 2, 2]]), (4, 2, 2, 4)))
def test_equals_naive(case):
    assert_naive(*case)


BENCHMARKED = [
    (58, 256, (288, 8, 4, 32)),
    (58, 256, (320, 8, 8, 64)),
    (94, 128, (160, 1, 4, 32)),
]
OTHERS = [(3, 1024, (1280, 1, 1, 320)), (3, 60, (64, 4, 1, 16)), (3, 96, (160, 12, 2, 10)), (2, 7, (7, 1, 1, 1))]


def some_loads(kind, layers, n_logical):
    rng = np.random.default_rng(11)
    if kind == "ties":
        return torch.from_numpy(rng.integers(0, 5, (layers, n_logical)))
    if kind == "tokens":
        return torch.from_numpy(rng.poisson(rng.lognormal(5, 1, (layers, n_logical))))
    return torch.from_numpy(rng.lognormal(0, 2, (layers, n_logical)))


@pytest.mark.parametrize(("layers", "n_logical", "sizes"), BENCHMARKED + OTHERS)
@pytest.mark.parametrize("kind", ["ties", "tokens", "lognormal"])
def test_equals_numpy_bit_for_bit(layers, n_logical, sizes, kind):
    weight = some_loads(kind, layers, n_logical)
    expected = rebalance_reference(weight, *sizes)
    for threads in (1, 2, 7):
        for mine, theirs in zip(rebalance_experts(weight, *sizes, threads=threads), expected, strict=True):
            assert mine.tolist() == theirs.tolist()


def test_negative_zero_is_zero():
    weight = torch.tensor([[-0.0, 0.0, -0.0, 0.0, 1.0, -0.0]])
    mine, theirs = (rebalance_experts(w, 8, 3, 1, 2) for w in (weight, weight.abs()))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("stride", ["transposed", "every other"])
def test_any_strides(stride):
    weight = some_loads("lognormal", 24, 24).float()
    view = weight.T if stride == "transposed" else weight[:, ::2]
    assert not view.is_contiguous()
    expected = rebalance_reference(view, 24, 6, 2, 4)
    for mine, theirs in zip(rebalance_experts(view, 24, 6, 2, 4), expected, strict=True):
        assert mine.tolist() == theirs.tolist()


@st.composite
def uneven_cases(draw):
    """Draw weights and sizes where some nodes get a group more than others."""
    num_nodes = draw(st.integers(2, 4))
    num_groups = num_nodes * draw(st.integers(1, 2)) + draw(st.integers(0, num_nodes - 1))
    group_size = draw(st.integers(1, 3))
    gpus_per_node = draw(st.integers(1, 3))
    most_experts = -(-num_groups // num_nodes) * group_size
    slots_per_gpu = -(-most_experts // gpus_per_node) + draw(st.integers(0, 2))
    n_logical = num_groups * group_size
    load = draw(st.sampled_from([st.integers(0, 3), st.integers(0, 10**7)]))
    weight = torch.tensor([draw(st.lists(load, min_size=n_logical, max_size=n_logical))])
    num_gpus = num_nodes * gpus_per_node
    return weight, (num_gpus * slots_per_gpu, num_groups, num_nodes, num_gpus)


@settings(deadline=None)
@given(uneven_cases())
def test_hierarchical_with_uneven_nodes(case):
    weight, sizes = case
    assert_naive(weight, sizes, "hierarchical")
    n_logical = weight.shape[1]
    _, num_groups, num_nodes, _ = sizes
    row = rebalance_experts(weight, *sizes, mode="hierarchical")[0].view(num_nodes, -1)
    groups = [set((node // (n_logical // num_groups)).tolist()) for node in row]
    assert sorted(g for node in groups for g in node) == list(range(num_groups))  # each on one node
    assert {len(node) for node in groups} <= {num_groups // num_nodes, -(-num_groups // num_nodes)}


def test_modes():
    weight = torch.tensor(README_WEIGHT)
    in_groups = rebalance_experts(weight, 16, 4, 2, 8)
    at_large = rebalance_experts(weight, 16, 1, 1, 8)
    assert not torch.equal(in_groups[0], at_large[0])
    for mode, expected in zip(MODES, (in_groups, in_groups, at_large), strict=True):
        for mine, theirs in zip(rebalance_experts(weight, 16, 4, 2, 8, mode=mode), expected, strict=True):
            assert torch.equal(mine, theirs)
    # 3 nodes for 4 groups: DeepSeek's rule looks at neither.
    assert torch.equal(rebalance_experts(weight, 24, 4, 3, 12)[0], rebalance_experts(weight, 24, 1, 1, 12)[0])
    by_node = rebalance_experts(weight, 24, 4, 3, 12, mode="hierarchical")[0].view(2, 3, 8)
    assert all(len(set((node // 3).tolist())) <= 2 for layer in by_node for node in layer)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "local"}, ValueError, "mode is 'local', allowed is one of 'auto', 'hierarchical', 'global'"),
        ({"mode": None}, TypeError, "mode is None, allowed is one of 'auto', 'hierarchical', 'global'"),
        ({"distinct": 1}, TypeError, "distinct is 1, allowed is a bool"),
        ({"threads": 0}, ValueError, "threads is 0, allowed is 1 to 1024"),
        ({"threads": 2.0}, TypeError, "threads is 2.0, allowed is an int"),
        ({"num_nodes": 3, "num_gpus": 8, "mode": "hierarchical"}, ValueError, "num_gpus is 8.*num_nodes = 3"),
        ({"num_groups": 5, "mode": "hierarchical"}, ValueError, "n_logical is 12.*num_groups = 5"),
        (
            {"num_groups": 3, "num_nodes": 4, "mode": "hierarchical"},
            ValueError,
            "num_groups is 3, allowed is num_nodes = 4 or more",
        ),
        (
            {"num_groups": 3, "num_replicas": 14, "num_gpus": 2, "mode": "hierarchical"},
            ValueError,
            "num_replicas is 14, allowed is 16 or more: a node with 2 of 3 groups holds 8 experts",
        ),
        ({"num_replicas": 2**31}, ValueError, "num_replicas is 2147483648, allowed is at most 2147483647"),
    ],
)
def test_options(options, error, message):
    sizes = dict(zip(("num_replicas", "num_groups", "num_nodes", "num_gpus"), README_SIZES, strict=True))
    with pytest.raises(error, match=message):
        rebalance_experts(torch.tensor(README_WEIGHT), **{**sizes, **options})


@pytest.mark.parametrize(
    ("n_logical", "sizes"),
    [(64, (72, 8, 4, 8)), (64, (80, 4, 4, 8)), (60, (64, 1, 4, 16)), (64, (64, 1, 1, 64))],
    ids=["hierarchical", "one group per node", "global", "one slot per GPU"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
def test_rounding_and_dtypes(n_logical, sizes, dtype):
    rng = np.random.default_rng(7)
    weight = torch.from_numpy(rng.lognormal(3, 2, size=(3, n_logical))).to(dtype)
    assert_naive(weight, sizes)


def test_large_integers_become_float32():
    # In float32 these three are equal, so the lowest index gets the slot.
    weight = torch.tensor([[2**24, 2**24 + 1, 2**24 + 1]])
    phy2log, _, logcnt = rebalance_experts(weight, 4, 1, 1, 4)
    assert phy2log.tolist() == [[0, 1, 2, 0]]
    assert logcnt.tolist() == [[2, 1, 1]]


def test_leaves_its_argument_alone():
    weight = torch.rand(2, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    before = weight.detach().clone()
    phy2log, _, _ = rebalance_experts(weight, *README_SIZES)
    assert not phy2log.requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (README_WEIGHT, "weight is a list, allowed is a torch.Tensor"),
        (torch.ones(2, 12, dtype=torch.bool), "dtype torch.bool, allowed is a real dtype"),
        (torch.ones(2, 12, dtype=torch.complex64), "dtype torch.complex64, allowed is a real dtype"),
    ],
)
def test_weight_types(weight, message):
    with pytest.raises(TypeError, match=message):
        rebalance_experts(weight, *README_SIZES)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(12), r"shape \[12\], allowed is \[layers, n_logical\]"),
        (torch.ones(1, 2, 12), r"shape \[1, 2, 12\]"),
        (torch.ones(0, 12), r"shape \[0, 12\].*not empty"),
        (torch.ones(2, 0), r"shape \[2, 0\].*not empty"),
        (
            torch.ones(2, 12).index_fill(1, torch.tensor(5), -3),
            r"weight\[0, 5\] is -3.0, allowed is finite and 0",
        ),
        (torch.ones(2, 12).index_fill(1, torch.tensor(5), float("nan")), r"weight\[0, 5\] is nan"),
        (torch.ones(2, 12).index_fill(1, torch.tensor(5), float("inf")), r"weight\[0, 5\] is inf"),
        (torch.full((2, 12), 1e300, dtype=torch.float64), r"weight\[0, 0\] is inf"),
        (torch.full((2, 12), 3e37), "weight adds up to 3.6.*e\\+38 in a layer, allowed is at most 1e\\+38"),
    ],
)
def test_weight_values(weight, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(weight, *README_SIZES)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 4, 2, 8), "num_replicas is 8, allowed is 12 or more"),
        ((16, 0, 2, 8), "num_groups is 0, allowed is 1 or more"),
        ((16, 4, 0, 8), "num_nodes is 0, allowed is 1 or more"),
        ((16, 4, 2, 0), "num_gpus is 0, allowed is 1 or more"),
        ((16, 4, 2, -8), "num_gpus is -8, allowed is 1 or more"),
        ((16, 8, 2, 8), "n_logical is 12, allowed is a multiple of num_groups = 8"),
        ((18, 4, 2, 8), "num_replicas is 18, allowed is a multiple of num_gpus = 8"),
        ((15, 4, 2, 5), "num_gpus is 5, allowed is a multiple of num_nodes = 2"),
    ],
)
def test_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(torch.tensor(README_WEIGHT), *sizes)


@pytest.mark.parametrize("name", ["num_replicas", "num_groups", "num_nodes", "num_gpus"])
@pytest.mark.parametrize("value", [8.0, True, None])
def test_sizes_are_ints(name, value):
    sizes = dict(zip(("num_replicas", "num_groups", "num_nodes", "num_gpus"), README_SIZES, strict=True))
    with pytest.raises(TypeError, match=f"{name} is {value}, allowed is an int"):
        rebalance_experts(torch.tensor(README_WEIGHT), **{**sizes, name: value})


OUT_OF_MEMORY = """
import resource, sys, torch
from lplb.eplb import rebalance_experts
distinct, threads, layers, slots = (int(word) for word in sys.argv[1:])
weight = torch.ones(layers, 60)
sizes = slots, 1, 1, slots // 50
rebalance_experts(weight, 100, 1, 1, 2, distinct=bool(distinct), threads=threads)  # starts the threads
results = layers * slots * 12  # bytes of phy2log and the copies' numbers, which fit
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + results + slots * 4
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    rebalance_experts(weight, *sizes, distinct=bool(distinct), threads=threads)
except MemoryError:
    print("refused")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS")
@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="AddressSanitizer ends the process")
@pytest.mark.parametrize("distinct", [0, 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_out_of_memory_is_an_exception(distinct, threads):
    arguments = [str(n) for n in (distinct, threads, threads, 20_000_000)]
    ran = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, *arguments], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "refused\n"), ran.stderr


@pytest.mark.parametrize("threads", [1025, 100000])
def test_threads_have_a_limit(threads):
    with pytest.raises(ValueError, match=f"threads is {threads}, allowed is 1 to 1024"):
        rebalance_experts(torch.tensor(README_WEIGHT), *README_SIZES, threads=threads)


def test_global_policy_ignores_groups_and_nodes():
    weight = torch.tensor(README_WEIGHT)
    # 5 groups do not divide 12 experts and 3 nodes do not divide 8 GPUs; the published code takes both.
    for mine, theirs in zip(
        rebalance_experts(weight, 16, 5, 3, 8), rebalance_experts(weight, 16, 1, 1, 8), strict=True
    ):
        assert torch.equal(mine, theirs)


def doubled(row, n_ranks):
    """Return whether some rank holds an expert twice."""
    slots = len(row) // n_ranks
    return any(len(set(row[r * slots : (r + 1) * slots])) < slots for r in range(n_ranks))


@st.composite
def crowded(draw):
    """Draw a mapping in which no expert has more slots than ranks; few experts, so that many are doubled."""
    n_ranks = draw(st.integers(1, 6))
    slots_per_rank = draw(st.integers(1, 5))
    n = n_ranks * slots_per_rank
    pool = list(range(draw(st.integers(slots_per_rank, n)))) * n_ranks
    if draw(st.booleans()):
        pool.sort()  # copies side by side: the worst start
    else:
        pool = draw(st.permutations(pool))
    return pool[:n], n_ranks


@settings(deadline=None)
@given(crowded(), st.sampled_from([None, 0, 1]))
@example(([0, 0, 1, 1], 2), None)
@example(([0, 0, 1, 0, 1, 1], 2), None)  # not possible: three of each on two ranks
@example(([0, 0, 1, 2, 1, 1, 2, 2, 3], 3), None)
def test_spread_never_doubles(case, seed):
    row, n_ranks = case
    phy2log = torch.tensor(row)
    weight = None if seed is None else torch.from_numpy(np.random.default_rng(seed).lognormal(size=max(row) + 1))
    if max(Counter(row).values()) > n_ranks:
        with pytest.raises(ValueError, match="allowed is at most n_ranks"):
            spread_copies(phy2log, n_ranks, weight)
        return
    spread = spread_copies(phy2log, n_ranks, weight)
    assert phy2log.tolist() == row
    assert not doubled(spread.tolist(), n_ranks)
    assert Counter(spread.tolist()) == Counter(row)
    assert torch.equal(spread, spread_copies(phy2log, n_ranks, weight))
    if not doubled(row, n_ranks):
        assert spread.tolist() == row


def test_spread_when_every_rank_repeats_what_the_other_holds():
    # No exchange puts a new expert on rank 0 at once: rank 2, the only one without 0, holds but 1 and 2.
    row = [0, 0, 1, 2, 0, 3, 4, 5, 1, 1, 2, 2]
    spread = spread_copies(torch.tensor(row), 3).tolist()
    assert not doubled(spread, 3)
    assert Counter(spread) == Counter(row)


def test_spread_takes_the_first_slot_or_the_nearest_load():
    phy2log = torch.tensor([0, 0, 1, 2, 3, 4])
    weight = torch.tensor([10.0, 90.0, 20.0, 6.0, 4.0])
    assert spread_copies(phy2log, 3).tolist() == [1, 0, 0, 2, 3, 4]
    # A copy of 0 carries 5; experts 3 and 4 are equally near, so the lower slot.
    assert spread_copies(phy2log, 3, weight).tolist() == [3, 0, 1, 2, 0, 4]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_spread_keeps_dtype_and_shape(dtype):
    layers = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 2]], dtype=dtype)
    weight = torch.ones(2, 3)
    for given_weight in (None, weight):
        spread = spread_copies(layers, 2, given_weight)
        assert spread.dtype == dtype
        assert spread.shape == (2, 4)
        for layer in range(2):
            alone = spread_copies(layers[layer], 2, None if given_weight is None else given_weight[layer])
            assert torch.equal(alone, spread[layer])
    assert spread_copies(layers[:0], 2).shape == (0, 4)


def test_spread_within_groups():
    rng = np.random.default_rng(3)
    weight = torch.from_numpy(rng.uniform(1, 4, size=(8, 32)))
    phy2log, _, logcnt = rebalance_experts(weight, 64, 4, 4, 16)  # four nodes of four GPUs with four slots
    assert logcnt.max() <= 4
    assert any(doubled(row, 16) for row in phy2log.tolist())
    spread = spread_copies(phy2log.view(-1, 16), 4).view_as(phy2log)
    for before, after in zip(phy2log.tolist(), spread.tolist(), strict=True):
        assert not doubled(after, 16)
        for node in range(0, 64, 16):
            assert Counter(before[node : node + 16]) == Counter(after[node : node + 16])


@pytest.mark.parametrize(
    ("phy2log", "n_ranks", "weight", "message"),
    [
        ([0, 0], 1, None, "phy2log is a list, allowed is a torch.Tensor"),
        (torch.tensor([0.0, 1.0]), 1, None, "dtype torch.float32, allowed is an integer dtype"),
        (torch.tensor([False, True]), 1, None, "dtype torch.bool, allowed is an integer dtype"),
        (torch.tensor([0, 1]), 1.0, None, "n_ranks is 1.0, allowed is an int"),
        (torch.tensor([0, 1]), 1, [1.0, 1.0], "weight is a list, allowed is a torch.Tensor"),
    ],
)
def test_spread_types(phy2log, n_ranks, weight, message):
    with pytest.raises(TypeError, match=message):
        spread_copies(phy2log, n_ranks, weight)


@pytest.mark.parametrize(
    ("phy2log", "n_ranks", "weight", "message"),
    [
        (torch.tensor(0), 1, None, r"shape \[\], allowed is \[n_physical\] or \[layers, n_physical\]"),
        (torch.zeros(1, 1, 1, dtype=torch.int32), 1, None, r"shape \[1, 1, 1\]"),
        (torch.empty(0, dtype=torch.int32), 1, None, r"shape \[0\]"),
        (torch.tensor([0, 1, 2]), 2, None, "n_physical is 3, allowed is a multiple of n_ranks = 2"),
        (torch.tensor([0, 1]), 0, None, "n_ranks is 0, allowed is 1 or more"),
        (torch.tensor([[0, 1], [0, -1]]), 2, None, "has -1 in layer 1, slot 1, allowed is 0 or more"),
        (
            torch.tensor([[0, 1], [7, 7]]),
            1,
            None,
            "expert 7 has 2 slots in layer 1, allowed is at most n_ranks = 1",
        ),
        (torch.tensor([0, 1]), 1, torch.ones(1, 2), r"weight has shape \[1, 2\], allowed is \[n_logical\]"),
        (
            torch.tensor([[0, 1]]),
            1,
            torch.ones(2),
            r"weight has shape \[2\], allowed is \[layers, n_logical\]",
        ),
        (torch.tensor([[0, 1]]), 1, torch.ones(2, 2), "weight has 2 layers, allowed is 1"),
        (torch.tensor([0, 2]), 1, torch.ones(2), "phy2log has expert 2, allowed by weight is 0 to 1"),
        (torch.tensor([0, 1]), 1, torch.tensor([1.0, -1.0]), r"weight\[1\] is -1.0, allowed is finite and 0"),
    ],
)
def test_spread_values(phy2log, n_ranks, weight, message):
    with pytest.raises(ValueError, match=message):
        spread_copies(phy2log, n_ranks, weight)
