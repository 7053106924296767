"""The dispatcher of a layer: swaps and maps of many simulated ranks, permutations, the planner that follows."""

import contextlib
import copy
import dataclasses
import pickle
import random
from collections import Counter
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from pretend_cuda import pretend
from test_distributed import batch, call, on_ranks
from test_gpu_planner import need_gpu
from test_weights import random_placement

from lplb import Placement, Planner
from lplb.dynamic.dispatcher import Dispatcher
from lplb.dynamic.maps import Maps, ranks_asked
from lplb.dynamic.sources import Callback, Peers
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
    asked = np.stack([ranks_asked(placement, rank, per_node) for rank in range(n_ranks)])
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
    asked = ranks_asked(placement, 2, 1)[:60]
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
        with pytest.raises(RuntimeError, match=r"is staged|holds experts"):
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
    for device in ("foo", "meta") if torch.cuda.is_available() else ("foo", "meta", "cuda"):
        with pytest.raises(ValueError, match=f"device is '{device}', allowed is one"):
            Dispatcher(placement, good, 0, device=device)
    one = [torch.zeros(3), torch.zeros(3)]
    for twice in ([good[0], good[0]], [one, [torch.zeros(3), one[1]]], [one, one[::-1]]):
        with pytest.raises(ValueError, match=r"weights\[1\] has slot . in the memory of slot . of weights\[0\]"):
            Dispatcher(placement, twice, 0)
    Dispatcher(placement, good[0].split(1, dim=1), 0)  # parts of one tensor that have nothing in common
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


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_dispatcher_is_neither_copied_nor_pickled(duplicate):
    dispatcher = Dispatcher(Placement([0, 1], 1), [torch.zeros(2, 3)], 0)
    with pytest.raises(TypeError, match=r"a Dispatcher was copied or pickled, allowed is .* state_dict\(\)"):
        duplicate(dispatcher)
    module = torch.nn.Linear(1, 1)
    module.dispatcher = dispatcher
    if duplicate is not copy.copy:
        with pytest.raises(TypeError, match="a Dispatcher was copied or pickled"):
            duplicate(module)


def test_staging_without_memory():
    fields = Dispatcher(Placement([0, 1], 1), [torch.zeros(2, 1000)], 0).fields
    assert (Staging(fields, 3).nbytes, Staging(fields, 3).fields[0].shape) == (12000, (3, 1000))
    with pytest.raises(RuntimeError, match=f"no memory for a staging of {2**48} experts of 4000 bytes"):
        Staging(fields, 2**48)
    with pytest.raises(ValueError, match="capacity is 0, allowed is 1 or more"):
        Staging(fields, 0)
    with pytest.raises(TypeError, match="like is a list"):
        Staging([torch.zeros(2)], 1)


def test_another_placement_is_adopted_with_its_weights():
    before, after = Placement([0, 1, 1, 2], 2), Placement([0, 2, 1, 2], 2)
    planner = Planner.from_placement(before)
    dispatcher = Dispatcher(before, [torch.tensor([0.0, 2.0])], 0, planner=planner)
    permutation = dispatcher.get_expert_trans_tensor()
    staging = Staging(dispatcher.fields, 1)
    dispatcher.stage(after, staging, 3)
    with pytest.raises(RuntimeError, match="epoch 3 is staged"):
        dispatcher.adopt(after, 5)
    dispatcher.unstage()
    with pytest.raises(ValueError, match="n_ranks 1, allowed is 2"):
        dispatcher.adopt(Placement([0, 1, 2, 3], 1), 5)
    assert (dispatcher.placement, dispatcher.epoch, planner.placement) == (before, 0, before)
    dispatcher.owner = object()
    with pytest.raises(RuntimeError, match=r"a Rebalancer has the dispatcher, allowed is after its close\(\)"):
        dispatcher.adopt(after, 5)
    dispatcher.owner = None
    assert (dispatcher.placement, dispatcher.epoch, planner.placement) == (before, 0, before)
    dispatcher.adopt(after, 5)
    assert (dispatcher.placement, dispatcher.epoch, planner.placement) == (after, 5, after)
    assert dispatcher.local_expert_list == [0, 2]
    assert dispatcher.local_expert_indices_map.tolist() == [0, -1, 1]
    assert permutation.argmax(0).tolist() == [0, 2, 1, 2]
    assert dispatcher.fields.fields[0].tolist() == [0, 2]


# Streams, played: what must have happened before what


