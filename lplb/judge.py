"""How a change of placement is judged: the history dealt out, what is gained on it, and how sure that is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from lplb import _C
from lplb.placement import Placement
from lplb.weights.moves import moves_between

__all__ = [
    "FEWEST_BATCHES",
    "MOST_BATCHES",
    "Candidate",
    "Ground",
    "Judge",
    "Limits",
    "Rating",
    "Scenarios",
    "deal_out",
    "mean_of",
    "noise_of",
]

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_Slots = npt.NDArray[np.int32]  # a phy2log, [n_physical], labelled as the current placement

FEWEST_BATCHES = 16
"""The older half to search on, the newer to judge by; fewer do not show how loads vary."""
MOST_BATCHES = 128
"""The latest."""
_SURE = 3.0  # standard errors
_MOST_CORRELATION = 0.95  # of a batch with the next that is reckoned with
_FIXED_POINT = 2.0**45  # what a batch of loads that are no whole numbers sums to


@dataclass(frozen=True)
class Scenarios:
    """The history, dealt out."""

    search: _Ints
    """What moves are searched on, ``[n, n_logical]``, whole numbers."""
    judge: _Ints
    """What they are judged on."""
    shown: _Ints
    """The batches that figures are of: those of ``judge``, or all where there are few."""
    tokens: _Floats
    """The sums of these, in the history's unit."""
    few: bool
    """Fewer batches than show how loads vary."""


