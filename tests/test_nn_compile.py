"""The EP layer under torch.compile: one graph, with functional collectives under a group."""

import shutil

import pytest
import torch
import torch.distributed as dist
from test_distributed import call, on_ranks
from test_nn import assert_near, of_all, step, tokens
from torch._dynamo.utils import counters

from lplb import Planner, topology
from lplb.nn import ExpertParallelMoE

HIDDEN, FFN, N_EXPERTS, TOP_K, N_RANKS = 8, 4, 4, 2, 2
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
pytestmark = pytest.mark.skipif(VERSION < (2, 13), reason="needs torch 2.13, where sizes known late can be compiled")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["aot_eager", "inductor"])
def backend(request):
    if request.param == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    return request.param


def layer_of(group=None, balanced=True, dtype=torch.float64):
    planner = Planner(topology.ring(N_RANKS), N_EXPERTS + N_RANKS, N_EXPERTS, N_RANKS, group) if balanced else None
    torch.manual_seed(0)
    return ExpertParallelMoE(HIDDEN, FFN, N_EXPERTS, TOP_K, group=group, balancer=planner, dtype=dtype)


def steps(layer, forward, sizes):
    """Steps of the layer with another forward."""
    layer.forward = forward
    record = [step(layer, *tokens(n, n)) for n in sizes]
    del layer.forward
    return record


def assert_equal_steps(got, want):
    for a, b in zip(got, want, strict=True):
        assert_near(of_all([a]), of_all([b]), 1e-12)
        assert torch.equal(a["received"], b["received"])
        assert (a["plan"] is None) == (b["plan"] is None)
        assert a["plan"] is None or torch.equal(a["plan"].quota, b["plan"].quota)


def test_one_graph(backend):
    layer = layer_of()
    sizes = (30, 21, 0) if backend != "inductor" else (30, 21)
    compiled = torch.compile(layer.forward, backend=backend, fullgraph=True, dynamic=True)
    assert_equal_steps(steps(layer, compiled, sizes), steps(layer, layer.forward, sizes))


def test_without_a_balancer():
    layer = layer_of(balanced=False)
    compiled = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    assert_equal_steps(steps(layer, compiled, (9, 12)), steps(layer, layer.forward, (9, 12)))


def test_the_only_breaks_are_where_split_sizes_are_read():
    layer = layer_of()
    compiled = torch.compile(layer.forward, backend="aot_eager")
    with torch._dynamo.config.patch(capture_scalar_outputs=False):
        assert_equal_steps(steps(layer, compiled, (9, 12)), steps(layer, layer.forward, (9, 12)))
    assert counters["graph_break"]
    for reason in counters["graph_break"]:
        assert "_local_scalar_dense" in reason  # what item() and tolist() are


def test_a_refusal_in_one_graph():
    compiled = torch.compile(layer_of(), backend="aot_eager", fullgraph=True)
    for n in (5, 6, 7):
        with pytest.raises(ValueError, match="x has 7 features in its last dimension, allowed is 8"):
            compiled(torch.zeros(n, 7, dtype=torch.float64))


def over_ranks(rank):
    torch._dynamo.config.capture_scalar_outputs = True
    layer = layer_of(dist.group.WORLD)
    n = (30, 0)[rank]
    compiled = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    pairs = steps(layer, compiled, [n]), steps(layer, layer.forward, [n])
    x, _ = tokens(n, n)
    bad = x.detach().clone()
    bad[4:5] = torch.nan
    faults = {
        "nan": call(compiled, bad.requires_grad_()),
        "dtype": call(compiled, x if rank else x.detach().float().requires_grad_()),
    }
    return pairs, faults, torch.equal(compiled(x), layer(x))


def test_over_ranks(tmp_path):
    results = on_ranks(N_RANKS, tmp_path, over_ranks)
    for rank, ((compiled, eager), faults, afterwards) in enumerate(results):
        assert_equal_steps(compiled, eager)
        others = "rank 0 refused its input, so no rank goes on: " if rank else ""
        kind, message = faults["nan"]
        assert kind == "ValueError"
        assert message.startswith(f"{others}the router's shares of token 4 are nan")
        said = "x has dtype torch.float32, allowed is the layer's, torch.float64"
        assert faults["dtype"] == ("TypeError", others + said)
        assert afterwards
