"""The dispatcher of a layer: swaps and maps of many simulated ranks, permutations, staging, the planner that follows."""

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from test_distributed import batch, call, on_ranks
from test_weights import random_placement

from lplb import Placement, Planner
from lplb.dynamic.dispatcher import Dispatcher
from lplb.dynamic.maps import ranks_asked
from lplb.dynamic.staging import Staging, arrivals, least_bytes, most_arrivals
from lplb.weights import moves_between

# What a layer may hold: (how, shape, dtype)
KINDS = [
    ("stacked", (3, 2), torch.float32),
    ("parameter", (2, 3), torch.bfloat16),
    ("parameters", (5,), torch.float32),
    ("tensors", (), torch.float64),
    ("stacked", (2, 3), torch.float8_e4m3fn),
    ("tensors", (7,), torch.bool),
    ("strided", (5, 3), torch.uint8),
    ("inference", (3,), torch.float16),
    ("stacked", (0, 4), torch.float32),
]


def bytes_of(expert, field):
    """An expert's bytes in a field."""
    _, shape, dtype = KINDS[field]
    n = int(np.prod(shape)) * dtype.itemsize
    return np.random.default_rng([expert, field]).integers(0, 2 if dtype == torch.bool else 256, n, np.uint8)


def expert_tensor(expert, field):
    _, shape, dtype = KINDS[field]
    found = bytes_of(expert, field)
    return torch.from_numpy(found).view(dtype).view(shape) if found.size else torch.empty(shape, dtype=dtype)


def fields_for(experts):
    """All kinds, for the experts in a rank's slots."""
    fields = []
    for i, (how, _, _) in enumerate(KINDS):
        slots = [expert_tensor(expert, i).clone() for expert in experts]
        if how == "stacked":
            fields.append(torch.stack(slots))
        elif how == "parameter":
            fields.append(torch.nn.Parameter(torch.stack(slots)))
        elif how == "parameters":
            fields.append(torch.nn.ParameterList([torch.nn.Parameter(slot) for slot in slots]))
        elif how == "strided":
            fields.append([slot.t().contiguous().t() for slot in slots])
        elif how == "inference":
            with torch.inference_mode():
                fields.append(torch.stack(slots))
        else:
            fields.append(slots)
    return fields


def raw(tensor):
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)


def holds(fields, slot, expert):
    return all(np.array_equal(raw(field[slot]), bytes_of(expert, i)) for i, field in enumerate(fields))


def experts_on(placement, rank):
    return placement.phy2log.view(placement.n_ranks, -1)[rank].tolist()


def dispatchers_for(placement, **settings):
    return [
        Dispatcher(placement, fields_for(experts_on(placement, rank)), rank, **settings)
        for rank in range(placement.n_ranks)
    ]


def bring(moves, staging, rank):
    """In the place of a source: experts from their seeds."""
    for move in moves:
        if move.target_rank == rank:
            for i, field in enumerate(staging.fields):
                field[move.target_slot].copy_(expert_tensor(move.expert, i))


def swap_now(dispatcher):
    """What the Rebalancer's agreement does, for the next step, and that step."""
    assert dispatcher.point.promise(dispatcher.steps + 1, 1)
    dispatcher.point.agree()
    assert dispatcher.check_consistency()
    return dispatcher.update_module_weight_and_map()


def change(dispatcher, after, epoch, staging=None):
    """A whole cycle of one rank by itself."""
    found = arrivals(dispatcher.placement, after, dispatcher.rank)
    staging = staging or Staging(dispatcher.fields, max(1, len(found.slots)))
    staging.begin()
    bring(found.moves, staging, dispatcher.rank)
    dispatcher.stage(after, staging, epoch)
    return swap_now(dispatcher)


def sizes(seed):
    rng = random.Random(seed)
    n_ranks, n_slots = rng.choice([1, 2, 5, 8]), rng.choice([1, 2, 4])
    return rng, n_ranks, n_slots, rng.randint(n_slots, n_ranks * n_slots)


