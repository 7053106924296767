"""What a plan with transfers says: who serves how much, which weights travel, and how good that is."""

import hashlib
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, SupportsIndex

import torch

from lplb import _C
from lplb.arguments import check_indices, whole_number
from lplb.cuda_transfers import Backend
from lplb.routes import RangeRouter
from lplb.transfers.residents import Residents
from lplb.weights.moves import Move

__all__ = ["ParetoFront", "ParetoPoint", "TransferPlan"]

N_NUMBERS = _C.transfer_numbers
N_TRANSFERS, MAX_LOAD, TOKENS, CAP, FEASIBLE, LEAST, MOST_SENDS, MOST_RECEIVES = range(N_NUMBERS)
"""What stands where in `TransferPlan.numbers`, as csrc/core/transfer_problem.h has it."""


class ParetoPoint(NamedTuple):
    """The best balance that the search finds with some number of transfers, where with fewer it finds less.

    The search is none for a proven optimum, which is NP-hard: ``max_load`` is reached, a smaller one may be as well.
    """

    transfers: int
    """Experts that travel to a rank."""
    bytes: int | None
    """What they weigh together; ``None`` where the planner does not know an expert's bytes."""
    max_load: int
    """Tokens on the busiest rank."""
    imbalance: float
    """Largest over mean rank load; 1 without tokens."""


ParetoFront = tuple[ParetoPoint, ...]
"""From no transfer, the worst balance, to the best balance that is found, with the fewest transfers found for it. Of
no transfer the balance is the least there is; of more it is what the search finds."""


