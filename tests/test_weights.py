"""The mover of weights: schedules, random moves over gloo processes, bad input, lost ranks, memory."""

import os
import random
import signal
from collections import Counter, defaultdict
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_distributed import call, on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from lplb import Placement
from lplb.weights import Move, Moved, WeightMover, moves_between
from lplb.weights.moves import rounds_of, sum_rounds

# Schedules, without processes


def random_moves(seed, n_ranks, n_slots, n_target_slots=None, once=True):
    """Sources by chance, permuted, or few for many targets; `once`: none for two slots of a rank, as in placements."""
    rng = random.Random(seed)
    sources = [(rank, slot) for rank in range(n_ranks) for slot in range(n_slots)]
    targets = [(rank, slot) for rank in range(n_ranks) for slot in range(n_target_slots or n_slots)]
    targets = rng.sample(targets, rng.randint(0, len(targets)))
    kind = rng.randrange(3)
    if kind == 0 and len(targets) <= len(sources):
        chosen = rng.sample(sources, len(targets))
    else:
        chosen = rng.choices(sources[:3] if kind == 1 else sources, k=len(targets))
    moves = [Move(s[0] * n_slots + s[1], *s, *t) for s, t in zip(chosen, targets, strict=True)]
    return list({m[:4]: m for m in moves}.values()) if once else moves


def play(rounds, state, in_place):
    """What a rank does in a round, on a dict of slots: packs, unpacks what came, then sends and receives."""
    target = state if in_place else {}
    came = {}
    for hops in [*rounds, []]:
        assert len({hop.move.source_rank for hop in hops}) == len(hops)
        assert len({hop.move.target_rank for hop in hops}) == len(hops)
        packed = {hop: (target if hop.forwarded else state)[hop.move[1:3]] for hop in hops}
        target.update(came)
        came = {hop.move[3:5]: content for hop, content in packed.items()}
    assert not came
    return target


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("n_ranks", "n_slots"), [(1, 1), (1, 6), (2, 3), (4, 1), (4, 4), (16, 8)])
def test_rounds_do_what_the_moves_say(n_ranks, n_slots, in_place):
    for seed in range(60):
        once = not in_place or seed % 2 == 0
        moves = random_moves(seed, n_ranks, n_slots, once=once and in_place)
        places = [(rank, slot) for rank in range(n_ranks) for slot in range(n_slots)]
        rounds = rounds_of(moves, in_place)
        expected = {place: place for place in places} if in_place else {}
        expected.update({move[3:5]: move[1:3] for move in moves})
        assert play(rounds, {place: place for place in places}, in_place) == expected
        # to every rank an expert is sent once, and never to one that has it
        sent = [hop.move for hops in rounds for hop in hops if hop.move.source_rank != hop.move.target_rank]
        needed = {(m[1:3], m.target_rank) for m in moves if m.source_rank != m.target_rank}
        assert len(sent) == len(needed) if once else len(sent) >= len(needed)
        # no rank can do with fewer rounds than it receives experts; greedy colouring needs less than twice as many
        received = Counter(m.target_rank for m in moves if not in_place or m[1:3] != m[3:5])
        sent_by = Counter(hop.move.source_rank for hops in rounds for hop in hops)
        most = max([0, *received.values(), *sent_by.values()])
        assert max([0, *received.values()]) <= len(rounds)
        assert len(rounds) <= 2 * most + 2 * in_place


def test_swap_and_ring_take_one_round():
    assert len(rounds_of([Move(0, 0, 0, 1, 0), Move(1, 1, 0, 0, 0)], True)) == 1
    assert len(rounds_of([Move(r, r, 0, (r + 1) % 9, 0) for r in range(9)], True)) == 1


@pytest.mark.parametrize(("copies", "n_rounds"), [(1, 1), (2, 2), (4, 3), (7, 4), (12, 5), (20, 6), (33, 7), (54, 8)])
def test_one_expert_for_many_ranks_is_passed_on(copies, n_rounds):
    """Ranks that have it: 1, 2, 3, then as many more as had it two rounds before."""
    assert len(rounds_of([Move(0, 0, 0, 1 + rank, 0) for rank in range(copies)], True)) == n_rounds


