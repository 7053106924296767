"""The cost of a layer: by hand, by a slow independent model, and by what must hold for any load."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplb.cost import EXCHANGES, HARDWARE, Hardware, hardware_by_name, layer_parts, layer_time, transfer_time
from lplb.models import MODELS, ModelShape, model_by_name

# Round numbers: an expert has 3 * 10 * 20 = 600 weights of 2 bytes: 1,200 bytes, 1,200 operations per token.
SMALL = ModelShape("small", 8, 2, 10, 20, 3, 2.0, "bf16", 1.0)
# Weights are read in 1 s, 4 tokens multiplied in 0.4 s; a hidden state (10 elements) over NVLink in 0.1 s, else 1 s.
ROUND = Hardware("round", 12e3, 24e3, 1e6, 1200.0, 100.0, 10.0, efficiency=1.0)


def time_of(tokens, n_ranks, **changes):
    options = {"ranks_per_node": n_ranks, "exchange": "direct", "tile": 4, **changes}
    return layer_time(np.array(tokens), n_ranks, SMALL, ROUND, **options)


def slow_seconds(tokens, n_ranks, model, hardware, node, exchange, planner, tile):
    """The same model written down once more: Python loops, one rank and one slot after the other."""
    slots = len(tokens) // n_ranks
    rate = {"bf16": hardware.bf16_flops, "fp8": hardware.fp8_flops}[model.precision] * hardware.efficiency
    weights = 3 * model.hidden * model.intermediate
    busiest, nvlink, cards = 0.0, 0.0, 0.0
    total = sum(tokens)
    load = [sum(tokens[r * slots : (r + 1) * slots]) for r in range(n_ranks)]
    for r in range(n_ranks):
        seconds = 0.0
        for t in tokens[r * slots : (r + 1) * slots]:
            if t:
                rows = -(-t // tile) * tile
                read = weights * model.weight_bytes / (hardware.memory_bandwidth * hardware.efficiency)
                seconds += max(read, 2 * weights * rows / rate)
        busiest = max(busiest, seconds)
        if not total:
            continue
        mine = range(r // node * node, r // node * node + node)
        if exchange == "direct":
            nvlink = max(nvlink, load[r] * (node - 1) / n_ranks)
            cards = max(cards, load[r] * (n_ranks - node) / n_ranks)
        else:
            batch, k = total / model.top_k, model.top_k
            nvlink = max(nvlink, batch * (1 - (1 - load[r] / total) ** k) * (n_ranks - 1) / n_ranks)
            part = sum(load[q] for q in mine) / total
            cards = max(cards, batch * (1 - (1 - part) ** k) * (n_ranks - node) / n_ranks / node)
    links = max(nvlink / hardware.nvlink_bandwidth, cards / hardware.rdma_bandwidth) / hardware.efficiency
    return busiest + links * model.hidden * (model.dispatch_bytes + model.combine_bytes) + planner


def test_by_hand():
    # Rank 0: 4 tokens are one tile, 0.4 s, less than reading: 1 s. 41 tokens are 11 tiles: 4.4 s. Rank 1: 2 s.
    # 45 tokens on rank 0, half of them from rank 1: 22.5 hidden states there (1 byte) and back (2 bytes): 2.25, 4.5 s.
    parts = layer_parts(
        np.array([4, 41, 1, 1]), 2, SMALL, ROUND, ranks_per_node=2, exchange="direct", planner_seconds=0.25, tile=4
    )
    assert parts.experts == pytest.approx(5.4)
    assert parts.dispatch == pytest.approx(2.25)
    assert parts.combine == pytest.approx(4.5)
    assert parts.planner == 0.25
    assert parts.floor == pytest.approx(2.0)  # with one token each the two slots would take 1 s each
    assert time_of([4, 41, 1, 1], 2, planner_seconds=0.25) == pytest.approx(12.4)


def test_between_nodes_by_hand():
    # Four ranks in two nodes. Rank 0 has 40 tokens: 10 from rank 1 over NVLink (1 s), 20 from the other node (20 s).
    assert time_of([40, 4, 4, 4], 4, ranks_per_node=2) == pytest.approx(4.0 + 20 * (1 + 2))
    # Two choices per token, all on rank 0: 20 tokens, each sent once. 10 come from the other node, over two cards: 5 s.
    assert time_of([40, 0, 0, 0], 4, ranks_per_node=2, exchange="by_node") == pytest.approx(4.0 + 5 * (1 + 2))
    # With cards that take no time: 5 tokens from rank 1 and 5 of the other node's 10, which came on rank 1's card.
    cards = replace(ROUND, rdma_bandwidth=1e15)
    for node, seconds in ((2, 1.0), (1, 0.0)):
        parts = layer_parts(np.array([40, 0, 0, 0]), 4, SMALL, cards, ranks_per_node=node, exchange="by_node")
        assert parts.dispatch == pytest.approx(seconds, abs=1e-9)


def test_a_slot_without_tokens_costs_nothing_and_one_token_costs_all_weights():
    assert time_of([0, 0, 0, 0], 1) == 0
    assert time_of([1, 0, 0, 0], 1) == pytest.approx(1.0)
    assert time_of([1, 1, 1, 1], 1) == pytest.approx(4.0)  # the four tokens of one expert would take 1 s


def test_steps_of_whole_tiles():
    seconds = [float(time_of([n], 1)) for n in range(1, 25)]
    assert seconds[:8] == pytest.approx([1.0] * 8)  # up to ten tokens reading takes longer, two tiles end at eight
    assert seconds[8:12] == pytest.approx([1.2] * 4)
    assert seconds[12:16] == pytest.approx([1.6] * 4)
    assert seconds[20:24] == pytest.approx([2.4] * 4)


loads = st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.integers(0, 2**32 - 1))


def draw(n_ranks, slots, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 3000, n_ranks * slots) * rng.integers(0, 2, n_ranks * slots)
    node = int(rng.choice([d for d in (1, 2, 4, 8) if n_ranks % d == 0]))
    return rng, tokens, node


@settings(deadline=None, max_examples=60)
@given(loads, st.sampled_from(EXCHANGES), st.sampled_from(sorted(MODELS)), st.sampled_from(sorted(HARDWARE)))
def test_equals_the_slow_model(drawn, exchange, model, hardware):
    n_ranks, slots, seed = drawn
    _, tokens, node = draw(n_ranks, slots, seed)
    shape, gpu = MODELS[model], HARDWARE[hardware]
    expected = slow_seconds(tokens.tolist(), n_ranks, shape, gpu, node, exchange, 5e-5, 64)
    got = layer_time(tokens, n_ranks, shape, gpu, ranks_per_node=node, exchange=exchange, planner_seconds=5e-5, tile=64)
    assert got == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(loads, st.sampled_from(EXCHANGES))
def test_never_less_for_more_tokens_nor_more_for_better_hardware(drawn, exchange):
    n_ranks, slots, seed = drawn
    rng, tokens, node = draw(n_ranks, slots, seed)
    shape, gpu = MODELS["deepseek-v3"], HARDWARE["h200"]
    options = {"ranks_per_node": node, "exchange": exchange}
    seconds = layer_time(tokens, n_ranks, shape, gpu, **options)
    assert seconds >= 0
    more = tokens.copy()
    more[rng.integers(len(more))] += rng.integers(1, 500)
    assert layer_time(more, n_ranks, shape, gpu, **options) >= seconds * (1 - 1e-12)
    for rate in ("fp8_flops", "memory_bandwidth", "nvlink_bandwidth", "rdma_bandwidth"):
        faster = replace(gpu, **{rate: getattr(gpu, rate) * 1.5})
        assert layer_time(tokens, n_ranks, shape, faster, **options) <= seconds
    half = layer_time(tokens, n_ranks, shape, replace(gpu, efficiency=gpu.efficiency / 2), **options)
    assert half == pytest.approx(2 * seconds)
    assert layer_time(tokens, n_ranks, shape, gpu, planner_seconds=1e-3, **options) == pytest.approx(seconds + 1e-3)


def test_batches_of_any_shape_and_kind():
    tokens = np.random.default_rng(3).integers(0, 900, (2, 5, 32))
    together = layer_time(tokens, 8, MODELS["kimi-k2"], HARDWARE["b200"])
    assert together.shape == (2, 5)
    assert together.dtype == np.float64
    for index in np.ndindex(2, 5):
        alone = layer_time(tokens[index].astype(np.float32), 8, MODELS["kimi-k2"], HARDWARE["b200"])
        assert alone.shape == ()
        assert alone == together[index]
    for exchange in EXCHANGES:
        assert layer_time(tokens[:, :0], 8, MODELS["kimi-k2"], HARDWARE["b200"], exchange=exchange).shape == (2, 0)
    as_quota = layer_time(torch.from_numpy(tokens).int(), 8, MODELS["kimi-k2"], HARDWARE["b200"])
    assert np.array_equal(as_quota, together)


def test_tokens_sent_once_are_those_of_a_simulation():
    """The expected number of tokens that a node takes, against tokens drawn one by one."""
    picks = np.random.default_rng(0).choice(4, (200_000, 2), p=[0.1, 0.2, 0.3, 0.4])  # the rank of each choice
    arriving = max(int((picks // 2 == node).any(1).sum()) for node in range(2)) / 2 / 2  # half are there, two cards
    gpu = replace(ROUND, nvlink_bandwidth=1e15, bf16_flops=1e15, memory_bandwidth=1e15)  # the cards take all the time
    seconds = layer_time(np.bincount(picks.ravel()), 4, SMALL, gpu, ranks_per_node=2, exchange="by_node")
    assert seconds == pytest.approx(arriving * (1 + 2), rel=0.01)  # ten elements, ten bytes per second


PUBLIC_MODELS = {  # config.json on huggingface.co, in the order of the fields
    "deepseek-v3": (256, 8, 7168, 2048, 61 - 3, 8, 4),
    "qwen3-235b-a22b": (128, 8, 4096, 1536, 94, 1, 1),
    "gpt-oss-120b": (128, 4, 2880, 2880, 36, 1, 1),
    "kimi-k2": (384, 8, 7168, 2048, 61 - 1, 1, 1),
}
# All weights of the routed experts: what is left of the public totals (671, 235, 116.8, 1,026 billion) without
# attention, embeddings, dense layers and shared experts.
BILLIONS = {
    "deepseek-v3": (640, 671),
    "qwen3-235b-a22b": (220, 235),
    "gpt-oss-120b": (110, 117),
    "kimi-k2": (1000, 1026),
}


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_models_are_those_of_their_configs(name):
    shape = model_by_name(name)
    sizes = (shape.n_logical, shape.top_k, shape.hidden, shape.intermediate, shape.moe_layers)
    assert (*sizes, shape.n_group, shape.topk_group) == PUBLIC_MODELS[name]
    weights = shape.slot_bytes / shape.weight_bytes * shape.n_logical
    least, most = BILLIONS[name]
    assert least * 1e9 < weights < most * 1e9


def test_bytes_of_an_expert():
    assert MODELS["deepseek-v3"].expert_bytes == 44_040_192  # 3 * 7168 * 2048 in fp8
    assert MODELS["qwen3-235b-a22b"].expert_bytes == 37_748_736  # 3 * 4096 * 1536 in bf16
    assert MODELS["gpt-oss-120b"].expert_bytes == 3 * 2880 * (2880 // 32) * 17  # 16 bytes and a scale per 32 weights
    assert MODELS["deepseek-v3"].slot_bytes / 2**30 == pytest.approx(2.379, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "bf16", "fp8", "memory", "bandwidth", "nvlink"),
    [
        ("h100", 1979, 3958, 80, 3.35, 900),
        ("h200", 1979, 3958, 141, 4.8, 900),
        ("b200", 4500, 9000, 180, 7.7, 1800),
    ],
)
def test_hardware_is_that_of_the_data_sheets(name, bf16, fp8, memory, bandwidth, nvlink):
    """Data sheets give operations with sparsity, in tera, and the sum of NVLink's directions, in GB/s."""
    gpu = hardware_by_name(name)
    assert gpu.bf16_flops == bf16 * 1e12 / 2
    assert gpu.fp8_flops == fp8 * 1e12 / 2
    assert gpu.memory_bytes == memory * 1e9
    assert gpu.memory_bandwidth == bandwidth * 1e12
    assert gpu.nvlink_bandwidth == nvlink * 1e9 / 2
    assert gpu.rdma_bandwidth == 400e9 / 8
    assert 0.5 <= gpu.efficiency <= 0.9