class Frame(NamedTuple):
    """The sizes of a plan, and where its tensors are in the one block of memory that they share."""

    n_logical: int
    n_ranks: int
    slots: int
    rows: int
    ranks_per_node: int

    @property
    def ends(self) -> tuple[int, int, int, int, int]:
        """Where quota, rank loads, numbers, bound and, rounded up, the int32 tables end, in words of 8 bytes."""
        quota = self.n_logical * self.n_ranks
        load = quota + self.n_ranks
        numbers = load + N_NUMBERS
        bound = numbers + 1
        return quota, load, numbers, bound, bound + (3 * self.rows + self.n_ranks * self.slots + 1) // 2

    @property
    def offsets(self) -> tuple[int, int, int, int, int, int]:
        """Where `quota`, `rank_load`, `transfers`, `guests`, `numbers` and `bound` begin, in bytes."""
        quota, load, numbers, bound, _ = self.ends
        return 0, 8 * quota, 8 * bound, 8 * bound + 12 * self.rows, 8 * load, 8 * numbers

    @property
    def filled_bytes(self) -> int:
        """Bytes that a plan fills; the rest of the last word is left as it was."""
        return 8 * self.ends[3] + 12 * self.rows + 4 * self.n_ranks * self.slots


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """Who serves the tokens of one batch, and which experts travel for it.

    A *guest* is a copy that serves one batch from a guest slot; a *transfer* brings one. All tensors are on the
    planner's device, belong to the plan, and are not to be written to. On CUDA they are filled in the order of the
    stream that was current, and a property that is no tensor waits for it.
    """

    memory: torch.Tensor
    """What the tensors are views of, int64, on the planner's device."""
    frame: Frame
    """The sizes, and where each tensor begins."""
    counts: torch.Tensor
    """The tokens that the plan is for, as they were given and not copied: int32 or int64 ``[ranks, n_logical]``, or
    ``[n_logical]`` of no rank in particular. Not to be written to as long as `route` is to be called."""
    residents: Residents
    """Where experts live."""
    strategy: str
    """``"llep"`` or ``"joint"``; from ``"auto"`` and planners with a ``model`` what they chose: ``"plain"`` (every
    expert at home), ``"replicas"`` (resident copies, no transfer) or ``"joint"``."""
    expert_bytes: int | None
    """Bytes of an expert, if the planner knows them."""
    seconds: dict[str, float] | None = None
    """For a plan chosen by the cost model: the modelled seconds of the layer, transfers included, with the best plan
    of each kind that was looked at. ``None`` for other plans."""
    version: int = 0
    """Writes to ``counts`` that torch knew of when the plan was made."""
    on_device: Backend | None = None
    """What finds routes on CUDA; ``None`` for a plan on the CPU."""

    def __getstate__(self) -> dict[str, Any]:
        """Copy or pickle the fields; a plan on CUDA cannot be, its `cpu` can."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**state, "version": version_of(self.counts) - self.version}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the fields; a copied tensor begins another count of writes."""
        self.__dict__.update(state, version=version_of(state["counts"]) - state["version"])

    # ---- tensors

    @cached_property
    def quota(self) -> torch.Tensor:
        """Tokens of each expert that each rank serves, int64 ``[n_logical, ranks]``."""
        return self.memory[: self.frame.ends[0]].view(self.frame.n_logical, self.frame.n_ranks)

    @cached_property
    def rank_load(self) -> torch.Tensor:
        """Tokens on each rank, int64 ``[ranks]``."""
        quota, load, *_ = self.frame.ends
        return self.memory[quota:load]

    @cached_property
    def numbers(self) -> torch.Tensor:
        """int64 ``[8]``: transfers, `max_load`, tokens of the batch, `cap`, `feasible`, the least `max_load` that any
        plan can have, most transfers from one rank, most to one rank."""
        _, load, numbers, *_ = self.frame.ends
        return self.memory[load:numbers]

    @cached_property
    def bound(self) -> torch.Tensor:
        """No plan has a smaller fractional largest load: float64 ``[1]``, tokens. Domains count, slots do not."""
        _, _, numbers, bound, _ = self.frame.ends
        return self.memory[numbers:bound].view(torch.float64)

    @cached_property
    def transfers(self) -> torch.Tensor:
        """Expert, rank that has it, rank that gets it: int32 ``[rows, 3]``, -1 behind the last."""
        return self._table[: 3 * self.frame.rows].view(self.frame.rows, 3)

    @cached_property
    def guests(self) -> torch.Tensor:
        """What each guest slot holds once the transfers have come, -1 for nothing: int32 ``[ranks, slots]``.

        May be given as ``held`` to the next call, if nothing else is put there meanwhile.
        """
        n_ranks, slots, rows = self.frame[1:4]
        return self._table[3 * rows : 3 * rows + n_ranks * slots].view(n_ranks, slots)

    @property
    def _table(self) -> torch.Tensor:
        return self.memory[self.frame.ends[3] :].view(torch.int32)

    # ---- numbers

    def _number(self, which: int) -> int:
        return int(self.memory[self.frame.ends[1] + which])

    @property
    def n_transfers(self) -> int:
        """Transfers, the rows of `transfers` that are used."""
        return self._number(N_TRANSFERS)

    @property
    def max_load(self) -> int:
        """Tokens on the busiest rank."""
        return self._number(MAX_LOAD)

    @property
    def cap(self) -> int:
        """The largest `max_load` that was asked for: by the tolerance or alpha, and by max_tokens.

        By the tolerance it is ``floor((1 + tolerance) * lower_bound)`` in float64, or the least whole `max_load` if
        that is more.
        """
        return self._number(CAP)

    @property
    def feasible(self) -> bool:
        """Whether no rank is above `cap`. If not, no such plan was found; where slots are few there may be one.

        Guests have at least ``m`` tokens in any plan but one by LLEP with ``compat``, where this says nothing of them.
        """
        return bool(self._number(FEASIBLE))

    @property
    def excess(self) -> int:
        """Tokens of the busiest rank above `cap`, 0 if there are none."""
        return max(0, self.max_load - self.cap)

    @property
    def imbalance(self) -> float:
        """Largest over mean rank load, at least 1; 1 without tokens."""
        tokens = self._number(TOKENS)
        return self.max_load * self.frame.n_ranks / tokens if tokens else 1.0

    @property
    def lower_bound(self) -> float:
        """No plan has a smaller fractional largest load, in tokens, however many copies travel into whatever slots."""
        return float(self.bound)

    @property
    def gap(self) -> float:
        """(`max_load` - least) / least, where least is `lower_bound` rounded up; 0 without tokens."""
        least = self._number(LEAST)
        return (self.max_load - least) / least if least else 0.0

    @property
    def bytes(self) -> int:
        """What the transfers weigh together.

        Raises:
            ValueError: the planner was given neither ``expert_bytes`` nor a ``model``.
        """
        if self.expert_bytes is None:
            raise ValueError("expert_bytes is None, allowed where bytes are asked for is an int, or a planner's model")
        return self.n_transfers * self.expert_bytes

    @property
    def sentence(self) -> str:
        """The plan in one line of words."""
        count, most = self.n_transfers, self.max_load
        what = f"{count} transfer{'s' * (count != 1)}" if count else "no transfer"
        line = f"{what}, busiest rank {most} tokens ({self.imbalance:.4f} of the mean), least possible "
        line += f"{self._number(LEAST)}"
        if self.feasible:
            return line
        return f"{line}; not what was asked for: {self.excess} above the cap of {self.cap}"

    def __str__(self) -> str:
        """One line: strategy, size, and the sentence."""
        return f"TransferPlan({self.strategy}, {self.frame.n_ranks} ranks: {self.sentence})"

    # ---- what to do with it

    def moves(self) -> list[Move]:
        """The transfers as moves for `lplb.weights.WeightMover`, from resident slots into guest slots.

        A move's ``source_slot`` counts the resident slots of the source, its ``target_slot`` the guest slots of the
        target, both from 0.

        Returns:
            One move for each transfer, in the order of `transfers`; the same on every rank.
        """
        rows = self.transfers[: self.n_transfers].tolist()
        guests = self.guests.tolist()
        slot_of = self.residents.slot_of
        return [Move(e, source, slot_of[e, source], to, guests[to].index(e)) for e, source, to in rows]

    def route(self, indices: torch.Tensor, rank: SupportsIndex) -> torch.Tensor:
        """Find the virtual slot of every choice of a source rank's tokens.

        Virtual slot ``rank * width + local`` is a resident slot of the rank below `TransferPlanner.residents_per_rank`,
        and a guest slot from there on. Tokens of an expert stay on their own rank, then within its node, as far as
        quotas allow, and go by range: the first so many choices to one rank, the next to another.

        Args:
            indices: the router's choices, int32 or int64, any shape, -1 for none: as many of each expert as ``counts``
                says of the rank.
            rank: the source; 0 where ``counts`` is of no rank in particular.

        Returns:
            Like ``indices``, contiguous; -1 stays -1. Over all ranks, each virtual slot gets exactly its quota.

        Raises:
            TypeError, ValueError: an argument is not allowed, or ``counts`` was written to since the plan was made:
                torch counted a write, or its tokens are other than the plan's. On CUDA, what only the values of counts
                and indices tell is raised by a later call.
        """
        rank, counts = self._checked_source(rank)
        check_indices(indices, self.memory.device)
        if self.on_device is None:
            _check_tokens(counts, self.quota)
        indices = indices.resolve_neg()  # memory is read as it is
        router = self._router if self.on_device is None else self.on_device
        return router.route(indices, self.quota, self.guests, counts, rank).slots

    def tokens_by_source(self) -> torch.Tensor:
        """Tokens that each source rank sends to each virtual slot: int64 ``[ranks, ranks * width]``, one row if
        ``counts`` is of no rank in particular, on the CPU. Waits for a CUDA device.

        A row is what `route` does for its rank.

        Raises:
            ValueError: ``counts`` was written to since the plan was made, or has other tokens than the plan.
        """
        counts, quota = self._checked_source(0)[1].cpu(), self.quota.cpu()
        _check_tokens(counts, quota)
        return self._router.tokens_by_source(quota, self.guests.cpu(), counts)

    @property
    def _router(self) -> RangeRouter:
        return _router_of(self.residents, self.frame.slots, self.frame.ranks_per_node)

    def _checked_source(self, rank: SupportsIndex) -> tuple[int, torch.Tensor]:
        """A source rank, and counts with a row for each."""
        if self.on_device is None and version_of(self.counts) != self.version:  # a captured plan is of new counts
            raise ValueError("counts was written to since the plan was made, allowed is a tensor that stays as it was")
        counts = self.counts if self.counts.dim() == 2 else self.counts[None]
        return whole_number("rank", rank, 0, len(counts) - 1), counts

    def cpu(self) -> "TransferPlan":
        """Return the plan on the CPU; waits for a CUDA device. The plan itself if it is there already."""
        if self.on_device is None:
            return self
        counts = self.counts.cpu()
        return replace(self, memory=self.memory.cpu(), counts=counts, version=version_of(counts), on_device=None)

    def fingerprint(self) -> tuple[int, int]:
        """Two 31-bit words that differ, but for chance, from those of any other plan; waits for a CUDA device."""
        filled = self.memory.cpu().view(torch.uint8)[: self.frame.filled_bytes]
        digest = hashlib.blake2b(filled.numpy().tobytes(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little") >> 1, int.from_bytes(digest[4:], "little") >> 1


@lru_cache(maxsize=64)
def _router_of(residents: Residents, slots: int, ranks_per_node: int) -> RangeRouter:
    n_logical, n_ranks = residents.n_logical, residents.n_ranks
    return RangeRouter(residents.ranks, residents.experts, n_logical, n_ranks, slots, ranks_per_node)


def _check_tokens(counts: torch.Tensor, quota: torch.Tensor) -> None:
    """Refuse counts with other tokens of an expert than its quotas: NumPy's writes are not counted by torch."""
    now, planned = counts.sum(0, dtype=torch.int64), quota.sum(1)
    if not torch.equal(now, planned):
        expert = int((now != planned).nonzero()[0])
        raise ValueError(
            f"counts has {int(now[expert])} tokens of expert {expert}, allowed is what the plan was made for, "
            f"{int(planned[expert])}: counts was written to since then"
        )


def points(pairs: list[tuple[int, int]], tokens: int, n_ranks: int, expert_bytes: int | None) -> ParetoFront:
    """A front from its transfers and largest loads."""
    return tuple(
        ParetoPoint(
            transfers,
            None if expert_bytes is None else transfers * expert_bytes,
            most,
            most * n_ranks / tokens if tokens else 1.0,
        )
        for transfers, most in pairs
    )


def version_of(counts: torch.Tensor) -> int:
    """Writes to a tensor that torch knows of; -1 where it does not count them."""
    return -1 if counts.is_inference() else counts._version
