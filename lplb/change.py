"""Changing a placement while a system runs: few moves for most of what a full re-solve would gain.

`plan_change` looks for the fewest or cheapest writes of experts into slots that lower the LP's optimum, and says
whether they pay.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, SupportsIndex, cast

import numpy as np
import numpy.typing as npt
import torch

from lplb import _C
from lplb.arguments import checked_group_size, real_number, seen, whole_number
from lplb.judge import FEWEST_BATCHES, Candidate, Ground, Judge, Limits, Scenarios, deal_out, mean_of
from lplb.placement import Placement
from lplb.policies import checked_history, place
from lplb.relabel import nested_blocks, relabel
from lplb.weights.moves import Move, moves_between

__all__ = [
    "Change",
    "Found",
    "checked_number",
    "decide",
    "levelled",
    "plan_change",
    "plan_layers",
    "rate_layers",
    "survey",
]

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_Slots = npt.NDArray[np.int32]  # a phy2log, [n_physical], labelled as the current placement
_Array = torch.Tensor | npt.NDArray[Any] | Sequence[Any]

_PREFIXES = 8  # of a path, that are looked at where the whole is doubtful
_LITTLE = 0.5  # of a re-solve's gain: what few moves have to reach, or all of them are made
_SPARE = 0.5  # of what may be left over; the search goes on to there, as batches kept back see a little less
_NEARLY = 0.99  # of what the search found: its last steps bring little


@dataclass(frozen=True)
class Change:
    """What to move, why, and what it brings.

    Imbalances are of the LP's largest rank load over the mean of all ranks, means over the newer half of the history,
    which was kept back from the search; over all of it where it has fewer than 16 batches.
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
    steady: bool = False,
    target: Placement | Sequence[Placement] | None = None,
) -> Change | list[Change]:
    """Look for the fewest or cheapest moves after which the LP balances what the history shows.

    One step after another: a slot gives up a copy that its expert can spare for an expert that is crowded, or two ranks
    exchange experts; always what lowers the LP's optimum most per move, or per byte where experts differ. The search
    sees the older half of the history. What it found is judged on the newer half, as if it had been made in between,
    and moves nothing unless the gain there is ``min_gain``, for every tenth of the slots if more are moved, and three
    standard errors away from none, batches that resemble the ones before counting for less. So noise alone moves
    nothing, and loads that have just changed move nothing yet. Fewer than 16 batches do not show how loads vary, and
    move nothing either, unless they are said to be ``steady``.

    ``gain`` is a share of what can be gained: of what a full re-solve gains, if it is given as ``target``; otherwise of
    all that is lost to imbalance or, where the search ends before, of what it found. A re-solve is made only where few
    moves gain something but less than half of what is lost, and no budget is given; it is taken, relabelled, where they
    gain less than half of what it does and what it gains beyond them is worth its moves.

    It is for the LP: what even splits make of the new placement is not looked at.

    The result depends on the arguments alone.

    Args:
        current: where experts are; for several layers one placement each, all of the same sizes.
        history: loads of each logical expert in the order of time, ``[n_logical]`` or ``[batches, n_logical]``, of
            which the latest 128 are used; for several layers ``[layers, batches, n_logical]``. As for `lplb.place`.
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
        steady: fewer than 16 batches, for example the mean of many, are taken as what loads will be. In whole tokens
            they are dealt out at random into smaller ones, each as noisy as its tokens are few, half of them kept back;
            other numbers are taken as if without noise.
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
    limits = Limits(
        gain=checked_number("gain", gain, above=0.0, most=1.0),
        min_gain=checked_number("min_gain", min_gain, least=0.0),
        max_moves=None if max_moves is None else whole_number("max_moves", max_moves, 0),
        max_bytes=None if max_bytes is None else whole_number("max_bytes", max_bytes, 0),
        expert_bytes=_checked_bytes(expert_bytes, first.n_logical),
        horizon=None if horizon is None else checked_number("horizon", horizon, above=0.0),
        token_cost=None if token_cost is None else checked_number("token_cost", token_cost, least=0.0),
        byte_cost=None if byte_cost is None else checked_number("byte_cost", byte_cost, least=0.0),
    )
    limits.check()
    if not isinstance(steady, (bool, np.bool_)):
        raise TypeError(f"steady is {seen(steady)}, allowed is a bool")
    size = checked_group_size(first.n_ranks, group_size)
    nested_blocks(first.n_ranks, size, n_nodes)
    for placement in (*placements, *(t for t in targets if t is not None)):
        placement.check_groups(size)
    ground = Ground(size, whole_number("n_nodes", n_nodes, 1))
    found = plan_layers(placements, layers, limits, ground, targets, steady=bool(steady))
    changes = [_with_moves(placement, f.change) for placement, f in zip(placements, found, strict=True)]
    return changes if many else changes[0]


def _with_moves(current: Placement, change: Change) -> Change:
    return replace(change, moves=tuple(moves_between(current, change.placement))) if change.worth else change


# ---- one layer


class Found(NamedTuple):
    """What was found for a layer."""

    change: Change
    """Without its list of moves, which takes time that not everyone has."""
    judge: Judge
    path: list[_Slots]
    """Placements, each by a few moves from the one before, as far as the budgets go."""


def survey(judge: Judge, steady: bool) -> tuple[Change, float]:
    """Return the change that is none, with a reason where nothing is to be looked for, and what is to gain."""
    scenarios, limits = judge.scenarios, judge.limits
    before, lost = judge.figure(judge.slots), mean_of(judge.before) - 1.0
    seconds = None if limits.horizon is None else 0.0
    weight = None if limits.expert_bytes is None else 0
    stay = Change(judge.current, (), weight, before, before, None, seconds, seconds, worth=False, reason="")
    if scenarios.few and not steady:
        n = len(scenarios.shown)
        reason = (
            f"imbalance is {before:.4f} over {n} batch{'es' if n > 1 else ''}: fewer than {FEWEST_BATCHES} do "
            "not show how loads vary; steady=True takes them as they are"
        )
    elif lost < max(limits.min_gain, 1e-9):
        reason = f"imbalance is {before:.4f}: less than {limits.min_gain:g} is to gain at all"
    elif limits.max_moves == 0 or limits.max_bytes == 0:
        reason = "the budget allows no move"
    else:
        return stay, lost
    return replace(stay, reason=reason), lost


def plan_layers(
    currents: Sequence[Placement],
    layers: Sequence[_Ints | _Floats] | _Floats,
    limits: Limits,
    ground: Ground,
    targets: Sequence[Placement | None] | None = None,
    *,
    steady: bool = False,
) -> Iterator[Found]:
    """Plan the change of every layer; rows ``[batches, n_logical]`` each, not all 0. `plan_change` without its checks.

    The searches of all layers are one call, before the first layer comes out.
    """
    dealt = [deal_out(rows) for rows in layers]
    looks = _look_at(
        currents, [d.search[:0] if d.few and not steady else d.search for d in dealt], dealt, limits, ground
    )
    for i, (current, scenarios, look) in enumerate(zip(currents, dealt, looks, strict=True)):
        time.sleep(0)  # lets a thread in that waits for the interpreter; it would have to wait for 5 ms otherwise
        judge = Judge(current, scenarios, limits, ground, look.known)
        yield _choose(judge, look.path, targets[i] if targets else None, steady)


def _choose(judge: Judge, path: list[_Slots], target: Placement | None, steady: bool) -> Found:
    """Choose on a path, or a re-solve where it leads too little far."""
    stay, lost = survey(judge, steady)
    if stay.reason:
        return Found(stay, judge, [])
    current, limits, ground = judge.current, judge.limits, judge.ground
    scenarios, before = judge.scenarios, stay.imbalance_before
    path = [p for p in path if judge.allows(p)]
    chosen = judge.rate(path[-1] if path else judge.slots)
    resolved: Candidate | None = None
    enough = min(limits.gain * lost, _NEARLY * chosen.gain)
    free = limits.max_moves is None and limits.max_bytes is None and ground.n_nodes == 1
    made = free and limits.min_gain <= chosen.gain < _LITTLE * lost
    if chosen.gain < limits.gain * lost and (target is not None or made):
        resolved = judge.rate(_resolve(current, scenarios.search, ground, target))
        if resolved.gain > chosen.gain:
            enough = limits.gain * resolved.gain
    if path:
        chosen = _cheapest(path, chosen, enough, judge)
    if (
        resolved is not None
        and chosen.gain < _LITTLE * resolved.gain
        and judge.allows(resolved.phy2log)
        and not judge.doubt(resolved.gains - chosen.gains, resolved.n_moves)
    ):
        chosen = resolved
    if resolved is not None:
        stay = replace(stay, imbalance_resolve=judge.figure(resolved.phy2log))
    if chosen.n_moves == 0:
        within = "" if free else " within the budget"
        reason = f"imbalance is {before:.4f}, and no move{within} lowers it on the older batches"
        return Found(replace(stay, reason=reason), judge, path)
    if judge.doubt(chosen.gains, chosen.n_moves):  # fewer moves have to gain less
        shorter = (judge.rate(p) for p in path[: -1 - len(path) : -max(1, len(path) // _PREFIXES)])
        sure = (c for c in shorter if not judge.doubt(c.gains, c.n_moves))
        chosen = next(sure, chosen)
    return Found(decide(stay, chosen, judge), judge, path)


def decide(stay: Change, chosen: Candidate, judge: Judge) -> Change:
    """Move, or say why not."""
    limits, before, after = judge.limits, stay.imbalance_before, judge.figure(chosen.phy2log)
    n = chosen.n_moves
    what = f"{n} move{'s lower' if n > 1 else ' lowers'} the imbalance from {before:.4f} to {after:.4f}"
    doubt = judge.doubt(chosen.gains, chosen.n_moves)
    if doubt:
        return replace(stay, reason=f"imbalance is {before:.4f}; by {n} move{'s' if n > 1 else ''} {doubt}")
    times = ""
    if limits.horizon is not None:
        saving, cost = judge.seconds(chosen)
        stay = replace(stay, saving=saving, cost=cost)
        times = f"{saving:.3g} s saved over {limits.horizon:g} batches against {cost:.3g} s"
        if saving <= cost:
            return replace(stay, reason=f"{what}: {times}")
    if stay.imbalance_resolve is not None:
        what += f", a full re-solve to {stay.imbalance_resolve:.4f}"
    return replace(
        stay,
        placement=judge.placement(chosen),
        bytes=chosen.bytes,
        imbalance_after=after,
        worth=True,
        reason=f"{what}: {times}" if times else what,
    )


def _cheapest(path: list[_Slots], last: Candidate, enough: float, judge: Judge) -> Candidate:
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

    def net(candidate: Candidate) -> float:
        saving, cost = judge.seconds(candidate)
        return saving - cost

    return max((judge.rate(p) for p in path[: high + 1]), key=net)


class _Look(NamedTuple):
    path: list[_Slots]
    """The placements after each step of the search."""
    known: list[tuple[_Slots, _Floats]]
    """Some placements, and their imbalance on the batches kept back."""


def _look_at(
    currents: Sequence[Placement], search: Sequence[_Ints], dealt: Sequence[Scenarios], limits: Limits, ground: Ground
) -> Iterator[_Look]:
    """Search in all layers, placements of the same sizes; where there are no batches to search on, rate alone."""
    first = currents[0]
    cost, most_cost = _prices(first.n_logical, limits)
    looks = _C.look_for_changes(
        [
            (p.phy2log.data_ptr(), s.ctypes.data, len(s), d.judge.ctypes.data, len(d.judge))
            for p, s, d in zip(currents, search, dealt, strict=True)
        ],
        first.n_physical,
        first.n_logical,
        first.n_ranks,
        ground.group_size,
        first.n_ranks // ground.n_nodes,
        cost.ctypes.data,
        first.n_physical if limits.max_moves is None else limits.max_moves,
        most_cost,
        (limits.gain, limits.min_gain, _SPARE, _NEARLY),
    )
    for current, (before, ends, slots, experts, rated) in zip(currents, looks, strict=True):
        path = _path(current, ends, slots, experts)
        known = [(current.phy2log.numpy(), np.frombuffer(before))]
        known += [(path[steps - 1], np.frombuffer(after)) for steps, after in rated]
        yield _Look(path, known)


def rate_layers(placements: Sequence[Placement], loads: Sequence[_Ints], ground: Ground) -> list[_Floats]:
    """Imbalance of every layer's loads ``[batches, n_logical]``, none all 0; placements of the same sizes. One call."""
    if not placements:
        return []
    rows = [np.ascontiguousarray(x) for x in loads]
    dealt = [Scenarios(x[:0], x, x, np.empty(0), False) for x in rows]
    free = Limits(1.0, 0.0, None, None, None, None, None, None)
    return [look.known[0][1] for look in _look_at(placements, [x[:0] for x in rows], dealt, free, ground)]