def test_sums_come_slot_by_slot_in_the_order_of_ranks():
    for seed in range(50):
        rng = random.Random(seed)
        n_ranks, n_slots = rng.choice([2, 4, 9]), rng.choice([1, 3])
        edges = {(rng.randrange(n_ranks), rng.randrange(n_slots), rng.randrange(n_ranks)) for _ in range(40)}
        moves = [Move(0, source, 0, rank, slot) for rank, slot, source in sorted(edges) if source != rank]
        rounds = sum_rounds(moves)
        assert sorted(m for ms in rounds for m in ms) == sorted(moves)
        for ms in rounds:
            assert len({m.source_rank for m in ms}) == len({m.target_rank for m in ms}) == len(ms) > 0
        for rank in range(n_ranks):
            got = [m for ms in rounds for m in ms if m.target_rank == rank]
            assert got == sorted(got, key=lambda m: (-m.target_slot, m.source_rank))


# From one placement to another


def random_placement(rng, n_ranks, n_slots, n_logical):
    """Every expert once, then experts by chance where their rank has none of it."""
    ranks = [set() for _ in range(n_ranks)]
    for expert in rng.sample(range(n_logical), n_logical):
        rng.choice([held for held in ranks if len(held) < n_slots]).add(expert)
    for held in ranks:
        held.update(rng.sample(sorted(set(range(n_logical)) - held), n_slots - len(held)))
    return Placement([e for held in ranks for e in rng.sample(sorted(held), n_slots)], n_ranks, n_logical)


def test_moves_between_random_placements():
    for seed in range(100):
        rng = random.Random(seed)
        n_ranks, n_slots = rng.choice([1, 2, 5, 8]), rng.choice([2, 4])
        n_logical = rng.randint(n_slots, n_ranks * n_slots)
        before, after = (random_placement(rng, n_ranks, n_slots, n_logical) for _ in range(2))
        moves = moves_between(before, after)
        old, new = (p.phy2log.view(n_ranks, n_slots).tolist() for p in (before, after))
        changed = [(r, s) for r in range(n_ranks) for s in range(n_slots) if old[r][s] != new[r][s]]
        assert [(m.target_rank, m.target_slot) for m in moves] == changed
        for move in moves:
            assert old[move.source_rank][move.source_slot] == move.expert == new[move.target_rank][move.target_slot]
            if move.expert in old[move.target_rank]:
                assert move.source_rank == move.target_rank
        held = {(r, s): old[r][s] for r in range(n_ranks) for s in range(n_slots)}
        assert play(rounds_of(moves, True), held, True) == {
            (r, s): new[r][s] for r in range(n_ranks) for s in range(n_slots)
        }


def test_moves_between_balances_senders():
    before = Placement([0, 1, 0, 2, 0, 3, 4, 5, 6, 7, 8, 9], 6)
    after = Placement([0, 1, 4, 0, 2, 4, 0, 3, 4, 4, 5, 0, 6, 7, 0, 8, 9, 0], 6)
    moves = moves_between(before, after)
    assert sorted(m.source_rank for m in moves if m.expert == 0) == [0, 1, 2]
    assert [m.source_rank for m in moves if m.expert == 4] == [3, 3, 3]
    # what only one rank has is taken first
    before, after = Placement([0, 1, 0, 2, 3, 4], 3), Placement([0, 1, 3, 0, 2, 4, 0, 1, 3], 3)
    assert moves_between(before, after) == [
        Move(3, 2, 0, 0, 2), Move(4, 2, 1, 1, 2), Move(0, 1, 0, 2, 0), Move(1, 0, 1, 2, 1), Move(3, 2, 0, 2, 2),
    ]  # fmt: skip


