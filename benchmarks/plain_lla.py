"""LLEP's least-loaded assignment in plain Python: what its planner decides, as a peer for time and transfers.

Nguyen et al., arXiv 2601.17111, and what github.com/SalesforceAIResearch/LeastLoadedEP does; in words of our own. Like
that program it works on Python lists. That reads counts from the tensor number by number, each twice; this does so on
request, and else all at once, which is faster.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Assigned(NamedTuple):
    """A batch shared out."""

    rank_load: list[int]
    """Tokens of each rank."""
    transfers: list[tuple[int, int, int, int]]
    """Expert, from, to, tokens; in the order in which they were decided."""

    @property
    def imbalance(self) -> float:
        """Busiest rank over mean; 1 without tokens."""
        total = sum(self.rank_load)
        return max(self.rank_load) * len(self.rank_load) / total if total else 1.0


def plain_lla(
    counts: torch.Tensor, n_ranks: int, alpha: float = 1.1, m: int = 1024, *, number_by_number: bool = False
) -> Assigned:
    """Share out a batch: experts by load, descending, each as far as possible at home.

    A home keeps what fits under its capacity beside what its experts that are still to come will need. What is left
    goes to the rank least loaded by the same measure, as much as has room there and at least ``m`` tokens unless it is
    all that is left; what nobody takes is forced onto the least loaded.

    Args:
        counts: tokens per source and expert, int64 ``[n_ranks, n_logical]``; homes are blocks of experts in order.
        n_ranks: a divisor of ``n_logical``.
        alpha: capacity of a rank over the mean.
        m: fewest tokens worth a GEMM.
        number_by_number: read counts as LLEP's program does.
    """
    summed = counts.sum(0)
    if number_by_number:
        twice = [int(summed[e].item()) for _ in range(2) for e in range(len(summed))]
        tokens = twice[: len(summed)]
    else:
        tokens = summed.tolist()
    per_rank = len(tokens) // n_ranks
    total = sum(tokens)
    capacity = max(1, int(alpha * (total // n_ranks)) if total >= n_ranks else total)
    load = [sum(tokens[r * per_rank : (r + 1) * per_rank]) for r in range(n_ranks)]  # assigned, and to come
    transfers: list[tuple[int, int, int, int]] = []

    def helpers(home: int) -> list[int]:
        return sorted((r for r in range(n_ranks) if r != home), key=load.__getitem__)

    for expert in sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True):
        left = tokens[expert]
        if left == 0:
            break
        home = expert // per_rank
        load[home] -= left
        kept = max(0, min(left, capacity - load[home]))
        load[home] += kept
        left -= kept
        order = helpers(home) if left else []
        looked_at = iter(order)
        while left:
            room = ((r, min(left, capacity - load[r])) for r in looked_at)
            fits = ((r, chunk) for r, chunk in room if chunk > 0 and (chunk >= m or chunk == left))
            rank, chunk = next(fits, None) or (order[0], left)  # nobody has room: the first has to take all
            transfers.append((expert, home, rank, chunk))
            load[rank] += chunk
            left -= chunk
            if kept and left:  # else the helpers are gone through once, in the first order
                order = helpers(home)
                looked_at = iter(order)
    return Assigned(load, transfers)
