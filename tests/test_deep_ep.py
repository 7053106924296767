"""Planners that take their ranks from a DeepEP buffer: a stand-in over gloo, and the real one where it is."""

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from reference import ReferenceLP, assign_reference, integer_optimum
from test_distributed import N_OWN, batch, call, counts_of, on_ranks, ring_phy2log, ring_planner

from lplb import Planner, deep_ep, topology
from lplb.exchange import Known

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.append(str(EXAMPLES))

from deep_ep_stand_in import Buffer, ElasticBuffer  # noqa: E402

SIZE = 4
SICK = 2  # the rank with the odd buffer
NODE = 2  # ranks of a node


def buffers(group, ranks_per_node=NODE):
    """Every kind of buffer there is, by name."""
    return {
        "Buffer": Buffer(group, 1024, 1024, ranks_per_node=ranks_per_node),
        "low latency": Buffer(group, 0, 1024, True, ranks_per_node=ranks_per_node),
        "ElasticBuffer": ElasticBuffer(group, ranks_per_node=ranks_per_node),
        "ElasticBuffer, not hybrid": ElasticBuffer(group, allow_hybrid_mode=False, ranks_per_node=ranks_per_node),
    }


# What a planner does with a buffer


class Spy:
    """All all-gathers of this process: over which group."""

    def __init__(self):
        self.name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        self.groups, self.sends = [], getattr(dist, self.name)
        setattr(dist, self.name, self)

    def __call__(self, *arguments, group):
        self.groups.append(group)
        return self.sends(*arguments, group=group)

    def off(self):
        setattr(dist, self.name, self.sends)


def take_buffers(rank, own_group):
    """Planners with a group of their own or with none, and each kind of buffer."""
    record = {}
    idx = batch([5, rank], (40, 3), SIZE * N_OWN)
    for name, buffer in buffers(dist.new_group(range(SIZE))).items():
        spy = Spy()
        planner = ring_planner(SIZE, dist.group.WORLD if own_group else None, ep_size=SIZE)
        given = planner.init_from_deep_ep(buffer)
        spy.groups.clear()
        counter = torch.zeros(1, dtype=torch.int64)
        physical = planner.run(idx, counter)
        over = [group is buffer.group for group in spy.groups]
        spy.off()
        facts = given, planner.deep_ep_initialized, planner.ep_group is buffer.group, planner.ranks_per_node, over
        record[name] = facts, idx, physical, planner.last_plan, counter.item()
    return record


@pytest.mark.usefixtures("highs")
@pytest.mark.parametrize("own_group", [True, False])
def test_ranks_come_from_the_buffer(own_group, tmp_path):
    results = on_ranks(SIZE, tmp_path, take_buffers, own_group)
    phy2log = ring_phy2log(SIZE)
    for name in results[0]:
        facts, batches, physical, plans, counters = zip(*(result[name] for result in results), strict=True)
        assert facts == ((None, True, True, NODE, [True]),) * SIZE, name
        assert counters == (1,) * SIZE
        for plan in plans:
            assert all(torch.equal(a, b) for a, b in zip(plan.tensors(), plans[0].tensors(), strict=True))
        expected = assign_reference(batches, phy2log, plans[0].quota, NODE)
        for got, want in zip(physical, expected, strict=True):
            assert np.array_equal(got, want)
        loads = sum(counts_of(idx, SIZE * N_OWN) for idx in batches)
        optimum = ReferenceLP(phy2log, SIZE).solve(loads)[0]
        assert plans[0].max_load.tolist() == [integer_optimum(optimum, SIZE)]


def take_again(rank):
    """What a second buffer changes; then one that differs on one rank, while the others go on."""
    world, other = dist.group.WORLD, dist.new_group(range(SIZE))
    planner = ring_planner(SIZE, world)
    planner.init_from_deep_ep(Buffer(world, ranks_per_node=NODE))
    idx = batch([6, rank], (20,), SIZE * N_OWN)
    planner.run(idx, None)
    backend, plan = planner._backend, planner.last_plan

    for _ in range(2):
        planner.init_from_deep_ep(Buffer(world, num_rdma_bytes=7, low_latency_mode=True, ranks_per_node=NODE))
    same = planner._backend is backend, torch.equal(planner.last_plan.quota, plan.quota)

    odd = Buffer(world, ranks_per_node=SIZE)
    crossed = call(planner.init_from_deep_ep, odd) if rank == SICK else call(planner.run, idx, None)
    none = call(planner.init_from_deep_ep, None) if rank == SICK else call(planner.run, idx, None)
    kept = planner._backend is backend, planner.ranks_per_node, planner.ep_group is world, planner.deep_ep_initialized

    spy = Spy()
    planner.init_from_deep_ep(ElasticBuffer(other, ranks_per_node=1))
    spy.groups.clear()
    physical = planner.run(idx, None)
    over = [group is other for group in spy.groups]
    return same, crossed, none, kept, over, planner.ranks_per_node, idx, physical, planner.last_plan.quota


