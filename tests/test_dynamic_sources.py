"""Sources of arriving experts: peers over gloo processes, host memory that processes share, the user's function."""

import gc
import os
import random
import signal
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from test_distributed import DEADLINE, PROCESSES, call, on_ranks, process
from test_dynamic_dispatcher import KINDS, experts_on, fields_for, holds, swap_now
from test_gpu_planner import need_gpu
from test_weights import random_placement

from lplb import Placement
from lplb.dynamic import node_memory
from lplb.dynamic.dispatcher import Dispatcher
from lplb.dynamic.sources import Callback, HostWeights, Peers, missing_on_nodes
from lplb.dynamic.staging import Staging, arrivals, least_bytes, most_arrivals
from lplb.weights import Move, Moved

EXPERT_BYTES = 24 + 12 + 20 + 8 + 6 + 7 + 15 + 6 + 0
N_LAYERS = 3


def layers_for(seed, n_ranks):
    """For every layer the placements one after the other."""
    rng = random.Random(seed)
    n_slots = rng.choice([1, 3, 4])
    n_logical = rng.randint(n_slots, n_ranks * n_slots)
    return [[random_placement(rng, n_ranks, n_slots, n_logical) for _ in range(3)] for _ in range(N_LAYERS)]


def dispatchers_on(rank, layers, **settings):
    return [Dispatcher(line[0], fields_for(experts_on(line[0], rank)), rank, **settings) for line in layers]


def capacity_for(layers):
    return max(1, *(most_arrivals(a, b) for line in layers for a, b in pairwise(line)))


def cycle(dispatcher, layer, after, epoch, source, staging):
    """Bring, look that nothing is live yet, swap; return what came in each step."""
    rank, before = dispatcher.rank, dispatcher.placement
    moves = arrivals(before, after, rank).moves
    steps = []
    for step in source.bring(layer, moves, staging):
        assert all(holds(dispatcher.fields.fields, s, e) for s, e in enumerate(experts_on(before, rank)))
        steps.append(step)
    dispatcher.stage(after, staging, epoch)
    swap_now(dispatcher)
    assert all(holds(dispatcher.fields.fields, s, e) for s, e in enumerate(experts_on(after, rank)))
    return Moved.total(steps)


# Peers


def swap_with_peers(rank, size, seeds):
    received = []
    for seed in seeds:
        layers = layers_for(seed, size)
        dispatchers = dispatchers_on(rank, layers)
        source = Peers(dispatchers, dist.group.WORLD)
        staging = Staging(dispatchers[0].fields, capacity_for(layers))
        for epoch in (1, 2):
            for layer, dispatcher in enumerate(dispatchers):
                before, after = layers[layer][epoch - 1 : epoch + 1]
                came = cycle(dispatcher, layer, after, epoch, source, staging)
                received.append((came.bytes_received, least_bytes(before, after, dispatcher.expert_bytes)))
    return received


@pytest.mark.parametrize(("size", "n_seeds"), [(2, 8), (4, 8)])
def test_swaps_with_peers(size, n_seeds, tmp_path):
    results = on_ranks(size, tmp_path, swap_with_peers, size, range(n_seeds))
    for rows in zip(*results, strict=True):
        assert sum(row[0] for row in rows) == rows[0][1]  # not a byte more than the lower bound
    assert sum(row[1] for row in results[0]) > 0


def refuse_on_one(rank, sick):
    """What is wrong with one rank's staging or weights, all raise; afterwards all is as before."""
    before, after = Placement([0, 1, 2, 3], 2), Placement([0, 2, 1, 3], 2)
    dispatchers = [Dispatcher(before, fields_for(experts_on(before, rank)), rank) for _ in range(2)]
    source = Peers(dispatchers, dist.group.WORLD)
    moves = arrivals(before, after, rank).moves
    staging, full = (Staging(dispatchers[0].fields, 1) for _ in range(2))
    full.keep(None if rank != sick else "a layer")
    faults = [
        call(lambda: list(source.bring(0, moves, full))),
        call(lambda: list(source.bring(5 if rank == sick else 1, moves, staging))),
        call(lambda: list(source.bring(0, moves[: 1 + (rank != sick)], staging))),
        call(Peers, dispatchers[: 1 + (rank == sick)], dist.group.WORLD),
        call(Peers, [] if rank == sick else dispatchers, dist.group.WORLD),
        call(Peers, [Dispatcher(before, fields_for([0, 1]), 0)], dist.group.WORLD),
    ]
    came = cycle(dispatchers[1], 1, after, 1, source, staging)
    return faults, came