def maps_by_brute_force(placement, rank):
    """local_expert_indices_map, log2phy by expert, logcnt."""
    n = placement.slots_per_rank
    experts = placement.phy2log.tolist()
    slots = [[s for s, e in enumerate(experts) if e == expert] for expert in range(placement.n_logical)]
    local = [next((s - rank * n for s in held if s // n == rank), -1) for held in slots]
    return local, slots, [len(held) for held in slots]


# Swaps


@given(st.integers(0, 2**32))
def test_every_slot_holds_the_right_expert_after_each_swap(seed):
    rng, *shape = sizes(seed)
    placements = [random_placement(rng, *shape) for _ in range(3)]
    dispatchers = dispatchers_for(placements[0])
    for epoch, (before, after) in enumerate(pairwise(placements), 1):
        for rank, dispatcher in enumerate(dispatchers):
            addresses = [raw_address(dispatcher.fields.fields), raw_address([[t] for t in maps_of(dispatcher)])]
            identity = [id(field) for field in dispatcher.fields.fields]
            staging = Staging(dispatcher.fields, max(1, most_arrivals(before, after)))
            old = experts_on(before, rank)
            found = arrivals(before, after, rank)
            staging.begin()
            bring(found.moves, staging, rank)
            dispatcher.stage(after, staging, epoch)
            # nothing is live before the swap
            assert dispatcher.placement == before
            assert not staging.released()
            assert all(holds(dispatcher.fields.fields, slot, expert) for slot, expert in enumerate(old))
            update = swap_now(dispatcher)
            assert staging.released()
            assert all(holds(update.weights, slot, e) for slot, e in enumerate(experts_on(after, rank)))
            assert update.placement is dispatcher.placement is after
            assert update.epoch == dispatcher.epoch == epoch
            assert update.local_expert_list == dispatcher.local_expert_list == experts_on(after, rank)
            local, slots, counts = maps_by_brute_force(after, rank)
            assert update.local_expert_indices_map.tolist() == local
            assert dispatcher.logcnt.tolist() == counts
            assert dispatcher.phy2log.tolist() == after.phy2log.tolist()
            assert [[s for s in row if s >= 0] for row in dispatcher.log2phy.tolist()] == slots
            assert addresses == [raw_address(update.weights), raw_address([[t] for t in maps_of(dispatcher)])]
            assert identity == [id(field) for field in update.weights]


def raw_address(fields):
    return [tensor.data_ptr() for field in fields for tensor in field]


def maps_of(dispatcher):
    return [getattr(dispatcher, name) for name in ("device_indices_map", "local_expert_indices_map", "phy2log",
                                                   "log2phy", "logcnt")]  # fmt: skip


@given(st.integers(0, 2**32))
def test_arrivals_are_the_moves_by_place(seed):
    rng, *shape = sizes(seed)
    before, after = random_placement(rng, *shape), random_placement(rng, *shape)
    moves = moves_between(before, after)
    found = [arrivals(before, after, rank) for rank in range(before.n_ranks)]
    assert all(f.moves == found[0].moves for f in found)
    for rank, (came, slots) in enumerate(found):
        places = [m.target_slot for m in came if m.target_rank == rank]
        assert places == list(range(len(slots)))
        assert list(slots) == sorted(slots)
        back = [m._replace(target_slot=slots[m.target_slot]) for m in came if m.target_rank == rank]
        assert back == [m for m in moves if m.target_rank == rank]
        old, new = experts_on(before, rank), experts_on(after, rank)
        assert list(slots) == [s for s in range(len(new)) if old[s] != new[s]]
    assert most_arrivals(before, after) == max(len(f.slots) for f in found)
    new_pairs = {(r, e) for r in range(before.n_ranks) for e in set(experts_on(after, r)) - set(experts_on(before, r))}
    assert least_bytes(before, after, 7) == 7 * len(new_pairs)


def test_the_six_first_of_an_update_are_those_of_mindie():
    placement = Placement([0, 1, 2, 0], 2)
    dispatcher = Dispatcher(placement, [torch.zeros(2, 3), torch.ones(2, 1)], 1)
    update = dispatcher.current()
    assert update._fields[:6] == (
        "weight1",
        "weight2",
        "local_expert_num",
        "device_indices_map",
        "local_expert_indices_map",
        "local_expert_list",
    )
    assert update.weight1 is dispatcher.fields.fields[0]
    assert update.weight2 is dispatcher.fields.fields[1]
    assert update[2] == 2
    assert [t.tolist() for t in update[3:5]] == [[1, 0, 1], [1, -1, 0]]
    assert update[5] == [2, 0]
    assert all(t.dtype == torch.int32 for t in maps_of(dispatcher))
    assert Dispatcher(placement, [torch.zeros(2)], 0).current().weight2 is None


# One rank per expert


@given(st.integers(0, 2**32))
def test_sources_ask_themselves_then_their_node_then_whom_few_ask(seed):
    rng = random.Random(seed)
    n_ranks, n_slots = rng.choice([1, 4, 6, 12]), rng.choice([2, 3])
    per_node = rng.choice([1, 2, 3, 4, 100])
    placement = random_placement(rng, n_ranks, n_slots, rng.randint(n_slots, n_ranks * n_slots))
    asked = ranks_asked(placement, per_node)
    assert asked.shape == (n_ranks, placement.n_logical)
    for expert in range(placement.n_logical):
        holders = [r for r in range(n_ranks) if expert in experts_on(placement, r)]
        asks = asked[:, expert].tolist()
        near, far = Counter(), []
        for source, target in enumerate(asks):
            assert target in holders
            on_node = [r for r in holders if r // per_node == source // per_node]
            if source in holders:
                assert target == source
            elif on_node:
                assert target in on_node
                near[target] += 1
            else:
                far.append(target)
        for node in range(-(-n_ranks // per_node)):
            times = [near[r] for r in holders if r // per_node == node]
            assert not times or max(times) - min(times) <= 1
        # water fills up from the bottom: nobody from afar asks a copy that is asked twice more than another
        total = Counter(asks)
        assert all(total[target] <= min(total[r] for r in holders) + 1 for target in far)


def test_what_is_left_over_goes_to_other_ranks_for_other_experts():
    """Two copies of each of 60 experts on ranks 0 and 1; rank 2, with a dummy expert alone, asks one of them."""
    placement = Placement([*range(60), *range(60), *range(60, 120)], 3)
    asked = ranks_asked(placement, 1)[2, :60]
    assert Counter(asked.tolist()) == {0: 30, 1: 30}


# Permutations


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool,
     torch.float8_e5m2],
)  # fmt: skip
def test_permutation_is_that_of_the_live_placement(dtype):
    rng = random.Random(3)
    placements = [random_placement(rng, 4, 3, 9) for _ in range(3)]
    dispatcher = dispatchers_for(placements[0])[1]
    first = dispatcher.get_expert_trans_tensor(dtype=dtype)
    for epoch, placement in enumerate(placements):
        if epoch:
            change(dispatcher, placement, epoch)
        found = dispatcher.get_expert_trans_tensor(torch.zeros(2, 9, dtype=dtype))
        want = np.zeros((9, 12))
        want[placement.phy2log.numpy(), np.arange(12)] = 1
        assert found is first
        assert found.dtype == dtype
        assert np.array_equal(found.double().numpy(), want)


def test_scores_in_slot_order():
    rng = random.Random(5)
    placements = [random_placement(rng, 4, 3, 9) for _ in range(2)]
    dispatcher = dispatchers_for(placements[0])[0]
    for epoch in range(2):
        if epoch:
            change(dispatcher, placements[1], 1)
        scores = torch.from_numpy(np.random.default_rng(epoch).normal(size=(2, 5, 9))).requires_grad_()
        want = scores.detach().numpy()[..., placements[epoch].phy2log.numpy()]
        assert np.array_equal((scores @ dispatcher.get_expert_trans_tensor(scores)).detach().numpy(), want)
        got = dispatcher.slot_scores(scores)
        assert np.array_equal(got.detach().numpy(), want)
        got.sum().backward()
        assert np.array_equal(scores.grad.numpy(), np.broadcast_to(placements[epoch].logcnt.numpy(), (2, 5, 9)))
    masked = torch.tensor([[0.5] * 8 + [-np.inf]])
    found = dispatcher.slot_scores(masked)[0].tolist()
    assert found == [-np.inf if e == 8 else 0.5 for e in placements[1].phy2log.tolist()]
    assert (masked @ dispatcher.get_expert_trans_tensor(masked)).isnan().any()  # as documented
    for bad, error in ((torch.zeros(3, 8), ValueError), (torch.tensor(1.0), ValueError), ([1.0], TypeError)):
        with pytest.raises(error, match="scores"):
            dispatcher.slot_scores(bad)
    with pytest.raises(TypeError, match="scores is a list"):
        dispatcher.get_expert_trans_tensor([1.0])


# When, and what not


def test_steps_are_counted_and_a_swap_is_made_once():
    before, after = Placement([0, 1, 1, 2], 2), Placement([0, 2, 1, 2], 2)
    dispatcher = dispatchers_for(before)[0]
    for step in range(1, 4):
        assert not dispatcher.check_consistency()
        assert dispatcher.steps == step
        assert not dispatcher.update_flag
    with pytest.raises(RuntimeError, match="while no swap is due, allowed is after check_consistency"):
        dispatcher.update_module_weight_and_map()
    staging = Staging(dispatcher.fields, 1)
    bring(arrivals(before, after, 0).moves, staging, 0)
    dispatcher.stage(after, staging, 1)
    assert dispatcher.point.promise(5, 1)
    dispatcher.point.agree()
    assert not dispatcher.check_consistency()
    with pytest.raises(RuntimeError, match="while no swap is due"):
        dispatcher.update_module_weight_and_map()
    assert dispatcher.check_consistency()
    assert dispatcher.update_flag
    dispatcher.update_module_weight_and_map()
    assert not dispatcher.update_flag
    with pytest.raises(RuntimeError, match="while no swap is due"):
        dispatcher.update_module_weight_and_map()
    assert not dispatcher.check_consistency()


def test_a_swap_that_is_not_made_is_an_error_in_the_next_pass():
    before, after = Placement([0, 1, 1, 2], 2), Placement([0, 2, 1, 2], 2)
    dispatcher = dispatchers_for(before)[0]
    dispatcher.stage(after, Staging(dispatcher.fields, 1), 1)
    dispatcher.point.promise(1, 1)
    dispatcher.point.agree()
    assert dispatcher.check_consistency()
    with pytest.raises(RuntimeError, match="call update_module_weight_and_map"):
        dispatcher.check_consistency()
    dispatcher.update_module_weight_and_map()  # too late is not never
    assert dispatcher.placement == after


def test_what_is_staged_can_be_forgotten():
    before, after = Placement([0, 1, 1, 2], 2), Placement([0, 2, 1, 2], 2)
    dispatcher, other = dispatchers_for(before)
    staging = Staging(dispatcher.fields, 1)
    dispatcher.unstage()
    dispatcher.stage(after, staging, 1)
    for refused in (lambda: dispatcher.stage(after, Staging(dispatcher.fields, 1), 2), staging.begin,
                    lambda: other.stage(after, staging, 1)):  # fmt: skip
        with pytest.raises(RuntimeError, match="is staged|holds experts"):
            refused()
    other.unstage()
    assert not staging.released()
    dispatcher.unstage()
    assert staging.released()
    assert dispatcher.placement == before
    change(dispatcher, after, 7, staging)
    assert dispatcher.epoch == 7


def test_autograd_goes_on_around_swaps():
    before, after = Placement([0, 1, 1, 2], 2), Placement([0, 2, 1, 2], 2)
    weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    dispatcher = Dispatcher(before, [weight], 0)
    staging = Staging(dispatcher.fields, 1)
    staging.fields[0][0] = torch.tensor([5.0, 6.0])
    dispatcher.stage(after, staging, 1)
    update = swap_now(dispatcher)
    assert update.weight1 is weight
    assert weight.tolist() == [[1, 2], [5, 6]]
    assert weight.requires_grad
    assert weight.is_leaf
    (weight * torch.tensor([[1.0, 2.0]])).sum().backward()
    assert weight.grad.tolist() == [[1, 2], [1, 2]]


def test_swaps_inside_inference_mode():
    before, after = Placement([0, 1, 1, 2], 2), Placement([0, 2, 1, 2], 2)
    with torch.inference_mode():
        dispatcher = dispatchers_for(before)[0]
        change(dispatcher, after, 1)
    assert all(holds(dispatcher.fields.fields, slot, expert) for slot, expert in enumerate([0, 2]))
    change(dispatcher, before, 2)
    assert all(holds(dispatcher.fields.fields, slot, expert) for slot, expert in enumerate([0, 1]))
    assert dispatcher.local_expert_indices_map.tolist() == [0, 1, -1]


def test_a_swap_of_nothing_renews_the_maps_of_others():
    """Rank 0 keeps its experts; who else has expert 1 changes."""
    before, after = Placement([0, 1, 2, 1], 2), Placement([0, 1, 2, 0], 2)
    dispatcher = dispatchers_for(before)[0]
    change(dispatcher, after, 1)
    assert dispatcher.logcnt.tolist() == [2, 1, 1]
    assert dispatcher.log2phy.tolist() == [[0, 3], [1, -1], [2, -1]]


def test_refused_arguments():
    placement = Placement([0, 1, 1, 2], 2)
    good = [torch.zeros(2, 3)]
    for arguments, error, match in (
        (([0, 1], good, 0), TypeError, "placement is a list, allowed is an lplb.Placement"),
        ((placement, good, 2), ValueError, "rank is 2, allowed is 0 to 1"),
        ((placement, [torch.zeros(3, 3)], 0), ValueError, "weights has 3 slots, allowed is .* 2"),
        ((placement, torch.zeros(2), 0), TypeError, "weights is a torch.float32 tensor"),
    ):
        with pytest.raises(error, match=match):
            Dispatcher(*arguments)
    with pytest.raises(TypeError, match="planner is a int"):
        Dispatcher(placement, good, 0, planner=3)
    with pytest.raises(ValueError, match="planner has another placement"):
        Dispatcher(placement, good, 0, planner=Planner.from_placement(Placement([0, 1, 0, 2], 2)))
    with pytest.raises(ValueError, match="ranks_per_node is 0, allowed is 1 or more"):
        Dispatcher(placement, good, 0, ranks_per_node=0)
    dispatcher = Dispatcher(placement, good, 0)
    after, staging = Placement([2, 0, 1, 2], 2), Staging(dispatcher.fields, 2)
    for arguments, error, match in (
        ((after, Staging(dispatcher.fields, 1), 1), ValueError, "room for 1 experts, allowed is 2 or more"),
        ((after, Staging(Dispatcher(placement, [torch.zeros(2, 4)], 0).fields, 2), 1), ValueError, "staging is for"),
        ((Placement([0, 1, 2], 1), staging, 1), ValueError, "placement has n_ranks 1, allowed is 2"),
        ((Placement([0, 1, 2, 1, 0, 2], 2), staging, 1), ValueError, "placement has n_physical 6, allowed is 4"),
        ((Placement([0, 1, 1, 0], 2), staging, 1), ValueError, "placement has n_logical 2, allowed is 3"),
        ((after, None, 1), TypeError, "staging is a NoneType"),
        ((after, staging, -1), ValueError, "epoch is -1"),
    ):
        with pytest.raises(error, match=match):
            dispatcher.stage(*arguments)
    assert staging.released()
    dispatcher.stage(after, staging, 1)


def test_staging_without_memory():
    fields = Dispatcher(Placement([0, 1], 1), [torch.zeros(2, 1000)], 0).fields
    assert (Staging(fields, 3).nbytes, Staging(fields, 3).fields[0].shape) == (12000, (3, 1000))
    with pytest.raises(RuntimeError, match=f"no memory for a staging of {2**48} experts of 4000 bytes"):
        Staging(fields, 2**48)
    with pytest.raises(ValueError, match="capacity is 0, allowed is 1 or more"):
        Staging(fields, 0)
    with pytest.raises(TypeError, match="like is a list"):
        Staging([torch.zeros(2)], 1)


# The planner follows


def placements_for(n_ranks, n):
    rng = random.Random(11)
    return [random_placement(rng, n_ranks, 4, 3 * n_ranks) for _ in range(n)]


def test_a_planner_of_another_placement_is_as_one_made_for_it():
    first, second = placements_for(4, 2)
    planner, fresh = Planner.from_placement(first), Planner.from_placement(second)
    idx = batch(1, (50, 4), 12)
    planner.run(idx, None)
    old = planner.last_plan
    for placement in (second, planner.compiled_for(second)):
        planner.replace_placement(first)
        planner.replace_placement(placement)
        assert planner.placement == second
        assert planner.phy2log.tolist() == second.phy2log.tolist()
        assert planner.last_plan is None
        assert torch.equal(planner.run(idx, None), fresh.run(idx, None))
        assert all(
            torch.equal(a, b) for a, b in zip(planner.last_plan.tensors(), fresh.last_plan.tensors(), strict=True)
        )
        with pytest.raises(ValueError, match="plan was made for another placement"):
            planner.assign(idx, old)


def test_replacing_is_refused_before_anything_changes():
    first = placements_for(4, 1)[0]
    planner = Planner.from_placement(first, group_size=4)
    for bad, error, match in (
        (Placement(first.phy2log, 2), ValueError, "n_ranks 2, allowed is the planner's, 4"),
        (Placement([*range(12), *range(12)], 4), ValueError, "n_physical 24, allowed is the planner's, 16"),
        (Placement([*range(13), 0, 1, 2], 4), ValueError, "n_logical 13, allowed is the planner's, 12"),
        ([0], TypeError, "placement is a list"),
    ):
        for method in (planner.replace_placement, planner.compiled_for):
            with pytest.raises(error, match=match):
                method(bad)
    pairs = Planner.from_placement(Placement([0, 1, 0, 2, 3, 4, 3, 5], 4), group_size=2)
    with pytest.raises(ValueError, match="allowed is one group"):
        pairs.replace_placement(Placement([0, 1, 3, 2, 0, 4, 3, 5], 4))
    assert planner.placement == first
    on_ring = Planner(torch.tensor([[1], [0]]), 6, 4, 2)
    with pytest.raises(RuntimeError, match="made for a topology"):
        on_ring.replace_placement(on_ring.placement)


def test_the_dispatcher_takes_its_planner_along():
    first, second = placements_for(2, 2)
    planner = Planner.from_placement(first, ranks_per_node=3)
    dispatcher = dispatchers_for(first, planner=planner)[0]
    assert dispatcher.ranks_per_node == 3
    staging = Staging(dispatcher.fields, 4)
    bring(arrivals(first, second, 0).moves, staging, 0)
    dispatcher.stage(second, staging, 1)
    assert planner.placement == first
    swap_now(dispatcher)
    assert planner.placement == second


def replace_but_on_one(rank, odd):
    """Three batches with lag or without; after the first, all but one rank replace."""
    first, second = placements_for(4, 2)
    group = dist.group.WORLD
    outcomes = []
    for lag in (0, 1):
        planner = Planner.from_placement(first, group=group)
        idx = batch([7, rank], (40, 2), 12)
        for _ in range(2):
            planner.run(idx, None, lag=lag)
        compiled = planner.compiled_for(second)
        if rank != odd:
            planner.replace_placement(compiled)
        calls = [call(lambda lag=lag: planner.run(idx, None, lag=lag)) for _ in range(2)]
        if rank == odd:
            planner.replace_placement(second)
        calls.append(call(planner.run, idx, None))  # with lag, the last call's exchange went wrong, too
        last = planner.run(idx, None)  # the ranks are together again
        outcomes.append((calls, last, idx))
    return outcomes


def test_a_rank_that_does_not_replace_is_found_by_all(tmp_path):
    second = placements_for(4, 2)[1]
    results = on_ranks(4, tmp_path, replace_but_on_one, 2)
    for lag in (0, 1):
        # a lagged exchange is heard of in the call after it, also by the rank that has replaced in between
        expected = [False, True, True] if lag else [True, True, False]
        for result in results:
            assert [found is not None for found in result[lag][0]] == expected
            for name, message in filter(None, result[lag][0]):
                assert name == "ValueError"
                assert "another placement or other settings than rank 0" in message
        physical, idx = (np.concatenate([result[lag][k].numpy().ravel() for result in results]) for k in (1, 2))
        assert np.array_equal(physical < 0, idx < 0)
        assert np.array_equal(second.phy2log.numpy()[physical[idx >= 0]], idx[idx >= 0])
