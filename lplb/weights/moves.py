"""Which expert goes from which slot to which, and in what rounds: no communication here."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import count
from typing import NamedTuple

from lplb.arguments import seen, whole_number
from lplb.placement import Placement

__all__ = ["Hop", "Move", "checked_moves", "moves_between", "rounds_of", "sum_rounds"]


class Move(NamedTuple):
    """An expert that goes from a slot of one rank to a slot of another, or of the same."""

    expert: int
    """Logical expert."""
    source_rank: int
    """Rank that has it."""
    source_slot: int
    """Where it is: a slot of that rank, counted from 0."""
    target_rank: int
    """Rank that gets it."""
    target_slot: int
    """Where it goes: a slot of that rank, counted from 0."""


class Hop(NamedTuple):
    """One transfer of a round."""

    move: Move
    """From where the bytes are taken, to where they go."""
    forwarded: bool
    """Whether they are taken from a slot that an earlier round wrote, not from one as it was before."""


_Place = tuple[int, int]  # rank, slot


def moves_between(before: Placement, after: Placement) -> list[Move]:
    """What has to move when one placement follows another.

    One move for every slot of ``after`` that held another expert before. Its source is the rank itself if it had the
    expert in any slot; otherwise, of the ranks that had it, the one with the fewest sends so far: experts with the
    fewest holders choose first, and the lowest rank wins a tie.

    Args:
        before: where experts are.
        after: where they are to be, on as many ranks; the slots per rank may differ.

    Returns:
        The moves in the order of the slots of ``after``; the same on every rank.

    Raises:
        TypeError: an argument is not a `Placement`.
        ValueError: the numbers of ranks differ, or ``after`` has experts that ``before`` has not.
    """
    for name, placement in (("before", before), ("after", after)):
        if not isinstance(placement, Placement):
            raise TypeError(f"{name} is {seen(placement)}, allowed is an lplb.Placement")
    if after.n_ranks != before.n_ranks:
        raise ValueError(f"after has {after.n_ranks} ranks, allowed is as many as before, {before.n_ranks}")
    if after.n_logical > before.n_logical:
        raise ValueError(f"after has {after.n_logical} experts, allowed are the {before.n_logical} of before")
    n = before.slots_per_rank
    slot_of = {(expert, slot // n): slot % n for slot, expert in enumerate(before.phy2log.tolist())}
    holders: dict[int, list[int]] = defaultdict(list)
    for expert, rank in slot_of:
        holders[expert].append(rank)

    moves: dict[int, Move] = {}
    away = []
    for slot, expert in enumerate(after.phy2log.tolist()):
        rank, local = divmod(slot, after.slots_per_rank)
        own = slot_of.get((expert, rank))
        if own is None:
            away.append((len(holders[expert]), slot, expert))
        elif own != local:
            moves[slot] = Move(expert, rank, own, rank, local)
    sends: Counter[int] = Counter()
    for _, slot, expert in sorted(away):
        source = min(holders[expert], key=lambda rank: (sends[rank], rank))
        sends[source] += 1
        moves[slot] = Move(expert, source, slot_of[expert, source], *divmod(slot, after.slots_per_rank))
    return [moves[slot] for slot in sorted(moves)]


def checked_moves(moves: object, rank: int, size: int, n_source: int, n_target: int) -> list[Move]:
    """Return the moves with Python ints.

    Args:
        moves: what a caller gives.
        rank: this rank, whose slots are checked.
        size: number of ranks.
        n_source: slots of this rank that can be read.
        n_target: slots of this rank that can be written.

    Raises:
        TypeError: ``moves`` is no sequence of five ints each.
        ValueError: a rank or slot is out of bounds, two moves have one target, or one source is two experts.
    """
    if not isinstance(moves, Sequence) or isinstance(moves, (str, bytes)):
        raise TypeError(f"moves is {seen(moves)}, allowed is a sequence of lplb.weights.Move")
    checked: list[Move] = []
    written: dict[_Place, int] = {}
    held: dict[_Place, int] = {}
    for i, move in enumerate(moves):
        if not isinstance(move, tuple) or len(move) != len(Move._fields):
            raise TypeError(f"moves[{i}] is {move!r}, allowed is an lplb.weights.Move")
        given = Move(*move)
        highest = {
            "source_rank": size - 1,
            "target_rank": size - 1,
            "source_slot": n_source - 1 if given.source_rank == rank else None,
            "target_slot": n_target - 1 if given.target_rank == rank else None,
        }
        values = [whole_number(f"moves[{i}].{name}", v, 0, highest.get(name)) for name, v in given._asdict().items()]
        good = Move(*values)
        source, target = good[1:3], good[3:5]
        if target in written:
            raise ValueError(
                f"moves[{i}] goes to slot {target[1]} of rank {target[0]} as moves[{written[target]}] does, allowed is "
                "one move per slot"
            )
        if held.setdefault(source, good.expert) != good.expert:
            raise ValueError(
                f"moves[{i}] takes expert {good.expert} from slot {source[1]} of rank {source[0]}, where another move "
                f"takes expert {held[source]}; allowed is one expert per slot"
            )
        written[target] = i
        checked.append(good)
    return checked


# In a round a rank first packs what it sends, then unpacks what the round before brought, then sends and receives. So
# what is received in round t is in its slot for what is packed from round t + 2 on, and a slot written with what is
# received in round t can still be read, as it was before, in round t + 1.
_UNPACKED = 2
_STILL_THERE = 1


class _Calendar:
    """In which rounds each rank sends and receives."""

    def __init__(self) -> None:
        self.sends: dict[int, set[int]] = defaultdict(set)
        self.receives: dict[int, set[int]] = defaultdict(set)
        self.rounds: list[list[Hop]] = []

    def copy(self) -> "_Calendar":
        other = _Calendar()
        other.sends.update({rank: set(rounds) for rank, rounds in self.sends.items()})
        other.receives.update({rank: set(rounds) for rank, rounds in self.receives.items()})
        return other

    def first_free(self, source: int, target: int, earliest: int) -> int:
        sends, receives = self.sends[source], self.receives[target]
        return next(at for at in count(earliest) if at not in sends and at not in receives)

    def take(self, hop: Hop, at: int) -> None:
        self.sends[hop.move.source_rank].add(at)
        self.receives[hop.move.target_rank].add(at)
        while len(self.rounds) <= at:
            self.rounds.append([])
        self.rounds[at].append(hop)


def rounds_of(moves: Sequence[Move], in_place: bool) -> list[list[Hop]]:
    """Put moves into rounds, in each of which a rank sends at most one expert and receives at most one.

    Greedy colouring of the edges of a bipartite multigraph: the moves of the busiest ranks come first, each into the
    first round that is free at both ends. A move within a rank counts as its send and its receive of that round.
    Where it is earlier, or needs no communication, an expert is taken from a slot that another move has filled, so an
    expert that goes to ``n`` ranks needs about ``1.44 log2 n`` rounds.

    In place, a slot is read before it is written, or at the latest in the round after what it will hold has come,
    which waits in the buffer that long. So cycles need no other memory.

    Args:
        moves: checked moves; every one reads what its source held before all of them.
        in_place: whether targets are the slots that are read. Then a move from a slot to itself is none.

    Returns:
        For each round its hops. Rounds may be empty, and are to be waited for all the same.
    """
    moves = [m for m in moves if not in_place or m[1:3] != m[3:5]]
    degree: Counter[tuple[str, int]] = Counter()
    for move in moves:
        degree["from", move.source_rank] += 1
        degree["to", move.target_rank] += 1
    urgency = [-max(degree["from", m.source_rank], degree["to", m.target_rank]) for m in moves]
    readers: Counter[_Place] = Counter(m[1:3] for m in moves) if in_place else Counter()
    writer = {m[3:5]: i for i, m in enumerate(moves)} if in_place else {}

    calendar = _Calendar()
    last_read: dict[_Place, int] = {}
    filled: dict[_Place, list[tuple[_Place, int]]] = defaultdict(list)  # by source: copies made, and from which round
    ready = [(urgency[i], i) for i, m in enumerate(moves) if not readers[m[3:5]]]
    heapq.heapify(ready)
    left = set(range(len(moves)))
    while ready:
        i = heapq.heappop(ready)[1]
        left.remove(i)
        hop, at = _first_hop(calendar, moves[i], filled[moves[i][1:3]], last_read.get(moves[i][3:5], 0) - _STILL_THERE)
        calendar.take(hop, at)
        source, target = moves[i][1:3], moves[i][3:5]
        filled[source].append((target, at + _UNPACKED))
        if in_place:
            if not hop.forwarded:
                last_read[source] = max(at, last_read.get(source, 0))
            readers[source] -= 1
            if not readers[source] and source in writer:
                heapq.heappush(ready, (urgency[writer[source]], writer[source]))
    for cycle in _cycles({moves[i][1:3]: moves[i] for i in sorted(left)}):
        _take_cycle(calendar, cycle, last_read)
    return calendar.rounds


def _first_hop(calendar: _Calendar, move: Move, filled: Iterable[tuple[_Place, int]], earliest: int) -> tuple[Hop, int]:
    """The earliest transfer of a move, and its round; within the target's rank if there is any."""
    places = [(move[1:3], 0, False), *((place, from_round, True) for place, from_round in filled)]
    places = [p for p in places if p[0][0] == move.target_rank] or places
    best: tuple[int, Hop] | None = None
    for (rank, slot), from_round, forwarded in places:
        at = calendar.first_free(rank, move.target_rank, max(earliest, from_round, 0))
        if best is None or at < best[0]:
            best = at, Hop(move._replace(source_rank=rank, source_slot=slot), forwarded)
    assert best is not None
    return best[1], best[0]


