"""Plans with transfers and tokens by range on CUDA: the CPU's results bit for bit; graphs; errors that arrive later.

What needs no GPU runs twice: on the device, marked `gpu`, and everywhere with pretend_cuda.py in the kernels' place.
"""

import numpy as np
import pytest
import torch
from pretend_cuda import pretend
from test_gpu_planner import need_gpu
from test_routes import GEOMETRIES, scene

from lplb import _C
from lplb.cuda_transfers import Backend
from lplb.exchange import EarlierFault
from lplb.routes import RangeRouter

JOINT = [(0.0, -1, -1, 1), (0.05, -1, -1, 16), (0.0, -1, 3, 1), (0.0, 10**4, -1, 1)]
LLEP = [(1.0, 1, 1.0, False, -1), (1.1, 1024, 1.3, False, -1), (1.0, 64, 1.0, True, -1), (1.0, 1, 1.0, False, 5000)]
SHAPES = [
    (1, 3, 1, 1),
    (2, 7, 2, 2),
    (8, 128, 128, 8),
    (8, 32, 2, 4),
    (33, 70, 3, 11),
    (64, 256, 2, 64),
    (72, 96, 2, 8),
]
gpu = pytest.mark.gpu


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        need_gpu()
        return "cuda"
    pretend(monkeypatch.setattr)
    return "cpu"


@pytest.fixture
def cuda():
    need_gpu()
    return "cuda"


class Planned:
    """Where a plan goes, of sizes that are fixed."""

    def __init__(self, n_ranks, n_logical, slots, rows, device):
        def filled(*shape, dtype=torch.int64):
            return torch.full(shape, -7, dtype=dtype, device=device)

        self.quota, self.rank_load = filled(n_logical, n_ranks), filled(n_ranks)
        self.transfers, self.guests = filled(rows, 3, dtype=torch.int32), filled(n_ranks, slots, dtype=torch.int32)
        self.numbers, self.bound = filled(8), filled(1, dtype=torch.float64)

    def tensors(self):
        return [self.quota, self.rank_load, self.transfers, self.guests, self.numbers, self.bound]

    def addresses(self):
        return tuple(tensor.data_ptr() for tensor in self.tensors())

    def same(self, other):
        return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(self.tensors(), other.tensors(), strict=True))