def test_moves_between_refuses():
    two = Placement([0, 1], 1)
    with pytest.raises(TypeError, match="after is a list, allowed is an"):
        moves_between(two, [0])
    with pytest.raises(ValueError, match="after has 2 ranks, allowed is as many as before, 1"):
        moves_between(two, Placement([0, 1], 2))
    with pytest.raises(ValueError, match="after has 3 experts, allowed are the 2 of before"):
        moves_between(two, Placement([0, 1, 2], 1))


# Tensors of any kind, as bytes from seeds

KINDS = [
    ("stacked", (3, 5), torch.float32),
    ("parameters", (7,), torch.bfloat16),
    ("tensors", (), torch.float64),
    ("stacked", (), torch.float32),
    ("stacked", (2, 3), torch.float8_e4m3fn),
    ("strided", (5, 3), torch.int8),
    ("tensors", (3,), torch.bool),
    ("strided", (2, 2), torch.float16),
    ("tensors", (0, 4), torch.float32),
    ("inference", (3,), torch.bfloat16),
    ("stacked", (2,), torch.complex64),
]
EXPERT_BYTES = 60 + 14 + 8 + 4 + 6 + 15 + 3 + 8 + 0 + 6 + 16


def bytes_of(seed, rank, slot, field):
    _, shape, dtype = KINDS[field]
    n = int(np.prod(shape)) * dtype.itemsize
    return np.random.default_rng([seed, rank, slot, field]).integers(0, 2 if dtype == torch.bool else 256, n, np.uint8)


def fields_for(seed, rank, n_slots):
    """All kinds; NaNs among them."""
    fields = []
    for i, (how, shape, dtype) in enumerate(KINDS):
        slots = [torch.empty(shape, dtype=dtype) for _ in range(n_slots)]
        for slot, tensor in enumerate(slots if slots[0].numel() else []):
            tensor.set_(torch.from_numpy(bytes_of(seed, rank, slot, i)).view(dtype).view(shape))
        if how == "stacked":
            fields.append(torch.stack(slots))
        elif how == "parameters":
            fields.append(torch.nn.ParameterList([torch.nn.Parameter(t) for t in slots]))
        elif how == "strided":
            fields.append([t.t().contiguous().t() for t in slots])
        elif how == "inference":
            with torch.inference_mode():
                fields.append([t.clone() for t in slots])
        else:
            fields.append(slots)
    return fields


def holds(fields, slot, seed, source):
    """Whether a slot has, bit for bit, what a source had at first."""
    for i, field in enumerate(fields):
        tensor = field[slot].detach().contiguous()
        found = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)
        if not np.array_equal(found, bytes_of(seed, *source, i)):
            return False
    return True


def move_at_random(rank, size, seeds):
    """In place, into other tensors, in steps; each against what the list of moves says."""
    moved = []
    for seed in seeds:
        n_slots = [1, 3, 4][seed % 3]
        moves = random_moves(seed, size, n_slots)
        fields = fields_for(seed, rank, n_slots)
        mover = WeightMover(fields, dist.group.WORLD if size > 1 or seed % 2 else None)
        assert (mover.expert_bytes, mover.buffer_bytes) == (EXPERT_BYTES, 2 * EXPERT_BYTES)
        done = mover.move(moves)
        content = {(rank, slot): (rank, slot) for slot in range(n_slots)}
        content.update({m[3:5]: m[1:3] for m in moves if m.target_rank == rank})
        assert all(holds(fields, slot, seed, source) for (_, slot), source in content.items())

        fields, other = fields_for(seed, rank, n_slots), fields_for(seed + 999, rank, 5)
        moves_away = random_moves(seed + 7, size, n_slots, 5)
        with torch.inference_mode(seed % 2 == 0):
            steps = list(WeightMover(fields, dist.group.WORLD).rounds(moves_away, other))
        content = {slot: (seed + 999, (rank, slot)) for slot in range(5)}
        content.update({m.target_slot: (seed, m[1:3]) for m in moves_away if m.target_rank == rank})
        assert all(holds(other, slot, *expected) for slot, expected in content.items())
        assert all(holds(fields, slot, seed, (rank, slot)) for slot in range(n_slots))
        assert all(step.rounds == 1 and step.bytes_sent <= EXPERT_BYTES >= step.bytes_received for step in steps)
        moved.append((moves, done, moves_away, Moved(len(steps), *(sum(s[i] for s in steps) for i in (1, 2)))))
    return moved


