"""Changing a placement while a system runs: few moves for most of what a full re-solve would gain.

`plan_change` looks for the fewest or cheapest writes of experts into slots that lower the LP's optimum, and says
whether they pay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex, cast

import numpy as np
import numpy.typing as npt
import torch

from lplb import _C
from lplb.arguments import checked_group_size, seen, whole_number
from lplb.placement import Placement
from lplb.policies import FALLBACKS, checked_history, place
from lplb.relabel import nested_blocks, relabel
from lplb.weights.moves import Move, moves_between

__all__ = ["Change", "plan_change"]

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_Slots = npt.NDArray[np.int32]  # a phy2log, [n_physical], labelled as the current placement
_Array = torch.Tensor | npt.NDArray[Any] | Sequence[Any]

_FEWEST_SCENARIOS = 16  # half of them to search on, half to judge by
_MOST_SCENARIOS = 128
_SURE = 3.0  # standard errors
_LITTLE = 0.5  # of a re-solve's gain: what few moves have to reach, or all of them are made
_NEARLY = 0.99  # of what the search found: its last steps bring little
_FIXED_POINT = 2.0**45  # what a batch of loads that are no whole numbers sums to


@dataclass(frozen=True)
class Change:
    """What to move, why, and what it brings.

    Imbalances are means over the batches of the history that were kept back from the search: of the LP's largest rank
    load over the mean of all ranks.
    """

    placement: Placement
    """Where experts are to be; the current placement where nothing is to move."""
    moves: tuple[Move, ...]
    """What `lplb.weights.WeightMover` moves, one for each slot that gets another expert; all from rank to rank."""
    bytes: int | None
    """What they weigh together; ``None`` where it is not known what an expert weighs."""
    imbalance_before: float
    """On the current placement."""
    imbalance_after: float
    """On `placement`."""
    imbalance_resolve: float | None
    """On the placement of a full re-solve; ``None`` where it was not needed to decide."""
    saving: float | None
    """Seconds that the moves save over the horizon, of those that were looked at; ``None`` without a horizon."""
    cost: float | None
    """Seconds that they take; ``None`` without a horizon."""
    worth: bool
    """Whether to move. What is not worth its moves is not in `placement`."""
    reason: str
    """Why, in a sentence with its figures."""

    @property
    def n_moves(self) -> int:
        """Number of experts that are written."""
        return len(self.moves)


def plan_change(
    current: Placement | Sequence[Placement],
    history: _Array,
    *,
    gain: float = 0.98,
    min_gain: float = 0.01,
    max_moves: int | None = None,
    max_bytes: int | None = None,
    expert_bytes: int | Sequence[int] | None = None,
    horizon: float | None = None,
    token_cost: float | None = None,
    byte_cost: float | None = None,
    group_size: int | None = None,
    n_nodes: int = 1,
    fallback: str = "lp",
    target: Placement | Sequence[Placement] | None = None,
) -> Change | list[Change]:
    """Look for the fewest or cheapest moves after which the LP balances what the history shows.

    One step after another: a slot gives up a copy that its expert can spare for an expert that is crowded, or two ranks
    exchange experts; always what lowers the LP's optimum most per move, or per byte where experts differ. The search
    sees every other batch of the history. What it found is judged on the batches in between, and moves nothing unless
    the gain there is ``min_gain``, for every tenth of the slots if more are moved, and three standard errors away from
    none: noise alone moves nothing. Of a short history in whole tokens, each batch is dealt out at random into smaller
    ones, of which each is as noisy as its tokens are few; one of fewer than 16 batches that are no whole numbers is
    taken as it is, as if without noise.

    ``gain`` is a share of what can be gained: of what a full re-solve gains, if it is given as ``target``; otherwise of
    all that is lost to imbalance or, where the search ends before, of what it found. A re-solve is made only where few
    moves gain something but less than half of what is lost; it is taken, relabelled, where they gain less than half of
    what it does, the budget allows for it, and what it gains beyond them is worth its moves.

    The result depends on the arguments alone.

    Args:
        current: where experts are; for several layers one placement each, all of the same sizes.
        history: loads of each logical expert, latest or not, ``[n_logical]`` or ``[batches, n_logical]``; for several
            layers ``[layers, batches, n_logical]``. As for `lplb.place`; tokens, not shares, if noise is to be known.
        gain: share of the gain that is enough, above 0, at most 1.
        min_gain: mean imbalance that a change has to take away at least, for example 0.01.
        max_moves: most moves, per layer.
        max_bytes: most bytes, per layer; wants ``expert_bytes``.
        expert_bytes: bytes of one expert's weights, or of each expert's, ``[n_logical]``.
        horizon: batches that the change is to serve. With it, moves are made only as far as they save more time than
            they take; it wants the two costs and ``expert_bytes``.
        token_cost: seconds that the busiest rank takes per token in this layer.
        byte_cost: seconds per byte that a rank sends or receives; the busiest rank counts.
        group_size: how many consecutive ranks balance among themselves; all by default.
        n_nodes: number of nodes, consecutive ranks each, that experts do not leave. 1 lets them go anywhere in their
            group.
        fallback: as for `lplb.place`, of which the full re-solve is.
        target: what a full re-solve gave, as for ``current``, if there is one already; ``lplb.place(history)``
            otherwise, made only where it is needed, and only for ``n_nodes=1``.

    Returns:
        A `Change`, or a list of one per layer.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a value or shape is not allowed; the message has the value seen and the value allowed.
    """
    layers, many = checked_history(history)
    placements = _checked_placements("current", current, layers, many)
    targets: list[Placement | None] = [None] * len(placements)
    if target is not None:
        targets = list(_checked_placements("target", target, layers, many))
        for here, there in zip(placements, targets, strict=True):
            if there is not None and (there.n_ranks, there.n_physical) != (here.n_ranks, here.n_physical):
                raise ValueError(f"target is {there!r}, allowed are the sizes of current, {here!r}")
    first = placements[0]
    limits = _Limits(
        gain=_checked_number("gain", gain, above=0.0, most=1.0),
        min_gain=_checked_number("min_gain", min_gain, least=0.0),
        max_moves=None if max_moves is None else whole_number("max_moves", max_moves, 0),
        max_bytes=None if max_bytes is None else whole_number("max_bytes", max_bytes, 0),
        expert_bytes=_checked_bytes(expert_bytes, first.n_logical),
        horizon=None if horizon is None else _checked_number("horizon", horizon, above=0.0),
        token_cost=None if token_cost is None else _checked_number("token_cost", token_cost, least=0.0),
        byte_cost=None if byte_cost is None else _checked_number("byte_cost", byte_cost, least=0.0),
    )
    limits.check()
    if fallback not in FALLBACKS:
        raise ValueError(f"fallback is {fallback!r}, allowed are {', '.join(map(repr, FALLBACKS))}")
    size = checked_group_size(first.n_ranks, group_size)
    nested_blocks(first.n_ranks, size, n_nodes)
    for placement in (*placements, *(t for t in targets if t is not None)):
        placement.check_groups(size)
    ground = _Ground(size, whole_number("n_nodes", n_nodes, 1), fallback)
    changes = [
        _plan_layer(placement, rows, limits, ground, there)
        for placement, rows, there in zip(placements, layers, targets, strict=True)
    ]
    return changes if many else changes[0]


# ---- one layer


@dataclass(frozen=True)
class _Limits:
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
class _Ground:
    """The ranks as they stand."""

    group_size: int
    n_nodes: int
    fallback: str


@dataclass(frozen=True)
class _Candidate:
    """A placement to move to, and what it is worth."""

    phy2log: _Slots
    gains: _Floats  # less imbalance, of every scenario
    n_moves: int
    bytes: int | None

    @property
    def gain(self) -> float:
        return float(self.gains.mean())


class _Judge:
    """The scenarios kept back from the search, and the limits."""

    def __init__(self, current: Placement, scenarios: _Floats, tokens: float, limits: _Limits, ground: _Ground) -> None:
        self.current, self.scenarios, self.tokens, self.limits, self.ground = current, scenarios, tokens, limits, ground
        self.slots: _Slots = current.phy2log.numpy()
        self.mean = scenarios.sum(axis=1) / current.n_ranks
        self.before = self.imbalance(self.slots)

    def imbalance(self, phy2log: _Slots) -> _Floats:
        """Of every scenario; as `lplb.policies.imbalance`, without its checks."""
        current, size = self.current, self.ground.group_size
        optima = np.empty((len(self.scenarios), current.n_ranks // size))
        _C.placement_optima(
            phy2log.ctypes.data,
            current.n_physical,
            current.n_logical,
            current.n_ranks,
            size,
            self.scenarios.ctypes.data,
            len(self.scenarios),
            optima.ctypes.data,
            1,
        )
        return np.asarray(optima.max(axis=1) / self.mean)

    def bytes(self, phy2log: _Slots) -> int | None:
        """What is written weighs."""
        sizes = self.limits.expert_bytes
        return None if sizes is None else int(sizes[phy2log[phy2log != self.slots]].sum())

    def rate(self, phy2log: _Slots) -> _Candidate:
        """Score a placement."""
        n_moves = int((phy2log != self.slots).sum())
        return _Candidate(phy2log, self.before - self.imbalance(phy2log), n_moves, self.bytes(phy2log))

    def allows(self, phy2log: _Slots) -> bool:
        """Whether the moves are within the budgets."""
        limits = self.limits
        if limits.max_moves is not None and (phy2log != self.slots).sum() > limits.max_moves:
            return False
        return limits.max_bytes is None or cast(int, self.bytes(phy2log)) <= limits.max_bytes

    def moves(self, candidate: _Candidate) -> tuple[Placement, tuple[Move, ...]]:
        """The placement, and how it is come to."""
        placement = Placement(candidate.phy2log, self.current.n_ranks, self.current.n_logical)
        return placement, tuple(moves_between(self.current, placement))

    def seconds(self, candidate: _Candidate) -> tuple[float, float]:
        """What moving saves over the horizon, and what it takes."""
        limits = self.limits
        if limits.horizon is None or limits.token_cost is None or limits.byte_cost is None:
            return 0.0, 0.0
        sent: Counter[int] = Counter()
        received: Counter[int] = Counter()
        for move in self.moves(candidate)[1]:
            weight = int(cast(_Ints, limits.expert_bytes)[move.expert])
            sent[move.source_rank] += weight
            received[move.target_rank] += weight
        busiest = max([*sent.values(), *received.values(), 0])
        return limits.horizon * candidate.gain * self.tokens * limits.token_cost, busiest * limits.byte_cost

    def sure(self, gains: _Floats, n_moves: int) -> bool:
        """Whether the gain is one, and large enough for so many moves."""
        n = len(gains)
        error = float(gains.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
        mean = float(gains.mean())
        tenths = 10 * n_moves / self.current.n_physical
        return mean >= self.limits.min_gain * max(1.0, tenths) and mean > _SURE * error


def _plan_layer(
    current: Placement, rows: _Floats, limits: _Limits, ground: _Ground, target: Placement | None
) -> Change:
    """Plan the change of one layer; rows [batches, n_logical]."""
    search, kept_back = _scenarios(rows)
    judge = _Judge(current, kept_back, float(rows.sum(axis=1).mean()) / current.n_ranks, limits, ground)
    before = float(judge.before.mean())
    stay = Change(current, (), _weight(limits, 0), before, before, None, *_no_time(limits), worth=False, reason="")
    if before - 1.0 < max(limits.min_gain, 1e-9):
        return replace(stay, reason=f"imbalance is {before:.4f}: less than {limits.min_gain:g} is to gain at all")
    if limits.max_moves == 0 or limits.max_bytes == 0:
        return replace(stay, reason="the budget allows no move")

    path = [p for p in _path(current, search, before, limits, ground) if judge.allows(p)]
    chosen = judge.rate(path[-1] if path else judge.slots)
    resolved: _Candidate | None = None
    enough = min(limits.gain * (before - 1.0), _NEARLY * chosen.gain)
    made = chosen.gain < _LITTLE * (before - 1.0) and chosen.gain >= limits.min_gain and ground.n_nodes == 1
    if chosen.gain < limits.gain * (before - 1.0) and (target is not None or made):
        resolved = judge.rate(_resolve(current, search, ground, target))
        enough = limits.gain * max(resolved.gain, 0.0)
    if path:
        chosen = _cheapest(path, chosen, enough, judge)
    if (
        resolved is not None
        and chosen.gain < _LITTLE * resolved.gain
        and judge.allows(resolved.phy2log)
        and judge.sure(resolved.gains - chosen.gains, resolved.n_moves)
    ):
        chosen = resolved
    if resolved is not None:
        stay = replace(stay, imbalance_resolve=before - resolved.gain)
    if chosen.n_moves == 0:
        return replace(stay, reason=f"imbalance is {before:.4f}, and no move within the budget lowers it")
    return _decide(stay, chosen, judge)


def _decide(stay: Change, chosen: _Candidate, judge: _Judge) -> Change:
    """Move, or say why not."""
    limits, before = judge.limits, stay.imbalance_before
    after = before - chosen.gain
    what = f"{chosen.n_moves} moves lower the imbalance from {before:.4f} to {after:.4f}"
    if not judge.sure(chosen.gains, chosen.n_moves):
        return replace(stay, reason=f"{what}: too little, or not beyond noise")
    times = ""
    if limits.horizon is not None:
        saving, cost = judge.seconds(chosen)
        stay = replace(stay, saving=saving, cost=cost)
        times = f"{saving:.3g} s saved over {limits.horizon:g} batches against {cost:.3g} s"
        if saving <= cost:
            return replace(stay, reason=f"{what}: {times}")
    if stay.imbalance_resolve is not None:
        what += f", a full re-solve to {stay.imbalance_resolve:.4f}"
    placement, moves = judge.moves(chosen)
    return replace(
        stay,
        placement=placement,
        moves=moves,
        bytes=chosen.bytes,
        imbalance_after=after,
        worth=True,
        reason=f"{what}: {times}" if times else what,
    )


def _cheapest(path: list[_Slots], last: _Candidate, enough: float, judge: _Judge) -> _Candidate:
    """Of the placements on a path the first that gains enough; with a horizon, of those up to it what saves most."""
    enough = min(enough, last.gain)
    low, high, reached = 0, len(path) - 1, last
    while low < high:
        middle = (low + high) // 2
        rated = judge.rate(path[middle])
        if rated.gain >= enough:
            high, reached = middle, rated
        else:
            low = middle + 1
    if judge.limits.horizon is None:
        return reached

    def net(candidate: _Candidate) -> float:
        saving, cost = judge.seconds(candidate)
        return saving - cost

    return max((judge.rate(p) for p in path[: high + 1]), key=net)


def _path(current: Placement, search: _Ints, before: float, limits: _Limits, ground: _Ground) -> list[_Slots]:
    """The placements after each step of the search, the budgets aside."""
    cost = np.ones(current.n_logical)
    if limits.expert_bytes is not None and limits.expert_bytes.any():
        cost = np.maximum(limits.expert_bytes / limits.expert_bytes.mean(), 1e-3)
    # Half as much again of what may be left over: the batches kept back see a little less than those searched on.
    wanted = 1.0 + 0.5 * (1.0 - limits.gain) * (before - 1.0)
    steps = _C.find_changes(
        current.phy2log.data_ptr(),
        current.n_physical,
        current.n_logical,
        current.n_ranks,
        ground.group_size,
        current.n_ranks // ground.n_nodes,
        search.ctypes.data,
        len(search),
        cost.ctypes.data,
        8 * current.n_physical if limits.max_moves is None else limits.max_moves,
        wanted,
    )
    phy2log = current.phy2log.numpy().copy()
    path = []
    for writes, _, _ in steps:
        for slot, expert in writes:
            phy2log[slot] = expert
        path.append(phy2log.copy())
    return path


def _resolve(current: Placement, search: _Ints, ground: _Ground, target: Placement | None) -> _Slots:
    """A full re-solve on what the search sees, relabelled."""
    if target is None:
        made = place(
            search,
            n_ranks=current.n_ranks,
            n_physical=current.n_physical,
            group_size=ground.group_size,
            fallback=ground.fallback,
        )
        target = cast(Placement, made)
    slots: _Slots = relabel(current, target, group_size=ground.group_size, n_nodes=ground.n_nodes).phy2log.numpy()
    return slots


# ---- scenarios


def _scenarios(rows: _Floats) -> tuple[_Ints, _Floats]:
    """Deal out the history: batches to search on, whole numbers, and batches to judge by."""
    rows = rows[rows.sum(axis=1) > 0]
    if len(rows) > _MOST_SCENARIOS:
        rows = rows[np.arange(_MOST_SCENARIOS) * len(rows) // _MOST_SCENARIOS]
    whole = bool((rows == np.rint(rows)).all()) and rows.sum(axis=1).max() < _FIXED_POINT
    parts = -(-_FEWEST_SCENARIOS // len(rows))
    if whole and parts > 1:
        rows = _thinned(rows.astype(np.int64), parts).astype(np.float64)
        rows = rows[rows.sum(axis=1) > 0]
    if len(rows) == 1 or (not whole and parts > 1):
        search = judge = rows
    else:
        search, judge = rows[::2], rows[1::2]
    if not whole:
        search = np.rint(search * (_FIXED_POINT / search.sum(axis=1, keepdims=True)))
    return np.ascontiguousarray(search, dtype=np.int64), np.ascontiguousarray(judge)


def _thinned(rows: _Ints, parts: int) -> _Ints:
    """Deal every token of a batch to one of so many parts: of Poisson counts, these are independent Poisson counts."""
    rng = np.random.default_rng(0)
    left, out = rows.copy(), np.empty((parts, *rows.shape), dtype=np.int64)
    for i in range(parts):
        out[i] = rng.binomial(left, 1.0 / (parts - i))
        left -= out[i]
    return out.reshape(-1, rows.shape[1])


# ---- checks


def _checked_placements(name: str, given: object, layers: _Floats, many: bool) -> list[Placement]:
    """One placement per layer, all of the same sizes, of the history's experts."""
    if not many:
        if not isinstance(given, Placement):
            raise TypeError(f"{name} is {seen(given)}, allowed is a lplb.Placement for a history of one layer")
        placements = [given]
    else:
        if not isinstance(given, Sequence):
            raise TypeError(f"{name} is {seen(given)}, allowed is a sequence of lplb.Placement, one per layer")
        placements = list(given)
        for i, placement in enumerate(placements):
            if not isinstance(placement, Placement):
                raise TypeError(f"{name}[{i}] is {seen(placement)}, allowed is a lplb.Placement")
    if len(placements) != len(layers):
        raise ValueError(f"{name} has {len(placements)} layers, allowed is the history's, {len(layers)}")
    for i, placement in enumerate(placements):
        if placement.n_logical != layers.shape[-1]:
            raise ValueError(
                f"{name}[{i}] has {placement.n_logical} experts, allowed is the history's, {layers.shape[-1]}"
            )
        sizes = placement.n_ranks, placement.n_physical
        if sizes != (placements[0].n_ranks, placements[0].n_physical):
            raise ValueError(f"{name}[{i}] is {placement!r}, allowed are the sizes of {name}[0], {placements[0]!r}")
    return placements