def deal_out(rows: _Ints | _Floats) -> Scenarios:
    """Deal out a layer's history, ``[batches, n_logical]``, not all zero."""
    rows = rows[rows.sum(axis=1) > 0][-MOST_BATCHES:]
    few = len(rows) < FEWEST_BATCHES
    shown, whole = _whole(rows)
    if not few:
        search, judge = np.split(shown, [len(rows) // 2])
        return Scenarios(search, judge, judge, np.asarray(rows[len(search) :].sum(axis=1), dtype=np.float64), few)
    search = judge = shown
    if whole:
        pieces = _thinned(shown, -(-FEWEST_BATCHES // len(rows)))
        pieces = pieces[pieces.sum(axis=1) > 0]
        if len(pieces) > 1:
            search, judge = np.ascontiguousarray(pieces[::2]), np.ascontiguousarray(pieces[1::2])
    return Scenarios(search, judge, shown, np.asarray(rows.sum(axis=1), dtype=np.float64), few)


def _whole(rows: _Ints | _Floats) -> tuple[_Ints, bool]:
    """Rows as whole numbers, in fixed point where they are none or too large; and whether they are what was given."""
    if (rows.dtype == np.int64 or (rows == np.rint(rows)).all()) and rows.sum(axis=1).max() < _FIXED_POINT:
        return np.ascontiguousarray(rows, dtype=np.int64), True
    scaled = rows / rows.max(axis=1, keepdims=True)  # sums of the smallest numbers would have lost their bits
    scaled = np.rint(scaled * (_FIXED_POINT / scaled.sum(axis=1, keepdims=True)))
    return np.ascontiguousarray(scaled, dtype=np.int64), False


def _thinned(rows: _Ints, parts: int) -> _Ints:
    """Deal every token of a batch to one of so many parts: of Poisson counts, these are independent Poisson counts."""
    rng = np.random.default_rng(0)
    left, out = rows.copy(), np.empty((parts, *rows.shape), dtype=np.int64)
    for i in range(parts):
        out[i] = rng.binomial(left, 1.0 / (parts - i))
        left -= out[i]
    return out.reshape(-1, rows.shape[1])


@dataclass(frozen=True)
class Limits:
    """What the caller wants and allows."""

    gain: float
    min_gain: float
    max_moves: int | None
    max_bytes: int | None
    expert_bytes: _Ints | None  # [n_logical]
    horizon: float | None
    token_cost: float | None
    byte_cost: float | None

    def check(self) -> None:
        """Refuse what is given without what it needs."""
        if self.max_bytes is not None and self.expert_bytes is None:
            raise ValueError(f"max_bytes is {self.max_bytes} and expert_bytes None, allowed are both or no max_bytes")
        if self.horizon is None:
            return
        for name in ("token_cost", "byte_cost", "expert_bytes"):
            if getattr(self, name) is None:
                raise ValueError(f"horizon is {self.horizon} and {name} None, allowed are all four or no horizon")


@dataclass(frozen=True)
class Ground:
    """The ranks as they stand."""

    group_size: int
    n_nodes: int


@dataclass(frozen=True)
class Candidate:
    """A placement to move to, and what it is worth."""

    phy2log: _Slots
    gains: _Floats  # less imbalance, of every scenario
    n_moves: int
    bytes: int | None

    @property
    def gain(self) -> float:
        """Their mean."""
        return mean_of(self.gains)


class Rating:
    """Placements of one layer, rated one after another on the same batches."""

    def __init__(self, current: Placement, loads: _Ints, group_size: int) -> None:
        """``loads``: ``[batches, n_logical]``, each batch from 1 up to 2**52, contiguous."""
        self._current, self._loads, self._group_size = current, loads, group_size
        self._known: dict[bytes, _Floats] = {}
        self._rating: _C.PlacementRating | None = None

    def know(self, phy2log: _Slots, imbalance: _Floats) -> None:
        """Take what a placement was rated elsewhere."""
        self._known[phy2log.tobytes()] = imbalance

    def imbalance(self, phy2log: _Slots) -> _Floats:
        """Of every batch, ``[batches]``; as `lplb.policies.imbalance`."""
        known = self._known.get(phy2log.tobytes())
        if known is not None:
            return known
        current, loads = self._current, self._loads
        if self._rating is None:
            self._rating = _C.PlacementRating(
                current.phy2log.data_ptr(),
                current.n_physical,
                current.n_logical,
                current.n_ranks,
                self._group_size,
                loads.ctypes.data,
                len(loads),
            )
        out = np.empty(len(loads))
        self._rating.rate(phy2log.ctypes.data, out.ctypes.data)
        self.know(phy2log, out)
        return out


class Judge:
    """The scenarios kept back from the search, the batches that figures are of, and the limits."""

    def __init__(
        self,
        current: Placement,
        scenarios: Scenarios,
        limits: Limits,
        ground: Ground,
        known: Sequence[tuple[_Slots, _Floats]] = (),
    ) -> None:
        """See the class; known: placements and their imbalance on the scenarios kept back."""
        self.current, self.scenarios, self.limits, self.ground = current, scenarios, limits, ground
        self.slots: _Slots = current.phy2log.numpy()
        self._judge = Rating(current, scenarios.judge, ground.group_size)
        for phy2log, imbalance in known:
            self._judge.know(phy2log, imbalance)
        self._shown = self._judge
        if scenarios.shown is not scenarios.judge:
            self._shown = Rating(current, scenarios.shown, ground.group_size)
        self.before = self.imbalance(self.slots)

    def imbalance(self, phy2log: _Slots, *, shown: bool = False) -> _Floats:
        """Of every batch that is judged by, or that figures are of; as `lplb.policies.imbalance`."""
        return (self._shown if shown else self._judge).imbalance(phy2log)

    def figure(self, phy2log: _Slots) -> float:
        """The imbalance that is reported."""
        return mean_of(self.imbalance(phy2log, shown=True))

    def bytes(self, phy2log: _Slots) -> int | None:
        """What is written weighs."""
        sizes = self.limits.expert_bytes
        return None if sizes is None else int(sizes[phy2log[phy2log != self.slots]].sum())

    def rate(self, phy2log: _Slots) -> Candidate:
        """Score a placement."""
        n_moves = int((phy2log != self.slots).sum())
        gains = self.before - self.imbalance(phy2log)
        return Candidate(phy2log, gains, n_moves, self.bytes(phy2log))

    def allows(self, phy2log: _Slots) -> bool:
        """Whether the moves are within the budgets."""
        limits = self.limits
        if limits.max_moves is not None and (phy2log != self.slots).sum() > limits.max_moves:
            return False
        return limits.max_bytes is None or cast(int, self.bytes(phy2log)) <= limits.max_bytes

    def placement(self, candidate: Candidate) -> Placement:
        """Where experts are to be."""
        return Placement(candidate.phy2log, self.current.n_ranks, self.current.n_logical)

    def seconds(self, candidate: Candidate) -> tuple[float, float]:
        """What moving saves over the horizon, and what it takes."""
        limits = self.limits
        if limits.horizon is None or limits.token_cost is None or limits.byte_cost is None:
            return 0.0, 0.0
        sent: Counter[int] = Counter()
        received: Counter[int] = Counter()
        for move in moves_between(self.current, self.placement(candidate)):
            weight = int(cast(_Ints, limits.expert_bytes)[move.expert])
            sent[move.source_rank] += weight
            received[move.target_rank] += weight
        busiest = max([*sent.values(), *received.values(), 0])
        saved = self.imbalance(self.slots, shown=True) - self.imbalance(candidate.phy2log, shown=True)
        tokens = mean_of(saved * self.scenarios.tokens) / self.current.n_ranks
        return limits.horizon * tokens * limits.token_cost, busiest * limits.byte_cost

    def doubt(self, gains: _Floats, n_moves: int) -> str:
        """Why the gain is too small for so many moves, or may be none; nothing where it is neither."""
        wanted = self.limits.min_gain * max(1.0, 10 * n_moves / self.current.n_physical)
        gain, noise = mean_of(gains), noise_of(gains)
        if gain < wanted:
            return f"{gain:.4f} is gained, and {wanted:.4f} asked for"
        if gain <= noise:
            return f"{gain:.4f} is gained, and {noise:.4f}, {_SURE:g} standard errors, may be noise"
        return ""


def mean_of(x: _Floats) -> float:
    """Return the mean, its sum rounded once: the same on any machine."""
    return math.fsum(x) / len(x)


def noise_of(x: _Floats, n: int | None = None) -> float:
    """Of the mean of a series in time, or of the mean of n of its kind, what may be noise: three standard errors."""
    return _SURE * _standard_error(x) * math.sqrt(len(x) / (n or len(x)))


def _standard_error(x: _Floats) -> float:
    """Of the mean of a series in time, its correlation from one to the next reckoned with; 0 of one alone.

    Its sums are rounded once: they are the same on any machine, whatever NumPy makes of its vectors.
    """
    n, mean = len(x), math.fsum(x) / len(x)
    off = x - mean
    squares = math.fsum(off * off)
    if n < 2 or squares == 0.0:
        return 0.0
    shown = math.fsum(off[1:] * off[:-1]) / squares  # a short series shows less than it has
    correlation = min(max(shown + (1.0 + 3.0 * shown) / n, 0.0), _MOST_CORRELATION)
    return math.sqrt(squares / (n - 1) / n * (1 + correlation) / (1 - correlation))