@pytest.mark.parametrize(("size", "n_seeds"), [(1, 12), (2, 30), (4, 24), (8, 9)])
def test_random_moves_over_processes(size, n_seeds, tmp_path):
    results = on_ranks(size, tmp_path, move_at_random, size, range(n_seeds))
    some = 0
    for rows in zip(*results, strict=True):
        for k in (0, 2):
            moves = rows[0][k]
            arrivals = {(m[1:3], m.target_rank) for m in moves if m.source_rank != m.target_rank}
            assert sum(row[k + 1].bytes_sent for row in rows) == EXPERT_BYTES * len(arrivals)
            for rank, row in enumerate(rows):
                assert row[k + 1].bytes_received == EXPERT_BYTES * sum(target == rank for _, target in arrivals)
                assert row[k + 1].rounds == rows[0][k + 1].rounds
            some += len(arrivals)
    assert (some > 0) == (size > 1)


def test_one_rank_without_a_group():
    fields = [torch.arange(6.0).view(3, 2), [torch.tensor(slot) for slot in range(3)]]
    mover = WeightMover(fields)
    assert mover.move([Move(0, 0, 0, 0, 2), Move(2, 0, 2, 0, 1), Move(1, 0, 1, 0, 0)]) == (3, 0, 0)
    assert fields[0].tolist() == [[2, 3], [4, 5], [0, 1]]
    assert [int(t) for t in fields[1]] == [1, 2, 0]
    assert mover.move([]) == mover.move([Move(0, 0, 1, 0, 1)]) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"moves\[0\].target_rank is 1, allowed is 0 to 0"):
        mover.move([Move(0, 0, 0, 1, 0)])


def test_tensors_with_overlapping_extents():
    """Slots that lie in one another's strides are apart all the same."""
    whole = torch.arange(12.0).view(4, 3)
    mover = WeightMover([whole.t()])
    mover.move([Move(0, 0, 0, 0, 1), Move(1, 0, 1, 0, 0)])
    assert whole.tolist() == [[1, 0, 2], [4, 3, 5], [7, 6, 8], [10, 9, 11]]


# Parts of the world


def move_in_pairs(rank):
    """Ranks 1 and 3 are one group, 0 and 2 another; moves count ranks within them."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    field = torch.tensor([rank * 10, rank * 10 + 1])
    WeightMover([field], groups[rank % 2]).move([Move(0, 0, 0, 1, 1), Move(1, 1, 0, 0, 0), Move(2, 1, 1, 0, 1)])
    outside = call(WeightMover, [field], groups[1 - rank % 2])
    return field.tolist(), outside


def test_groups_within_the_world(tmp_path):
    fields, outside = zip(*on_ranks(4, tmp_path, move_in_pairs), strict=True)
    assert fields == ([20, 21], [30, 31], [20, 0], [30, 10])
    assert all(fault is not None for fault in outside)


# Memory


class Allocated(TorchDispatchMode):
    """Bytes of the storages that operators make."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.new = defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                storage = tensor.untyped_storage()
                self.new[storage.data_ptr()] = max(self.new[storage.data_ptr()], storage.nbytes())
        return result


def move_with_count(rank):
    fields = [torch.zeros(6, 200, 100), [torch.zeros(4000, dtype=torch.bfloat16) for _ in range(6)]]
    mover = WeightMover(fields, dist.group.WORLD)
    with Allocated([fields[0], *fields[1]]) as allocated:
        done = mover.move([Move(s, r, s, (r + 1) % 2, (s + 1) % 6) for r in range(2) for s in range(6)])
    large = [n for n in allocated.new.values() if n > 10_000]
    return done, mover.expert_bytes, large