def _prices(n_logical: int, limits: Limits) -> tuple[_Floats, float]:
    """What writing each expert costs, [n_logical], and the most that may be spent; 1 for a move on average."""
    if limits.expert_bytes is None or not limits.expert_bytes.any():
        return np.ones(n_logical), math.inf
    mean = float(limits.expert_bytes.mean())
    cost = np.maximum(limits.expert_bytes / mean, 1e-12)  # above 0
    return cost, math.inf if limits.max_bytes is None else limits.max_bytes / mean


def _path(current: Placement, ends: list[int], slots: list[int], experts: list[int]) -> list[_Slots]:
    """The placements after each step."""
    phy2log = current.phy2log.numpy().copy()
    path, done = [], 0
    for end in ends:
        phy2log[slots[done:end]] = experts[done:end]  # no slot twice in a step
        path.append(phy2log.copy())
        done = end
    return path


def levelled(placement: Placement, loads: _Ints, ground: Ground) -> Placement:
    """Follow the search from a placement to its end, whatever it writes; loads ``[n, n_logical]``, each below 2**52."""
    cost = np.ones(placement.n_logical)
    steps = _C.find_changes(
        placement.phy2log.data_ptr(),
        placement.n_physical,
        placement.n_logical,
        placement.n_ranks,
        ground.group_size,
        placement.n_ranks // ground.n_nodes,
        loads.ctypes.data,
        len(loads),
        cost.ctypes.data,
        placement.n_physical,
        math.inf,
        1.0,
    )
    path = _path(placement, *steps)
    return Placement(path[-1], placement.n_ranks, placement.n_logical) if path else placement


def _resolve(current: Placement, search: _Ints, ground: Ground, target: Placement | None) -> _Slots:
    """A full re-solve on what the search sees, relabelled."""
    if target is None:
        made = place(
            search,
            n_ranks=current.n_ranks,
            n_physical=current.n_physical,
            group_size=ground.group_size,
        )
        target = cast(Placement, made)
    slots: _Slots = relabel(current, target, group_size=ground.group_size, n_nodes=ground.n_nodes).phy2log.numpy()
    return slots


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


def checked_number(
    name: str, value: object, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> float:
    """Return a finite number within its bounds as a float, or say what it was and what is allowed."""
    number = real_number(name, value)
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
