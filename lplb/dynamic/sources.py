"""Where the weights of arriving experts come from: other ranks, host memory that a node shares, or the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from lplb import exchange
from lplb.arguments import seen, whole_number
from lplb.dynamic.dispatcher import Dispatcher
from lplb.dynamic.staging import Staging
from lplb.weights import Move, Moved, WeightMover
from lplb.weights.links import checked_ranks
from lplb.weights.mover import Job
from lplb.weights.packing import quiet

__all__ = ["Callback", "Peers", "Source", "arriving"]


class Source(Protocol):
    """What brings experts to stagings, called by the background thread."""

    collective: bool
    """Whether all ranks bring the same moves in the same order, and an error on one is raised on all."""

    def bring(self, layer: int, moves: Sequence[Move], staging: Staging) -> Iterator[Moved]:
        """Fill the staging, one step at a time, so that the caller sets the pace, pauses or gives up between steps.

        Args:
            layer: number of the layer, counted from 0.
            moves: as in `lplb.dynamic.staging.Arrivals`: of all ranks, with places in their stagings as targets.
            staging: of this rank; not held.

        Returns:
            An iterator over what each step has brought: at most one expert, which is there when it is yielded. All are
            there when it is exhausted.

        Raises:
            TypeError, ValueError: an argument is not allowed.
            RuntimeError: the staging is held; or what went wrong while bringing, in any step.
        """


def arriving(moves: Sequence[Move], rank: int, staging: Staging) -> list[Move]:
    """Return the moves that come to one rank.

    Raises:
        ValueError: one goes to a place that its staging does not have.
    """
    mine = [move for move in moves if move.target_rank == rank]
    for move in mine:
        whole_number("target_slot of a move", move.target_slot, 0, staging.capacity - 1)
    return mine


class Peers:
    """Experts come from ranks that have them, by a `WeightMover` for every layer.

    Its live slots are read, so they must not change before all that is brought has come; a swap of the layer is the
    only thing of `lplb` that changes them. Collective, the constructor and every step of `bring` alike: a step is one
    round of transfers.

    Args:
        dispatchers: of the layers, in the same order on every rank.
        group: the ranks, a process group that nothing else uses meanwhile; ``None`` is one rank.

    Raises:
        TypeError, ValueError: weights are others on another rank, or a dispatcher has another rank; on every rank.
    """

    collective = True

    def __init__(self, dispatchers: Sequence[Dispatcher], group: dist.ProcessGroup | None = None) -> None:
        """See the class."""
        ranks = checked_ranks("group", group)
        self._dispatchers = _checked_dispatchers(dispatchers, ranks, "lplb.dynamic Peers")
        self._movers = [WeightMover(dispatcher.fields.fields, group) for dispatcher in self._dispatchers]

    def bring(self, layer: int, moves: Sequence[Move], staging: Staging) -> Iterator[Moved]:
        """See `Source`. Collective. A round in which this rank has nothing to do brings 0 bytes."""
        try:
            mover = self._movers[whole_number("layer", layer, 0, len(self._movers) - 1)]
            staging.begin()
            staging.wait_for(self._dispatchers[layer].swapped)
        except Exception as problem:
            fault = problem

            def refuse() -> Job:
                raise fault

            return self._movers[0].agreed_rounds(refuse)  # raises on all ranks: none waits for this one
        with staging.filling():
            rounds = mover.rounds(moves, staging.fields)
        return _steps(rounds, staging)


def _checked_dispatchers(
    dispatchers: Sequence[Dispatcher], ranks: exchange.Local | exchange.Distributed, what: str
) -> list[Dispatcher]:
    """Refuse dispatchers that are not one or more of this rank, as many on every rank. Collective."""

    def check() -> list[Dispatcher]:
        listed = list(dispatchers)
        if not listed:
            raise ValueError("dispatchers is empty, allowed is one or more")
        for i, dispatcher in enumerate(listed):
            if not isinstance(dispatcher, Dispatcher):
                raise TypeError(f"dispatchers[{i}] is {seen(dispatcher)}, allowed is an lplb.dynamic Dispatcher")
            place = f"rank {dispatcher.rank} of {dispatcher.placement.n_ranks}"
            allowed = f"rank {ranks.rank} of {ranks.size}"
            if place != allowed:
                raise ValueError(f"dispatchers[{i}] is of {place}, allowed is this process in the group, {allowed}")
        return listed

    has = "another number of dispatchers than rank 0, allowed is the same on every rank"
    return exchange.together(ranks, check, lambda found: exchange.fingerprint(what, len(found)), has)


def _steps(work: Iterator[Moved], staging: Staging) -> Iterator[Moved]:
    """Do work step by step on the transfer stream; the stream is the caller's own again between steps."""
    while True:
        with staging.filling():
            moved = next(work, None)
        staging.settle()
        if moved is None:
            return
        yield moved


class Callback:
    """The user's function brings experts: from a file, a store, or another framework.

    Args:
        function: called with the layer, the logical expert, and the tensors to write, one of each field. On CUDA the
            transfer stream is current; what it does on other streams has to be done when it returns. It runs in the
            background thread, without autograd.
        rank: this rank.
    """

    collective = False

    def __init__(self, function: Callable[[int, int, list[torch.Tensor]], object], rank: int) -> None:
        """See the class."""
        if not callable(function):
            raise TypeError(f"function is {seen(function)}, allowed is a function (layer, expert, into)")
        self._function = function
        self._rank = whole_number("rank", rank, 0)

    def bring(self, layer: int, moves: Sequence[Move], staging: Staging) -> Iterator[Moved]:
        """See `Source`. What the function raises, this rank raises in that step."""
        mine = arriving(moves, self._rank, staging)
        staging.begin()
        return _steps(self._bring(layer, mine, staging), staging)

    def _bring(self, layer: int, mine: list[Move], staging: Staging) -> Iterator[Moved]:
        for move in mine:
            with quiet():
                self._function(layer, move.expert, [field[move.target_slot] for field in staging.fields])
            yield Moved(1, 0, staging.layout.nbytes)
