"""The one mover of expert weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from lplb import exchange
from lplb.weights.links import Link, checked_ranks, says_where
from lplb.weights.moves import Hop, Move, checked_moves, rounds_of
from lplb.weights.packing import (
    Field,
    Fields,
    checked_fields,
    holders,
    is_in_place,
    pack,
    quiet,
    unpack,
)

__all__ = ["Job", "Moved", "WeightMover"]


class Moved(NamedTuple):
    """What this rank did for a list of moves, or in one round of it."""

    rounds: int
    """Batches of point-to-point transfers."""
    bytes_sent: int
    """Bytes that left this rank."""
    bytes_received: int
    """Bytes that came to this rank."""

    @classmethod
    def total(cls, parts: Iterable["Moved"]) -> "Moved":
        """The sum of parts, which are waited for."""
        listed = list(parts)
        return cls(*(sum(part[i] for part in listed) for i in range(3)))


@dataclass(frozen=True)
class Job:
    """Moves in rounds, as ranks agree on them."""

    rounds: list[list[Hop]]
    target: Fields
    print: tuple[int, int]
    """Fingerprint of all that has to be the same on every rank."""


class WeightMover:
    """Carries experts from slot to slot, within a rank and between the ranks of a group.

    All its calls are collective and begin with an agreement: if one rank was given something odd, or other moves than
    the others, all ranks raise before the first byte moves. They end with one as well: no rank returns from moves that
    another has not come to the end of.

    A move has memory for one expert in each direction, a flat buffer each, for as long as it lasts. On CUDA devices
    the work goes to the caller's current stream; agreements wait for it. A gloo group carries CUDA tensors over the
    CPU.

    Args:
        params_per_expert: the expert tensors of this rank, one *field* for each kind (weights, biases, scales): a
            stacked tensor ``[n_slots, ...]``, or a sequence of ``n_slots`` tensors of one shape and dtype, parameters
            for example. Any dtype that torch can copy, and any strides without overlap; the shapes behind ``n_slots``
            and the dtypes are the same on every rank. They are kept, and read and written by the calls.
        group: the ranks, a torch.distributed process group; ``None`` is one rank.

    Raises:
        TypeError, ValueError: a field is not allowed, or is another on another rank; on every rank.
    """

    fields: Fields
    """The expert tensors, and what is the same for all of them."""
    ranks: exchange.Local | exchange.Distributed
    """The ranks of the group."""
    link: Link
    """Transfers between them."""

    def __init__(self, params_per_expert: Sequence[Field], group: dist.ProcessGroup | None = None) -> None:
        """See the class."""
        self.ranks = checked_ranks("group", group)

        def check() -> tuple[Fields, Link]:
            fields = checked_fields("params_per_expert", params_per_expert)
            return fields, Link(self.ranks, fields.device)

        has = "other fields (how many, shapes, dtypes) than rank 0; allowed are the same on every rank"
        self.fields, self.link = exchange.together(
            self.ranks, check, lambda found: exchange.fingerprint("fields", found[0].layout.kinds), has
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, all fields together."""
        return self.fields.layout.nbytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes that a move allocates: a flat buffer of one expert for each direction."""
        return 2 * self.expert_bytes

    def move(self, moves: Sequence[Move], into: Sequence[Field] | None = None) -> Moved:
        """Carry out moves. Collective.

        Every move reads what its source held before all of them, whatever their order: swaps and cycles are fine. In
        place, a slot is written only after the moves that read it have taken their bytes.

        Args:
            moves: the same list on every rank; slots are counted within their rank, and none is the target of two.
            into: where targets are: fields like the mover's own, of as many slots or others, which are the mover's
                own fields or share no memory with them; by default the mover's own fields.

        Returns:
            The rounds, and the bytes that this rank sent and received.

        Raises:
            TypeError, ValueError: an argument is not allowed, or another on another rank. Nothing has been moved.
            RuntimeError: a rank is lost, or later than the group's time-out: then the group is of no use any more. Or
                a copy failed on one rank, whose error all raise. Targets are not to be used then; with ``into`` of its
                own memory, sources are as before.
        """
        return Moved.total(self.rounds(moves, into))

    def rounds(self, moves: Sequence[Move], into: Sequence[Field] | None = None) -> Iterator[Moved]:
        """Do as `move` does in steps, so that the caller sets the pace. Collective.

        In a round a rank sends at most one expert and receives at most one. Every rank takes every round, also those
        in which it has nothing to do, and pauses for less than the group's time-out. A slot has its new expert one
        round after it came; all have theirs when the iterator is exhausted, which ends with an agreement.

        Args:
            moves: as for `move`.
            into: as for `move`.

        Returns:
            An iterator over what this rank did in each round. Arguments are checked before it is returned.

        Raises:
            TypeError, ValueError, RuntimeError: as for `move`.
        """

        def plan() -> Job:
            target = self.fields if into is None else self._checked_target(into)
            in_place = into is None or is_in_place(self.fields, target)
            listed = checked_moves(moves, self.ranks.rank, self.ranks.size, self.fields.n_slots, target.n_slots)
            return Job(rounds_of(listed, in_place), target, exchange.fingerprint("move", listed, in_place))

        return self.agreed_rounds(plan)

    def _checked_target(self, into: Sequence[Field]) -> Fields:
        target = checked_fields("into", into)
        if (target.layout, target.device) != (self.fields.layout, self.fields.device):
            raise ValueError(f"into has {target}, allowed are fields like the mover's own, {self.fields}")
        return target

    def agreed_rounds(self, plan: Callable[[], Job]) -> Iterator[Moved]:
        """Agree on a job and return its rounds, as `rounds` does. Collective.

        Args:
            plan: returns the job; what it raises, all ranks raise.
        """

        def check() -> tuple[Job, list[torch.Tensor]]:
            self.check_unchanged()
            job = plan()
            return job, [self.link.buffer(self.fields.layout) for _ in range(2 if job.rounds else 0)]

        has = "other moves than rank 0, or called another method; allowed are the same moves on every rank"
        with self.link.device_made_current():
            job, buffers = exchange.together(self.ranks, check, lambda found: found[0].print, has)
        return self._carry_out(job, buffers)

    def carry_out(self, job: Job, buffers: list[torch.Tensor], *, agree: bool) -> Moved:
        """Carry out a job that the ranks have agreed on already. Collective.

        Args:
            job: on every rank the same; its source slots are the mover's own fields.
            buffers: two of `Link.buffer`, which the caller keeps from job to job.
            agree: whether the job ends with an agreement. Without one, a rank whose copy failed raises alone, and the
                others have what it sent instead; but nothing here waits for the device.

        Returns:
            The rounds, and the bytes that this rank sent and received.

        Raises:
            RuntimeError: as for `move`.
        """
        return Moved.total(self._carry_out(job, buffers, agree))

    def check_unchanged(self) -> None:
        """Refuse parameters that have become others since the constructor checked them."""
        now = checked_fields("params_per_expert", self.fields.fields)
        if str(now) != str(self.fields):
            raise ValueError(f"params_per_expert has {now}, allowed is what it had at first, {self.fields}")

    def _carry_out(self, job: Job, buffers: list[torch.Tensor], agree: bool = True) -> Iterator[Moved]:
        """The order within a round is what `rounds_of` counts on: pack, unpack what came last time, transfer."""
        own, target, layout = self.fields.fields, job.target.fields, self.fields.layout
        inference = any(tensor.is_inference() for field in target for tensor in holders(field))
        waiting: int | None = None  # slot for what came in the last round
        fault: Exception | None = None  # of this rank alone: the others are not left waiting
        for number, hops in enumerate([*job.rounds, []] if job.rounds else []):
            out = next((hop for hop in hops if hop.move.source_rank == self.ranks.rank), None)
            come = next((hop for hop in hops if hop.move.target_rank == self.ranks.rank), None)
            try:
                with quiet(inference):
                    if out is not None:
                        pack(target if out.forwarded else own, out.move.source_slot, layout, buffers[0])
                    if waiting is not None:
                        unpack(target, waiting, layout, buffers[1])
            except Exception as problem:
                fault = fault or problem
            if number == len(job.rounds):  # there only to unpack
                break
            waiting = None if come is None else come.move.target_slot
            moved = Moved(1, 0, 0)
            if out is come:
                buffers.reverse()  # within this rank: what was packed is what came
            else:
                moved = Moved(1, layout.nbytes * (out is not None), layout.nbytes * (come is not None))
                with says_where(f"moving weights stopped in round {number + 1} of {len(job.rounds)}"):
                    self.link.transfer(
                        None if out is None else (buffers[0], out.move.target_rank),
                        None if come is None else (buffers[1], come.move.source_rank),
                    )
            yield moved
        if agree:
            self.agree_on_end("moving weights", fault)
        elif fault is not None:
            raise fault

    def agree_on_end(self, what: str, fault: Exception | None = None) -> None:
        """Return when all ranks have come to the end of something; raise on all if one has a fault. Collective."""

        def check() -> None:
            if fault is not None:
                raise fault

        with self.link.device_made_current(), says_where(f"{what} stopped at its end"):
            exchange.together(self.ranks, check, lambda _: exchange.fingerprint(what))
