"""Where experts live between batches: any number on each rank, unlike in a `Placement`."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import SupportsIndex

import numpy as np

from lplb.arguments import MAX_GROUP_SIZE, seen, whole_number
from lplb.placement import Placement

__all__ = ["Residents"]

MOST_EXPERTS = 1 << 16
"""Of a planner: its tables have an entry for each expert and rank. As many as scenes have."""

_MAX_NAMED = 4  # how many missing experts a message lists


@dataclass(frozen=True)
class Residents:
    """The experts of each rank, slot by slot. Ranks may have different numbers of them, also none.

    Every expert is on at least one rank, and on each at most once. Made by `residents_of`, which checks.
    """

    by_rank: tuple[tuple[int, ...], ...]
    """For each rank the experts in its resident slots."""
    n_logical: int
    """Number of experts."""

    @property
    def n_ranks(self) -> int:
        """Number of ranks."""
        return len(self.by_rank)

    @cached_property
    def width(self) -> int:
        """Resident slots of the rank that has most of them."""
        return max(map(len, self.by_rank))

    @cached_property
    def ranks(self) -> list[int]:
        """The rank of every resident copy, in the order of ranks and slots."""
        return [rank for rank, experts in enumerate(self.by_rank) for _ in experts]

    @cached_property
    def experts(self) -> list[int]:
        """The expert of every resident copy, in the order of `ranks`."""
        return list(chain.from_iterable(self.by_rank))

    @cached_property
    def slot_of(self) -> dict[tuple[int, int], int]:
        """The slot of each resident copy within its rank, by expert and rank."""
        return {(e, rank): slot for rank, experts in enumerate(self.by_rank) for slot, e in enumerate(experts)}

    @cached_property
    def home(self) -> tuple[int, ...]:
        """For each expert the rank of its first copy: plain expert parallelism uses that one only."""
        homes: dict[int, int] = {}
        for rank, expert in zip(self.ranks, self.experts, strict=True):
            homes.setdefault(expert, rank)
        return tuple(homes[expert] for expert in range(self.n_logical))


def residents_of(placement: object, n_logical: SupportsIndex, n_ranks: SupportsIndex) -> Residents:
    """Return where experts live, checked.

    Args:
        placement: a `Placement`; or for each rank a sequence of its experts; or ``None`` for one copy of each expert,
            in blocks in the order of ranks, the first blocks longer by one where they do not divide evenly.
        n_logical: number of experts, 1 to `MOST_EXPERTS`.
        n_ranks: number of ranks, 1 to `MAX_GROUP_SIZE`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: other numbers of ranks or experts, an expert that does not exist, is nowhere, or twice on one rank.
    """
    n_logical = whole_number("n_logical", n_logical, 1, MOST_EXPERTS)
    n_ranks = whole_number("ep_size", n_ranks, 1, MAX_GROUP_SIZE)
    if placement is None:
        each, left = divmod(n_logical, n_ranks)
        first = [rank * each + min(rank, left) for rank in range(n_ranks + 1)]
        return Residents(tuple(tuple(range(*ends)) for ends in pairwise(first)), n_logical)
    if isinstance(placement, Placement):
        for name, has, wanted, allowed in (
            ("n_ranks", placement.n_ranks, "ep_size", n_ranks),
            ("n_logical", placement.n_logical, "n_logical", n_logical),
        ):
            if has != allowed:
                raise ValueError(f"placement has {name} {has}, allowed is {wanted} = {allowed}")
        rows = placement.phy2log.view(n_ranks, -1).tolist()
        return Residents(tuple(map(tuple, rows)), n_logical)
    found = Residents(_rows(placement, n_ranks, n_logical), n_logical)
    n_missing = n_logical - len(set(found.experts))
    if n_missing:
        present = set(found.experts)
        missing = [e for e in range(n_logical) if e not in present][:_MAX_NAMED]
        more = " and others" if n_missing > len(missing) else ""
        raise ValueError(
            f"placement has {n_missing} of {n_logical} experts on no rank: {', '.join(map(str, missing))}{more}; "
            "allowed is at least one copy each"
        )
    return found


def _rows(placement: object, n_ranks: int, n_logical: int) -> tuple[tuple[int, ...], ...]:
    """The experts of each rank, in range and none twice on one rank."""
    if not isinstance(placement, Sequence) or isinstance(placement, (str, bytes)):
        raise TypeError(
            f"placement is {seen(placement)}, allowed is an lplb.Placement, for each rank a sequence of its experts, "
            "or None"
        )
    if len(placement) != n_ranks:
        raise ValueError(f"placement is of {len(placement)} ranks, allowed is ep_size = {n_ranks}")
    rows = []
    for rank, given in enumerate(placement):
        if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
            raise TypeError(f"placement[{rank}] is {seen(given)}, allowed is a sequence of experts")
        for slot, expert in enumerate(given):
            if isinstance(expert, (bool, np.bool_)) or not hasattr(expert, "__index__"):
                raise TypeError(f"placement[{rank}][{slot}] is {expert!r}, allowed is an int")
        row = tuple(operator.index(expert) for expert in given)
        first: dict[int, int] = {}
        for slot, expert in enumerate(row):
            if not 0 <= expert < n_logical:
                raise ValueError(f"placement[{rank}][{slot}] is {expert}, allowed is 0 to {n_logical - 1}")
            if first.setdefault(expert, slot) != slot:
                raise ValueError(
                    f"placement[{rank}] has expert {expert} in slots {first[expert]} and {slot}, allowed is once on a "
                    "rank"
                )
        rows.append(row)
    return tuple(rows)
