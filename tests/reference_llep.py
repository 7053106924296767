"""Least-loaded assignment (LLEP, arXiv 2601.17111) in plain Python, word by word: what `compat=True` is compared with.

Nothing of lplb, no slots, no domains, no further residents: the paper has none. Helpers are sorted whenever the
published planner sorts them. Also here: whether any plan keeps a cap, by trying all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


def capacity(total: int, n_ranks: int, alpha: float) -> int:
    """What a rank may have; everything where there are fewer tokens than ranks."""
    balanced = total // n_ranks
    return total if balanced == 0 else max(1, int(alpha * balanced))


def stays_plain(native: Sequence[int], lam: float) -> bool:
    """Whether plain expert parallelism runs, for the tokens that every rank has at home."""
    return sum(native) == 0 or max(native) / (sum(native) / len(native)) < lam


@dataclass
class Assignment:
    """Who serves what so far. chunks: (expert, rank, tokens) in the order of decisions; a helper may come twice."""

    pending: list[int]
    cap: int
    m: int
    assigned: list[int] = field(init=False)
    chunks: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.assigned = [0] * len(self.pending)

    def effective(self, rank: int) -> int:
        return self.assigned[rank] + self.pending[rank]

    def room(self, rank: int) -> int:
        return self.cap - self.effective(rank)

    def give(self, expert: int, rank: int, tokens: int) -> None:
        self.assigned[rank] += tokens
        self.chunks.append((expert, rank, tokens))

    def sorted_helpers(self, native: int) -> list[int]:
        return sorted((g for g in range(len(self.pending)) if g != native), key=self.effective)

    def chunk(self, rank: int, remaining: int) -> int:
        """What a helper takes; 0 where it has no room, or a chunk below m that would not be the expert's last."""
        chunk = min(remaining, self.room(rank))
        return 0 if chunk <= 0 or (chunk < self.m and remaining > chunk) else chunk

    def spill_in_turn(self, expert: int, native: int, remaining: int) -> None:
        """For a native rank that kept some: helpers are sorted again after every chunk."""
        while remaining > 0:
            helpers = self.sorted_helpers(native)
            for helper in helpers:
                if chunk := self.chunk(helper, remaining):
                    break
            else:
                helper, chunk = helpers[0], remaining
            self.give(expert, helper, chunk)
            remaining -= chunk

    def spill_at_once(self, expert: int, native: int, remaining: int) -> None:
        """For a native rank without room: helpers are sorted once."""
        helpers = self.sorted_helpers(native)
        for helper in helpers:
            chunk = self.chunk(helper, remaining) if remaining > 0 else 0
            if chunk:
                self.give(expert, helper, chunk)
                remaining -= chunk
        if remaining > 0:
            self.give(expert, helpers[0], remaining)

    def place(self, expert: int, native: int, load: int) -> None:
        self.pending[native] -= load
        available = self.room(native)
        if available >= load or len(self.pending) == 1:
            self.give(expert, native, load)
        elif available > 0:
            self.give(expert, native, available)
            self.spill_in_turn(expert, native, load - available)
        else:
            self.spill_at_once(expert, native, load)


def least_loaded(
    loads: Sequence[int], home: Sequence[int], n_ranks: int, alpha: float, m: int, lam: float, most: int | None = None
) -> list[list[int]]:
    """Tokens of every expert on every rank, [n_logical][n_ranks]. most: no capacity is above it."""
    native = [0] * n_ranks
    for rank, load in zip(home, loads, strict=True):
        native[rank] += load
    quota = [[0] * n_ranks for _ in loads]
    if stays_plain(native, lam) and (most is None or max(native) <= most):
        for expert, load in enumerate(loads):
            quota[expert][home[expert]] = load
        return quota
    cap = capacity(sum(loads), n_ranks, alpha)
    plan = Assignment(native, cap if most is None else min(cap, most), m)
    for expert in sorted(range(len(loads)), key=lambda e: -loads[e]):
        if loads[expert] > 0:
            plan.place(expert, home[expert], loads[expert])
    for expert, rank, tokens in plan.chunks:
        quota[expert][rank] += tokens
    return quota


def splits(tokens: int, n_ranks: int, home: int, m: int) -> Iterator[tuple[int, ...]]:
    """All ways to share out an expert's tokens with m or more, or none, on every rank but its home."""
    if n_ranks == 0:
        if tokens == 0:
            yield ()
        return
    for last in range(tokens + 1):
        if last == 0 or last >= m or home == n_ranks - 1:
            for others in splits(tokens - last, n_ranks - 1, home, m):
                yield (*others, last)


def can_keep(loads: Sequence[int], home: Sequence[int], n_ranks: int, m: int, cap: int) -> bool:
    """Whether any plan has at most `cap` tokens on every rank. For few tokens."""
    reached = {(0,) * n_ranks}
    for rank, load in zip(home, loads, strict=True):
        ways = list(splits(load, n_ranks, rank, m))
        sums = (tuple(a + b for a, b in zip(so_far, way, strict=True)) for so_far in reached for way in ways)
        reached = {ranks for ranks in sums if max(ranks) <= cap}
    return bool(reached)
