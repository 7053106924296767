"""The EP layer over gloo processes: what it computes, who does how much, and that no rank is left waiting."""

import copy
import os
import pickle
import time
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from reference import ReferenceLP, integer_optimum
from test_distributed import PROCESSES, call, on_ranks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lplb import Placement, Planner, nn, topology
from lplb.nn import ExpertParallelMoE, keep_routes
from lplb.policies import place

HIDDEN, FFN, N_EXPERTS, TOP_K = 8, 12, 32, 3
FIELDS = ("gate_up", "down")


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are so small that waking other threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Placements, layers and batches


def eplb(n_ranks, spare, seed=0):
    """An EPLB placement with `spare` copies per rank, for loads of log-normal size."""
    load = torch.from_numpy(np.random.default_rng(seed).lognormal(0, 1.5, N_EXPERTS))
    return place(load, n_ranks=n_ranks, n_physical=N_EXPERTS + spare * n_ranks, policy="eplb")


def on_topology(r2o, n_ranks, group):
    planner = Planner(r2o, N_EXPERTS + n_ranks * r2o.shape[1], N_EXPERTS, n_ranks, group)
    planner.update_redundancy_mapping(torch.arange(N_EXPERTS).flip(0))
    return planner


BALANCERS = {
    "none": lambda n, group: None,
    "ring": lambda n, group: on_topology(topology.ring(n), n, group),
    "torus": lambda n, group: on_topology(topology.torus(2, n // 2), n, group),
    "cube": lambda n, group: on_topology(topology.cube(), n, group),
    "hypercube": lambda n, group: on_topology(topology.hypercube(), n, group),
    "rings of 2": lambda n, group: on_topology(topology.ring(2), n, group),
    "eplb": lambda n, group: Planner.from_placement(eplb(n, 2), group=group),
    "eplb, flow": lambda n, group: Planner.from_placement(eplb(n, 1, 7), group=group, solver="flow"),
    "all everywhere": lambda n, group: Planner.from_placement(Placement(list(range(N_EXPERTS)) * n, n), group=group),
}


def layer_of(balancer, n_ranks, group, dtype=torch.float64, hidden=HIDDEN, top_k=TOP_K, lag=0):
    planner = BALANCERS[balancer](n_ranks, group)
    torch.manual_seed(0)
    return ExpertParallelMoE(hidden, FFN, N_EXPERTS, top_k, group=group, balancer=planner, lag=lag, dtype=dtype)


def tokens(seed, n, dtype=torch.float64):
    """Tokens of one domain, so that few experts are asked for, and the gradient that comes back to them."""
    draw = torch.Generator().manual_seed(seed)
    domain = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(n, HIDDEN, generator=draw, dtype=torch.float64) + 2 * domain
    return x.to(dtype).requires_grad_(), torch.randn(n, HIDDEN, generator=draw, dtype=torch.float64).to(dtype)


def step(layer, x, grad):
    """Forward, backward, and what is left of them on this rank."""
    layer.router.grad = x.grad = None
    for leaf in (*layer.expert_fields[0], *layer.expert_fields[1]):
        leaf.grad = None
    out = layer(x)
    out.backward(grad)
    first = layer._ranks.rank * len(layer.expert_fields[0])
    expert_grads = {}
    for field, leaves in zip(FIELDS, layer.expert_fields, strict=True):
        for slot, leaf in enumerate(leaves, first):
            key = f"{field}.{int(layer.placement.phy2log[slot])}"
            expert_grads[key] = expert_grads.get(key, 0) + leaf.grad
    return {
        "x": x.detach(),
        "grad": grad,
        "top_k": layer.top_k,
        "parameters": {name: p.detach().clone() for name, p in layer.experts.named_parameters()},
        "router": layer.router.detach().clone(),
        "results": {"out": out.detach(), "x.grad": x.grad},
        "sums": {"router.grad": layer.router.grad, **expert_grads},
        "received": layer.received,
        "plan": None if layer.balancer is None else layer.balancer.last_plan,
        "phy2log": layer.placement.phy2log,
    }


def of_all(rows):
    """What the ranks computed together."""
    found = {name: torch.cat([row["results"][name] for row in rows]) for name in rows[0]["results"]}
    for row in rows:
        for name, value in row["sums"].items():
            found[name] = found.get(name, 0) + value
    return found


def dense(rows, dtype=torch.float64):
    """The reference: every expert sees every token, and autograd does the rest. Also the tokens of each expert."""
    x = torch.cat([row["x"] for row in rows]).to(dtype).requires_grad_()
    router = rows[0]["router"].to(dtype).requires_grad_()
    n_experts = len(router)
    held = {name: p.to(dtype).requires_grad_() for row in rows for name, p in row["parameters"].items()}
    assert sum(len(row["parameters"]) for row in rows) == len(held) == 2 * n_experts  # each expert has one home
    probability = torch.softmax(x @ router.T, 1)
    chosen = probability >= probability.sort(1).values[:, -rows[0]["top_k"], None]
    share = probability * chosen / (probability * chosen).sum(1, keepdim=True)
    out = torch.zeros_like(x)
    for e in range(n_experts):
        gate, up = (x @ held[f"gate_up.{e}"]).split(len(held[f"down.{e}"]), 1)
        out = out + share[:, e, None] * ((functional.silu(gate) * up) @ held[f"down.{e}"])
    out.backward(torch.cat([row["grad"] for row in rows]).to(dtype))
    grads = {name: p.grad for name, p in held.items()}
    return {"out": out.detach(), "x.grad": x.grad, "router.grad": router.grad, **grads}, chosen.sum(0).numpy()


def assert_near(got, want, tolerance):
    """Within `tolerance` of the largest entry (at least 1)."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        scale = float(torch.cat([want[name].abs().flatten(), torch.ones(1)]).max())
        torch.testing.assert_close(value.double(), want[name].double(), rtol=0, atol=tolerance * scale, msg=name)


# What it computes


def run_cases(rank, size, cases):
    record = []
    for balancer, n_tokens, lag in cases:
        layer = layer_of(balancer, size, dist.group.WORLD, lag=lag)
        record.append([step(layer, *tokens(10 * seed + rank, n_tokens[rank])) for seed in range(2)])
    return record


def run_on_four(rank):
    """What four ranks do, in one group of processes: starting them takes longer."""
    return {
        "cases": run_cases(rank, 4, cases_of(4)),
        "whole numbers": run_whole_numbers(rank, 4, ["none", "ring", "torus", "eplb"]),
        "float32": run_float32(rank, 4, ["none", "torus", "eplb"]),
        "checkpoints": run_checkpoints(rank),
        "initial": {name: initial_weights(rank, 4, name) for name in ("none", "torus", "eplb")},
    }


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return on_ranks(4, tmp_path_factory.mktemp("four"), run_on_four)


SOME, NONE_AT_ALL = [40, 0, 25, 1, 30, 0, 7, 64], [0] * 8
CASES = {
    2: ["none", "ring", "eplb", "all everywhere"],
    4: ["none", "ring", "torus", "rings of 2", "eplb", "eplb, flow"],
    8: ["none", "ring", "torus", "cube", "rings of 2", "eplb"],
}


def cases_of(size):
    idle = [("none", NONE_AT_ALL, 0), ("eplb", NONE_AT_ALL, 0), ("eplb", NONE_AT_ALL, 1)]
    lagged = [(name, SOME, 1) for name in CASES[size] if name != "none"]
    return [(name, SOME, 0) for name in CASES[size]] + lagged + idle


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.usefixtures("highs")
def test_outputs_gradients_and_loads(size, tmp_path, request):
    cases = cases_of(size)
    if size == 4:
        results = [result["cases"] for result in request.getfixturevalue("four")]
    else:
        results = on_ranks(size, tmp_path, run_cases, size, cases)
    unbalanced = [of_all([result[0][seed] for result in results]) for seed in range(2)]
    for case, (name, n_tokens, lag) in enumerate(cases):
        for seed in range(2):
            rows = [result[case][seed] for result in results]
            want, loads = dense(rows)
            assert_near(of_all(rows), want, 1e-12)
            if n_tokens is SOME:
                assert_near(of_all(rows), unbalanced[seed], 1e-12)
            received = [int(row["received"].sum()) for row in rows]
            assert sum(received) == sum(loads) == TOP_K * sum(n_tokens[:size])
            if name == "none":
                assert received == loads.reshape(size, -1).sum(1).tolist()
            elif not lag:
                assert received == rows[0]["plan"].rank_load.tolist()
            if name.startswith("eplb") and sum(loads) and not lag:
                optimum = ReferenceLP(rows[0]["phy2log"].numpy(), size).solve(loads)[0]
                assert max(received) == integer_optimum(optimum, size)


def test_all_ranks_of_a_planner_in_one_process():
    """Sixteen ranks, among them the hypercube's."""
    want = None
    for name in ("none", "hypercube", "rings of 2", "eplb", "torus"):
        row = step(layer_of(name, 16, None), *tokens(3, 50))
        reference, loads = dense([row])
        want = of_all([row]) if want is None else want
        assert_near(of_all([row]), reference, 1e-12)
        assert_near(of_all([row]), want, 1e-12)
        if name != "none":
            assert row["received"].view(16, -1).sum(1).tolist() == row["plan"].rank_load.tolist()
        assert row["received"].sum() == loads.sum()


# Whole numbers: nothing is rounded, so nothing may differ

PAIRS = N_EXPERTS // 2
BIG = 1024.0  # silu(1024) is 1024 with slope 1, silu(-1024) is 0 with slope 0


def whole_number_layer(balancer, size, group):
    """Feature i of the first makes a token choose experts 2i and 2i + 1, by equal scores; weights are whole numbers."""
    layer = layer_of(balancer, size, group, torch.float32, PAIRS + 3, top_k=2)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.router.zero_()
        layer.router[torch.arange(N_EXPERTS), torch.arange(N_EXPERTS) // 2] = 128.0  # exp(-128) is no float32
        for e in range(N_EXPERTS):
            gate, up = (torch.randint(-2, 3, (PAIRS + 3, FFN), generator=draw) for _ in range(2))
            down = torch.randint(-2, 3, (FFN, PAIRS + 3), generator=draw)
            layer.experts.fill(e, {"gate_up": torch.cat([BIG * gate, up], 1), "down": down.float()})
    return layer


def whole_number_tokens(rank):
    draw = torch.Generator().manual_seed(rank)
    n = SOME[rank]
    pair = torch.randint(0, PAIRS, (n,), generator=draw) * torch.randint(0, 2, (n,), generator=draw)  # half are 0
    x = torch.cat([functional.one_hot(pair, PAIRS), torch.randint(-1, 2, (n, 3), generator=draw)], 1).float()
    return x.requires_grad_(), torch.randint(-2, 3, x.shape, generator=draw).float()


def run_whole_numbers(rank, size, names):
    layers = [whole_number_layer(name, size, dist.group.WORLD) for name in names]
    return [step(layer, *whole_number_tokens(rank)) for layer in layers]


def test_whole_numbers_are_equal(four):
    results = [result["whole numbers"] for result in four]
    want, loads = dense([result[0] for result in results])
    assert max(loads) > 2 * np.mean(loads)
    assert all(want[name].abs().max() >= 1 for name in ("out", "x.grad", "router.grad", "gate_up.0", "down.1"))
    for rows in zip(*results, strict=True):
        got = of_all(rows)
        assert got.keys() == want.keys()
        for name, value in got.items():
            assert torch.equal(value.double(), want[name]), name


def run_float32(rank, size, names):
    layers = [layer_of(name, size, dist.group.WORLD, torch.float32) for name in names]
    return [step(layer, *tokens(rank, 60, torch.float32)) for layer in layers]


def test_float32_is_as_near_as_its_sums(four):
    results = [result["float32"] for result in four]
    plain, *balanced = [of_all(rows) for rows in zip(*results, strict=True)]
    want, _ = dense([result[0] for result in results])
    n_terms = 4 * 60 * TOP_K  # the longest sum: a router's or expert's gradient over all tokens
    assert_near(plain, want, n_terms * torch.finfo(torch.float32).eps)
    for got in balanced:
        assert_near(got, plain, 2 * n_terms * torch.finfo(torch.float32).eps)


# One seed, one model


def initial_weights(rank, size, name):
    layer = layer_of(name, size, dist.group.WORLD)
    return layer.router, dict(layer.experts.named_parameters()), layer.expert_fields, layer.placement.phy2log


@pytest.mark.parametrize("name", ["none", "torus", "eplb"])
def test_initial_weights_depend_on_the_seed_only(name, four):
    torch.manual_seed(0)
    alone = ExpertParallelMoE(HIDDEN, FFN, N_EXPERTS, TOP_K, dtype=torch.float64)
    expected = dict(alone.experts.named_parameters())
    seen = set()
    for rank, (router, parameters, fields, phy2log) in enumerate(result["initial"][name] for result in four):
        assert torch.equal(router, alone.router)
        seen |= parameters.keys()
        for key, value in parameters.items():
            assert torch.equal(value, expected[key])
        for field, leaves in zip(FIELDS, fields, strict=True):
            for slot, leaf in enumerate(leaves):
                assert torch.equal(leaf, expected[f"{field}.{phy2log[rank * len(leaves) + slot]}"])
                assert leaf.requires_grad
    assert seen == expected.keys()
    for name, bound in (("gate_up", HIDDEN), ("down", FFN)):
        for e in range(N_EXPERTS):
            assert 0.8 * bound**-0.5 < expected[f"{name}.{e}"].abs().max() <= bound**-0.5


# Activation checkpointing

WAYS = {
    "plain": lambda layer, x: layer(2 * x),
    "keep_routes": lambda layer, x: checkpoint(lambda x: layer(2 * x), x, use_reentrant=False, context_fn=keep_routes),
    "compute only": lambda layer, x: checkpoint(layer.compute, 2 * x, layer.route(2 * x), use_reentrant=False),
    "nothing kept": lambda layer, x: checkpoint(lambda x: layer(2 * x), x, use_reentrant=False),
}


def run_checkpoints(rank):
    """Every way of checkpointing: results, and how often the planner ran and split sizes were exchanged."""
    layer = layer_of("eplb", 4, dist.group.WORLD)
    x, grad = tokens(rank, SOME[rank])
    calls = []
    run, agree = layer.balancer.run, layer._agree
    layer.balancer.run = lambda *given, **how: calls.append("plan") or run(*given, **how)
    layer._agree = lambda *given: calls.append("agree") or agree(*given)
    record = {}
    for name, way in WAYS.items():
        calls.clear()
        x.grad = layer.router.grad = None
        for leaf in (*layer.expert_fields[0], *layer.expert_fields[1]):
            leaf.grad = None
        out = way(layer, x)
        out.backward(grad, retain_graph=True)
        out.backward(grad)
        grads = [leaf.grad for leaf in (x, layer.router, *layer.expert_fields[0], *layer.expert_fields[1])]
        record[name] = out.detach(), grads, list(calls)
    return record


@pytest.mark.parametrize(("name", "times"), [("keep_routes", 1), ("compute only", 1), ("nothing kept", 3)])
def test_checkpointed_layers_plan_once(name, times, four):
    for result in four:
        out, grads, calls = result["checkpoints"][name]
        plain_out, plain_grads, plain_calls = result["checkpoints"]["plain"]
        assert plain_calls == ["plan", "agree"]
        assert calls == times * ["plan", "agree"]
        assert torch.equal(out, plain_out)
        assert all(map(torch.equal, grads, plain_grads))


def test_layers_in_regions_within_regions():
    layers = [layer_of(name, 4, None) for name in ("ring", "eplb", "torus")]

    def inner(x):
        return layers[2](layers[1](x))

    def outer(x):
        return layers[1](checkpoint(inner, layers[0](x), use_reentrant=False, context_fn=keep_routes))

    x, grad = tokens(0, 20)
    outer(x).backward(grad)
    nested = x.grad, [p.grad for layer in layers for p in layer.parameters()]
    x.grad = None
    for layer in layers:
        layer.zero_grad()
    checkpoint(outer, x, use_reentrant=False, context_fn=keep_routes).backward(grad)
    assert torch.equal(x.grad, nested[0])
    assert all(map(torch.equal, [p.grad for layer in layers for p in layer.parameters()], nested[1]))


# Weights in slots


def leaves_of(layer):
    return [*layer.expert_fields[0], *layer.expert_fields[1]]


def assert_rows(layer):
    """The leaves are the rows of one tensor per field."""
    for field, leaves in zip(FIELDS, layer.expert_fields, strict=True):
        stacked = layer.experts.stacked(field)
        assert len(leaves) == len(stacked)
        for row, leaf in zip(stacked, leaves, strict=True):
            assert leaf.data_ptr() == row.data_ptr()
            assert (leaf.shape, leaf.stride(), leaf.dtype) == (row.shape, row.stride(), row.dtype)
            assert leaf.is_leaf
            assert leaf.requires_grad


def test_homes_are_parameters_and_copies_are_not():
    layer = layer_of("eplb", 4, None)
    names = {f"experts.{field}.{e}" for field in FIELDS for e in range(N_EXPERTS)}
    assert {name for name, _ in layer.named_parameters()} == layer.state_dict().keys() == names | {"router"}
    assert not list(layer.buffers())
    first = layer.placement.log2phy[:, 0].tolist()
    assert layer.home.tolist() == first
    at_home = {id(p) for p in layer.parameters()}
    for leaves in layer.expert_fields:
        assert [slot for slot, leaf in enumerate(leaves) if id(leaf) in at_home] == sorted(first)
    assert_rows(layer)


def test_an_optimizer_changes_the_rows():
    layer = layer_of("eplb", 4, None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = [leaf.detach().clone() for leaf in leaves_of(layer)]
    result = step(layer, *tokens(0, 40))
    optimizer.step()
    assert_rows(layer)
    at_home = {id(p) for p in layer.parameters()}
    for leaf, was in zip(leaves_of(layer), before, strict=True):
        assert torch.equal(leaf, was - 0.5 * leaf.grad if id(leaf) in at_home else was)
    assert result["plan"].solved


@pytest.mark.parametrize(
    "convert", [lambda layer: layer.float(), lambda layer: layer.to("meta").to_empty(device="cpu")]
)
def test_conversions_keep_leaves_and_gradients(convert):
    layer = layer_of("eplb", 4, None)
    step(layer, *tokens(0, 40))
    before = [(leaf.detach().clone(), leaf.grad.clone()) for leaf in leaves_of(layer)]
    dtype = convert(layer).router.dtype
    assert_rows(layer)
    if dtype == torch.float32:
        for leaf, (was, grad) in zip(leaves_of(layer), before, strict=True):
            assert torch.equal(leaf, was.float())
            assert torch.equal(leaf.grad, grad.float())
        row = step(layer, *tokens(0, 40, torch.float32))
        assert_near(of_all([row]), dense([row])[0], 1e-4)
    layer.reset_parameters()
    assert torch.isfinite(layer(tokens(0, 4, dtype)[0])).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_apart(copied):
    layer = layer_of("eplb", 4, None)
    x, grad = tokens(0, 40)
    want = step(layer, x, grad)
    other = copied(layer)
    assert_rows(other)
    with torch.no_grad():
        for leaf in leaves_of(layer):
            leaf.zero_()
    assert torch.equal(step(other, x, grad)["results"]["out"], want["results"]["out"])
    assert layer(x).abs().max() == 0
    assert other._handle != layer._handle


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_fit_any_placement(assign):
    torch.manual_seed(1)
    source = ExpertParallelMoE(HIDDEN, FFN, N_EXPERTS, TOP_K, dtype=torch.float64)
    layer = layer_of("eplb", 4, None)
    layer.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert_rows(layer)
    expected = dict(source.experts.named_parameters())
    for field, leaves in zip(FIELDS, layer.expert_fields, strict=True):
        for expert, slot in enumerate(layer.home.tolist()):
            assert torch.equal(leaves[slot], expected[f"{field}.{expert}"])
    assert {name for name, _ in layer.named_parameters()} == {name for name, _ in source.named_parameters()}


def test_grouped_matmul_equals_one_by_one(monkeypatch):
    if not hasattr(functional, "grouped_mm"):
        pytest.skip("needs torch.nn.functional.grouped_mm")
    layer = layer_of("eplb", 4, None, torch.float32)
    x, grad = tokens(0, 40, torch.float32)
    want = step(layer, x, grad)
    monkeypatch.setattr(nn, "has_grouped_matmul", lambda *_: True)
    got = step(layer, x, grad)
    assert_near(of_all([got]), of_all([want]), 1e-5)
    for leaf in leaves_of(layer):
        assert leaf.grad is not None


def test_any_shape_and_dtype():
    layer = layer_of("eplb", 4, None, torch.bfloat16)
    x = tokens(0, 12)[0].detach().bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(layer(x.view(2, 6, HIDDEN)), out.view(2, 6, HIDDEN))
    assert torch.equal(layer(x.T.contiguous().T), out)
    assert torch.equal(layer(x[3]), layer(x[3:4])[0])
    assert layer(x.view(2, 6, HIDDEN)[:, :0]).shape == (2, 0, HIDDEN)


# Refusals: on all ranks, and everything goes on as before

SIZE, SICK = 4, 2
REFUSED = f"rank {SICK} refused its input, so no rank goes on: "
GOOD = torch.zeros(5, HIDDEN)

# name: (what the sick rank gives, what the others give, exception, what the sick rank says)
BAD_TOKENS = {
    "dtype of tokens": (
        GOOD.double(),
        GOOD,
        "TypeError",
        "x has dtype torch.float64, allowed is the layer's, torch.float32",
    ),
    "hidden size of tokens": (
        GOOD[:, 1:],
        GOOD,
        "ValueError",
        "x has 7 features in its last dimension, allowed is 8",
    ),
    "no dimension": (torch.tensor(1.0), GOOD, "ValueError", "x has 0 features in its last dimension, allowed is 8"),
    "device of tokens": (GOOD.to("meta"), GOOD, "ValueError", "x is on 'meta', allowed is the layer's device, 'cpu'"),
    "no tensor": (None, GOOD, "TypeError", "x is a NoneType, allowed is a torch.Tensor"),
    "NaN": (GOOD.index_fill(0, torch.tensor([3]), torch.nan), GOOD, "ValueError", "token 3 are nan, allowed"),
    "infinite": (torch.full((1, HIDDEN), torch.inf), GOOD[:0], "ValueError", "token 0 are nan, allowed"),
}
# name: (what the sick rank has otherwise, what it says); GROUP and ALONE stand for planners of other groups
GROUP, ALONE = object(), object()
BAD_LAYERS = {
    "top_k": ({"top_k": 33}, "top_k is 33, allowed is 1 to 32"),
    "hidden size": ({"hidden_size": 0}, "hidden_size is 0, allowed is 1 or more"),
    "ffn size": ({"ffn_size": 1.5}, "ffn_size is 1.5, allowed is an int"),
    "dtype": ({"dtype": torch.int32}, "dtype is torch.int32, allowed are torch.float16"),
    "expert count": ({"n_experts": 12}, "balancer plans for 32 experts, allowed is n_experts = 12"),
    "device": ({"device": "meta"}, "balancer works on 'cpu', allowed is the layer's device, 'meta'"),
    "kind of balancer": ({"balancer": "ring"}, "balancer is a str, allowed is an lplb.Planner or None"),
    "planner of another group": (
        {"balancer": GROUP},
        "balancer plans for the processes [2, 3], allowed is a planner of this layer's group, the processes [0, 1, 2, ",
    ),
    "planner without a group": ({"balancer": ALONE}, "balancer plans for one process without a group, allowed"),
}
# name: (what the sick rank has otherwise, what all ranks say)
OTHER_LAYERS = {
    "another hidden size": ({"hidden_size": 9}, ["rank 2 has hidden_size 9, ", "rank 0 has hidden_size 8, "]),
    "another dtype": ({"dtype": torch.float16}, ["rank 2 has", "dtype torch.float16, a balancer, allowed is the same"]),
    "another top_k": ({"top_k": 1}, ["rank 2 has hidden_size 8, ffn_size 12, n_experts 32, top_k 1, ", "top_k 3, "]),
    "no balancer": ({"balancer": None}, ["rank 2 has", "no balancer, allowed is the same", "rank 0 has"]),
}


def refusals(rank):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    planner = on_topology(topology.ring(SIZE), SIZE, dist.group.WORLD)
    others = {
        GROUP: on_topology(topology.ring(2), 2, pairs[rank // 2]),
        ALONE: on_topology(topology.ring(SIZE), SIZE, None),
    }
    settings = {
        "hidden_size": HIDDEN,
        "ffn_size": FFN,
        "n_experts": N_EXPERTS,
        "top_k": TOP_K,
        "group": dist.group.WORLD,
        "balancer": planner,
    }
    torch.manual_seed(0)
    layer = ExpertParallelMoE(**settings)
    x, grad = tokens(rank, SOME[rank], torch.float32)
    record = {"before": step(layer, x, grad)}
    for name, (bad, good, *_) in BAD_TOKENS.items():
        record[name] = call(layer, bad if rank == SICK else good), step(layer, x, grad)
    for name, (change, _) in (BAD_LAYERS | OTHER_LAYERS).items():
        change = {key: others.get(value, value) if key == "balancer" else value for key, value in change.items()}
        given = settings | (change if rank == SICK else {})
        record[name] = call(partial(ExpertParallelMoE, **given)), step(layer, x, grad)
    with torch.set_grad_enabled(rank != SICK):
        record["gradients on some"] = call(layer, x)
    record["all refuse"] = call(layer, GOOD.double())
    planner.update_redundancy_mapping()
    record["stale"] = call(layer, x), call(layer.route, x)
    planner.update_redundancy_mapping(torch.arange(N_EXPERTS).flip(0))
    record["after"] = step(layer, x, grad)
    record["uneven"] = call(partial(ExpertParallelMoE, HIDDEN, FFN, 18, TOP_K, group=dist.group.WORLD))
    record["topology"] = call(on_topology, topology.cube(), SIZE, dist.group.WORLD)
    return record


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    return on_ranks(SIZE, tmp_path_factory.mktemp("refused"), refusals)


def assert_same(step, other):
    for kind in ("results", "sums", "parameters"):
        assert step[kind].keys() == other[kind].keys()
        for name, value in step[kind].items():
            assert torch.equal(value, other[kind][name]), name
    assert torch.equal(step["received"], other["received"])
    assert torch.equal(step["plan"].quota, other["plan"].quota)


@pytest.mark.parametrize("name", [*BAD_TOKENS, *BAD_LAYERS, *OTHER_LAYERS])
def test_a_refusal_of_one_rank_is_everyones(name, refused):
    for rank, result in enumerate(refused):
        (kind, message), again = result[name]
        if name in OTHER_LAYERS:
            assert kind == "ValueError"
            assert all(part in message for part in OTHER_LAYERS[name][1])
        else:
            said = BAD_TOKENS[name][3] if name in BAD_TOKENS else BAD_LAYERS[name][1]
            assert kind == (BAD_TOKENS[name][2] if name in BAD_TOKENS else kind)
            assert said in message
            assert message.startswith(REFUSED) == (rank != SICK)
        assert_same(again, result["before"])


def test_refusals_of_all_ranks(refused):
    for result in refused:
        kind, message = result["gradients on some"]
        assert kind == "ValueError"
        assert message.startswith("rank 2 has tokens of torch.float32 without gradients, allowed is the same")
        assert message.endswith("rank 0 has tokens of torch.float32 that need gradients")
        assert result["all refuse"] == ("TypeError", "x has dtype torch.float64, allowed is the layer's, torch.float32")
        for stale in result["stale"]:
            assert stale[0] == "ValueError"
            assert "the balancer has another placement than the weights of this layer" in stale[1]
        assert_same(result["after"], result["before"])
        assert result["uneven"] == ("ValueError", "n_experts is 18, allowed is a multiple of the number of ranks = 4")
        assert "ep_size is 4, allowed is a multiple of group_size = 8" in result["topology"][1]


# A process that dies


def dies(rank, folder, moment):
    """Rank 1 ends without a word in the second step; the others write what became of theirs."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE, timeout=timedelta(seconds=20)
    )
    layer = layer_of("ring", SIZE, dist.group.WORLD)
    x, grad = tokens(rank, 30)
    step(layer, x, grad)

    def second():
        if rank == 1 and moment == "before":
            os._exit(1)
        route = layer.route(x)
        if rank == 1 and moment == "routed":
            os._exit(1)
        out = layer.compute(x, route)
        if rank == 1 and moment == "computed":
            os._exit(1)
        out.backward(grad)

    before = {name: p.clone() for name, p in layer.named_parameters()}
    raised = call(second)
    unchanged = all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
    torch.save((raised, unchanged), f"{folder}/{rank}.pt")
    os._exit(0)


@pytest.mark.parametrize("moment", ["before", "routed", "computed"])
def test_the_others_raise_when_a_process_dies(moment, tmp_path):
    ranks = [PROCESSES.Process(target=dies, args=(rank, str(tmp_path), moment)) for rank in range(SIZE)]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + 60
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))
    late = [rank for rank in ranks if rank.is_alive()]
    for rank in late:
        rank.kill()
        rank.join()
    assert not late
    assert ranks[1].exitcode == 1
    for rank in (0, 2, 3):
        raised, unchanged = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert raised is not None
        assert unchanged


def gradients_that_differ(rank):
    """Only rank 0 has an expert that is trained, and tokens need no gradients: its backward pass would wait."""
    layer = layer_of("none", 2, dist.group.WORLD)
    twin = copy.deepcopy(layer)
    for name, p in layer.experts.named_parameters():
        p.requires_grad_(name.endswith(".0"))
    x = tokens(rank, 20)[0].detach()
    try:
        layer(x)
        said = "nothing raised"
    except ValueError as error:
        said = str(error)
    return [said, torch.equal(twin(x), twin(x)), twin._ranks is layer._ranks]


def test_ranks_agree_on_who_needs_gradients(tmp_path):
    for said, same, shared in on_ranks(2, tmp_path, gradients_that_differ):
        assert "rank 1 has tokens of torch.float64 without gradients" in said
        assert "rank 0 has tokens of torch.float64 that need gradients" in said
        assert same
        assert shared


def test_experts_that_move_are_trained_alike():
    layer = layer_of("eplb", 4, None)
    layer.experts.leaves("down")[3].requires_grad_(False)
    placement = layer.placement
    with pytest.raises(ValueError, match=r"requires_grad of down is False for expert \d+, allowed is that of expert"):
        layer.follow(BALANCERS["ring"](4, None))
    assert layer.placement is placement