def _cycles(by_source: dict[_Place, Move]) -> Iterable[list[Move]]:
    """Cycles of moves, each of which reads the slot that the one before writes."""
    while by_source:
        move = by_source.pop(next(iter(by_source)))
        cycle = [move]
        while move[3:5] in by_source:
            move = by_source.pop(move[3:5])
            cycle.append(move)
        yield cycle


def _take_cycle(calendar: _Calendar, cycle: list[Move], last_read: dict[_Place, int]) -> None:
    """Backwards, each move into the first round that its reader allows, until the first one fits to the last.

    The last move is tried later and later: from there each round may be one less than that of the move's reader.
    """
    for start in count():
        trial = calendar.copy()
        rounds: list[int] = []
        for move in reversed(cycle):
            read = max(rounds[-1] if rounds else start + _STILL_THERE, last_read.get(move[3:5], 0))
            at = trial.first_free(move.source_rank, move.target_rank, max(0, read - _STILL_THERE))
            trial.take(Hop(move, False), at)
            rounds.append(at)
        if rounds[-1] <= rounds[0] + _STILL_THERE:
            for move, at in zip(reversed(cycle), rounds, strict=True):
                calendar.take(Hop(move, False), at)
            return


def sum_rounds(moves: Sequence[Move]) -> list[list[Move]]:
    """Put moves into rounds so that all that a slot gets comes in the order of ranks, one slot after another.

    A rank that sums what it receives then needs memory for one message and one sum.

    Args:
        moves: from replicas to the originals of their experts; many may have one target.

    Returns:
        For each round its moves; in a round a rank sends at most one and receives at most one. The highest slots come
        first, since a backward pass ends with the first layers.
    """
    queues: dict[int, list[Move]] = defaultdict(list)
    for move in sorted(moves, key=lambda m: (m.target_slot, -m.source_rank)):  # the next one is the last of a list
        queues[move.target_rank].append(move)
    rounds: list[list[Move]] = []
    while any(queues.values()):
        taken: dict[int, Move] = {}
        for target in sorted(queues, key=lambda rank: (-len(queues[rank]), rank)):
            if queues[target] and queues[target][-1].source_rank not in taken:
                move = queues[target].pop()
                taken[move.source_rank] = move
        rounds.append(list(taken.values()))
    return rounds
