"""Transfer planners on CUDA: the CPU's plans and routes, no waiting for the device, errors that arrive later.

What needs no GPU runs twice: on the device, marked `gpu`, and everywhere with pretend_cuda.py in the kernels' place.
"""

import copy

import pytest
import torch
from pretend_cuda import pretend
from test_gpu_planner import need_gpu
from test_transfers import BY_NAME, KINDS, STRATEGIES, batch, check, same

from lplb import cuda_transfers
from lplb.exchange import EarlierFault
from lplb.models import MODELS
from lplb.transfers import TransferPlanner

ON_DEVICE = [name for name, settings in STRATEGIES.items() if "model" not in settings]


class OnCpu(TransferPlanner):
    """A planner of the CPU, whatever is pretended."""

    _backends = TransferPlanner._backends


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        need_gpu()
        return "cuda"
    pretend(monkeypatch.setattr)

    def backends(self):
        residents = self.residents
        sizes = self.n_logical, self.n_ranks, self.slots, self.domain, self._settings.ranks_per_node
        backend = cuda_transfers.Backend(residents.ranks, residents.experts, *sizes, self.device)
        return backend, backend

    monkeypatch.setattr(TransferPlanner, "_backends", backends)
    return "cpu"


@pytest.mark.parametrize("name", ["two ranks, a slot", "primes with replicas", "two domains", "64 ranks"])
@pytest.mark.parametrize("strategy", ON_DEVICE)
def test_plans_are_those_of_the_cpu(name, strategy, device):
    geometry = BY_NAME[name]
    on_cpu = geometry.planner(OnCpu, **STRATEGIES[strategy])
    planner = geometry.planner(device=device, **STRATEGIES[strategy])
    for kind in KINDS:
        counts = batch(kind, geometry.n_ranks, geometry.n_logical)
        plan = planner.plan(counts.to(device))
        assert plan.memory.device.type == torch.device(device).type
        assert same(plan, on_cpu.plan(counts))
        assert str(plan) == str(on_cpu.plan(counts))
        assert plan.moves() == on_cpu.plan(counts).moves()
    if strategy.startswith("joint"):
        held = on_cpu.plan(counts).guests
        assert same(planner.plan(counts.to(device), held=held.to(device)), on_cpu.plan(counts, held=held))
        assert same(planner.plan(counts.to(device), held=plan), on_cpu.plan(counts, held=held))
    assert same(copy.deepcopy(planner).plan(counts.to(device)), plan)


def test_routes_are_those_of_the_cpu(device):
    geometry = BY_NAME["primes with replicas"]
    counts = batch("hot", geometry.n_ranks, geometry.n_logical)
    expected = geometry.planner(OnCpu).plan(counts)
    plan = geometry.planner(device=device).plan(counts.to(device))
    for rank in range(geometry.n_ranks):
        indices = torch.repeat_interleave(torch.arange(geometry.n_logical), counts[rank])
        assert torch.equal(plan.route(indices.to(device), rank).cpu(), expected.route(indices, rank))
    assert torch.equal(plan.tokens_by_source(), expected.tokens_by_source())


def test_wrong_counts_are_raised_later(device):
    planner = TransferPlanner(8, 4, device=device)
    good = torch.arange(32, device=device).view(4, 8)
    for wrong, message in (
        (-good, "counts of an earlier plan were negative"),
        (good * 2**48, "tokens or more together"),
    ):
        plan = planner.plan(wrong)
        assert plan.max_load == plan.n_transfers == 0
        if device == "cuda":
            torch.cuda.synchronize()
        with pytest.raises(EarlierFault, match=message):
            planner.plan(good)
        assert planner.plan(good).max_load > 0
    for odd in (good.float(), good[:3], None):
        with pytest.raises((TypeError, ValueError), match="allowed"):
            planner.plan(odd)


def test_what_is_for_the_cpu(device):
    planner = TransferPlanner(8, 4, device=device)
    with pytest.raises(RuntimeError, match="front is asked of a planner on"):
        planner.front(torch.arange(32, device=device).view(4, 8))


@pytest.mark.gpu
def test_costs_are_for_the_cpu():
    need_gpu()
    model = MODELS["gpt-oss-120b"]
    with pytest.raises(ValueError, match="strategy is 'auto', allowed on CUDA are 'joint' and 'llep'"):
        TransferPlanner(8, 4, strategy="auto", model=model, device="cuda")
    with pytest.raises(ValueError, match="model is 'gpt-oss-120b', allowed on CUDA with strategy 'joint' is None"):
        TransferPlanner(8, 4, model=model, device="cuda")
    planner = TransferPlanner(8, 4, strategy="llep", model=model, device="cuda")
    assert planner.plan(torch.arange(32, device="cuda").view(4, 8)).bytes >= 0
    with pytest.raises(ValueError, match="counts is on 'cpu', allowed is the planner's device, 'cuda:0'"):
        planner.plan(torch.arange(32).view(4, 8))


@pytest.mark.gpu
def test_plans_are_captured():
    need_gpu()
    geometry = BY_NAME["eight ranks with replicas"]
    on_cpu, planner = geometry.planner(), geometry.planner(device="cuda")
    first, second = (batch("hot", 8, 32, seed) for seed in (1, 2))
    counts = first.cuda()
    planner.plan(counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = planner.plan(counts)
    for batch_ in (second, first):
        counts.copy_(batch_)
        graph.replay()
        check(planner, plan.cpu(), batch_)
        assert same(plan, on_cpu.plan(batch_))
