"""`Planner.run` under torch.compile and torch.export, and the operator behind it."""

import gc
import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lplb import Planner, ops, topology

N_LOGICAL, N_PHYSICAL, N_RANKS = 64, 80, 8
BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    return request.param


def make(shift=0, **settings):
    planner = Planner(topology.cube(), N_PHYSICAL, N_LOGICAL, N_RANKS, **settings)
    planner.update_redundancy_mapping(torch.arange(N_LOGICAL).roll(shift))
    return planner


def batch(seed, shape, dtype=torch.int64):
    return torch.from_numpy(np.random.default_rng(seed).integers(-1, N_LOGICAL, shape)).to(dtype)


def model(planner, idx, counter, n_sms=None):
    """A function around `run` whose other parts a compiler fuses."""
    physical = planner.run(idx * 2 // 2, counter, n_sms)
    return physical * 3 + 1, physical, (0 if counter is None else counter * 10)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("counted", [False, True])
def test_compiled_equals_eager(backend, counted, dtype):
    planner = make()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    counters = [torch.zeros(1, dtype=dtype) if counted else None for _ in range(2)]
    for seed, shape in enumerate([(50, 6), (50, 6), (20, 6), (31, 6), (7, 3, 2), (0, 6)]):
        idx = batch(seed, shape, dtype)
        before = idx.clone()
        got = compiled(planner, idx, counters[0])
        plan = planner.last_plan
        want = model(planner, idx, counters[1])
        assert torch.equal(idx, before)
        assert torch.equal(plan.quota, planner.last_plan.quota)
        assert got[1].dtype == dtype
        for a, b in zip(got, want, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        if counted:
            assert counters[0].item() == counters[1].item() == seed + 1
            assert got[2].item() == 10 * (seed + 1)  # the mutation is seen by what comes after it


def test_views_and_n_sms(backend):
    planner = make()
    compiled = torch.compile(lambda idx: planner.run(idx.T[1:], None, 3), backend=backend, fullgraph=True)
    idx = batch(0, (40, 6))
    physical = compiled(idx)
    assert physical.is_contiguous()
    assert torch.equal(physical, planner.run(idx.T[1:], None))


def test_twice_in_one_graph(backend):
    first, second = make(), make(3, solver="flow")

    def both(idx, counter):
        return first.run(idx, counter), second.run(idx, counter), first.run(idx.flip(0), counter)

    idx, counter = batch(0, (60, 4)), torch.zeros((), dtype=torch.int64)
    expected = both(idx, None)
    got = torch.compile(both, backend=backend, fullgraph=True)(idx, counter)
    assert all(map(torch.equal, got, expected))
    assert counter.item() == 3


def test_one_graph_for_any_length_and_any_planner():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda planner, idx: planner.run(idx, None), backend=counter, fullgraph=True)
    for i in range(12):  # more than torch's recompile limit of 8
        planner, idx = make(i), batch(i, (30 + i, 6))
        assert torch.equal(compiled(planner, idx), planner.run(idx, None))
    assert counter.frame_count <= 3  # the first constants, then what varies


def test_errors_come_from_the_running_graph(backend):
    planner = make()
    compiled = torch.compile(lambda idx, counter: planner.run(idx, counter), backend=backend, fullgraph=True)
    counter = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"idx has 64 at flat position 1, allowed is -1"):
        compiled(torch.tensor([0, 64]), counter)
    assert counter.item() == 0
    assert torch.equal(compiled(torch.arange(5), counter), planner.run(torch.arange(5), None))


def test_a_new_mapping_is_followed(backend):
    planner = make()
    compiled = torch.compile(lambda idx: planner.run(idx, None), backend=backend, fullgraph=True)
    idx = batch(0, (40, 6))
    before = compiled(idx)
    planner.update_redundancy_mapping()
    assert torch.equal(compiled(idx), planner.run(idx, None))
    assert not torch.equal(compiled(idx), before)


class Layer(torch.nn.Module):
    def __init__(self, planner):
        super().__init__()
        self.planner = planner

    def forward(self, idx):
        return self.planner.run(idx, None) * 2


def test_in_a_module(backend):
    layer = Layer(make())
    idx = batch(1, (40, 6))
    assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(idx), layer(idx))


def test_export():
    layer = Layer(make())
    tokens = torch.export.Dim("tokens", min=2, max=100_000)
    exported = torch.export.export(layer, (batch(0, (40, 6)),), dynamic_shapes=({0: tokens},))
    idx = batch(1, (77, 6))
    assert torch.equal(exported.module()(idx), layer(idx))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_opcheck(dtype):
    planner = make()
    idx = batch(0, (50, 6), dtype)
    for view in (idx, idx.T[1:], idx[:0], idx[0, 0]):
        for n_sms in (None, 3):
            torch.library.opcheck(torch.ops.lplb.run.uncounted, (view, planner._handle, n_sms))
            for counter in (None, torch.zeros(1, dtype=torch.int32), torch.zeros((), dtype=torch.int64)):
                torch.library.opcheck(torch.ops.lplb.run.default, (view, counter, planner._handle, n_sms))


def test_schema():
    schema = str(torch.ops.lplb.run.default._schema)
    assert schema == "lplb::run(Tensor idx, Tensor(a!)? avail_counter, SymInt planner, int? n_sms, int lag=0) -> Tensor"


def test_eager_calls_bypass_the_dispatcher(monkeypatch):
    monkeypatch.setattr(ops, "run", None)
    assert make().run(torch.arange(5), None).shape == (5,)


def test_a_planner_that_is_gone():
    planner = make()
    handle = planner._handle
    copied = ops.run(torch.arange(5), None, handle)
    assert torch.equal(copied, planner.run(torch.arange(5), None))
    del planner
    gc.collect()
    with pytest.raises(RuntimeError, match=rf"lplb::run has planner {handle}, allowed is one that is alive"):
        ops.run(torch.arange(5), None, handle)


def test_tensors_without_memory_go_to_the_operator():
    planner = make()
    with FakeTensorMode():
        idx = torch.zeros(3, 2, dtype=torch.int32)
        physical = planner.run(idx, None)
        assert (physical.shape, physical.dtype, type(physical)) == (idx.shape, idx.dtype, type(idx))
    with pytest.raises(TypeError, match="idx is a FakeTensor"):
        planner.count_workload(idx, 1)
    with pytest.raises(TypeError, match="workload is a FakeTensor"), FakeTensorMode():
        planner.solve(torch.zeros(N_LOGICAL))
    assert planner.last_plan is None


def test_tracing_by_symbols_keeps_the_operator():
    planner, idx = make(), batch(5, (7, 3))
    traced = make_fx(lambda i: planner.run(i, None) + 1, tracing_mode="symbolic")(idx)
    assert "lplb.run.uncounted" in traced.code
    other = batch(6, (4, 3))
    assert torch.equal(traced(other), planner.run(other, None) + 1)