def test_dispatch_is_near_what_deepep_reports():
    """DeepEP's low-latency kernels, 128 tokens, hidden 7168, top-8, EP 32, all over 50 GB/s cards: 155 and 273 µs."""
    even = np.full(32, 128 * 8)
    gpu = replace(HARDWARE["h100"], efficiency=1.0)
    parts = layer_parts(even, 32, MODELS["deepseek-v3"], gpu, ranks_per_node=1, exchange="direct")
    assert parts.dispatch * 1e6 == pytest.approx(155, rel=0.1)
    assert parts.combine * 1e6 == pytest.approx(273, rel=0.1)


def test_numbers_of_any_real_type():
    whole = layer_time(np.array([4.0, 41.0, 1.0, 1.0]), 2, SMALL, ROUND, planner_seconds=0.25)
    for dtype in (torch.bfloat16, torch.float16, torch.int32, torch.uint8):
        tokens = torch.tensor([4, 41, 1, 1], dtype=dtype)
        assert layer_time(tokens, 2, SMALL, ROUND, planner_seconds=np.float32(0.25)) == whole
    half = replace(ROUND, efficiency=np.float32(0.5))
    assert (half.efficiency, type(half.efficiency)) == (0.5, float)
    assert np.isfinite(layer_time(np.full(4, 1e30), 2, SMALL, ROUND)).all()


