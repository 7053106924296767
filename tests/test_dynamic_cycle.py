"""Cycles under every order of events: background threads and forward passes of several ranks, stepped one at a time."""

import threading
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lplb.dynamic.collector import LoadCollector
from lplb.dynamic.commit import SwapPoint, agreement
from lplb.dynamic.control import Control, SkippedError, Stage
from lplb.dynamic.cycle import Cycle, Pace, Request, Wishes
from lplb.dynamic.dispatcher import Dispatcher
from lplb.dynamic.layers import Layer
from lplb.dynamic.planning import Settings
from lplb.dynamic.stats import Tally
from lplb.exchange import Known, LostRankError
from lplb.placement import Placement
from lplb.weights.mover import Moved

N_EXPERTS, SLOTS, N_LAYERS = 6, 3, 2


def random_placement(rng, n_ranks):
    """Any placement: every expert somewhere, never twice on a rank."""
    while True:
        slots = [rng.choice(N_EXPERTS, SLOTS, replace=False) for _ in range(n_ranks)]
        if set(np.concatenate(slots)) == set(range(N_EXPERTS)):
            return Placement(np.concatenate(slots), n_ranks, N_EXPERTS)


def weights_of(layer, expert):
    return torch.tensor([1000.0 * layer + expert, -float(expert)])


# ---- the step of a swap


def table_of(generators, rows):
    """Send every generator the table of all rows; return what they yield next, or return."""
    out = []
    for generator in generators:
        try:
            out.append(generator.send(rows))
        except StopIteration as end:
            out.append(end.value)
    return out


def test_ranks_swap_at_the_furthest_ranks_step_plus_ahead():
    points = [SwapPoint() for _ in range(3)]
    for n, point in zip((5, 6, 5), points, strict=True):
        assert not any(point.advance() for _ in range(n))
    agreements = [agreement([point], 8) for point in points]
    told = table_of(agreements, [next(a) for a in agreements])
    assert told == [[1], [1], [1]]
    assert table_of(agreements, told) == [[True]] * 3
    for point in points:
        swaps = [point.steps for _ in range(20) if point.advance() and point.done() is None]
        assert swaps == [14]


def test_a_rank_that_is_too_late_keeps_all_from_swapping():
    points = [SwapPoint() for _ in range(2)]
    agreements = [agreement([point], 4) for point in points]
    rows = [next(a) for a in agreements]
    for _ in range(2):  # forward passes go on while the first gather is under way
        points[1].advance()
    told = table_of(agreements, rows)
    assert told == [[1], [0]]
    assert table_of(agreements, told) == [[False]] * 2
    assert not any(point.advance() for point in points for _ in range(20))


def test_a_rank_in_doubt_waits_for_the_outcome_and_counts_it():
    point = SwapPoint()
    assert point.promise(3, 1)
    assert not point.advance()
    assert not point.advance()
    assert point.in_doubt
    outcome = []
    forward = threading.Thread(target=lambda: outcome.append(point.advance()))
    forward.start()
    forward.join(0.05)
    assert forward.is_alive()
    point.agree()
    forward.join(20)
    assert outcome == [True]
    assert point.stalls == 1
    assert point.stall_seconds > 0


@pytest.mark.parametrize("end", ["drop", "drop and promise", "fail"])
def test_a_rank_in_doubt_goes_on_with_the_old_placement_or_raises(end):
    """Another promise may have been made, and kept by all, before the thread that waited has its turn."""
    point = SwapPoint()
    assert point.promise(2, 1)
    assert not point.advance()
    outcome = []

    def forward():
        try:
            outcome.append(point.advance())
        except RuntimeError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=forward)
    thread.start()
    while not point._changed._waiters:
        pass
    with point._changed:  # the waiter cannot have its turn in between
        if end == "fail":
            point.fail(RuntimeError("rank 1 is gone"))
        else:
            point.drop()
        if end == "drop and promise":
            assert point.promise(20, 1)
            point.agree()
    thread.join(20)
    if end == "fail":
        assert "rank 1 is gone" in outcome[0]
        assert point.steps == 1  # the pass has not begun
        assert not point.clear()  # the others may have swapped
        with pytest.raises(RuntimeError, match="rank 1 is gone"):
            point.advance()
        return
    assert outcome == [False]
    swaps = [point.steps for _ in range(30) if point.advance() and point.done() is None]
    assert swaps == ([20] if end == "drop and promise" else [])