def test_one_flat_buffer_for_each_direction(tmp_path):
    for done, expert_bytes, large in on_ranks(2, tmp_path, move_with_count):
        assert expert_bytes == 88_000
        assert done.bytes_sent == done.bytes_received == 6 * expert_bytes
        assert large == [expert_bytes] * 2


# Bad input on one rank

SICK = 1
SLOTS = 3


def good_fields(rank=0):
    return [torch.full((SLOTS, 4), float(rank)), [torch.full((2,), rank, dtype=torch.int8) for _ in range(SLOTS)]]


def build(fields):
    return WeightMover(fields, dist.group.WORLD)


def move(mover, *arguments):
    return mover.move(*arguments)


def into(mover, fields):
    return mover.move(GOOD, fields)


GOOD = [Move(0, 0, 0, 1, 0), Move(7, 1, 2, 2, 1)]
FIELDS = good_fields()
EXPANDED = torch.zeros(4).expand(SLOTS, 4)
SAME = torch.zeros(4)
REFUSED = f"rank {SICK} refused its input, so no rank goes on: "
DIFFERS = f"rank {SICK} has other "

# name: (call with the mover, the bad argument, the good one, exception, what the bad rank says)
ON_ONE_RANK = {
    "fields no sequence": (lambda m, f: build(f), None, FIELDS, "TypeError", "params_per_expert is a NoneType"),
    "fields a tensor": (lambda m, f: build(f), FIELDS[0], FIELDS, "TypeError", "is a torch.float32 tensor [3, 4]"),
    "no fields": (lambda m, f: build(f), [], FIELDS, "ValueError", "has no fields"),
    "no tensors": (lambda m, f: build(f), [[1, 2], [3, 4]], FIELDS, "TypeError", "[0][0] is a int"),
    "no slots": (lambda m, f: build(f), [[], []], FIELDS, "ValueError", "[0] has no slots"),
    "not stacked": (lambda m, f: build(f), [torch.tensor(1.0)], FIELDS, "ValueError", "[0] has shape []"),
    "slot counts": (
        lambda m, f: build(f), [FIELDS[0], FIELDS[1][:2]], FIELDS, "ValueError", "[1] has 2 slots, allowed is as many",
    ),
    "slot shapes": (
        lambda m, f: build(f), [FIELDS[0], [*FIELDS[1][:2], torch.zeros(3, dtype=torch.int8)]], FIELDS,
        "ValueError", "[1][2] is a torch.int8 tensor [3]",
    ),
    "slot dtypes": (
        lambda m, f: build(f), [FIELDS[0], [*FIELDS[1][:2], torch.zeros(2)]], FIELDS,
        "ValueError", "[1][2] is a torch.float32 tensor [2]",
    ),
    "shared slots": (lambda m, f: build(f), [[SAME] * 3], FIELDS, "ValueError", "[0][1] is the memory of slot 0"),
    "expanded": (lambda m, f: build(f), [EXPANDED], FIELDS, "ValueError", "[0] has strides [0, 1]"),
    "sparse": (lambda m, f: build(f), [torch.eye(3).to_sparse()], FIELDS, "TypeError", "layout torch.sparse_coo"),
    "no memory": (
        lambda m, f: build(f), [torch.zeros(SLOTS, 4, device="meta")], FIELDS, "TypeError", "on 'meta'",
    ),
    "other fields": (lambda m, f: build(f), FIELDS[:1], FIELDS, "ValueError", DIFFERS + "fields"),
    "other shapes": (
        lambda m, f: build(f), [torch.zeros(SLOTS, 5), FIELDS[1]], FIELDS, "ValueError", DIFFERS + "fields",
    ),
    "other dtypes": (
        lambda m, f: build(f), [FIELDS[0].half(), FIELDS[1]], FIELDS, "ValueError", DIFFERS + "fields",
    ),
    "moves no sequence": (move, None, GOOD, "TypeError", "moves is a NoneType"),
    "no move": (move, [(0, 0)], GOOD, "TypeError", "moves[0] is (0, 0), allowed is an lplb.weights.Move"),
    "source rank": (move, [Move(0, 9, 0, 1, 0)], GOOD, "ValueError", "moves[0].source_rank is 9, allowed is 0 to 2"),
    "source slot": (
        move, [Move(0, SICK, SLOTS, 0, 0)], GOOD, "ValueError", "moves[0].source_slot is 3, allowed is 0 to 2",
    ),
    "target slot": (
        move, [Move(0, 0, 0, SICK, -1)], GOOD, "ValueError", "moves[0].target_slot is -1, allowed is 0 to 2",
    ),
    "rank no int": (
        move, [Move(0, 0, 0, 1.0, 0)], GOOD, "TypeError", "moves[0].target_rank is 1.0, allowed is an int",
    ),
    "two in one slot": (
        move, [Move(0, 0, 0, 1, 1), Move(1, 2, 0, 1, 1)], GOOD,
        "ValueError", "moves[1] goes to slot 1 of rank 1 as moves[0] does",
    ),
    "two from one slot": (
        move, [Move(0, 0, 0, 1, 1), Move(1, 0, 0, 1, 2)], GOOD,
        "ValueError", "moves[1] takes expert 1 from slot 0 of rank 0, where another move takes expert 0",
    ),
    "other moves": (move, GOOD[:1], GOOD, "ValueError", DIFFERS + "moves"),
    "moves in another order": (move, GOOD[::-1], GOOD, "ValueError", DIFFERS + "moves"),
    "into no fields": (into, 3, good_fields(), "TypeError", "into is a int"),
    "into other dtype": (
        into, [FIELDS[0].half(), FIELDS[1]], good_fields(),
        "ValueError", "into has 3 slots of (float16 [4], int8 [2]) on 'cpu', allowed are fields like",
    ),
    "into too few slots": (
        into, [FIELDS[0][:0], FIELDS[1]], good_fields(), "ValueError", "into[0] has shape [0, 4]",
    ),
    "into by another rank only": (into, None, good_fields(), "ValueError", DIFFERS + "moves"),
}  # fmt: skip


