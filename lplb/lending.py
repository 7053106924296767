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
from lplb.transfers.plan import LEAST
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

    layer: int
    """The layer's number in this process."""
    plan: TransferPlan
    """Who serves how many tokens of which expert."""
    new: tuple[Move, ...]
    """Guests that come for this batch."""
    all: tuple[Move, ...]
    """These, and those that were there before, as if they came from home."""
    before: int | None
    """The batch whose guests the slots must hold so that `new` are enough."""
    back: tuple[Move, ...]
    """From guest slots to the homes of their experts."""
    marks: object
    """Of this rank's weights when the batch was planned; ``None`` where they do not matter."""
    trained: bool
    """Whether experts of any rank are trained, whatever the grad mode was."""
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
        self.experts = experts
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
        self._checked: object = None  # weights that were fit to travel
        self._noted: tuple[Loan, int] | None = None  # and the number of its batch

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
        lasting = not differentiated and not (torch.is_grad_enabled() and self.experts.trained)
        settings += f"{' (in x)' * differentiated} and transfers"
        counts, trained, stay = self._counts_of_all(expert.flatten(), settings, error, lasting)
        try:
            before, batch = self._noted if stay and self._noted is not None else (None, None)
            plan = self.planner.plan(counts) if before is None else self.planner.plan(counts, held=before.plan.guests)
            loan = self._loan(plan, batch, self._marks() if lasting else None, trained)
            slot = plan.route(expert, self._ranks.rank)
        except (TypeError, ValueError) as problem:
            return torch.full_like(expert, -1), None, settings, problem
        name = "".join(f"{word:08x}" for word in plan.fingerprint())
        return slot, loan, f"{settings} by the plan {name}", None

    def _counts_of_all(
        self, expert: Tensor, settings: str, error: Exception | None, lasting: bool
    ) -> tuple[Tensor, bool, bool]:
        """Choices of every rank by expert; whether experts are trained anywhere; whether guests may stay everywhere."""
        n = self.planner.n_logical
        try:
            self._check_weights()
        except (TypeError, ValueError, RuntimeError) as problem:  # the last of tensors without memory
            error = error or problem
        row = torch.zeros(_FLAGS + n + exchange.WORDS, dtype=torch.int32, device=expert.device)
        if error is None:
            stay = self._may_hold and lasting and self._noted is not None and self._still_there(*self._noted)
            row[:_FLAGS] = row.new_tensor([self.experts.trained, stay])
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

    def _check_weights(self) -> None:
        """Refuse weights that are unfit to travel; only others than the last time are looked at closely."""
        leaves = [leaf for field in self.mover.fields.fields for leaf in field]
        now = [
            (type(leaf), leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else None
            for leaf in leaves
        ]
        if now != self._checked:
            self.mover.check_unchanged()
            self._checked = now

    def _still_there(self, loan: Loan, batch: int) -> bool:
        """Whether the slots hold the guests of an earlier batch and weights of this rank are as they were."""
        return self.guests.holds(batch) and loan.marks is not None and self._marks() == loan.marks

    def _marks(self) -> list[tuple[int, int]] | None:
        """What changes with weights of this rank; ``None`` where torch does not count their changes."""
        leaves = [leaf for field in self.mover.fields.fields for leaf in field]
        if any(leaf.is_inference() for leaf in leaves):
            return None
        written = self.guests.forgotten, sum(rows._version for rows in self.stacked())
        return [written, *((leaf._version, leaf.data_ptr()) for leaf in leaves)]

    def _loan(self, plan: TransferPlan, before: int | None, marks: object, trained: bool) -> Loan:
        """The plan as this layer carries it out.

        Raises:
            ValueError: it needs more memory than there may be.
        """
        most, allowed = plan.max_load, self.planner.max_tokens
        if allowed is not None and most > allowed:
            least = int(plan.numbers[LEAST])
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
            self._number,
            plan,
            new,
            every,
            before,
            tuple(self._back(move) for move in every),
            marks,
            trained,
            used[self._ranks.rank],
            self._ranks.rank,
        )

    def _back(self, move: Move) -> Move:
        return Move(move.expert, move.target_rank, move.target_slot, *self._home[move.expert])

    # ---- during the batch

    def refusal(self, loan: Loan | None) -> Exception | None:
        """What is wrong with a loan before anything sets out. Local: ranks that did the same have the same."""
        if loan is None or loan.layer != self._number:
            return ValueError("route is of another layer, allowed is what this layer's route returned")
        if torch.is_grad_enabled() and self.experts.trained and not loan.trained:
            return ValueError(
                "experts require gradients in compute, and no rank's did in route: allowed is the same in both"
            )
        if self._are_there(loan) and self._marks() != loan.marks:
            return ValueError(
                "weights have changed since route, which counted on guests of an earlier batch: allowed is a route "
                "after the change"
            )
        return None

    def begin(self, loan: Loan, leaves: Sequence[Tensor], of_x: bool) -> "Lent":
        """Let guests' weights set out, after what is under way. Collective.

        Args:
            loan: of the batch, not refused.
            leaves: weights of own slots, first gate and up, then down.
            of_x: whether tokens require gradients.
        """
        batch = self.guests.next_batch()
        lasting = not (torch.is_grad_enabled() and (of_x or loan.trained))
        kept = None
        if not lasting and not self.guests.resend:
            kept = self.guests.room(loan.n_guests, self.guests.device, self.guests.dtype)
            self._start(loan.rounds_of_all, Fields(kept, loan.n_guests, self._room.layout, self._room.device), batch)
        else:
            # Weights that have changed since the route may change back to the same marks; what is sent now does not.
            same = lasting and loan.marks is not None and self._marks() == loan.marks
            self._start(loan.rounds_of_new if self._are_there(loan) else loan.rounds_of_all, self._room, batch)
            self._noted = (loan, batch) if same else None
        return Lent(self, loan, batch, kept, borrowing.lent(self, leaves))

    def _are_there(self, loan: Loan) -> bool:
        """Whether the slots have the guests that the plan counted on; on all ranks or on none."""
        return loan.before is not None and self.guests.holds(loan.before)

    def send_again(self, loan: Loan, batch: int) -> None:
        """Let guests' weights set out for the backward pass, after what is under way. Collective.

        Not if the slots have them still from this very batch, nor if the batch keeps them.
        """
        if self.guests.resend and not self.guests.holds(batch):
            self._start(loan.rounds_of_all, self._room, batch)

    def _start(self, rounds: list[list[Hop]], target: Fields, batch: int) -> None:
        if not rounds:
            self.guests.wait()
            if target is self._room:
                self.guests.mark(batch)
            return
        job, buffers = Job(rounds, target, (0, 0)), self._buffers
        holds = batch if target is self._room else None
        self.guests.start(lambda: self.mover.carry_out(job, buffers, agree=self._agrees), holds, target)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Weights of own slots as tensors ``[slots, ...]``, without gradients."""
        return self.experts.rows("gate_up"), self.experts.rows("down")

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
        """Let guests' gradients go home, and be added to those of own slots, after what is under way. Collective.

        The gradients of own slots are complete after `GuestSlots.wait`.
        """
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
        other.experts, other._number, other._noted = experts, next(_numbers), None
        other._checked = None
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
    batch: int
    """Its number among all batches of the guest slots."""
    kept: tuple[Tensor, Tensor] | None
    """Where guests come to; ``None`` for the shared slots."""
    leaves: tuple[Tensor, ...]
    """Weights of own slots, whose gradients will have those of guests added."""

    def serve(self, rows: Tensor, per_slot: list[int], grouped: bool) -> Tensor:
        """What own experts and guests make of rows that lie slot by slot, once guests are there. Collective."""
        return borrowing.served(rows, per_slot, self.lender, self.loan, self.batch, self.kept, self.leaves, grouped)

    def ahead(self, rows: Tensor) -> Tensor:
        """The rows that came back; their gradients let guests set out again."""
        return borrowing.ahead(rows, self.lender, self.loan, self.batch)