BAD = [
    ({"tokens": [1, 2]}, TypeError, "tokens is a list"),
    ({"tokens": np.array([True])}, TypeError, "bool"),
    ({"tokens": np.array(1.0)}, ValueError, r"shape \[\]"),
    ({"tokens": np.empty((3, 0))}, ValueError, r"shape \[3, 0\]"),
    ({"tokens": np.ones(5)}, ValueError, r"shape \[5\].*n_ranks = 2"),
    ({"tokens": np.array([1.0, -2.0])}, ValueError, "-2.0"),
    ({"tokens": np.array([1.0, np.nan])}, ValueError, "nan"),
    ({"tokens": np.array([1.0, np.inf])}, ValueError, "inf"),
    ({"tokens": np.array([1.0, 1e308])}, ValueError, "1e\\+308, allowed are 0 to 1e\\+30"),
    ({"tokens": torch.eye(2).to_sparse()}, TypeError, "sparse"),
    ({"tokens": torch.ones(2, device="meta")}, TypeError, "meta"),
    ({"tokens": torch.ones(4, dtype=torch.bool)}, TypeError, "bool"),
    ({"planner_seconds": np.True_}, TypeError, "planner_seconds is"),
    ({"n_ranks": 0}, ValueError, "n_ranks is 0"),
    ({"n_ranks": 2.0}, TypeError, "n_ranks is 2.0"),
    ({"model": "deepseek-v3"}, TypeError, "model is a str"),
    ({"hardware": None}, TypeError, "hardware is a NoneType"),
    ({"ranks_per_node": 3}, ValueError, "n_ranks is 2.*ranks_per_node = 3"),
    ({"exchange": "carrier pigeon"}, ValueError, "carrier pigeon"),
    ({"planner_seconds": -1e-6}, ValueError, "-1e-06"),
    ({"planner_seconds": float("nan")}, ValueError, "nan"),
    ({"planner_seconds": "fast"}, TypeError, "fast"),
    ({"tile": 0}, ValueError, "tile is 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_by_value(change, error, message):
    given_ = {"tokens": np.ones(4), "n_ranks": 2, "model": SMALL, "hardware": ROUND, **change}
    with pytest.raises(error, match=message):
        layer_time(**given_)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_logical": 0}, ValueError, "n_logical is 0"),
        ({"n_logical": 8.0}, TypeError, "n_logical is 8.0, allowed is an int"),
        ({"hidden": True}, TypeError, "hidden is True"),
        ({"weight_bytes": float("nan")}, ValueError, "weight_bytes is nan"),
        ({"precision": "fp4"}, ValueError, "'fp4'"),
        ({"top_k": 9}, ValueError, "top_k is 9.*8"),
        ({"n_group": 3}, ValueError, "n_group is 3"),
        ({"topk_group": 2}, ValueError, "topk_group is 2"),
    ],
)
def test_bad_models_by_value(change, error, message):
    with pytest.raises(error, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"efficiency": 1.1}, ValueError, "efficiency is 1.1"),
        ({"efficiency": 0}, ValueError, "efficiency is 0"),
        ({"memory_bandwidth": float("inf")}, ValueError, "memory_bandwidth is inf"),
        ({"bf16_flops": "1"}, TypeError, "bf16_flops is '1'"),
    ],
)
def test_bad_hardware_by_value(change, error, message):
    with pytest.raises(error, match=message):
        replace(ROUND, **change)


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(ValueError, match=r"'gpt-5'.*'deepseek-v3'"):
        model_by_name("gpt-5")
    with pytest.raises(ValueError, match=r"'a100'.*'h100'"):
        hardware_by_name("a100")