def bad_input(rank):
    """Every case in turn; then whether nothing moved, and whether a good move works."""
    fields = good_fields(rank)
    mover = build(fields)
    own = torch.equal(fields[0], good_fields(rank)[0])
    record = {}
    for name, (function, bad, good, *_) in ON_ONE_RANK.items():
        raised = call(function, mover, bad if rank == SICK else good)
        same = all(torch.equal(a[s], b[s]) for a, b in zip(fields, good_fields(rank), strict=True) for s in range(3))
        target = good_fields(-1)
        mover.move(GOOD, target)
        record[name] = raised, same, target[0][:, 0].tolist()

    # memory of the sources in another order would be lost
    turned = [fields[0].flip(0).clone().set_(fields[0].untyped_storage(), 4, (2, 4)), fields[1][1:]]
    record["shared"] = call(mover.move, GOOD, turned)
    record["aliased"] = mover.move(GOOD, [fields[0][:], list(fields[1])]), fields[0][:, 0].tolist()
    # a list of experts that became other ones
    fields[1][0] = torch.zeros(5, dtype=torch.int8) if rank == SICK else fields[1][0]
    record["changed"] = call(mover.move, GOOD)
    record["group"] = call(WeightMover, fields, "group")
    return own, record


@pytest.fixture(scope="module")
def sick_group(tmp_path_factory):
    return on_ranks(3, tmp_path_factory.mktemp("sick_movers"), bad_input)


@pytest.mark.parametrize("name", list(ON_ONE_RANK))
def test_bad_input_on_one_rank(name, sick_group):
    *_, kind, message = ON_ONE_RANK[name]
    after = [[-1, -1, -1], [0, -1, -1], [-1, 1, -1]]
    for rank, (own, record) in enumerate(sick_group):
        raised, same, moved = record[name]
        assert own
        assert raised is not None, f"rank {rank} did not raise"
        assert raised[0] == kind
        assert "allowed" in raised[1]
        if message.startswith(DIFFERS):
            assert raised[1].startswith(message)
        else:
            assert message in raised[1]
            assert raised[1].startswith(REFUSED) == (rank != SICK)
        assert same
        assert moved == after[rank]