def test_an_error_on_one_rank_is_raised_on_all(tmp_path):
    for faults, came in on_ranks(2, tmp_path, refuse_on_one, 1):
        matches = (
            "holds experts",
            "layer is 5, allowed is 0 to 1",
            "other moves",
            "another number",
            "is empty",
            "rank 0 of 2, allowed",
        )
        for fault, match in zip(faults, matches, strict=True):
            assert fault is not None
            assert match in fault[1]
        assert came == (1, EXPERT_BYTES, EXPERT_BYTES)


def lose_a_peer(rank, out):
    """Rank 1 is killed after its first round; rank 0 keeps the old placement, complete."""
    before, after = Placement([*range(8), *range(8, 16)], 2), Placement([*range(8, 16), *range(8)], 2)
    dispatcher = Dispatcher(before, fields_for(experts_on(before, rank)), rank)
    staging = Staging(dispatcher.fields, 8)
    steps = Peers([dispatcher], dist.group.WORLD).bring(0, arrivals(before, after, rank).moves, staging)
    next(steps)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    fault = call(lambda: list(steps))
    whole = all(holds(dispatcher.fields.fields, s, e) for s, e in enumerate(experts_on(before, rank)))
    torch.save((fault, whole, staging.released(), dispatcher.check_consistency()), out)
    os._exit(0)


