"""Tokens to virtual slots by range, where weights travel for one batch.

A *virtual slot* is ``rank * width + local``: the residents of a rank in slot order, padded to the most that any rank
has, then its guest slots. How much of a source's tokens of an expert each rank serves is as LPLB shares quotas out,
local first: the source's own rank, then its node, then the rest; the totals of every source and every quota are met
exactly. Within a source the tokens go by range, in the order of its indices: the first so many to the first of the
ranks that serve it, the next to the second.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lplb import _C

__all__ = ["RangeRouter", "Routed"]

MOST_INDICES = 2**31 - 1
"""Of one call: tokens of a source are numbered with 32 bits."""

_TOKENS_PER_THREAD = 1 << 16  # below this a thread costs more than it saves


class Routed(NamedTuple):
    """Where the tokens of a source go."""

    slots: torch.Tensor
    """The virtual slot of every choice, shape, dtype and device of the indices; -1 where an index is -1."""
    send: torch.Tensor
    """How many of them go to each virtual slot, int64 ``[n_ranks * width]``."""


class RangeRouter:
    """Residents and guest slots of all ranks, for `route`; any thread may call it.

    What callers give is checked by `lplb.TransferPlan`, but for what only a look at all indices tells.

    Args:
        resident_rank: the rank of every resident, in rank order.
        resident_expert: the expert of each, in slot order within a rank; every expert is there.
        n_logical: experts.
        n_ranks: ranks.
        slots: guest slots of a rank.
        ranks_per_node: consecutive ranks among which tokens travel cheaply.
    """

    def __init__(
        self,
        resident_rank: Sequence[int],
        resident_expert: Sequence[int],
        n_logical: int,
        n_ranks: int,
        slots: int,
        ranks_per_node: int,
    ) -> None:
        """See the class."""
        self._ranges = _C.CpuRanges(resident_rank, resident_expert, n_logical, n_ranks, slots)
        self.width = self._ranges.width
        """Virtual slots per rank."""
        self._n_ranks = n_ranks
        self._ranks_per_node = ranks_per_node

    def route(
        self, indices: torch.Tensor, quota: torch.Tensor, guests: torch.Tensor, counts: torch.Tensor, source: int
    ) -> Routed:
        """Find the virtual slot of every choice of a source rank.

        Args:
            indices: the router's choices, int32 or int64 of any shape, on the CPU; -1 is no choice.
            quota: tokens of an expert that a rank serves, int64 ``[n_logical, n_ranks]``, contiguous.
            guests: experts in the guest slots, int32 ``[n_ranks, slots]``, contiguous; -1 is empty.
            counts: tokens that the quotas are of, int32 or int64 ``[n_ranks, n_logical]``, by source rank; its rows are
                contiguous. With one row the source is no rank in particular, and ``source`` is 0.
            source: the rank whose choices these are.

        Raises:
            ValueError: an index is no expert, there are too many, or an expert has another number of tokens than
                ``counts`` says of the source.
        """
        if indices.numel() > MOST_INDICES:
            raise ValueError(f"indices are {indices.numel()}, allowed are {MOST_INDICES}")
        given = indices.contiguous()
        slots = torch.empty_like(given)
        send = torch.empty(self._n_ranks * self.width, dtype=torch.int64, device=given.device)
        threads = max(1, min(torch.get_num_threads(), given.numel() // _TOKENS_PER_THREAD))
        bad, expert = self._ranges.route(
            (quota.data_ptr(), guests.data_ptr()),
            *self._counts(counts),
            source,
            (given.data_ptr(), given.element_size(), given.numel()),
            slots.data_ptr(),
            send.data_ptr(),
            threads,
        )
        if bad >= 0:
            raise ValueError(
                f"indices have {int(given.view(-1)[bad])} at flat position {bad}, allowed is -1 (masked) or 0 to "
                f"n_logical - 1 = {counts.shape[1] - 1}"
            )
        if expert >= 0:
            found, planned = int((given == expert).sum()), int(counts[source, expert])
            raise ValueError(
                f"indices name expert {expert} {found} times, allowed is {planned}, what the plan's counts say of rank "
                f"{source}"
            )
        return Routed(slots, send)

    def tokens_by_source(self, quota: torch.Tensor, guests: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Tokens that each source sends to each virtual slot, int64 ``[rows of counts, n_ranks * width]``.

        Rows are what `route` says of each source, columns add up to the quotas. Arguments as there.
        """
        tokens = torch.empty(len(counts), self._n_ranks * self.width, dtype=torch.int64, device=counts.device)
        self._ranges.send_all((quota.data_ptr(), guests.data_ptr()), *self._counts(counts), tokens.data_ptr())
        return tokens

    def _counts(self, counts: torch.Tensor) -> tuple[tuple[int, int, int, int], int]:
        rows = len(counts)
        ranks_per_node = 0 if rows == 1 and self._n_ranks > 1 else self._ranks_per_node
        return (counts.data_ptr(), counts.element_size(), rows, counts.stride(0)), ranks_per_node