def test_sources_and_targets_that_share_memory(sick_group):
    for rank, (_, record) in enumerate(sick_group):
        assert record["shared"][0] == "ValueError"
        assert "into shares memory with the source in another order" in record["shared"][1]
        moved = (1, *[(18, 0), (18, 18), (0, 18)][rank])
        assert record["aliased"] == (moved, [[0, 0, 0], [0, 1, 1], [2, 1, 2]][rank])
        assert record["changed"][0] == "ValueError"
        assert record["group"] == (
            "TypeError", "group is a str, allowed is a torch.distributed.ProcessGroup or None"
        )  # fmt: skip


# Lost ranks


def leave(folder, rank, result):
    """End without the goodbye of `on_ranks`, which a broken group cannot say."""
    torch.save(result, f"{folder}/{rank}.pt")
    os._exit(0)


def die_in_a_move(rank, folder, pairs):
    """Rank 3 is killed after its first round; in pairs, ranks 0 and 1 have nothing to do with it."""
    n_slots = 6
    to = [1, 0, 3, 2] if pairs else [1, 2, 3, 0]
    moves = [Move(r * n_slots + s, r, s, to[r], s) for r in range(4) for s in range(n_slots)]
    fields, targets = [torch.full((n_slots, 1000), float(rank))], [torch.zeros(n_slots, 1000)]
    mover = WeightMover(fields, dist.group.WORLD)
    if rank == 3:
        torch.save(None, f"{folder}/{rank}.pt")
        next(mover.rounds(moves, targets))
        os.kill(os.getpid(), signal.SIGKILL)
    raised = call(mover.move, moves, targets)
    leave(folder, rank, (raised, torch.equal(fields[0], torch.full((n_slots, 1000), float(rank)))))


@pytest.mark.parametrize("pairs", [False, True])
def test_a_killed_rank_is_an_error_on_all_others(pairs, tmp_path):
    for raised, same in on_ranks(4, tmp_path, die_in_a_move, str(tmp_path), pairs)[:3]:
        assert raised is not None
        assert raised[0] == "RuntimeError"
        assert "moving weights stopped" in raised[1]
        assert same


def stay_away(rank):
    """Rank 1 does not take part; the others wait for as long as their group says."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    mover = WeightMover([torch.zeros(2, 3)], group)
    steps = mover.rounds([Move(r, r, s, (r + 1) % 3, s) for r in range(3) for s in range(2)])
    raised = call(list, steps) if rank != 1 else None
    dist.barrier()
    return raised


def test_a_rank_that_stays_away_is_an_error_on_all_others(tmp_path):
    raised = on_ranks(3, tmp_path, stay_away)
    for found in raised[::2]:
        assert found is not None
        assert found[0] == "RuntimeError"
        assert "moving weights stopped in round" in found[1]


def fail_alone(rank):
    """A fault of one rank in the middle of a move: here, of a tensor that has become another."""
    fields = [[torch.full((3,), float(rank)) for _ in range(2)]]
    mover = WeightMover(fields, dist.group.WORLD)
    steps = mover.rounds([Move(0, 0, 0, 1, 0), Move(1, 0, 1, 1, 1), Move(2, 1, 0, 0, 0)])
    if rank == 1:
        fields[0][1] = torch.zeros(5)
    raised = call(list, steps)
    again = call(WeightMover([torch.zeros(1)], dist.group.WORLD).move, [Move(0, 0, 0, 1, 0)])
    return raised, again


def test_a_fault_of_one_rank_keeps_none_waiting(tmp_path):
    for raised, again in on_ranks(2, tmp_path, fail_alone):
        assert raised is not None
        assert raised[0] == "RuntimeError"
        assert "moving weights stopped at its end" in raised[1]
        assert again is None
