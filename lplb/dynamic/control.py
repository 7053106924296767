"""What the background threads of the ranks tell each other: rows of words, and what went wrong on one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TypeVar

import torch
import torch.distributed as dist

from lplb import exchange

__all__ = ["KINDS", "Control", "SkippedError", "Stage"]

_LABEL = 3  # words behind a row, the same on all ranks that are in step

KINDS = ("no gain", "no loads", "loads", "plan", "memory", "transfer", "commit", "closed")
"""Why a cycle may end early."""

T = TypeVar("T")


class Stage(IntEnum):
    """Where the background thread of a rank is; the same on all ranks whenever they meet."""

    IDLE = 0
    COLLECT = 1
    PLAN = 2
    TRANSFER = 3
    COMMIT = 4
    WAIT = 5


class SkippedError(Exception):
    """A cycle goes no further, on any rank, and nothing is lost.

    Args:
        kind: one of `KINDS`, for counting.
        reason: what happened, in a sentence.
    """

    def __init__(self, kind: str, reason: str) -> None:
        """See the class."""
        super().__init__(reason)
        self.kind = kind


class Control:
    """Collective calls of background threads, in one order on all ranks.

    Every call raises `lplb.exchange.LostRankError` where a rank is lost or out of step; then no rank knows what the
    others do, and nothing may be decided any more.

    Args:
        ranks: between which nothing else travels.
        columns: words of the widest row.
    """

    def __init__(self, ranks: exchange.Exchange, columns: int) -> None:
        """See the class."""
        self.ranks = ranks
        self.rank, self.size = ranks.rank, ranks.size
        exchange.widen(ranks, 2 * (columns + _LABEL))  # words are of 64 bits, columns of 32

    def gather(self, stage: Stage, row: Sequence[int]) -> list[list[int]]:
        """Return every rank's words, in the order of ranks.

        Args:
            stage: the same on every rank, or they are out of step.
            row: as many words of 64 bits as on every other rank.
        """
        label = [exchange.REBALANCE, int(stage), len(row)]
        words = torch.tensor([*row, *label], dtype=torch.int64, device="cpu")
        table = torch.empty(self.size, 2 * len(words), dtype=torch.int32, device="cpu")
        exchange.gather(self.ranks, exchange.REBALANCE, words.view(torch.int32), table)
        told: list[list[int]] = table.view(torch.int64).tolist()
        odd = next((rank for rank, theirs in enumerate(told) if theirs[len(row) :] != label), None)
        if odd is not None:
            raise exchange.LostRankError(
                f"rank {odd} is out of step with rank {self.rank}, which is in {stage.name.lower()}: one of them has "
                "had an error that the other has not"
            )
        return [theirs[: len(row)] for theirs in told]

    def together(
        self, stage: Stage, kind: str, action: Callable[[], T], print_of: Callable[[T], object] | None = None
    ) -> T:
        """Act on every rank; if that fails on one, or the outcomes differ, all ranks skip what they are at.

        Args:
            stage: as for `gather`.
            kind: of the `SkippedError`, unless the action raises one of its own.
            action: what to do; if it is collective itself, with the same calls on every rank that has no error.
            print_of: from the outcome to what is the same on every rank, by its ``repr``.

        Raises:
            SkippedError: on every rank, with the error of the first that has one.
        """
        error: Exception | None = None
        words = (0, 0)
        try:
            found = action()
            words = exchange.fingerprint(kind, None if print_of is None else print_of(found))
        except exchange.LostRankError:
            raise
        except Exception as problem:
            error = problem
        mine = error.kind if isinstance(error, SkippedError) else kind
        words_of_error = "" if error is None else _words_of(error)
        told = self.gather(stage, [0 if error is None else 1 + KINDS.index(mine), *words])
        failed = next((rank for rank, theirs in enumerate(told) if theirs[0]), None)
        if failed is not None:
            text = exchange.message_of(self.ranks, failed, words_of_error)
            why = KINDS[told[failed][0] - 1]
            raise SkippedError(why, text if self.size == 1 else f"rank {failed}: {text}") from error
        odd = next((rank for rank, theirs in enumerate(told) if theirs[1:] != told[0][1:]), None)
        if odd is not None:
            raise SkippedError(kind, f"rank {odd} has another outcome than rank 0")
        return found

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        """Add up int64 counts of the CPU over the ranks, in place."""
        if isinstance(self.ranks, exchange.Distributed):
            with _as_lost("adding up loads"):
                dist.all_reduce(counts, group=self.ranks.group)
        return counts

    def by_rank(self, counts: torch.Tensor) -> torch.Tensor:
        """Return every rank's int64 counts of the CPU, ``[ranks, *counts.shape]``."""
        if not isinstance(self.ranks, exchange.Distributed):
            return counts[None]
        table = [torch.empty_like(counts) for _ in range(self.size)]
        with _as_lost("gathering loads"):
            dist.all_gather(table, counts.contiguous(), group=self.ranks.group)
        return torch.stack(table)


def _words_of(error: Exception) -> str:
    """What an error says on one line; it must not raise, as the other ranks wait."""
    try:
        words = str(error) or repr(error)
    except Exception:
        words = type(error).__name__
    return " ".join(words.split())


class _as_lost:
    """What torch.distributed raises, as a lost rank."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise exchange.LostRankError(
                f"{self._what} failed, most likely because a rank was lost: {error}"
            ) from error
