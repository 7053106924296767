"""Experts lent to other ranks for one batch: when their weights leave, and when their gradients come home.

A batch of a layer with transfers goes like this:

    choices of all ranks → one plan on every rank: who serves how many tokens, and which weights travel for it
    weights set out (a second group, on a thread or a stream)   beside   the all-to-all of tokens
    own experts, then guests → all-to-all back

and backward weights set out again beside the gradients of tokens, and gradients of guests go home beside those that
leave. What is computed, and its gradient, is in `lplb.borrowing`.

On CUDA the host waits for the plan, as it does for split sizes; nothing else here waits for the device.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lplb import borrowing, exchange
from lplb.exchange import Exchange
from lplb.guests import GuestSlots
from lplb.slots import SlotWeights
from lplb.transfers import TransferPlan, TransferPlanner
from lplb.weights.early import Part
from lplb.weights.mover import Job, WeightMover
from lplb.weights.moves import Hop, Move, rounds_of
from lplb.weights.packing import Fields, checked_fields
from lplb.weights.returning import bring_home, ways_home

__all__ = ["Lender", "Lent", "Loan"]

_FLAGS = 2
"""Columns before the counts: whether experts are trained here, whether guests of the last batch are still good."""


@dataclass(frozen=True)
class Loan:
    """The guests of one batch of one layer, on all ranks."""

    key: tuple[int, int, int]
    """The layer's number and the plan's fingerprint."""
    plan: TransferPlan
    """Who serves how many tokens of which expert."""
    new: tuple[Move, ...]
    """Guests that come for this batch."""
    all: tuple[Move, ...]
    """These, and those that were there before, as if they came from home."""
    before: object
    """Key of what the slots must hold so that `new` are enough."""
    back: tuple[Move, ...]
    """From guest slots to the homes of their experts."""
    needs_gradients: bool
    """Whether there will be a backward pass."""
    trained: bool
    """Whether it has gradients for experts, of any rank."""
    n_guests: int
    """Guest slots in use on this rank, up to the last."""
    rank: int
    """This rank."""

    @cached_property
    def rounds_of_new(self) -> list[list[Hop]]:
        """In which rounds new guests come."""
        return rounds_of(self.new, in_place=False)

    @cached_property
    def rounds_of_all(self) -> list[list[Hop]]:
        """In which rounds all would come."""
        return self.rounds_of_new if self.all == self.new else rounds_of(self.all, in_place=False)

    @cached_property
    def ways(self) -> list[Part]:
        """How gradients go home."""
        return ways_home(self.back, self.rank)


_numbers = itertools.count()


class Lender:
    """One layer's part: plans its batches, sends its weights out and brings gradients home. Collective to make.

    Args:
        planner: for as many ranks and experts, with as many residents on every rank.
        guests: slots of the layer's sizes.
        experts: the layer's weights.
        home: physical slot of every expert's original.
        ranks: the layer's.
    """

    def __init__(
        self, planner: TransferPlanner, guests: GuestSlots, experts: SlotWeights, home: Tensor, ranks: Exchange
    ) -> None:
        """See the class."""
        self.planner, self.guests, self._ranks = planner, guests, ranks
        self.n_residents = len(experts.experts)
        self._home: list[tuple[int, int]] = [divmod(slot, self.n_residents) for slot in home.tolist()]
        self._number = next(_numbers)
        self._experts = experts
        with exchange.turn(ranks):
            exchange.drain(ranks)
            settings = guests.settings
            exchange.together(ranks, lambda: None, lambda _: exchange.fingerprint(settings), settings=settings)
            exchange.widen(ranks, planner.n_logical + _FLAGS)
        apart = guests.connect(ranks)
        group = apart.group if isinstance(apart, exchange.Distributed) else None
        self.mover = WeightMover([experts.leaves("gate_up"), experts.leaves("down")], group)
        self._buffers = guests.messages(self.mover)
        self._room = checked_fields("guests", guests.fields)
        self._agrees = guests.device.type == "cpu"  # elsewhere an agreement would have the host wait for the device
        self._may_hold = planner.strategy != "llep"  # which keeps no copies
        self._noted: tuple[Loan, object] | None = None

    @property
    def n_slots(self) -> int:
        """Slots of all ranks, those of guests too."""
        return self._ranks.size * self.planner.width

    # ---- before the batch

    def lend(
        self, expert: Tensor, x: Tensor, settings: str, error: Exception | None
    ) -> tuple[Tensor, Loan | None, str, Exception | None]:
        """Plan a batch; an error of this rank is raised on all. Collective.

        Args:
            expert: choices of this rank, int64 of any shape.
            x: its tokens.
            settings: in what ranks must not differ, in words.
            error: this rank's, if there is one already.

        Returns:
            The virtual slot of every choice, int64 ``[choices]``; the loan; and for another agreement, in which ranks
            find out whether they have the same plan, settings and what is wrong with it.
        """
        differentiated = torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad
        trained = torch.is_grad_enabled() and self._experts.trained
        settings += f"{' (in x)' * differentiated} and transfers"
        counts, any_trained, stay = self._counts_of_all(expert.flatten(), settings, error, differentiated, trained)
        try:
            before = self._noted[0] if stay and self._noted is not None else None
            plan = self.planner.plan(counts) if before is None else self.planner.plan(counts, held=before.plan.guests)
            loan = self._loan(plan, before, differentiated or any_trained, any_trained)
            slot = plan.route(expert, self._ranks.rank)
        except (TypeError, ValueError) as problem:
            return torch.full_like(expert, -1), None, settings, problem
        return slot, loan, f"{settings} by the plan {loan.key[1]:08x}{loan.key[2]:08x}", None

    def _counts_of_all(
        self, expert: Tensor, settings: str, error: Exception | None, differentiated: bool, trained: bool
    ) -> tuple[Tensor, bool, bool]:
        """Choices of every rank by expert; whether experts are trained anywhere; whether guests may stay everywhere."""
        n = self.planner.n_logical
        try:
            self.mover.check_unchanged()
        except (TypeError, ValueError) as problem:
            error = error or problem
        row = torch.zeros(_FLAGS + n + exchange.WORDS, dtype=torch.int32, device=expert.device)
        if error is None:
            stay = (
                self._may_hold
                and not (differentiated or trained)
                and self._noted is not None
                and self._still_there(*self._noted)
            )
            row[:_FLAGS] = row.new_tensor([trained, stay])
            row[_FLAGS : _FLAGS + n].scatter_add_(0, expert, torch.ones_like(expert, dtype=torch.int32))
        words = [exchange.error_word(error), exchange.LAYER, *exchange.fingerprint("transfers", settings)]
        row[-exchange.WORDS :] = row.new_tensor(words)
        table = row.new_empty(self._ranks.size, len(row))
        with exchange.turn(self._ranks):
            exchange.gather(self._ranks, exchange.LAYER, row, table)
            flags, words_of = table[:, :_FLAGS].tolist(), table[:, -exchange.WORDS :].tolist()
            exchange.raise_together(self._ranks, words_of, error, settings=settings)
        counts = table[:, _FLAGS : _FLAGS + n].contiguous()
        return counts, any(flag[0] for flag in flags), all(flag[1] for flag in flags)

    def _still_there(self, loan: Loan, marks: object) -> bool:
        """Whether the slots hold the guests of an earlier batch and weights of this rank are as they were."""
        return self.guests.holds(loan.key) and marks is not None and self._marks() == marks

    def _marks(self) -> list[tuple[int, int]] | None:
        """What changes with weights of this rank; ``None`` where torch does not count their changes."""
        leaves = [leaf for field in self.mover.fields.fields for leaf in field]
        if any(leaf.is_inference() for leaf in leaves):
            return None
        written = self.guests.forgotten, sum(rows._version for rows in self.stacked())
        return [written, *((leaf._version, leaf.data_ptr()) for leaf in leaves)]

    def _loan(self, plan: TransferPlan, before: Loan | None, needs_gradients: bool, trained: bool) -> Loan:
        """The plan as this layer carries it out.

        Raises:
            ValueError: it needs more memory than there may be.
        """
        most, allowed = plan.max_load, self.planner.max_tokens
        if allowed is not None and most > allowed:
            least = int(plan.numbers[5])
            raise ValueError(
                f"rank {int(plan.rank_load.argmax())} would receive {most} tokens by the plan, allowed is max_tokens = "
                f"{allowed}; no plan for this batch has fewer than {least} on its busiest rank"
            )
        guests: list[list[int]] = plan.guests.tolist()
        used = [max((slot + 1 for slot, expert in enumerate(row) if expert >= 0), default=0) for row in guests]
        if max(used) > self.guests.slots:
            raise ValueError(
                f"the plan has {max(used)} guests on rank {used.index(max(used))}, allowed are as many as guests has "
                f"slots, {self.guests.slots}"
            )
        coming = {move[3:5]: move for move in plan.moves()}  # an expert is sent once, however often it is planned
        new = tuple(coming.values())
        there = [
            Move(expert, *self._home[expert], rank, slot)
            for rank, row in enumerate(guests)
            for slot, expert in enumerate(row)
            if expert >= 0 and (rank, slot) not in coming
        ]
        every = (*new, *there)
        return Loan(
            (self._number, *plan.fingerprint()),
            plan,
            new,
            every,
            None if before is None else before.key,
            tuple(self._back(move) for move in every),
            needs_gradients,
            trained,
            used[self._ranks.rank],
            self._ranks.rank,
        )

    def _back(self, move: Move) -> Move:
        return Move(move.expert, move.target_rank, move.target_slot, *self._home[move.expert])

    # ---- during the batch

    def begin(self, loan: Loan, leaves: Sequence[Tensor]) -> "Lent":
        """Let guests' weights set out. Collective, but nothing waits here.

        Args:
            loan: of the batch.
            leaves: weights of own slots, first gate and up, then down.
        """
        kept = None
        if loan.needs_gradients and not self.guests.resend:
            kept = self.guests.room(loan.n_guests, self.guests.device, self.guests.dtype)
            self._start(loan.rounds_of_all, Fields(kept, loan.n_guests, self._room.layout, self._room.device), None)
        else:
            there = loan.before is not None and self.guests.holds(loan.before)
            self._start(loan.rounds_of_new if there else loan.rounds_of_all, self._room, loan.key)
            self._noted = None if loan.needs_gradients else (loan, self._marks())
        return Lent(self, loan, kept, borrowing.lent(self, leaves))

    def send_again(self, loan: Loan) -> None:
        """Let guests' weights set out for the backward pass, unless the slots have them still. Collective likewise."""
        if self.guests.resend and not self.guests.holds(loan.key):
            self._start(loan.rounds_of_all, self._room, loan.key)

    def _start(self, rounds: list[list[Hop]], target: Fields, key: object) -> None:
        if not rounds:
            self.guests.wait()
            if target is self._room:
                self.guests.mark(key)
            return
        job, buffers = Job(rounds, target, (0, 0)), self._buffers
        holds = key if target is self._room else None
        self.guests.start(lambda: self.mover.carry_out(job, buffers, agree=self._agrees), holds, target)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Weights of own slots as tensors ``[slots, ...]``, without gradients."""
        return self._experts.rows("gate_up"), self._experts.rows("down")

    # ---- gradients

    def gradient_room(self) -> tuple[Tensor, Tensor]:
        """Memory for the gradients of own slots; not initialised."""
        return self.guests.room(self.n_residents, self.guests.device, self.guests.dtype)

    def spoiled(self, loan: Loan) -> tuple[Tensor, Tensor]:
        """The shared slots of this rank's guests, for their gradients; the weights there are lost."""
        if loan.all:
            self.guests.mark(None)
        gate_up, down = self.guests.fields
        return gate_up[: loan.n_guests], down[: loan.n_guests]

    def bring_home(self, loan: Loan, own: tuple[Tensor, Tensor] | None) -> None:
        """Let guests' gradients go home, and be added to those of own slots. Collective, but nothing waits here."""
        if not loan.back:
            return

        def work() -> None:
            bring_home(
                self.mover, loan.ways, self.guests.fields, own or (None, None), self._buffers, agree=self._agrees
            )

        self.guests.start(work, None, own)

    def for_copy(self, experts: SlotWeights) -> "Lender":
        """The same for a copy of the layer, which has weights of its own. Local."""
        other = copy.copy(self)
        other._experts, other._number, other._noted = experts, next(_numbers), None
        other.mover = copy.copy(self.mover)
        fields = [experts.leaves("gate_up"), experts.leaves("down")]
        other.mover.fields = checked_fields("params_per_expert", fields)
        return other

    # ---- memory

    def bytes_for(self, layers: int) -> tuple[int, int]:
        """Bytes on a rank that no batch changes, and bytes for every row that a rank receives."""
        guests = self.guests
        kept, peak = borrowing.row_bytes(guests.hidden_size, guests.ffn_size, guests.dtype.itemsize)
        wide = torch.promote_types(guests.dtype, torch.float32).itemsize
        sums = wide * sum(2 * field[0].numel() for field in guests.fields)
        alive = 0 if guests.resend else layers * guests.slots * guests.expert_bytes
        return guests.nbytes + alive + self.n_residents * guests.expert_bytes + sums, layers * kept + peak


class Lent(NamedTuple):
    """A batch whose guests are on their way."""

    lender: Lender
    """Of the layer."""
    loan: Loan
    """What is lent."""
    kept: tuple[Tensor, Tensor] | None
    """Where guests come to; ``None`` for the shared slots."""
    leaves: tuple[Tensor, ...]
    """Weights of own slots, whose gradients will have those of guests added."""

    def serve(self, rows: Tensor, per_slot: list[int], grouped: bool) -> Tensor:
        """What own experts and guests make of rows that lie slot by slot, once guests are there. Collective."""
        return borrowing.served(rows, per_slot, self.lender, self.loan, self.kept, self.leaves, grouped)

    def ahead(self, rows: Tensor) -> Tensor:
        """The rows that came back; their gradients let guests set out again."""
        return borrowing.ahead(rows, self.lender, self.loan)