def test_a_killed_peer_leaves_the_old_placement(tmp_path):
    out = tmp_path / "out.pt"
    ranks = [PROCESSES.Process(target=process, args=(r, 2, str(tmp_path), lose_a_peer, (out,))) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(DEADLINE)
    assert [rank.exitcode for rank in ranks] == [0, -signal.SIGKILL]
    fault, whole, released, due = torch.load(out, weights_only=False)
    assert fault[0] == "RuntimeError"
    assert "moving weights stopped" in fault[1]
    assert (whole, released, due) == (True, True, False)


def test_one_rank_alone_has_peers_too():
    before, after = Placement([0, 1, 2], 1), Placement([2, 0, 1], 1)
    dispatcher = Dispatcher(before, fields_for([0, 1, 2]), 0)
    source = Peers([dispatcher])
    assert cycle(dispatcher, 0, after, 1, source, Staging(dispatcher.fields, 3)) == (3, 0, 0)
    assert source.buffer_bytes == 2 * EXPERT_BYTES


# Host memory


def swap_from_the_host(rank, size, seeds, per_node):
    received = []
    for seed in seeds:
        layers = layers_for(seed, size)
        dispatchers = dispatchers_on(rank, layers, ranks_per_node=per_node)
        if seed % 2:
            source = HostWeights.of_slots(dispatchers, dist.group.WORLD)
        else:
            whole = [fields_for(range(line[0].n_logical)) for line in layers]
            source = HostWeights.of(whole, dist.group.WORLD, ranks_per_node=per_node)
            del whole
        assert not any("lplb" in name for name in os.listdir("/dev/shm"))
        for line, host in zip(layers, source.layers, strict=True):
            assert all(holds(host, expert, expert) for expert in range(line[0].n_logical))
        staging = Staging(dispatchers[0].fields, capacity_for(layers))
        for epoch in (1, 2):
            for layer, dispatcher in enumerate(dispatchers):
                before, after = layers[layer][epoch - 1 : epoch + 1]
                came = cycle(dispatcher, layer, after, epoch, source, staging)
                received.append((came.bytes_received, len(arrivals(before, after, rank).slots)))
        source.close()
        with pytest.raises(RuntimeError, match="was closed"):
            source.bring(0, [], staging)
    return received


@pytest.mark.parametrize(("size", "per_node"), [(2, 2), (4, 2), (4, 3), (4, 8)])
def test_swaps_from_host_memory(size, per_node, tmp_path):
    results = on_ranks(size, tmp_path, swap_from_the_host, size, range(4), per_node)
    assert all(came == EXPERT_BYTES * n for rows in results for came, n in rows)
    assert sum(n for _, n in results[0]) > 0


def share_and_die(rank, folder):
    """Rank 0, which made the memory, is killed while the other one reads it."""
    placement = Placement([0, 1, 2, 3], 2)
    dispatcher = Dispatcher(placement, fields_for(experts_on(placement, rank)), rank, ranks_per_node=2)
    source = HostWeights.of_slots([dispatcher], dist.group.WORLD)
    shared = source.layers[0][0]
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    if rank == 0:
        shared[3, 0, 0] = 42.0  # it is one memory
        (folder / "ready").touch()
        time.sleep(DEADLINE)
    wait_for(lambda: (folder / "ready").exists())
    other = int((folder / "pid0").read_text())
    assert float(shared[3, 0, 0]) == 42
    assert any("memfd:lplb" in line for line in maps_of(other))
    os.kill(other, signal.SIGKILL)
    wait_for(lambda: not maps_of(other))
    assert all(holds(source.layers[0], expert, expert) for expert in range(3))
    mine = [line for line in maps_of("self") if "memfd:lplb" in line]
    source.close()
    del shared
    gc.collect()
    return len(mine), [line for line in maps_of("self") if "memfd:lplb" in line], source.nbytes


def maps_of(process):
    """What a process has mapped; nothing if it is gone."""
    try:
        return Path(f"/proc/{process}/maps").read_text().splitlines()
    except OSError:
        return []


def wait_for(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def die_or_return(rank, folder, out):
    torch.save(share_and_die(rank, folder), out)
    os._exit(0)  # the group has lost a rank: no farewell


def test_a_killed_process_leaves_memory_to_the_others_and_nothing_behind(tmp_path):
    out = tmp_path / "out.pt"
    ranks = [
        PROCESSES.Process(target=process, args=(r, 2, str(tmp_path), die_or_return, (tmp_path, out))) for r in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(DEADLINE)
    assert [rank.exitcode for rank in ranks] == [-signal.SIGKILL, 0]
    mapped, left, nbytes = torch.load(out, weights_only=False)
    assert mapped == 1
    assert left == []
    assert nbytes >= 4 * EXPERT_BYTES


def test_host_weights_of_one_process():
    layers = layers_for(3, 4)
    whole = [fields_for(range(line[0].n_logical)) for line in layers]
    dispatchers = dispatchers_on(2, layers)
    source = HostWeights.of(whole, rank=2)
    assert source.nbytes >= sum(line[0].n_logical for line in layers) * EXPERT_BYTES
    assert source.pinned == torch.cuda.is_available()
    staging = Staging(dispatchers[0].fields, capacity_for(layers))
    for layer, dispatcher in enumerate(dispatchers):
        cycle(dispatcher, layer, layers[layer][1], 1, source, staging)
    other = Staging(Dispatcher(Placement([0], 1), [torch.zeros(1, 5)], 0).fields, 1)
    for arguments, match in (
        ((0, [], other), "staging is for experts of"),
        ((N_LAYERS, [], staging), "layer is 3, allowed is 0 to 2"),
        ((0, [Move(99, 0, 0, 2, 0)], staging), "expert of a move is 99, allowed is 0 to"),
        ((0, [Move(0, 0, 0, 2, 99)], staging), "target_slot of a move is 99"),
    ):
        with pytest.raises(ValueError, match=match):
            source.bring(*arguments)


@pytest.mark.gpu
def test_host_weights_for_a_device():
    need_gpu()
    before, after = Placement([0, 1, 2, 3], 2), Placement([2, 3, 0, 1], 2)
    host = torch.arange(4 * 1000.0).view(4, 1000)
    source = HostWeights.of([[host]], rank=0)
    assert source.pinned
    dispatcher = Dispatcher(before, [host[:2].cuda()], 0)
    staging = Staging(dispatcher.fields, 2)
    assert len(list(source.bring(0, arrivals(before, after, 0).moves, staging))) == 2
    dispatcher.stage(after, staging, 1)
    assert torch.equal(swap_now(dispatcher).weight1.cpu(), host[2:])
    source.close()
    assert not source.pinned


@given(st.integers(0, 2**32))
def test_what_a_node_lacks_comes_once_from_balanced_ranks(seed):
    rng = random.Random(seed)
    n_ranks, n_slots = rng.choice([1, 4, 6]), rng.choice([1, 3])
    per_node, at_once = rng.choice([1, 2, 4, 9]), rng.choice([1, 2])
    placement = random_placement(rng, n_ranks, n_slots, rng.randint(n_slots, n_ranks * n_slots))
    came = Counter()
    for moves in missing_on_nodes(placement, per_node, at_once):
        assert len({(m.target_rank, m.target_slot) for m in moves}) == len(moves)
        for move in moves:
            assert experts_on(placement, move.source_rank)[move.source_slot] == move.expert
            assert move.target_slot < at_once
            came[move.expert, move.target_rank // per_node] += 1
    nodes = {
        node: {e for r in range(n_ranks) if r // per_node == node for e in experts_on(placement, r)}
        for node in range(-(-n_ranks // per_node))
    }
    lacking = {(e, node): 1 for node, held in nodes.items() for e in range(placement.n_logical) if e not in held}
    assert came == Counter(lacking)


def ask_too_much(rank, sick):
    """Shapes that differ, memory that is missing, ranks that are not on one node: on all ranks or on none."""
    group = dist.group.WORLD
    layer = [torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.bool)]
    available = node_memory._available
    faults = [call(HostWeights.of, [layer, layer[: 1 + (rank != sick)]], group)]
    faults.append(call(partial(HostWeights.of, [layer], group, ranks_per_node=1 + (rank == sick))))
    faults.append(call(HostWeights.of, [] if rank == sick else [layer], group))
    node_memory._available = lambda: 10
    faults.append(call(partial(HostWeights.of, [layer], group, ranks_per_node=2)))
    node_memory._available = available
    named = node_memory._named
    node_memory._named = lambda *name: "lplb-another" if rank == sick else named(*name)
    faults.append(call(partial(HostWeights.of, [layer], group, ranks_per_node=2)))
    node_memory._named = named
    left = [line for line in maps_of("self") if "memfd:lplb" in line]
    return faults, left, HostWeights.of([layer], group, ranks_per_node=2).layers[0][0].sum().item()


def test_host_weights_are_refused_on_all_ranks(tmp_path):
    matches = (
        "other layers",
        "other layers",
        "is empty",
        "no memory on this host for 128 bytes",
        "ranks_per_node is 2",
    )
    for faults, left, total in on_ranks(2, tmp_path, ask_too_much, 1):
        for fault, match in zip(faults, matches, strict=True):
            assert fault is not None
            assert match in fault[1]
        assert left == []
        assert total == 0


# The user's function


def test_a_function_brings_experts():
    layers = layers_for(2, 4)
    dispatchers = dispatchers_on(1, layers)
    asked = []

    def load(layer, expert, into):
        asked.append((layer, expert))
        assert not torch.is_grad_enabled()
        for tensor, stored in zip(into, fields_for([expert]), strict=True):
            tensor.copy_(stored[0])

    staging = Staging(dispatchers[0].fields, capacity_for(layers))
    for layer, dispatcher in enumerate(dispatchers):
        found = arrivals(*layers[layer][:2], 1)
        came = cycle(dispatcher, layer, layers[layer][1], 1, Callback(load, 1), staging)
        assert came == (len(found.slots), 0, len(found.slots) * EXPERT_BYTES)
        new = experts_on(layers[layer][1], 1)
        assert [expert for at, expert in asked if at == layer] == [new[slot] for slot in found.slots]


def test_what_the_function_raises_leaves_all_as_it_was():
    before, after = Placement([0, 1, 2, 3], 2), Placement([2, 3, 1, 0], 2)
    dispatcher = Dispatcher(before, fields_for([0, 1]), 0)
    staging = Staging(dispatcher.fields, 2)
    moves = arrivals(before, after, 0).moves

    def fail_later(layer, expert, into):
        if expert == 3:
            raise OSError("no such file")

    steps = Callback(fail_later, 0).bring(0, moves, staging)
    assert next(steps) == (1, 0, EXPERT_BYTES)
    with pytest.raises(OSError, match="no such file"):
        next(steps)
    assert staging.released()
    assert all(holds(dispatcher.fields.fields, s, e) for s, e in enumerate([0, 1]))
    with pytest.raises(ValueError, match="target_slot of a move is 1, allowed is 0 to 0"):
        Callback(fail_later, 0).bring(0, moves, Staging(dispatcher.fields, 1))
    with pytest.raises(TypeError, match="function is a int"):
        Callback(3, 0)
    assert len(KINDS) == len(staging.fields)
