"""What a rebalancer has done and is at, for those who watch it."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

__all__ = ["Progress", "Stats", "Tally"]


class Progress(NamedTuple):
    """How far the cycle is that is under way."""

    stage: str = "idle"
    """``"idle"``, ``"collect"``, ``"plan"``, ``"transfer"``, ``"commit"``, ``"wait"`` (for the step of a swap),
    ``"closed"`` or ``"failed"``."""
    layer: str = ""
    """The layer that is moved; empty if none is."""
    layers_done: int = 0
    """Layers that have been moved in this cycle."""
    layers: int = 0
    """Layers that are to be moved in this cycle."""
    rounds_done: int = 0
    """Rounds of the layer's transfer that are over."""


@dataclass(frozen=True)
class Stats:
    """A consistent copy of what is known at one moment; seconds are of this rank's background thread."""

    layers: tuple[str, ...]
    """Names of the layers."""
    balancedness: tuple[float, ...]
    """Mean over largest rank load under the LP, on the loads last planned from; NaN where that is not known yet."""
    epoch: int
    """Number of the last cycle that ended in a swap that all ranks agreed on; 0 before the first."""
    cycles: int = 0
    """Cycles that have begun."""
    swaps: int = 0
    """Swaps of layers that all ranks agreed on."""
    plan_seconds: float = 0.0
    """Spent planning, or waiting for a plan."""
    transfer_seconds: float = 0.0
    """Spent moving weights."""
    bytes_moved: int = 0
    """What came to this rank."""
    bytes_lower_bound: int = 0
    """The least that had to come to it: experts that it did not have."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """How often a cycle ended early, by kind of reason."""
    last_reason: str = ""
    """Why the last cycle that ended early did."""
    placement_age: float = 0.0
    """Seconds since all ranks agreed on the last swap, or the start."""
    stalls: int = 0
    """Forward passes that waited for the outcome of an agreement."""
    stall_seconds: float = 0.0
    """How long, together."""
    staging_bytes: int = 0
    """Memory of buffers for incoming experts on this rank, those that the source has included. In mode EX the budget
    bounds it, for each of the ``layers_at_once``; kept from one transfer to the next."""
    stage: str = "idle"
    """As `Progress.stage`."""
    held: bool = False
    """Whether this rank holds transfers back."""


class Tally:
    """Figures that the background thread keeps and any thread reads.

    Args:
        layers: names of the layers.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        """Nothing yet."""
        self._lock = threading.Lock()
        self._stats = Stats(tuple(layers), (math.nan,) * len(layers), 0)
        self._skipped: Counter[str] = Counter()
        self._told: set[str] = set()  # kinds of reasons since the last swap
        self._swapped = time.monotonic()
        self._progress = Progress()

    def read(self) -> Stats:
        """A consistent copy."""
        with self._lock:
            return replace(
                self._stats,
                skipped=dict(self._skipped),
                placement_age=time.monotonic() - self._swapped,
                stage=self._progress.stage,
            )

    @property
    def progress(self) -> Progress:
        """How far the cycle is."""
        return self._progress

    def begin(self) -> int:
        """Count a cycle; return its number."""
        with self._lock:
            self._stats = replace(self._stats, cycles=self._stats.cycles + 1)
            return self._stats.cycles

    def at(self, progress: Progress) -> None:
        """Set how far the cycle is."""
        self._progress = progress

    def add(self, **figures: int | float) -> None:
        """Add to sums."""
        with self._lock:
            self._stats = replace(self._stats, **{k: getattr(self._stats, k) + v for k, v in figures.items()})

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to a sum."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - begin})

    def balanced(self, layer: int, imbalance: float) -> None:
        """Set what a layer's balancedness is by its last plan."""
        with self._lock:
            known = list(self._stats.balancedness)
            known[layer] = 1.0 / imbalance if imbalance >= 1.0 else math.nan
            self._stats = replace(self._stats, balancedness=tuple(known))

    def skip(self, kind: str, reason: str) -> bool:
        """Count a cycle that ended early; return whether it is the first of this kind since the last swap."""
        with self._lock:
            news = kind not in self._told
            self._told.add(kind)
            self._skipped[kind] += 1
            self._stats = replace(self._stats, last_reason=f"{kind}: {reason}")
            return news

    def swapped(self, epoch: int, layers: int) -> None:
        """Count swaps that all ranks have agreed on."""
        with self._lock:
            self._swapped = time.monotonic()
            self._told.clear()
            self._stats = replace(self._stats, epoch=epoch, swaps=self._stats.swaps + layers, last_reason="")