class Streams:
    """What each stream has done or waited for by now; the host waits only where it says so."""

    def __init__(self, monkeypatch):
        self.current = self.main = set()
        self.host_waits = 0
        self.capturing = False
        played = self

        class Stream(set):
            def __init__(self, device):
                super().__init__()

            def wait_event(self, event):
                self.update(event.done)

        class Event:
            def __init__(self, **_):
                self.done = set()

            def record(self, stream=None):
                self.done = set(played.current if stream is None else stream)

            def synchronize(self):
                played.host_waits += 1

        @contextlib.contextmanager
        def made_current(stream):
            before, played.current = played.current, stream
            yield
            played.current = before

        self.current = self.main = Stream(None)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", made_current)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def do(self, *what):
        self.current.add(what)


@pytest.fixture
def streams(monkeypatch):
    played = Streams(monkeypatch)
    cuda = torch.device("cuda", 0)
    allocated, taking, write = Staging._allocated, Staging.taking, Maps.write

    def on_cpu(staging):
        staging.device = torch.device("cpu")
        fields = allocated(staging)
        staging.device = cuda
        return fields

    @contextlib.contextmanager
    def taken(staging):
        with taking(staging):
            yield
            played.do("swap", staging)

    monkeypatch.setattr(Staging, "_allocated", on_cpu)
    monkeypatch.setattr(Staging, "taking", taken)

    def written(maps, host):
        assert {done for done in played.main if done == ("read maps", maps)} <= played.current
        played.do("write maps", maps)
        write(maps, host)

    monkeypatch.setattr(Maps, "write", written)
    renew = Dispatcher._renew_permutations  # what follows the copy of the maps
    monkeypatch.setattr(
        Dispatcher, "_renew_permutations", lambda self: (played.do("read maps", self._next_maps), renew(self))
    )
    return played


def as_on_cuda(dispatcher):
    """It takes itself to be on a device, which is played in host memory."""
    dispatcher.device = dispatcher._cuda = torch.device("cuda", 0)
    dispatcher.fields = dataclasses.replace(dispatcher.fields, device=dispatcher.device)
    dispatcher._swapped = torch.cuda.Event()
    return dispatcher


def test_streams_wait_for_one_another_and_the_host_for_none(streams):
    """Two layers share a staging: what is written, by whom, behind whose reading."""
    rng = random.Random(4)
    placements = [random_placement(rng, 2, 3, 4) for _ in range(6)]
    layers = [as_on_cuda(dispatchers_for(placements[0])[0]) for _ in range(2)]
    staging = Staging(layers[0].fields, 3)
    transfer = staging.transfer_stream
    for epoch, (before, after) in enumerate(pairwise(placements)):
        if epoch > 3:  # nobody has taken from another one yet
            staging = Staging(layers[0].fields, 3)
            transfer = staging.transfer_stream
        for dispatcher in layers if epoch <= 3 else layers[:1]:
            swaps = {done for done in streams.main if done == ("swap", staging)}
            found = arrivals(before, after, 0)

            def load(layer, expert, into, epoch=epoch, swaps=swaps, transfer=transfer):
                assert streams.current is transfer
                assert swaps <= transfer  # all that has read the staging before
                streams.do("fill", epoch, layer, expert)
                for tensor, stored in zip(into, fields_for([expert]), strict=True):
                    tensor.copy_(stored[0])

            for step, _ in enumerate(Callback(load, 0).bring(layers.index(dispatcher), found.moves, staging), 1):
                assert streams.host_waits == step  # what is yielded has come
                assert streams.current is streams.main
            dispatcher.stage(after, staging, epoch + 1)
            assert streams.current is streams.main
            filled = {done for done in transfer if done[0] != "swap"}
            assert not found.slots or not filled <= streams.main
            streams.host_waits = 0
            streams.capturing = True
            dispatcher.point.promise(dispatcher.steps + 1, 1)
            dispatcher.point.agree()
            assert dispatcher.check_consistency()
            with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
                dispatcher.update_module_weight_and_map()
            assert dispatcher.placement == before
            streams.capturing = False
            dispatcher.update_module_weight_and_map()
            assert streams.host_waits == 0
            assert filled <= streams.main  # the swap has waited for them
            assert all(holds(dispatcher.fields.fields, s, e) for s, e in enumerate(experts_on(after, 0)))
            streams.host_waits = 0