class Placed:
    """Experts in blocks, some with further residents; a backend and the CPU's core for them."""

    def __init__(self, shape, device):
        n_ranks, n_logical, slots, domain = self.shape = shape
        rng = np.random.default_rng(shape)
        holds = np.zeros((n_ranks, n_logical), dtype=bool)
        holds[np.arange(n_logical) * n_ranks // n_logical, np.arange(n_logical)] = True
        holds |= rng.random(holds.shape) < 0.5 / n_ranks
        ranks, experts = (part.tolist() for part in np.nonzero(holds))
        self.holds, self.device = holds, device
        self.core = _C.CpuTransfers(ranks, experts, n_logical, n_ranks, slots, domain)
        self.router = RangeRouter(ranks, experts, n_logical, n_ranks, slots, domain)
        self.backend = Backend(ranks, experts, n_logical, n_ranks, slots, domain, domain, torch.device(device))
        assert self.backend.rows == self.core.rows
        assert self.backend.width == self.router.width

    def counts(self, seed, dtype=torch.int64):
        """Of sources; an expert or two are hot."""
        n_ranks, n_logical, _, _ = self.shape
        rng = np.random.default_rng([seed, n_ranks])
        share = rng.lognormal(0.0, 1.0, n_logical)
        share[rng.integers(0, n_logical, 2)] += rng.uniform(0, 3) * share.sum()
        return torch.from_numpy(rng.multinomial(4096, share / share.sum(), n_ranks)).to(dtype)

    def held(self, seed):
        """What guest slots hold from before: other experts than the rank's residents, of the rank's domain."""
        n_ranks, n_logical, slots, domain = self.shape
        rng = np.random.default_rng([seed, 1])
        held = np.full((n_ranks, slots), -1, dtype=np.int32)
        near = self.holds.reshape(n_ranks // domain, domain, n_logical).any(1).repeat(domain, 0)
        for r in range(n_ranks):
            coming = rng.permutation(np.nonzero(near[r] & ~self.holds[r])[0])[: min(slots, 3)]
            held[r, : len(coming)] = coming
        return torch.from_numpy(held)

    def planned(self, device):
        n_ranks, n_logical, slots, _ = self.shape
        return Planned(n_ranks, n_logical, slots, self.core.rows, device)


def table(counts):
    return counts.data_ptr(), counts.element_size(), len(counts), counts.stride(0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", SHAPES)
def test_plans_are_the_cpus(device, shape, dtype):
    placed = Placed(shape, device)
    for seed in range(3):
        counts = placed.counts(seed, dtype)
        there, got, wanted = counts.to(device), placed.planned(device), placed.planned("cpu")
        for rules in JOINT:
            for held in (None, placed.held(seed)):
                where = 0 if held is None else held.data_ptr()
                assert placed.core.joint(table(counts), *rules, where, wanted.addresses()) == 0
                kept = None if held is None else held.to(device)
                where = 0 if kept is None else kept.data_ptr()
                assert placed.backend.joint(table(there), *rules, where, got.addresses()) == 0
                assert got.same(wanted), (seed, rules)
        for rules in LLEP:
            assert placed.core.llep(table(counts), *rules, wanted.addresses()) == 0
            assert placed.backend.llep(table(there), *rules, got.addresses()) == 0
            assert got.same(wanted), (seed, rules)
    placed.backend.check_earlier()


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_tokens_go_where_the_cpu_sends_them(device, geometry, index_dtype):
    of = scene(*geometry, 3)
    router = of.router()
    ranks = [r for r, experts in enumerate(of.residents) for _ in experts]
    experts = [e for held in of.residents for e in held]
    backend = Backend(
        ranks, experts, of.n_logical, of.n_ranks, geometry[2], of.n_ranks, of.ranks_per_node, torch.device(device)
    )
    for dtype in (torch.int64, torch.int32):
        plan = of.tensors(dtype)
        there = [tensor.to(device) for tensor in plan]
        for source in {0, of.n_ranks - 1}:
            indices = of.indices(source, 5, index_dtype)
            wanted = router.route(indices, *plan, source)
            for n_sms in (None, 1):
                got = backend.route(indices.to(device), *there, source, n_sms)
                assert torch.equal(got.slots.cpu(), wanted.slots)
                assert torch.equal(got.send.cpu(), wanted.send)
    backend.check_earlier()


def test_shapes_and_views(device):
    placed = Placed((8, 32, 2, 4), device)
    counts, plan = placed.counts(1), placed.planned("cpu")
    assert placed.core.joint(table(counts), *JOINT[0], 0, plan.addresses()) == 0
    indices = torch.arange(32).repeat_interleave(counts[5])
    indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(3))]
    wanted = placed.router.route(indices, plan.quota, plan.guests, counts, 5)
    there = [tensor.to(device) for tensor in (plan.quota, plan.guests, counts)]
    apart = torch.stack([indices, torch.zeros_like(indices)], 1).to(device)
    for given in (apart[:, 0], indices.to(device).view(-1, 8)):
        got = placed.backend.route(given, *there, 5)
        assert got.slots.shape == given.shape
        assert torch.equal(got.slots.cpu().flatten(), wanted.slots)
        assert torch.equal(got.send.cpu(), wanted.send)


def test_no_tokens(device):
    placed = Placed((8, 32, 2, 4), device)
    counts, plan = torch.zeros(8, 32, dtype=torch.int64, device=device), placed.planned(device)
    placed.backend.joint(table(counts), *JOINT[0], 0, plan.addresses())
    for given in (torch.full((5, 2), -1, device=device), torch.empty(0, 8, dtype=torch.int32, device=device)):
        routed = placed.backend.route(given, plan.quota, plan.guests, counts, 3)
        assert torch.equal(routed.slots, given)
        assert not routed.send.any()


@pytest.mark.parametrize("strategy", ["joint", "llep"])
@pytest.mark.parametrize(
    ("count", "words"),
    [(-1, "negative.* allowed are 0 and more"), (2**52, f"were {2**52} tokens or more.* allowed are {2**52 - 1}")],
)
def test_counts_that_are_refused_are_raised_by_the_next_call(device, strategy, count, words):
    placed = Placed((8, 32, 2, 4), device)
    counts, plan = placed.counts(1).to(device), placed.planned(device)
    counts[3, 5] = count
    rules = [*JOINT[0], 0] if strategy == "joint" else LLEP[0]
    getattr(placed.backend, strategy)(table(counts), *rules, plan.addresses())
    assert not plan.quota.any()
    assert not plan.rank_load.any()
    counts[3, 5] = 1
    with pytest.raises(EarlierFault, match=words):
        getattr(placed.backend, strategy)(table(counts), *rules, plan.addresses())
    getattr(placed.backend, strategy)(table(counts), *rules, plan.addresses())
    assert plan.quota.sum() == counts.sum()


def test_indices_of_another_batch_are_raised_by_the_next_call(device):
    placed = Placed((8, 32, 2, 4), device)
    counts, plan = placed.counts(1), placed.planned(device)
    there = counts.to(device)
    placed.backend.joint(table(there), *JOINT[0], 0, plan.addresses())
    indices = torch.arange(32).repeat_interleave(counts[2])
    placed.backend.route(indices[1:].to(device), plan.quota, plan.guests, there, 2)
    torch.zeros(1, device=device).item()  # waits
    with pytest.raises(EarlierFault, match=f"name expert {int(indices[0])} as often"):
        placed.backend.route(indices.to(device), plan.quota, plan.guests, there, 2)
    placed.backend.route(indices.to(device), plan.quota, plan.guests, there, 2)
    torch.zeros(1, device=device).item()
    placed.backend.check_earlier()


@pytest.mark.parametrize("checked", [False, True])
def test_indices_outside_go_nowhere(device, checked, monkeypatch):
    monkeypatch.setenv("LPLB_CHECK", str(int(checked)))
    placed = Placed((8, 32, 2, 4), device)
    counts, plan = placed.counts(1), placed.planned(device)
    there = counts.to(device)
    placed.backend.joint(table(there), *JOINT[0], 0, plan.addresses())
    indices = torch.arange(32).repeat_interleave(counts[2])
    wanted = placed.backend.route(indices.to(device), plan.quota, plan.guests, there, 2)
    given = torch.cat([torch.tensor([32, -2]), indices]).to(device)
    routed = placed.backend.route(given, plan.quota, plan.guests, there, 2)
    assert routed.slots[:2].tolist() == [-1, -1]
    assert torch.equal(routed.slots[2:], wanted.slots)
    assert placed.backend.indices_outside == 2
    if checked:
        with pytest.raises(EarlierFault, match="2 indices in earlier calls"):
            placed.backend.check_earlier()
    placed.backend.check_earlier()


def test_a_backend_is_not_made_while_a_graph_is_captured(monkeypatch):
    pretend(monkeypatch.setattr).capturing = True
    with pytest.raises(RuntimeError, match="outside of CUDA graph capture"):
        Placed((8, 32, 2, 4), "cpu")


@gpu
@pytest.mark.parametrize("shape", [(8, 128, 128, 8), (64, 256, 2, 64)])
def test_a_graph_replays_with_other_counts_and_other_tokens(cuda, shape):
    placed = Placed(shape, cuda)
    n = 4096
    counts, plan, least = placed.counts(0).to(cuda), placed.planned(cuda), placed.planned(cuda)
    held, indices = placed.held(0).to(cuda), torch.zeros(n, dtype=torch.int64, device=cuda)

    def everything():
        placed.backend.llep(table(counts), *LLEP[0], least.addresses())
        placed.backend.joint(table(counts), *JOINT[0], held.data_ptr(), plan.addresses())
        return placed.backend.route(indices, plan.quota, plan.guests, counts, 1)

    everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routed = everything()
    for seed in range(1, 6):
        now = placed.counts(seed)
        chosen = torch.arange(shape[1]).repeat_interleave(now[1])
        counts.copy_(now)
        indices.copy_(chosen[torch.randperm(n, generator=torch.Generator().manual_seed(seed))])
        graph.replay()
        wanted = placed.planned("cpu")
        assert placed.core.llep(table(now), *LLEP[0], wanted.addresses()) == 0
        assert least.same(wanted)
        assert placed.core.joint(table(now), *JOINT[0], placed.held(0).data_ptr(), wanted.addresses()) == 0
        assert plan.same(wanted)
        tokens = placed.router.route(indices.cpu(), wanted.quota, wanted.guests, now, 1)
        assert torch.equal(routed.slots.cpu(), tokens.slots)
        assert torch.equal(routed.send.cpu(), tokens.send)
    placed.backend.check_earlier()


@gpu
def test_calls_on_two_streams_come_in_order(cuda):
    placed = Placed((8, 128, 2, 8), cuda)
    counts = [placed.counts(seed).to(cuda) for seed in range(8)]
    plans = [placed.planned(cuda) for _ in counts]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for i, (given, plan) in enumerate(zip(counts, plans, strict=True)):
        with torch.cuda.stream(streams[i % 2]):
            placed.backend.joint(table(given), *JOINT[0], 0, plan.addresses())
    torch.cuda.synchronize()
    for given, plan in zip(counts, plans, strict=True):
        wanted, here = placed.planned("cpu"), given.cpu()
        assert placed.core.joint(table(here), *JOINT[0], 0, wanted.addresses()) == 0
        assert plan.same(wanted)
