"""Gradients of experts that were lent for one batch: how they come home."""

from collections.abc import Sequence

import torch

from lplb.weights.early import Part
from lplb.weights.gradients import Gradients, RankOrderSum
from lplb.weights.links import says_where
from lplb.weights.mover import WeightMover
from lplb.weights.moves import Move, sum_rounds
from lplb.weights.packing import Field, pack, quiet

__all__ = ["bring_home", "ways_home"]


def ways_home(moves: Sequence[Move], rank: int) -> list[Part]:
    """What a rank does, round by round, to bring gradients home.

    Args:
        moves: from every guest slot to its expert's original.
        rank: whose part it is.
    """
    return [
        Part(
            next((move for move in together if move.source_rank == rank), None),
            next((move for move in together if move.target_rank == rank), None),
        )
        for together in sum_rounds(moves)
    ]


def bring_home(
    mover: WeightMover,
    ways: Sequence[Part],
    copies: Sequence[Field],
    own: Sequence[torch.Tensor | None],
    buffers: Sequence[torch.Tensor],
    *,
    agree: bool,
) -> None:
    """Send the gradients of guests to the originals of their experts, and add up there. Collective.

    An original gets the sum over its copies, in the order of their ranks with its own gradient in its rank's place, in
    float32 (float64 if gradients are), rounded once.

    Args:
        mover: of the layer's weights; gradients have their shapes and dtypes, and take the same way.
        ways: of `ways_home`.
        copies: gradients by guest slot, one field for each of the mover's.
        own: gradients by slot of this rank, ``None`` for a field that is not trained here; the sums are written here.
        buffers: two of `Link.buffer`.
        agree: as for `WeightMover.carry_out`.

    Raises:
        RuntimeError: a rank is lost, or an addition failed.
    """
    layout, link = mover.fields.layout, mover.link
    sums: _Sums | None = None
    fault: Exception | None = None  # of this rank alone: the others are not left waiting
    with quiet():
        for number, (out, come) in enumerate(ways):
            try:
                if out is not None:
                    pack(copies, out.source_slot, layout, buffers[0])
            except Exception as problem:
                fault = fault or problem
            with says_where(f"bringing gradients home stopped in round {number + 1} of {len(ways)}"):
                link.transfer(
                    None if out is None else (buffers[0], out.target_rank),
                    None if come is None else (buffers[1], come.source_rank),
                )
            try:
                if come is not None:
                    if sums is None or sums.slot != come.target_slot:
                        if sums is not None:
                            sums.write()
                        sums = _Sums(come.target_slot, mover, own)
                    sums.total.add(come.source_rank, sums.wanted(layout.views(buffers[1])))
            except Exception as problem:
                fault = fault or problem
        try:
            if sums is not None:
                sums.write()
        except Exception as problem:
            fault = fault or problem
    if agree and ways:
        mover.agree_on_end("bringing gradients home", fault)
    elif fault is not None:
        raise fault


class _Sums:
    """The gradients of one original while its copies' are added."""

    def __init__(self, slot: int, mover: WeightMover, own: Sequence[torch.Tensor | None]) -> None:
        self.slot = slot
        self._own: Gradients = [None if rows is None else rows[slot] for rows in own]
        self.total = RankOrderSum(mover.ranks.rank, self._own, mover.fields.device)

    def wanted(self, gradients: Sequence[torch.Tensor]) -> Gradients:
        """Only those that are trained here."""
        return [None if own is None else gradient for own, gradient in zip(self._own, gradients, strict=True)]

    def write(self) -> None:
        """Round once."""
        for own, total in zip(self._own, self.total.total(), strict=True):
            if own is not None and total is not None:
                own.copy_(total)