def test_peers_read_behind_the_last_swap(streams):
    """A transfer from live slots, into a staging that this layer's last swap has not used."""
    placements = [Placement([0, 1, 2], 1), Placement([1, 2, 0], 1), Placement([2, 1, 0], 1)]
    dispatcher = Dispatcher(placements[0], fields_for([0, 1, 2]), 0)
    source = Peers([dispatcher])
    as_on_cuda(dispatcher)
    for epoch, (before, after) in enumerate(pairwise(placements), 1):
        staging = Staging(dispatcher.fields, 3)
        staging.device = torch.device("cpu")  # for the mover, which knows where the weights are
        steps = source.bring(0, arrivals(before, after, 0).moves, staging)
        assert {done for done in streams.main if done[0] == "swap"} <= staging.transfer_stream
        assert len(list(steps)) == len(arrivals(before, after, 0).slots)
        staging.device = dispatcher.device
        dispatcher.stage(after, staging, epoch)
        swap_now(dispatcher)
        assert all(holds(dispatcher.fields.fields, s, e) for s, e in enumerate(experts_on(after, 0)))
    assert streams.current is streams.main


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
    planner.replace_placement(placement)  # what has been used, and what another planner's is, is made anew
    assert planner.last_plan is None
    other = Planner.from_placement(first, solver="flow")
    other.replace_placement(planner.compiled_for(second))
    other.run(idx, None)
    assert other.last_plan.solver == "flow"
    assert planner.last_plan is None


def test_a_planner_of_kernels_follows(monkeypatch):
    """The CUDA backend, its kernels played."""
    pretend(monkeypatch.setattr)
    first, second = placements_for(4, 2)
    planner, fresh = Planner.from_placement(first), Planner.from_placement(second)
    idx = batch(1, (50, 4), 12)
    planner.run(idx, None)
    planner.replace_placement(planner.compiled_for(second))
    assert torch.equal(planner.run(idx, None), fresh.run(idx, None))


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
        calls = [call(partial(planner.run, idx, None, lag=lag)) for _ in range(2)]
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


# On a device


def on_device(placement, rank, **settings):
    fields = [[t.cuda() for t in field] for field in fields_for(experts_on(placement, rank))]
    return Dispatcher(placement, fields, rank, **settings)


def holds_on_device(dispatcher, experts):
    fields = [[t.cpu() for t in field] for field in dispatcher.fields.fields]
    return all(holds(fields, slot, expert) for slot, expert in enumerate(experts))


@pytest.mark.gpu
def test_swaps_on_a_device_while_it_is_busy():
    need_gpu()
    placements = [random_placement(random.Random(4), 2, 4, 6) for _ in range(5)]
    dispatcher = on_device(placements[0], 0)
    staging = Staging(dispatcher.fields, 4)
    for epoch, after in enumerate(placements[1:], 1):
        torch.cuda._sleep(200_000_000)
        found = arrivals(dispatcher.placement, after, 0)
        staging.begin()
        with staging.filling():
            bring(found.moves, staging, 0)
        dispatcher.stage(after, staging, epoch)
        torch.cuda._sleep(200_000_000)
        update = swap_now(dispatcher)
        assert not torch.cuda.current_stream().query()  # the host has not waited
        assert update.local_expert_indices_map.tolist() == maps_by_brute_force(after, 0)[0]
        assert holds_on_device(dispatcher, experts_on(after, 0))


@pytest.mark.gpu
def test_captured_graphs_see_the_new_placement():
    need_gpu()
    before, after = Placement([0, 1, 1, 2], 2), Placement([0, 2, 1, 2], 2)
    weight = torch.nn.Parameter(torch.tensor([[1.0], [2.0]], device="cuda"))
    dispatcher = Dispatcher(before, [weight], 0)
    permutation = dispatcher.get_expert_trans_tensor()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        seen = [weight + 0, dispatcher.device_indices_map + 0, dispatcher.log2phy + 0, permutation.argmax(0)]
    staging = Staging(dispatcher.fields, 1)
    staging.begin()
    with staging.filling():
        staging.fields[0].fill_(3.0)
    dispatcher.stage(after, staging, 1)
    for placement, values in ((before, [1, 2]), (after, [1, 3])):
        if placement is after:
            swap_now(dispatcher)
        graph.replay()
        assert seen[0].flatten().tolist() == values
        assert seen[1].tolist() == ranks_asked(placement, 0, dispatcher.ranks_per_node).tolist()
        assert [[s for s in row if s >= 0] for row in seen[2].tolist()] == maps_by_brute_force(placement, 0)[1]
        assert seen[3].tolist() == placement.phy2log.tolist()


@pytest.mark.gpu
def test_a_planner_on_a_device_follows():
    need_gpu()
    first, second = placements_for(4, 2)
    planner, fresh = (Planner.from_placement(placement, device="cuda") for placement in (first, second))
    idx = batch(1, (50, 4), 12).cuda()
    planner.run(idx, None)
    planner.replace_placement(planner.compiled_for(second))
    assert torch.equal(planner.run(idx, None), fresh.run(idx, None))
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="replace_placement"):
        planner.replace_placement(first)
