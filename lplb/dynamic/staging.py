"""Where experts wait between their arrival and the swap: which go where, and memory that both threads respect."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lplb.arguments import seen, whole_number
from lplb.placement import Placement
from lplb.weights import Move, moves_between
from lplb.weights.packing import Fields

__all__ = ["Arrivals", "Staging", "arrivals", "least_bytes", "most_arrivals"]


class Arrivals(NamedTuple):
    """What has to come to the stagings of all ranks before one placement can follow another."""

    moves: tuple[Move, ...]
    """As `lplb.weights.moves_between` has them, but that ``target_slot`` counts what comes to a rank: 0, 1, ... in the
    order of its slots. The same on every rank."""
    slots: tuple[int, ...]
    """For each of these places in the staging of this rank the slot that its expert goes to in the swap."""


def arrivals(before: Placement, after: Placement, rank: int) -> Arrivals:
    """Return what has to come, and where it goes on one rank.

    Args:
        before: where experts are.
        after: where they are to be, on as many ranks.
        rank: whose slots are returned.

    Raises:
        TypeError, ValueError: as `lplb.weights.moves_between`; or ``rank`` is not one of theirs.
    """
    to_slots = moves_between(before, after)
    rank = whole_number("rank", rank, 0, before.n_ranks - 1)
    came: Counter[int] = Counter()
    moves = []
    for move in to_slots:
        moves.append(move._replace(target_slot=came[move.target_rank]))
        came[move.target_rank] += 1
    return Arrivals(tuple(moves), tuple(move.target_slot for move in to_slots if move.target_rank == rank))


def most_arrivals(before: Placement, after: Placement) -> int:
    """Return how many experts come to the rank to which the most come: the capacity that its staging needs.

    Raises:
        TypeError, ValueError: as `lplb.weights.moves_between`.
    """
    return max(Counter(move.target_rank for move in moves_between(before, after)).values(), default=0)


def least_bytes(before: Placement, after: Placement, expert_bytes: int) -> int:
    """Return what has to travel between ranks at least: each expert once to each rank that had it in no slot.

    Args:
        before: where experts are.
        after: where they are to be, on as many ranks.
        expert_bytes: of one expert.

    Raises:
        TypeError, ValueError: as `lplb.weights.moves_between`.
    """
    moves = moves_between(before, after)
    return expert_bytes * sum(move.source_rank != move.target_rank for move in moves)


def _new_event() -> "torch.cuda.Event":
    """An event that a host waits for without a busy core."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call, unused-ignore]


class Staging:
    """Preallocated memory for experts that have come and are not yet live. Layers of one layout may share it.

    The background thread fills it: `begin`, then `filling` around each step, then `lplb.dynamic.Dispatcher.stage`,
    which calls `keep`. The thread of the forward passes takes out what it holds in the swap (`taking`). Then, or when
    the dispatcher has forgotten it (`let_go`), it is `released`.

    On CUDA it has a transfer stream: filling waits there for the swap before, by an event, and a swap waits on its own
    stream for the filling. The host waits in `settle` alone, which is the background thread's. Let no graph be
    captured meanwhile, but with ``capture_error_mode="thread_local"``: CUDA refuses other threads' waits during any
    other capture.

    Args:
        like: the layout, and the device. What ``Dispatcher.fields`` is.
        capacity: experts that it has room for, 1 or more.

    Raises:
        TypeError, ValueError: ``capacity`` is not allowed.
        RuntimeError: there is not so much memory.
    """

    fields: tuple[torch.Tensor, ...]
    """One for each kind of tensor, ``[capacity, ...]``."""
    capacity: int
    """Experts."""
    nbytes: int
    """Bytes kept."""

    def __init__(self, like: Fields, capacity: int) -> None:
        """See the class."""
        if not isinstance(like, Fields):
            raise TypeError(f"like is {seen(like)}, allowed are the checked fields of a Dispatcher")
        self.capacity = whole_number("capacity", capacity, 1)
        self.layout, self.device = like.layout, like.device
        self.nbytes = self.capacity * self.layout.nbytes
        self._held_by: object = None
        self._transfer: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self._transfer = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call, unused-ignore]
                self._filled, self._taken, self._settled = (_new_event() for _ in range(3))
        with self.filling():
            self.fields = self._allocated()

    def _allocated(self) -> tuple[torch.Tensor, ...]:
        fields = []
        try:
            with torch.inference_mode(False):  # so that it can be written in any mode
                for shape, dtype in self.layout.kinds:
                    nbytes = self.capacity * torch.Size(shape).numel() * dtype.itemsize
                    # filled, for the system may promise memory that it does not have
                    flat = torch.empty(nbytes, dtype=torch.uint8, device=self.device).fill_(0)
                    fields.append(flat.view(dtype).view(self.capacity, *shape))
        except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
            raise RuntimeError(
                f"no memory for a staging of {self.capacity} experts of {self.layout.nbytes} bytes, {self.nbytes} "
                f"bytes on {str(self.device)!r}: {error}"
            ) from error
        return tuple(fields)

    @property
    def transfer_stream(self) -> "torch.cuda.Stream | None":
        """The stream that experts come on; ``None`` on the CPU."""
        return self._transfer

    def released(self) -> bool:
        """Whether it may be filled: what it held has been taken, or was let go."""
        return self._held_by is None

    def _check_released(self) -> None:
        if self._held_by is not None:
            raise RuntimeError("staging holds experts that no swap has taken; allowed is one that is released()")

    # ---- the background thread

    def begin(self) -> None:
        """Let what comes be written behind what the last swap reads.

        Raises:
            RuntimeError: it holds what a swap has not taken.
        """
        if self._held_by is not None:
            raise RuntimeError(
                "staging holds experts that no swap has taken; allowed is one that released() is true of"
            )
        if self._transfer is not None:
            self._transfer.wait_event(self._taken)

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Make the transfer stream current, for one step."""
        if self._transfer is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._transfer):
            yield

    def wait_for(self, event: "torch.cuda.Event | None") -> None:
        """Let what comes wait for an event on another stream."""
        if self._transfer is not None and event is not None:
            self._transfer.wait_event(event)

    def settle(self) -> None:
        """Wait until what was begun in `filling` is done."""
        if self._transfer is not None:
            self._settled.record(self._transfer)
            self._settled.synchronize()

    def keep(self, holder: object) -> None:
        """Hold what it has until ``holder`` takes it."""
        if self._held_by is not None:
            raise RuntimeError(
                "staging holds experts that no swap has taken; allowed is one that released() is true of"
            )
        if self._transfer is not None:
            self._filled.record(self._transfer)
        self._held_by = holder

    def let_go(self, holder: object) -> None:
        """Forget what it holds for ``holder``."""
        if self._held_by is holder:
            self._held_by = None

    # ---- the thread of the forward passes

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        """Let the current stream read what is held, behind its filling; then it is released."""
        if self._transfer is None:
            yield
        else:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self._filled)
            yield
            for field in self.fields:
                field.record_stream(stream)
            self._taken.record(stream)
        self._held_by = None