def _checked_number(
    name: str, value: object, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} is {value!r}, allowed is a number")
    number = float(value)
    if not (math.isfinite(number) and number >= least and number > above and number <= most):
        low = f"above {above:g}" if above > -math.inf else f"{least:g} or more"
        high = f", at most {most:g}" if most < math.inf else ""
        raise ValueError(f"{name} is {number}, allowed is finite, {low}{high}")
    return number


def _checked_bytes(expert_bytes: object, n_logical: int) -> _Ints | None:
    """Bytes of every expert, [n_logical]."""
    if expert_bytes is None:
        return None
    if isinstance(expert_bytes, (Sequence, np.ndarray, torch.Tensor)) and not isinstance(expert_bytes, (str, bytes)):
        if len(expert_bytes) != n_logical:
            raise ValueError(f"expert_bytes has {len(expert_bytes)} values, allowed is one per expert, {n_logical}")
        sizes = [whole_number(f"expert_bytes[{e}]", size, 0, 2**50) for e, size in enumerate(expert_bytes)]
    else:
        sizes = [whole_number("expert_bytes", cast(SupportsIndex, expert_bytes), 0, 2**50)] * n_logical
    return np.array(sizes, dtype=np.int64)


def _weight(limits: _Limits, n: int) -> int | None:
    return None if limits.expert_bytes is None else n


def _no_time(limits: _Limits) -> tuple[float | None, float | None]:
    return (None, None) if limits.horizon is None else (0.0, 0.0)
