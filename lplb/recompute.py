"""Activation checkpointing: a region that is computed twice plans once."""

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lplb.lending import Loan

__all__ = ["keep_routes", "settled"]

_Settled: TypeAlias = tuple[Tensor, Tensor, "Loan | None"]
"""The slot of every choice, the rows that ranks have for each other, and what weights travel."""
_Context: TypeAlias = contextlib.AbstractContextManager[None]


def keep_routes() -> tuple[_Context, _Context]:
    """Let the EP layers of a checkpointed region keep what they settled, so that the second time they only compute.

    For regions that contain layers: ``checkpoint(block, x, use_reentrant=False, context_fn=keep_routes)``. Without it
    the results are the same, but all ranks plan and exchange split sizes again; with ``lag=1``, where the plan would be
    another the second time, it is required. One int64 is kept for every choice.

    Returns:
        What torch.utils.checkpoint wants of a ``context_fn``: contexts for the first computation and for those after.
    """
    noted: list[_Settled] = []
    return _Region(noted, again=False), _Region(noted, again=True)


class _Regions(threading.local):
    """What layers of this thread are to do: note what they settle, or take what was noted, in the order of calls."""

    def __init__(self) -> None:
        self.noted: list[_Settled] | None = None
        self.repeated: Iterator[_Settled] | None = None

    def note(self, slot: Tensor, traffic: Tensor, loan: "Loan | None") -> None:
        """Keep what a layer has settled, if this is a region's first computation."""
        if not torch.compiler.is_compiling() and self.noted is not None:
            self.noted.append((slot, traffic, loan))

    def again(self) -> _Settled | None:
        """What the layer had settled the first time, ``None`` if this is the first time."""
        if torch.compiler.is_compiling() or self.repeated is None:
            return None
        found = next(self.repeated, None)
        if found is None:
            raise RuntimeError(
                "a checkpointed region calls more layers when computed again, allowed are as many as before"
            )
        return found


settled = _Regions()


class _Region(contextlib.AbstractContextManager[None]):
    """May be entered several times: a graph that is kept is computed again for every backward pass."""

    def __init__(self, noted: list[_Settled], again: bool) -> None:
        self._noted, self._again = noted, again

    def __enter__(self) -> None:
        self._before = settled.noted, settled.repeated
        settled.noted, settled.repeated = (None, iter(self._noted)) if self._again else (self._noted, None)

    def __exit__(self, *_: object) -> None:
        settled.noted, settled.repeated = self._before