# Weights that travel. A copy takes 12 s over NVLink and 120 s over a card.


@pytest.mark.parametrize(
    ("transfers", "node", "seconds"),
    [
        ([], 4, 0),
        ([(0, 0, 1)], 4, 12),
        ([(0, 0, 1)], 1, 120),
        ([(0, 0, 1), (1, 1, 0)], 4, 12),  # in and out beside each other
        ([(0, 0, 1), (1, 0, 2)], 4, 24),  # two leave one rank
        ([(0, 1, 0), (1, 2, 0)], 4, 24),  # two come to one rank
        ([(0, 0, 1), (0, 0, 2), (0, 0, 3)], 4, 24),  # rank 1 passes on what it got
        ([(0, 0, 1), (0, 0, 2), (0, 3, 1), (0, 3, 2)], 4, 24),  # of each source its own
        # Rank 1 sends five: two of its own, and passes on three that come from 0, 2 and 3.
        (
            [
                *((0, 0, to) for to in (1, 2, 3)),
                *((1, 2, to) for to in (1, 3, 0)),
                *((2, 3, to) for to in (1, 2, 0)),
                (3, 1, 0),
                (4, 1, 2),
            ],
            4,
            60,
        ),
        ([(0, 0, 1), (0, 0, 2), (0, 0, 3), (1, 1, 0), (2, 1, 2)], 1, 360),  # rank 1 passes on over its card
        ([(0, 0, 2), (0, 0, 3)], 2, 120),  # to the other node once
        ([(0, 0, 1), (0, 0, 2), (0, 0, 3)], 2, 120),  # NVLink has nothing to wait for
        ([(0, 0, 1), (0, 0, 2), (0, 0, 3)], 1, 240),
        ([(e, 0, 1) for e in range(11)] + [(20, 0, 2)], 2, 132),  # eleven over NVLink take longer than one over a card
    ],
)
def test_transfers_by_hand(transfers, node, seconds):
    table = np.array([*transfers, (-1, -1, -1)]).reshape(-1, 3)
    for rows in (table, torch.from_numpy(table.astype(np.int32)), torch._neg_view(torch.from_numpy(-table))):
        assert transfer_time(rows, 4, SMALL, ROUND, ranks_per_node=node) == pytest.approx(seconds)


