"""Sources of arriving experts: peers over gloo processes, host memory that processes share, the user's function."""

import random

import pytest
import torch
import torch.distributed as dist
from test_distributed import call, on_ranks
from test_dynamic_dispatcher import KINDS, experts_on, fields_for, holds, swap_now
from test_weights import random_placement

from lplb import Placement
from lplb.dynamic.dispatcher import Dispatcher
from lplb.dynamic.sources import Callback, Peers
from lplb.dynamic.staging import Staging, arrivals, least_bytes, most_arrivals
from lplb.weights import Moved

EXPERT_BYTES = 24 + 12 + 20 + 8 + 6 + 7 + 15 + 6 + 0
N_LAYERS = 3


def layers_for(seed, n_ranks):
    """For every layer the placements one after the other."""
    rng = random.Random(seed)
    n_slots = rng.choice([1, 3, 4])
    n_logical = rng.randint(n_slots, n_ranks * n_slots)
    return [[random_placement(rng, n_ranks, n_slots, n_logical) for _ in range(3)] for _ in range(N_LAYERS)]


def dispatchers_on(rank, layers):
    return [Dispatcher(line[0], fields_for(experts_on(line[0], rank)), rank) for line in layers]


def capacity_for(layers):
    return max(1, *(most_arrivals(a, b) for line in layers for a, b in zip(line, line[1:], strict=False)))


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


def test_one_rank_alone_has_peers_too():
    before, after = Placement([0, 1, 2], 1), Placement([2, 0, 1], 1)
    dispatcher = Dispatcher(before, fields_for([0, 1, 2]), 0)
    came = cycle(dispatcher, 0, after, 1, Peers([dispatcher]), Staging(dispatcher.fields, 3))
    assert came == (3, 0, 0)


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