def test_a_second_buffer(tmp_path):
    results = on_ranks(SIZE, tmp_path, take_again)
    expected = assign_reference([result[6] for result in results], ring_phy2log(SIZE), results[0][8], 1)
    for rank, (same, crossed, none, kept, over, per_node, _, physical, _) in enumerate(results):
        assert same == (True, True)
        assert crossed[0] == "ValueError"
        assert crossed[1].startswith("rank 2 has another placement or other settings than rank 0, or called another")
        refusal = "buffer is a NoneType without the attribute group, allowed is a deep_ep.Buffer"
        assert none[0] == "TypeError"
        prefix = "" if rank == SICK else "rank 2 refused its input, so no rank goes on: "
        assert none[1].startswith(prefix + refusal)
        assert kept == (True, NODE, True, True)
        assert over == [True]
        assert per_node == 1
        assert np.array_equal(physical, expected[rank])


def map_over_nodes(rank):
    """Experts on 4 ranks in 2 groups: packed within nodes where there are as many, else over all ranks."""
    world = dist.group.WORLD
    history = torch.from_numpy(np.random.default_rng(8).integers(1, 1000, 24)).float()

    def mapped(ranks_per_node=None, buffer=None):
        planner = Planner(topology.ring(2), 28, 24, group=world, ranks_per_node=ranks_per_node)
        if buffer is not None:
            planner.init_from_deep_ep(buffer)
        return planner.update_redundancy_mapping(history)[0].tolist()

    told = {nodes: mapped(SIZE // nodes) for nodes in (1, 2)}
    read = {nodes: [mapped(3 - nodes, buffer) for buffer in buffers(world, SIZE // nodes).values()] for nodes in (1, 2)}
    return told, read


def test_nodes_of_the_buffer_are_those_of_eplb(tmp_path):
    for told, read in on_ranks(SIZE, tmp_path, map_over_nodes):
        assert told[1] != told[2]
        for nodes in (1, 2):
            assert read[nodes] == [told[nodes]] * 4


# Buffers that are refused


def changed(kind, **attributes):
    """A buffer with something else in it; dots separate what is inside of what."""

    def make():
        buffer = kind(dist.group.WORLD, ranks_per_node=NODE)
        for name, value in attributes.items():
            *path, last = name.split("__")
            target = buffer
            for step in path:
                target = getattr(target, step)
            setattr(target, last, value)
        return buffer

    return make


def says(value):
    return lambda: value


ODD = {
    "none": (says(None), "TypeError", "buffer is a NoneType without the attribute group"),
    "no group": (changed(Buffer, group=None), "TypeError", "buffer.group is a NoneType, allowed is the torch.distri"),
    "an MPI communicator": (changed(Buffer, group=SimpleNamespace(Get_rank=says(0))), "TypeError", "a SimpleNamespace"),
    "neither": (
        lambda: SimpleNamespace(group=dist.group.WORLD), "TypeError",
        "a SimpleNamespace with neither runtime.get_num_rdma_ranks nor get_physical_domain_size",
    ),
    "destroyed": (changed(Buffer, runtime=None), "ValueError", "buffer.runtime is None"),
    "rank": (changed(Buffer, rank=1), "ValueError", "buffer.rank is 1, allowed is that of buffer.group, 2"),
    "size": (changed(Buffer, group_size=8), "ValueError", "buffer.group_size is 8, allowed is that of buffer.group, 4"),
    "three nodes": (
        changed(Buffer, runtime__get_num_rdma_ranks=says(3)), "ValueError",
        "buffer.runtime.get_num_rdma_ranks() is 3, allowed is a divisor of the group's size, 4",
    ),
    "no nodes": (changed(Buffer, runtime__get_num_rdma_ranks=says(0)), "ValueError", "get_num_rdma_ranks() is 0"),
    "half a node": (changed(Buffer, runtime__get_num_rdma_ranks=says(0.5)), "TypeError", "is 0.5, allowed is an int"),
    "on another node": (
        changed(Buffer, runtime__get_rdma_rank=says(0)), "ValueError",
        "buffer.runtime.get_rdma_rank() is 0 on rank 2, allowed is 1: 2 nodes of 2 consecutive ranks",
    ),
    "elastic rank": (changed(ElasticBuffer, rank_idx=0), "ValueError", "buffer.rank_idx is 0, allowed is"),
    "elastic size": (changed(ElasticBuffer, num_ranks=2), "ValueError", "buffer.num_ranks is 2, allowed is"),
    "elastic product": (
        changed(ElasticBuffer, get_physical_domain_size=says((3, 1))), "ValueError",
        "buffer.get_physical_domain_size() is (3, 1), allowed are two whole numbers",
    ),
    "elastic numbers": (changed(ElasticBuffer, get_physical_domain_size=says((1, 2, 2))), "ValueError", "(1, 2, 2)"),
    "elastic number": (changed(ElasticBuffer, get_physical_domain_size=says(4)), "ValueError", "is 4, allowed are two"),
    "elastic halves": (changed(ElasticBuffer, get_physical_domain_size=says((8, 0.5))), "ValueError", "(8, 0.5)"),
    "elastic domains": (
        changed(ElasticBuffer, get_logical_domain_size=says((4, 1))), "ValueError",
        "buffer.get_logical_domain_size() is (4, 1), allowed is get_physical_domain_size() = (2, 2) (hybrid mode) or "
        "(1, 4)",
    ),
    "it raises": (changed(ElasticBuffer, get_physical_domain_size=lambda: 1 // 0), "RuntimeError", "by zero"),
    "other nodes": (lambda: Buffer(dist.group.WORLD, ranks_per_node=SIZE), "ValueError", None),
}  # fmt: skip


def give_odd_buffers(rank):
    """Each odd buffer on one rank, good ones on the others, for planners with a group and without."""
    planners = {"group": ring_planner(SIZE, dist.group.WORLD), "none": ring_planner(SIZE, ep_size=SIZE)}
    good = Buffer(dist.group.WORLD, ranks_per_node=NODE)
    record = {}
    for kind, planner in planners.items():
        for name, (make, *_) in ODD.items():
            if kind == "none" and name in ("none", "no group", "an MPI communicator"):
                continue  # nothing to tell the others over
            backend = planner._backend
            raised = call(planner.init_from_deep_ep, make() if rank == SICK else good)
            record[kind, name] = raised, planner._backend is backend and not planner.deep_ep_initialized
        planner.init_from_deep_ep(good)
    idx = batch([7, rank], (20,), SIZE * N_OWN)
    record["afterwards"] = idx, [planner.run(idx, None) for planner in planners.values()]
    record["quota"] = planner.last_plan.quota
    return record


@pytest.fixture(scope="module")
def odd_buffers(tmp_path_factory):
    return on_ranks(SIZE, tmp_path_factory.mktemp("odd_buffers"), give_odd_buffers)


@pytest.mark.parametrize("name", list(ODD))
def test_an_odd_buffer_on_one_rank(name, odd_buffers):
    _, kind, message = ODD[name]
    for key in {("group", name), ("none", name)} & set(odd_buffers[0]):
        for rank, result in enumerate(odd_buffers):
            (raised, said), kept = result[key]
            assert raised == (kind if rank != SICK or name != "it raises" else "ZeroDivisionError")
            assert kept
            if message is None:
                assert said.startswith("rank 2 has another placement or other settings than rank 0")
                continue
            assert message in said
            assert said.startswith("rank 2 refused its input, so no rank goes on: ") == (rank != SICK)


def test_after_odd_buffers(odd_buffers):
    batches = [result["afterwards"][0] for result in odd_buffers]
    expected = assign_reference(batches, ring_phy2log(SIZE), odd_buffers[0]["quota"], NODE)
    for result, want in zip(odd_buffers, expected, strict=True):
        for got in result["afterwards"][1]:
            assert np.array_equal(got, want)


def give_other_groups(rank):
    """Buffers over other ranks than the planner's, by what they say on the planner's ranks."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    without_3, without_2 = dist.new_group([0, 1, 2]), dist.new_group([0, 1, 3])
    try:
        mixed = dist.new_group([3, 1, 0, 2], sort_ranks=False)
    except TypeError:
        mixed = None  # this torch puts every group in order
    record = {}
    planner = ring_planner(SIZE, dist.group.WORLD)
    record["size"] = call(planner.init_from_deep_ep, Buffer(pairs[rank // 2]))
    if mixed is not None:
        record["order"] = call(planner.init_from_deep_ep, Buffer(mixed))
    if rank != 3:
        three = ring_planner(3, without_3)
        buffer = Buffer(without_2) if rank != 2 else Buffer(pairs[1])
        record["other ranks"] = call(three.init_from_deep_ep, buffer)
    alone = ring_planner(2 * SIZE, ep_size=2 * SIZE)
    record["ep_size"] = call(alone.init_from_deep_ep, Buffer(dist.group.WORLD))
    wide = ring_planner(2 * SIZE if rank == SICK else SIZE, ep_size=2 * SIZE if rank == SICK else SIZE)
    record["ep_size on one rank"] = call(wide.init_from_deep_ep, Buffer(dist.group.WORLD))
    other = ring_planner(SIZE, ep_size=SIZE, solver="flow" if rank == SICK else "ipm")
    record["solver on one rank"] = call(other.init_from_deep_ep, Buffer(dist.group.WORLD))
    record["ep_group"] = other.ep_group is None, other.deep_ep_initialized, other.run(torch.arange(3), None).numel()
    return record


def test_buffers_of_other_ranks(tmp_path):
    results = on_ranks(SIZE, tmp_path, give_other_groups)
    for rank, result in enumerate(results):
        assert result["size"][0] == "ValueError"
        assert "buffer.group has 2 ranks, allowed is ep_size = 4" in result["size"][1]
        if "order" in result:
            assert result["order"][0] == "ValueError"
            assert "in the order [3, 1, 0, 2], allowed is the planner's, [0, 1, 2, 3]" in result["order"][1]
        if rank != 3:
            assert result["other ranks"][0] == "ValueError"
            said = "of ranks [0, 1, 3], allowed are those of the planner's group, [0, 1, 2]"
            own = "buffer.group has 2 ranks, allowed is ep_size = 3"
            assert (own if rank == 2 else said) in result["other ranks"][1]
        assert result["ep_size"] == ("ValueError", "buffer.group has 4 ranks, allowed is ep_size = 8")
        assert result["ep_size on one rank"][0] == "ValueError"
        assert "buffer.group has 4 ranks, allowed is ep_size = 8" in result["ep_size on one rank"][1]
        assert result["solver on one rank"][0] == "ValueError"
        assert result["solver on one rank"][1].startswith("rank 2 has another placement or other settings than rank 0")
        assert result["ep_group"] == (True, False, 3)


def one_rank(rank):
    planner = ring_planner(SIZE, Known(1, SIZE))
    known = call(planner.init_from_deep_ep, Buffer(dist.group.WORLD))
    one, other = (deep_ep.read(kind(dist.group.WORLD)) for kind in (Buffer, ElasticBuffer))
    return known, call(setattr, one, "size", 2), one == other


def test_a_replay_and_a_group_of_one(tmp_path):
    ((known, frozen, equal),) = on_ranks(1, tmp_path, one_rank)
    assert known[0] == "ValueError"
    assert known[1].startswith("group is an lplb.exchange.Known, allowed with a DeepEP buffer are a process group")
    assert frozen == ("FrozenInstanceError", "cannot assign to field 'size'")
    assert equal


# To dispatch and back


def dispatch_and_combine(rank, elastic):
    """Physical indices through a buffer; and what every rank gave, for the reference."""
    buffer = (ElasticBuffer if elastic else Buffer)(dist.group.WORLD, ranks_per_node=NODE)
    planner = ring_planner(SIZE, ep_size=SIZE)
    planner.init_from_deep_ep(buffer)
    rng = np.random.default_rng([9, rank])
    n = 0 if rank == 1 else 30
    logical = np.array([rng.permutation(SIZE * N_OWN)[:3] for _ in range(n)], dtype=np.int64).reshape(n, 3)
    logical[rng.random(logical.shape) < 0.1] = -1
    x = torch.from_numpy(rng.integers(-8, 9, (n, 16))).bfloat16()
    weights = torch.from_numpy(rng.integers(1, 4, (n, 3))).float()
    physical = planner.run(torch.from_numpy(logical), None)
    if elastic:
        sent = buffer.dispatch(x, topk_idx=physical, topk_weights=weights, num_experts=planner.n_routed_experts)
        received, experts, received_weights, handle, _ = sent
        layout = counts = None
    else:
        layout = buffer.get_dispatch_layout(physical, planner.n_routed_experts)
        per_rank, per_node, per_expert, in_rank, _ = layout
        received, experts, received_weights, counts, handle, _ = buffer.dispatch(
            x, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node, is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert, topk_idx=physical, topk_weights=weights,
        )  # fmt: skip
    mine = ring_phy2log(SIZE)[rank * (N_OWN + 1) :][: N_OWN + 1]
    factors = torch.from_numpy(np.append(mine + 1, 0))[experts]  # -1 is the last
    combined, _, _ = buffer.combine((received * (factors * received_weights).sum(1, keepdim=True)).bfloat16(), handle)
    return logical, x.float().numpy(), weights.numpy(), physical.numpy(), layout, experts.numpy(), counts, combined


@pytest.mark.parametrize("elastic", [False, True])
def test_the_result_goes_to_dispatch(elastic, tmp_path):
    results = on_ranks(SIZE, tmp_path, dispatch_and_combine, elastic)
    slots = N_OWN + 1
    for rank, (logical, x, weights, physical, layout, experts, counts, combined) in enumerate(results):
        factors = np.where(logical >= 0, (logical + 1) * weights, 0).sum(1, keepdims=True)
        np.testing.assert_allclose(combined.float().numpy(), x * factors, rtol=2**-7)  # bfloat16, added up
        came = [p[((p >= rank * slots) & (p < (rank + 1) * slots)).any(1)] for p in (r[3] for r in results)]
        local = np.concatenate(came) - rank * slots
        assert np.array_equal(experts, np.where((local >= 0) & (local < slots), local, -1))
        if elastic:
            continue
        assert counts == [int((local == expert).sum()) for expert in range(slots)]
        per_rank, per_node, per_expert, in_rank, _ = layout
        to = np.array([[bool(((row >= 0) & (row // slots == r)).any()) for r in range(SIZE)] for row in physical])
        to = to.reshape(-1, SIZE)
        assert np.array_equal(in_rank, to)
        assert per_rank.tolist() == to.sum(0).tolist()
        assert per_node.tolist() == to.reshape(-1, SIZE // NODE, NODE).any(2).sum(0).tolist()
        assert per_expert.tolist() == np.bincount(physical[physical >= 0], minlength=SIZE * slots).tolist()


def test_the_example():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the stand-in, also where DeepEP is
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "deepep_dispatch.py")],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "4 ranks, a stand-in for deep_ep.Buffer over gloo"
    without, balanced = ([int(n) for n in re.findall(r"\d+", line.partition(":")[2])] for line in lines[1:3])
    assert sum(without) == sum(balanced) == 4 * 512 * 4
    assert max(balanced) < max(without)
    assert lines[3:] == ["combined sums are right on 4 of 4 ranks"]


# The real one


def use_deep_ep(rank, size):
    import deep_ep as real

    torch.cuda.set_device(rank)
    configs = real.Buffer.get_dispatch_config(size), real.Buffer.get_combine_config(size)
    buffer = real.Buffer(dist.group.WORLD, max(config.get_nvl_buffer_size_hint(256, size) for config in configs))
    planner = ring_planner(size, ep_size=size, device=torch.device("cuda", rank))
    planner.init_from_deep_ep(buffer)
    idx = batch([10, rank], (40, 3), size * N_OWN)
    physical = planner.run(idx.cuda(), None)
    per_expert = buffer.get_dispatch_layout(physical, planner.n_routed_experts)[2]
    dist.all_reduce(per_expert)
    return idx, physical.cpu(), planner.last_plan.cpu().quota, per_expert.cpu(), planner.ranks_per_node


def real_rank(rank, size, folder):
    store = f"file://{folder}/store"
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    torch.save(use_deep_ep(rank, size), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.gpu
def test_the_real_buffer(tmp_path):
    pytest.importorskip("deep_ep", reason="needs DeepEP, which is not installed")
    size = 2
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices, there are {torch.cuda.device_count()}")
    torch.multiprocessing.spawn(real_rank, (size, str(tmp_path)), size)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    quota = results[0][2]
    expected = assign_reference([result[0] for result in results], ring_phy2log(size), quota, size)
    for (_, physical, _, per_expert, per_node), want in zip(results, expected, strict=True):
        assert np.array_equal(physical, want)
        assert torch.equal(per_expert, quota)
        assert per_node == size