def test_transfers_are_added():
    tokens = np.array([[40, 4], [4, 40]])
    plain = time_of(tokens, 2)
    np.testing.assert_allclose(time_of(tokens, 2, transfer_seconds=3.5), plain + 3.5)
    np.testing.assert_allclose(time_of(tokens, 2, transfer_seconds=np.array([1.0, 0.0])) - plain, [1.0, 0.0])
    parts = layer_parts(tokens, 2, SMALL, ROUND, transfer_seconds=2)
    assert parts.transfers.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: transfer_time(np.zeros((2, 2), int), 4, SMALL, ROUND), ValueError, r"transfers has shape \[2, 2\]"),
        (lambda: transfer_time(np.zeros((2, 3)), 4, SMALL, ROUND), TypeError, "transfers is a ndarray, allowed is"),
        (lambda: transfer_time([[0, 0, 1]], 4, SMALL, ROUND), TypeError, "transfers is a list, allowed is"),
        (lambda: transfer_time(np.array([[0, 0, 4]]), 4, SMALL, ROUND), ValueError, "transfers has rank 4, allowed"),
        (lambda: transfer_time(np.array([[0, -1, 1]]), 4, SMALL, ROUND), ValueError, "transfers has rank -1, allowed"),
        (lambda: transfer_time(np.array([[0, 0, 1]]), 4, "x", ROUND), TypeError, "model is a str, allowed is"),
        (
            lambda: time_of([1, 2], 2, transfer_seconds=-1.0),
            ValueError,
            "transfer_seconds is -1.0, allowed is 0 or mor",
        ),
        (lambda: time_of([1, 2], 2, transfer_seconds=np.nan), ValueError, "transfer_seconds is nan, allowed"),
        (lambda: time_of([1, 2], 2, transfer_seconds=np.zeros(3)), TypeError, "transfer_seconds is array"),
        (lambda: time_of([1, 2], 2, transfer_seconds="1"), TypeError, "transfer_seconds is '1', allowed"),
    ],
)
def test_transfers_are_checked(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
