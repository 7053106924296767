"""What a placement is worth on loads, and what one placement changes of another, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lplb.placement import Placement, split_evenly
from lplb.planner import Planner
from lplb.weights import moves_between

__all__ = ["Change", "Worth", "change", "worth"]

_Floats = npt.NDArray[np.float64]

_MOST_TOKENS = 2**24  # of a batch of averages: loads are planned in whole tokens, and these are fine enough


class Worth(NamedTuple):
    """Rank loads on a placement, and their largest over their mean, of batches that have tokens."""

    even: _Floats
    """Imbalance where the whole tokens of an expert are dealt out evenly over its copies, ``[batches]``."""
    lp: _Floats
    """Imbalance where the LP shares out whole tokens, ``[batches]``."""
    bound: _Floats
    """The certified lower bound of that, ``[batches]``."""
    even_loads: _Floats
    """Tokens of each rank, the mean over the batches, ``[n_ranks]``."""
    lp_loads: _Floats
    """The same for the LP, ``[n_ranks]``."""


def worth(placement: Placement, loads: npt.NDArray[Any], group_size: int | None = None) -> Worth:
    """Share out loads on a placement, evenly and by the LP.

    Args:
        placement: where the experts are.
        loads: tokens of each expert, or averages of them, ``[batches, n_logical]``.
        group_size: consecutive ranks that balance among themselves; all by default.

    Returns:
        What comes of it; the arrays of batches are empty if no batch has a token.

    Raises:
        ValueError: ``loads`` is of other experts, or the groups do not fit the placement.
    """
    if loads.ndim != 2 or loads.shape[1] != placement.n_logical:
        raise ValueError(
            f"loads has shape {list(loads.shape)}, allowed is [batches, n_logical] = [batches, {placement.n_logical}]"
        )
    planner = Planner.from_placement(placement, group_size=group_size, solver="flow")
    total = loads.sum(axis=1, dtype=np.float64)
    kept, total = loads[total > 0], total[total > 0]
    if not len(kept):
        nothing = np.zeros(placement.n_ranks)
        return Worth(np.empty(0), np.empty(0), np.empty(0), nothing, nothing)
    scale = _scale(kept, total)
    tokens = np.rint(kept * scale[:, None])
    plan = planner.solve(torch.from_numpy(tokens))
    mean = tokens.sum(axis=1) / placement.n_ranks
    quota = split_evenly(placement, tokens.astype(np.int64))
    even = quota.reshape(len(kept), placement.n_ranks, -1).sum(axis=2)
    lp = plan.rank_load.numpy()
    return Worth(
        even.max(axis=1) / mean,
        lp.max(axis=1) / mean,
        plan.lower_bound.numpy().max(axis=1) / mean,
        (even / scale[:, None]).mean(axis=0),
        (lp / scale[:, None]).mean(axis=0),
    )


def _scale(loads: npt.NDArray[Any], total: _Floats) -> _Floats:
    """Return what makes whole tokens of each batch: 1 if it has them, and no more than a planner takes."""
    whole = (loads == np.floor(loads)).all(axis=1) & (total < 2**31)
    return np.where(whole, 1.0, _MOST_TOKENS / total)


class Change(NamedTuple):
    """What leads from one placement of a layer to another."""

    moves: int
    """Slots filled from another rank: each is one transfer of an expert's weights."""
    within_rank: int
    """Slots filled from another slot of the same rank."""
    experts: list[int]
    """Logical experts that come to a rank that had none of their copies, in ascending order."""
    copies: dict[int, tuple[int, int]]
    """Experts whose number of copies changes: before and after."""
    received: list[int]
    """Moves to each rank."""
    sent: list[int]
    """Moves from each rank."""


def change(before: Placement, after: Placement) -> Change:
    """Say what has to move for one placement to follow another, as `lplb.weights.moves_between` does it.

    Args:
        before: where experts are.
        after: where they are to be, on as many ranks.

    Returns:
        Moves between ranks and within them.

    Raises:
        ValueError: the numbers of ranks differ, or ``after`` has experts that ``before`` has not.
    """
    moves = moves_between(before, after)
    away = [move for move in moves if move.source_rank != move.target_rank]
    counted = [placement.logcnt.tolist() for placement in (before, after)]
    copies = {e: (old, new) for e, (old, new) in enumerate(zip(*counted, strict=False)) if old != new}
    copies |= {e: (old, 0) for e, old in enumerate(counted[0]) if e >= after.n_logical}
    return Change(
        len(away),
        len(moves) - len(away),
        sorted({move.expert for move in away}),
        copies,
        _per_rank([move.target_rank for move in away], after.n_ranks),
        _per_rank([move.source_rank for move in away], after.n_ranks),
    )


def _per_rank(ranks: Sequence[int], n_ranks: int) -> list[int]:
    counted = Counter(ranks)
    return [counted[rank] for rank in range(n_ranks)]
