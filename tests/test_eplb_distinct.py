"""EPLB without an expert twice on a GPU: always valid, the same bits every time, and no worse than as published."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from reference_eplb import rebalance_reference

from lplb import Placement
from lplb.eplb import rebalance_experts


def check(weight, sizes, mode="auto"):
    """Check everything a placement must be, from its numbers alone."""
    num_replicas, num_groups, num_nodes, num_gpus = sizes
    placed = rebalance_experts(weight, *sizes, mode=mode, distinct=True)
    phy2log, log2phy, logcnt = (t.numpy() for t in placed)
    layers, n_logical = weight.shape
    assert phy2log.shape == (layers, num_replicas)
    assert log2phy.shape == (layers, n_logical, logcnt.max())
    by_node = mode == "hierarchical" or (mode == "auto" and num_groups % num_nodes == 0)
    gpus_per_node = num_gpus // num_nodes if by_node else num_gpus
    for layer in range(layers):
        row = phy2log[layer].tolist()
        gpus = np.reshape(row, (num_gpus, -1)).tolist()
        assert all(len(set(gpu)) == len(gpu) for gpu in gpus)
        count = Counter(row)
        assert logcnt[layer].tolist() == [count[e] for e in range(n_logical)]
        assert 1 <= logcnt[layer].min() <= logcnt[layer].max() <= gpus_per_node
        for e in range(n_logical):
            slots = log2phy[layer, e].tolist()
            assert sorted(slots[: count[e]]) == [slot for slot, held in enumerate(row) if held == e]
            assert set(slots[count[e] :]) <= {-1}
        share = (weight[layer].float().numpy() / logcnt[layer].astype(np.float32))[phy2log[layer]].reshape(num_gpus, -1)
        assert (np.diff(share, axis=1) <= 0).all()  # heaviest first
        if by_node:
            node_of_group = {}
            for slot, e in enumerate(row):
                node = slot * num_nodes // num_replicas
                assert node_of_group.setdefault(e * num_groups // n_logical, node) == node
            Placement(row, num_gpus, n_logical).check_groups(gpus_per_node) if gpus_per_node <= 128 else None
    for layer in range(layers):  # whatever layers come before it
        alone = rebalance_experts(weight[layer : layer + 1], *sizes, mode=mode, distinct=True)
        assert torch.equal(alone[0][0], placed[0][layer])


@st.composite
def geometries(draw):
    """Draw weights, many with ties or zeros, and sizes; some as full as can be."""
    num_nodes = draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["auto", "hierarchical", "global"]))
    num_groups = num_nodes * draw(st.integers(1, 2)) + (draw(st.integers(0, 2)) if mode == "hierarchical" else 0)
    group_size = draw(st.integers(1, 6))
    gpus_per_node = draw(st.integers(1, 5))
    n_logical, num_gpus = num_groups * group_size, num_nodes * gpus_per_node
    least = -(-num_groups // num_nodes) * group_size  # experts of the fullest node
    most = num_groups // num_nodes * group_size  # of the emptiest
    if mode == "global":
        least, most = -(-n_logical // num_nodes), n_logical
    low = -(-least // gpus_per_node)
    slots_per_gpu = draw(st.integers(low, max(low, most)))
    load = draw(st.sampled_from([st.just(0), st.integers(0, 2), st.integers(0, 10**6), st.sampled_from([0, 1, 10**5])]))
    rows = draw(st.lists(st.lists(load, min_size=n_logical, max_size=n_logical), min_size=1, max_size=2))
    return torch.tensor(rows), (num_gpus * slots_per_gpu, num_groups, num_nodes, num_gpus), mode, slots_per_gpu <= most


@settings(deadline=None, max_examples=300)
@given(geometries())
@example((torch.zeros(1, 6), (18, 1, 1, 3), "auto", True))  # every expert everywhere
@example((torch.zeros(1, 6), (12, 1, 1, 4), "auto", True))  # the last slots to fill are of experts already there
@example((torch.tensor([[10**6] + [0] * 15]), (20, 1, 1, 4), "auto", True))
def test_valid_for_every_geometry(case):
    weight, sizes, mode, fits = case
    if fits:
        check(weight, sizes, mode)
    else:
        with pytest.raises(ValueError, match="allowed with distinct is at most"):
            rebalance_experts(weight, *sizes, mode=mode, distinct=True)


@pytest.mark.parametrize(
    ("n_logical", "sizes"),
    [
        (256, (288, 8, 4, 32)),
        (256, (320, 8, 8, 64)),
        (1024, (1280, 1, 1, 320)),
        (64, (512, 1, 1, 64)),
        (128, (1152, 1, 1, 128)),
    ],
)
def test_valid_at_size(n_logical, sizes):
    rng = np.random.default_rng(2)
    weight = torch.from_numpy(rng.lognormal(0, [[1.5], [1.5], [1.5], [1.5], [3]], (5, n_logical)))
    check(weight, sizes)
    placed = rebalance_experts(weight, *sizes, distinct=True)
    for threads in (1, 2, 3):
        again = rebalance_experts(weight, *sizes, distinct=True, threads=threads)
        assert all(torch.equal(a, b) for a, b in zip(placed, again, strict=True))


LOADS = {
    "lognormal 0.3": lambda rng, shape: rng.lognormal(0, 0.3, shape),
    "lognormal 0.85": lambda rng, shape: rng.lognormal(0, 0.85, shape),
    "lognormal 1.5": lambda rng, shape: rng.lognormal(0, 1.5, shape),
    "zipf": lambda rng, shape: rng.permuted(np.broadcast_to(1 / np.arange(1, shape[1] + 1), shape), axis=1),
    "dirichlet": lambda rng, shape: rng.dirichlet(np.full(shape[1], 0.5), shape[0]),
    "poisson": lambda rng, shape: rng.poisson(50, shape).astype(float),
    "one hot": lambda rng, shape: rng.lognormal(0, 0.4, shape) * np.where(np.arange(shape[1]) == 3, 40, 1),
}
SHAPES = [
    (256, (288, 8, 4, 32)),
    (256, (320, 8, 8, 64)),
    (128, (160, 1, 4, 32)),
    (128, (144, 1, 1, 16)),
    (32, (40, 1, 1, 8)),
]


def imbalance(weight, phy2log, num_gpus):
    """Largest over mean GPU load of each layer, if every copy takes an even share."""
    out = []
    for load, row in zip(weight, np.asarray(phy2log), strict=True):
        share = load / np.bincount(row, minlength=len(load))
        gpus = share[row].reshape(num_gpus, -1).sum(1)
        out.append(gpus.max() / gpus.mean() if gpus.any() else 1.0)
    return np.array(out)


@pytest.mark.parametrize("kind", LOADS)
def test_no_worse_than_published(kind):
    rng = np.random.default_rng(20)
    published, mine = [], []
    for n_logical, sizes in SHAPES:
        weight = (1000 * LOADS[kind](rng, (20, n_logical))).astype(np.float32).astype(np.float64)
        placed = rebalance_experts(torch.from_numpy(weight), *sizes, distinct=True)[0]
        published.append(imbalance(weight, rebalance_reference(torch.from_numpy(weight), *sizes)[0], sizes[3]))
        mine.append(imbalance(weight, placed, sizes[3]))
        assert mine[-1].mean() <= published[-1].mean()
    before, after = np.concatenate(published), np.concatenate(mine)
    assert (after <= before * (1 + 1e-6)).mean() >= 0.99


@st.composite
def loads_and_sizes(draw):
    num_nodes = draw(st.integers(1, 2))
    gpus_per_node, slots_per_gpu = draw(st.integers(2, 6)), draw(st.integers(2, 5))
    per_node = draw(st.integers(slots_per_gpu, gpus_per_node * slots_per_gpu))
    load = draw(st.sampled_from([st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([1, 50, 3000])]))
    row = draw(st.lists(load, min_size=num_nodes * per_node, max_size=num_nodes * per_node))
    num_gpus = num_nodes * gpus_per_node
    return np.array([row], dtype=np.float64), (num_gpus * slots_per_gpu, num_nodes, num_nodes, num_gpus)


@settings(deadline=None, max_examples=300)
@given(loads_and_sizes())
def test_never_worse_than_published_without_doubles(case):
    weight, sizes = case
    published = rebalance_reference(torch.from_numpy(weight), *sizes)[0]
    assume(all(len(set(gpu)) == len(gpu) for gpu in published.reshape(sizes[3], -1).tolist()))
    placed = rebalance_experts(torch.from_numpy(weight), *sizes, distinct=True)[0]
    assert imbalance(weight, placed, sizes[3])[0] <= imbalance(weight, published, sizes[3])[0] * (1 + 1e-6)


def test_nearly_level_where_the_effort_ends():
    """Few experts with nearly all load, on many GPUs."""
    weight = np.random.default_rng(1).lognormal(0, 3, (20, 128)).astype(np.float32).astype(np.float64)
    published, _, count = rebalance_reference(torch.from_numpy(weight), 1152, 1, 1, 128)
    assert (count.max(axis=1) > 128).all()
    placed = rebalance_experts(torch.from_numpy(weight), 1152, 1, 1, 128, distinct=True)[0]
    assert (imbalance(weight, placed, 128) < imbalance(weight, published, 128)).all()
    assert imbalance(weight, placed, 128).mean() < 1.03


def test_an_exchange_levels_what_longest_first_left():
    # Longest first leaves 8 + 5 + 4 and 7 + 6 + 2; 8 for 7 makes both 16.
    weight = torch.tensor([[8.0, 7.0, 6.0, 5.0, 4.0, 2.0]])
    assert imbalance(weight.numpy(), rebalance_reference(weight, 6, 1, 1, 2)[0], 2).tolist() == [17 / 16]
    assert imbalance(weight.numpy(), rebalance_experts(weight, 6, 1, 1, 2, distinct=True)[0], 2).tolist() == [1.0]


def test_fewer_copies_where_that_is_better():
    # Greedily expert 0 gets 4 copies of 4.9: one on each GPU, and 5.2 beside one of them is 10.1 at least. With 3
    # copies of 6.53, expert 1 has 2 of 2.6, and no GPU needs more than 6.53 + 2.6 + 0.1.
    weight = torch.tensor([[19.6, 5.2, 4.5, 4.4, 0.1, 0.1, 0.1, 0.1, 0.1]])
    assert rebalance_reference(weight, 12, 1, 1, 4)[2][0].tolist() == [4] + [1] * 8
    phy2log, _, logcnt = rebalance_experts(weight, 12, 1, 1, 4, distinct=True)
    assert logcnt[0].tolist()[:2] == [3, 2]
    assert imbalance(weight.numpy(), phy2log, 4)[0] * weight.sum() / 4 < 9.3


@pytest.mark.parametrize(
    ("n_logical", "sizes", "mode", "message"),
    [
        (
            4,
            (20, 1, 1, 4),
            "auto",
            "num_replicas is 20, allowed with distinct is at most 16: each of 4 GPUs.*4 experts",
        ),
        (8, (24, 2, 2, 4), "auto", "num_replicas is 24, allowed with distinct is at most 16: .* 4 experts of a node"),
        (9, (24, 3, 2, 4), "hierarchical", "num_replicas is 24, allowed with distinct is at most 12"),
    ],
)
def test_refusals(n_logical, sizes, mode, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(torch.ones(1, n_logical), *sizes, mode=mode, distinct=True)
    rebalance_experts(torch.ones(1, n_logical), *sizes, mode=mode)