def test_what_is_agreed_on_survives_a_failure():
    point = SwapPoint()
    assert point.promise(3, 1)
    point.agree()
    point.fail(RuntimeError("rank 1 is gone"))
    for _ in range(5):  # passes that raise are not counted
        with pytest.raises(RuntimeError, match="rank 1 is gone"):
            point.advance()
    assert point.clear()
    assert [point.advance() for _ in range(3)] == [False, False, True]
    point.fail(RuntimeError("rank 2 is gone"))  # while the swap is made
    point.done()
    with pytest.raises(RuntimeError, match="rank 2 is gone"):
        point.advance()


def test_failure_raises_until_it_is_cleared():
    point = SwapPoint()
    assert point.promise(5, 1)
    point.fail(RuntimeError("rank 3 is gone"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="rank 3 is gone"):
            point.advance()
    assert not point.clear()  # it had promised: the others may have swapped
    other = SwapPoint()
    other.fail(RuntimeError("rank 3 is gone"))
    with pytest.raises(RuntimeError, match="rank 3 is gone"):
        other.advance()
    assert other.clear()
    assert not other.advance()


def test_a_swap_that_is_not_made_is_an_error_in_the_next_forward_pass():
    point = SwapPoint()
    assert point.promise(2, 1)
    point.agree()
    assert [point.advance(), point.advance()] == [False, True]
    with pytest.raises(RuntimeError, match=r"at step 2.* update_module_weight_and_map"):
        point.advance()


# ---- all of a cycle


class Network:
    """Gathers that are complete when all have come; threads that stop wherever they could wait."""

    def __init__(self, n_ranks):
        self.n_ranks = n_ranks
        self.rows = defaultdict(dict)  # number of a gather -> rank -> row
        self.dead = set()
        self.go = [threading.Semaphore(0) for _ in range(n_ranks)]
        self.parked = [threading.Event() for _ in range(n_ranks)]
        self.waiting_for = [None] * n_ranks  # number of the gather
        self.count = [0] * n_ranks
        self.over = False

    def park(self, rank):
        self.parked[rank].set()
        self.go[rank].acquire()
        if self.over or rank in self.dead:
            raise LostRankError("the test is over")

    def gather(self, rank, row):
        number = self.count[rank]
        self.count[rank] += 1
        self.rows[number][rank] = list(row)
        self.waiting_for[rank] = number
        self.park(rank)
        self.waiting_for[rank] = None
        if len(self.rows[number]) < self.n_ranks:
            raise LostRankError("a rank is gone")
        return [self.rows[number][r] for r in range(self.n_ranks)]

    def can_run(self, rank):
        number = self.waiting_for[rank]
        return rank not in self.dead and (
            number is None or len(self.rows[number]) == self.n_ranks or bool(self.dead - set(self.rows[number]))
        )

    def run(self, rank):
        """Let a thread go on to where it could wait next."""
        self.parked[rank].clear()
        self.go[rank].release()
        assert self.parked[rank].wait(20), "a background thread hangs"


class Scripted(Control):
    """Control over such a network."""

    def __init__(self, network, rank):
        super().__init__(Known(rank, network.n_ranks), 16)
        self.network = network
        self.pause = lambda: network.park(rank)

    def gather(self, stage, row):
        told = self.network.gather(self.rank, [int(stage), *row])
        if any(theirs[0] != stage or len(theirs) != len(row) + 1 for theirs in told):
            raise LostRankError("out of step")
        return [theirs[1:] for theirs in told]

    def total(self, counts):
        told = self.network.gather(self.rank, [-1, *counts.flatten().tolist()])
        return torch.tensor(told)[:, 1:].sum(0).view_as(counts)


class FromRanks:
    """Weights out of the other ranks' live slots, one expert a round, in the order of moves."""

    collective = True

    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.broken = ranks, rank, False

    def bring(self, layer, moves, staging):
        for move in moves:
            if move.target_rank == self.rank:
                source = self.ranks[move.source_rank].dispatchers[layer].fields.fields[0][move.source_slot]
                staging.fields[0][move.target_slot].copy_(source)
            yield Moved(1, 0, 16 if move.target_rank == self.rank else 0)


class Rank:
    """One rank: its layers, its cycle, its background thread."""

    def __init__(self, rank, ranks, network, placement, at_once):
        self.rank, self.network = rank, network
        self.dispatchers = []
        for layer in range(N_LAYERS):
            own = placement.phy2log.view(-1, SLOTS)[rank].tolist()
            weights = torch.stack([weights_of(layer, expert) for expert in own])
            self.dispatchers.append(Dispatcher(placement, [weights], rank))
        layers = [Layer(f"{i}", d, LoadCollector(N_EXPERTS, window=4)) for i, d in enumerate(self.dispatchers)]
        self.layers = layers
        self.wishes = Wishes()
        self.wishes.wait = lambda seconds: network.park(rank)
        self.targets = []
        self.no_memory = self.no_stage = False
        self.end = None
        self.skips = []
        pace = Pace(window=4, layers_at_once=at_once, bytes_per_second=None, ahead=4, poll=1.0)
        self.cycle = Cycle(
            layers, Scripted(network, rank), None, FromRanks(ranks, rank), Settings(), None, pace, self.wishes,
            Tally(["0", "1"]),
        )  # fmt: skip
        memory = self.cycle._memory
        self.cycle._memory = lambda batch: self._refused() if self.no_memory else memory(batch)
        stage = self.dispatchers[1].stage
        self.dispatchers[1].stage = lambda *what: self._refused() if self.no_stage else stage(*what)
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def _refused(self):
        self.no_memory = self.no_stage = False
        raise MemoryError("no memory for buffers")

    def serve(self):
        number = 0
        try:
            while True:
                self.network.park(self.rank)
                if len(self.targets) > number:
                    number += 1
                    try:
                        self.cycle.run([0] * N_LAYERS, Request(self.targets[number - 1], None, (1, 1)))
                    except SkippedError as skipped:
                        self.skips.append((number, skipped.kind))
                        if skipped.kind == "closed":
                            break
            self.end = "closed"
        except LostRankError as error:
            self.end = error
            for dispatcher in self.dispatchers:
                dispatcher.point.fail(error)
        finally:
            while not self.network.over:  # nothing to do any more; the test may still let it run
                self.network.parked[self.rank].set()
                self.network.go[self.rank].acquire()
            self.network.parked[self.rank].set()


class Order(NamedTuple):
    """How events follow each other."""

    n: int
    forwards: float  # share of forward passes
    slow: int  # a rank, or none
    slowness: float
    seed: int


ORDERS = st.builds(
    Order,
    n=st.sampled_from([150, 300, 20]),
    forwards=st.sampled_from([0.7, 0.9, 0.2, 0.02]),
    slow=st.integers(0, 3),
    slowness=st.sampled_from([0.98, 0.5, 0.0]),
    seed=st.integers(0, 2**32 - 1),
)


class Cycles(RuleBasedStateMachine):
    """Any order of background steps, forward passes, wishes, errors and deaths."""

    def __init__(self):
        super().__init__()
        self.ranks = []

    @initialize(
        n_ranks=st.integers(2, 4), at_once=st.integers(1, N_LAYERS), seed=st.integers(0, 2**32 - 1), order=ORDERS
    )
    def begin(self, n_ranks, at_once, seed, order):
        self.rng = np.random.default_rng(seed)
        self.n_ranks = n_ranks
        self.network = Network(n_ranks)
        placement = random_placement(self.rng, n_ranks)
        for rank in range(n_ranks):
            self.ranks.append(Rank(rank, self.ranks, self.network, placement, at_once))
        for rank in self.ranks:
            rank.thread.start()
            assert self.network.parked[rank.rank].wait(20)
        self.routed = defaultdict(dict)  # (layer, step) -> rank -> placement
        self.stopped = set()  # ranks whose forward pass has raised
        self.closed = False
        self.waiting = {}  # rank -> layer, thread and outcome of a pass that waits
        self.swaps = self.doubts = 0
        self.ask(order)

    # what may happen

    @rule(order=ORDERS)
    def go_on(self, order):
        """Events in random order: forward passes rare or often, the background thread of one rank late."""
        rng = np.random.default_rng(order.seed)
        for _ in range(order.n):
            if rng.random() < order.forwards:
                self.step(int(rng.integers(self.n_ranks)), int(rng.integers(N_LAYERS)))
                continue
            ready = [r for r in range(self.n_ranks) if self.network.can_run(r)]
            prompt = [r for r in ready if r != order.slow or rng.random() >= order.slowness]
            if prompt:
                self.background(int(rng.choice(prompt)))

    @rule(order=ORDERS)
    def ask(self, order):
        """A plan, which all ranks will come to sooner or later; there may be two in flight."""
        target = tuple(random_placement(self.rng, self.n_ranks) for _ in range(N_LAYERS))
        for rank in self.ranks:
            rank.targets.append(target)
        self.go_on(order)

    @rule(rank=st.integers(0, 3), order=ORDERS)
    def hold_for_a_while(self, rank, order):
        wishes = self.ranks[rank % self.n_ranks].wishes
        wishes.held = True
        self.go_on(order)
        wishes.held = False

    @rule(rank=st.integers(0, 3), late=st.booleans(), order=ORDERS)
    def take_memory(self, rank, late, order):
        setattr(self.ranks[rank % self.n_ranks], "no_stage" if late else "no_memory", True)
        self.ask(order)

    @precondition(lambda self: self.ranks and not self.network.dead and self.swaps > 20)
    @rule(rank=st.integers(0, 3), order=ORDERS)
    def kill(self, rank, order):
        self.ask(order)
        self.network.dead.add(rank % self.n_ranks)
        self.go_on(order)

    @precondition(lambda self: self.ranks and not self.network.dead and not self.closed and self.swaps > 20)
    @rule(rank=st.integers(0, 3), order=ORDERS)
    def close(self, rank, order):
        self.ask(order)
        self.closed = True
        self.ranks[rank % self.n_ranks].wishes.closing = True
        self.go_on(order)

    # what must hold

    def step(self, rank, layer):
        """A forward pass of one rank, which its exchange of tokens couples with those of all others."""
        dispatchers = [r.dispatchers[layer] for r in self.ranks]
        own = dispatchers[rank]
        if rank in self.network.dead | self.stopped or rank in self.waiting:
            return
        if own.point.steps > min(d.point.steps for d in dispatchers):
            return
        if own.point.in_doubt:  # it waits, and its rank does nothing else meanwhile
            self.doubts += 1
            outcome = []
            thread = threading.Thread(target=lambda: outcome.append(self.begun(own)), daemon=True)
            thread.start()
            self.waiting[rank] = layer, thread, outcome
            return
        self.went_on(rank, layer, self.begun(own))

    def begun(self, dispatcher):
        """Begin a pass; the swap if it is due, or what was raised."""
        try:
            if dispatcher.check_consistency():
                dispatcher.update_module_weight_and_map()
                return "swapped"
        except RuntimeError as error:
            return error
        return "as before"

    def went_on(self, rank, layer, outcome):
        if isinstance(outcome, RuntimeError):
            assert self.network.dead, f"a forward pass raised with all ranks alive: {outcome}"
            self.stopped.add(rank)
            return
        self.swaps += outcome == "swapped"
        own = self.ranks[rank].dispatchers[layer]
        routed = self.routed[layer, own.point.steps]
        routed[rank] = own.placement
        assert len(set(routed.values())) == 1, f"two placements in step {own.point.steps} of layer {layer}"

    def background(self, rank):
        """A step of a background thread; passes that it has let go on are over when it returns."""
        self.network.run(rank)
        if rank in self.waiting:
            layer, thread, outcome = self.waiting[rank]
            if not self.ranks[rank].dispatchers[layer].point._is_in_doubt():
                thread.join(20)
                assert outcome, "a forward pass hangs"
                del self.waiting[rank]
                self.went_on(rank, layer, outcome[0])

    @invariant()
    def every_slot_has_its_expert(self):
        for rank in (r for r in self.ranks if r.rank not in self.waiting):
            for layer, dispatcher in enumerate(rank.dispatchers):
                own = dispatcher.placement.phy2log.view(-1, SLOTS)[rank.rank].tolist()
                expected = torch.stack([weights_of(layer, expert) for expert in own])
                assert torch.equal(dispatcher.fields.fields[0], expected)
                assert dispatcher.local_expert_list == own

    @invariant()
    def nobody_ends_but_for_a_death(self):
        if self.ranks and not self.network.dead:
            ends = [rank.end for rank in self.ranks]
            assert all(end is None or (self.closed and end == "closed") for end in ends), ends

    def teardown(self):
        if not self.ranks:
            return
        if not self.network.dead:
            self.all_ends_well()
        self.network.over = True
        for rank in self.ranks:
            self.network.go[rank.rank].release()
        for rank in self.ranks:
            rank.thread.join(20)
            assert not rank.thread.is_alive()

    def all_ends_well(self):
        """With time and forward passes every plan is carried out or skipped, alike on all ranks."""
        for rank in self.ranks:
            rank.wishes.held = rank.no_memory = rank.no_stage = False
        target = tuple(random_placement(self.rng, self.n_ranks) for _ in range(N_LAYERS))
        for rank in self.ranks:
            rank.targets.append(target)
        for _ in range(4000):
            if self.closed:
                if all(r.end == "closed" and not any(d.point.pending for d in r.dispatchers) for r in self.ranks):
                    break
            elif all(d.placement == target[i] for rank in self.ranks for i, d in enumerate(rank.dispatchers)):
                break
            for r in range(self.n_ranks):
                if self.network.can_run(r):
                    self.background(r)
            for r in range(self.n_ranks):
                for layer in range(N_LAYERS):
                    self.step(r, layer)
        for rank in self.ranks:
            live = [d.placement for d in rank.dispatchers]
            assert live == ([d.placement for d in self.ranks[0].dispatchers] if self.closed else list(target))
            assert rank.skips == self.ranks[0].skips
            assert {kind for _, kind in rank.skips} <= {"memory", "no gain", "commit", "closed"}
        self.every_slot_has_its_expert()


Cycles.TestCase.settings = settings(
    max_examples=50, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCycles = Cycles.TestCase


def test_these_orders_of_events_meet_what_they_are_to_meet():
    """Swaps, ranks in doubt, refused promises, and plans in flight; or the machine above would prove nothing."""
    machine = Cycles()
    machine.begin(3, 1, 5, Order(1, 0.5, 0, 0.0, 0))
    ahead = 0
    for seed in range(60):
        machine.ask(Order(300, *((0.7, seed % 4, 0.98), (0.9, seed % 4, 0.95), (0.5, 0, 0.0))[seed % 3], seed))
        machine.every_slot_has_its_expert()
        ahead = max(ahead, *(rank.cycle._ahead for rank in machine.ranks))
    swaps, doubts = machine.swaps, machine.doubts
    machine.teardown()
    assert swaps > 20
    assert doubts > 3
    assert ahead > 4, "no promise was refused"


def test_stages_have_the_names_that_progress_shows():
    assert [stage.name.lower() for stage in Stage] == ["idle", "collect", "plan", "transfer", "commit", "wait"]
