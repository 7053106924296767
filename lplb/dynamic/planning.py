"""What to do in a cycle: for every layer the placement that is to follow, from loads and placements alone.

Pure functions of their arguments, the same on every rank and in a service: no clock, no random number, no state. What
plans for all layers together is here; what is known of one layer is in `lplb.change`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from lplb.arguments import checked_group_size, seen, whole_number
from lplb.change import Change, Found, checked_number, decide, levelled, plan_layers, rate_layers, survey
from lplb.judge import FEWEST_BATCHES, MOST_BATCHES, Candidate, Ground, Judge, Limits, deal_out, mean_of, noise_of
from lplb.placement import Placement
from lplb.policies import place
from lplb.relabel import nested_blocks, relabel

__all__ = ["MODES", "POLICIES", "LayerPlan", "Problem", "Settings", "plan", "plans_digest"]

MODES = ("A2A", "AG", "EX")
POLICIES = ("change", "lp", "eplb", "eplb-distinct")

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

_MOST_TOKENS = 2**45  # of a row: their sums over rows, and in fixed point, are exact
_LEAST_ROWS = 3 * FEWEST_BATCHES  # for a second look at some of them
_MOST_STOPS = 12  # of a layer's path that are weighed against those of other layers


@dataclass(frozen=True)
class Settings:
    """How to plan. Numbers, strings, bools and None alone, so that it travels; the same on all ranks.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a value is not allowed, or lacks another that it needs.
    """

    mode: str = "A2A"
    """``"A2A"``: ranks route their own tokens, loads are sums over ranks. ``"AG"``: every rank sees all tokens.
    ``"EX"``: as ``"A2A"``, with few moves in a cycle: it wants a budget, and the policy ``"change"``."""
    policy: str = "change"
    """``"change"``: the few moves that gain most (`lplb.plan_change`). The others place anew (`lplb.place`), under the
    names of ranks and slots by which most experts stay."""
    gain: float = 0.98
    """Share of what can be gained that is enough; for ``"change"``."""
    min_gain: float = 0.01
    """Mean imbalance that a layer's change has to take away at least."""
    max_moves: int | None = None
    """Most experts that are written in a cycle, in all layers together."""
    max_bytes: int | None = None
    """Most bytes of them; wants ``expert_bytes``."""
    expert_bytes: int | None = None
    """Bytes of one expert's weights."""
    group_size: int | None = None
    """How many consecutive ranks balance among themselves; all by default."""
    n_nodes: int = 1
    """Number of nodes, consecutive ranks each. Above 1, ``"change"`` keeps experts on the nodes that have them, and
    ``"lp"`` puts ranks where most tokens find a copy on their own node."""
    steady: bool = False
    """Fewer than 16 rows are taken as what loads will be; otherwise they move nothing."""
    horizon: float | None = None
    """Rows that a change is to serve. With it, what takes longer than it saves is not moved; as `lplb.plan_change`."""
    token_cost: float | None = None
    """Seconds that the busiest rank takes per token in a layer."""
    byte_cost: float | None = None
    """Seconds per byte that a rank sends or receives."""

    def __post_init__(self) -> None:
        """Check the values, and make numbers what they are declared to be."""
        _check_choice("mode", self.mode, MODES)
        _check_choice("policy", self.policy, POLICIES)
        if not isinstance(self.steady, (bool, np.bool_)):
            raise TypeError(f"steady is {seen(self.steady)}, allowed is a bool")
        known: dict[str, Any] = {
            "gain": checked_number("gain", self.gain, above=0.0, most=1.0),
            "min_gain": checked_number("min_gain", self.min_gain, least=0.0),
            "n_nodes": whole_number("n_nodes", self.n_nodes, 1),
            "steady": bool(self.steady),
        }
        for name, least in (("max_moves", 0), ("max_bytes", 0), ("expert_bytes", 0), ("group_size", 1)):
            value = getattr(self, name)
            known[name] = None if value is None else whole_number(name, value, least, _MOST_TOKENS)
        for name in ("horizon", "token_cost", "byte_cost"):
            value = getattr(self, name)
            above = {"above": 0.0} if name == "horizon" else {"least": 0.0}
            known[name] = None if value is None else checked_number(name, value, **above)
        for name, value in known.items():
            object.__setattr__(self, name, value)
        self.limits(1).check()
        if self.mode == "EX" and self.policy != "change":
            raise ValueError(f"policy is {self.policy!r}, allowed in mode 'EX' is 'change': few moves in a cycle")
        if self.mode == "EX" and self.max_moves is None and self.max_bytes is None:
            raise ValueError("max_moves and max_bytes are None, allowed in mode 'EX' is at least one of them")

    def budget(self) -> int | None:
        """Most experts that are written in a cycle, by moves and by bytes; None for any number."""
        most = [] if self.max_moves is None else [self.max_moves]
        if self.max_bytes is not None and self.expert_bytes:
            most.append(self.max_bytes // self.expert_bytes)
        return min(most, default=None)

    def limits(self, n_logical: int) -> Limits:
        """Of one layer, as if it had the whole budget for itself."""
        sizes = None if self.expert_bytes is None else np.full(n_logical, self.expert_bytes, dtype=np.int64)
        return Limits(
            gain=self.gain,
            min_gain=self.min_gain,
            max_moves=self.max_moves,
            max_bytes=self.max_bytes,
            expert_bytes=sizes,
            horizon=self.horizon,
            token_cost=self.token_cost,
            byte_cost=self.byte_cost,
        )


@dataclass(frozen=True, eq=False)
class Problem:
    """What a cycle starts from: the same on all ranks, or their digests differ.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a shape or value is not allowed.
    """

    placements: tuple[Placement, ...]
    """Where experts are, for each layer; all of the same sizes."""
    history: _Ints
    """Tokens of each expert over all ranks, in the order of time, ``[layers, rows, n_logical]``; not negative."""
    sources: _Ints | None
    """The same by the rank that sent them, ``[layers, n_ranks, n_logical]``, summed over rows; or None."""
    settings: Settings

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        if not isinstance(self.settings, Settings):
            raise TypeError(f"settings is {seen(self.settings)}, allowed is lplb.dynamic.planning.Settings")
        object.__setattr__(self, "placements", _checked_placements(self.placements))
        first, layers = self.placements[0], len(self.placements)
        object.__setattr__(self, "history", _checked_counts("history", self.history))
        shape = self.history.shape
        if len(shape) != 3 or shape[0] != layers or shape[1] < 1 or shape[2] != first.n_logical:
            raise ValueError(
                f"history has shape {list(shape)}, allowed is [layers, rows, n_logical] = [{layers}, 1 or more, "
                f"{first.n_logical}]"
            )
        if self.sources is not None:
            object.__setattr__(self, "sources", _checked_counts("sources", self.sources))
            wanted = layers, first.n_ranks, first.n_logical
            if self.sources.shape != wanted:
                raise ValueError(
                    f"sources has shape {list(self.sources.shape)}, allowed is [layers, n_ranks, n_logical] = "
                    f"{list(wanted)}"
                )
        size = checked_group_size(first.n_ranks, self.settings.group_size)
        nested_blocks(first.n_ranks, size, self.settings.n_nodes)
        for placement in self.placements:
            placement.check_groups(size)
        parts = first.n_ranks // size
        if self.settings.policy != "change" and first.n_logical % parts:
            raise ValueError(
                f"policy is {self.settings.policy!r}, allowed for {first.n_logical} experts in {parts} groups of ranks "
                "is 'change': the others put as many experts in every group"
            )

    @property
    def group_size(self) -> int:
        """How many consecutive ranks balance among themselves."""
        return checked_group_size(self.placements[0].n_ranks, self.settings.group_size)

    def digest(self) -> str:
        """Hex; equal on two ranks if and only if the problem is, but for a collision of BLAKE2b."""
        parts: list[object] = ["lplb problem 1", *(p for pair in _items(self.settings) for p in pair)]
        for placement in self.placements:
            parts += [placement.n_ranks, placement.n_logical, placement.phy2log.numpy()]
        return _digest([*parts, self.history, self.sources])


@dataclass(frozen=True)
class LayerPlan:
    """What is to become of a layer."""

    placement: Placement
    """Where experts are to be; the one of the problem where nothing moves."""
    worth: bool
    """Whether anything moves."""
    reason: str
    """Why, in a sentence with its figures."""
    imbalance_before: float
    """Mean of the LP's largest rank load over the mean of all ranks, on the newer half of the rows that decided (on
    all of fewer than 16); 1 without loads."""
    imbalance_after: float
    """The same on `placement`."""
    n_moves: int
    """Experts that are written."""


def plan(problem: Problem) -> tuple[LayerPlan, ...]:
    """Plan a cycle.

    A layer moves only through `lplb.plan_change`'s gate, whatever the policy: searched or placed on the older half of
    the rows, the moves must gain ``min_gain`` on the newer half, for every tenth of the slots that are written, and
    three standard errors. Where the whole history shows no gain yet, ``"change"`` looks once more, at the newest rows
    alone. A layer without loads keeps its placement.

    ``max_moves`` and ``max_bytes`` are for all layers together (MindIE's ``max_move`` is for each layer's plan): where
    the layers want more, each makes as many of its moves, the best first, that together they take most tokens off the
    busiest ranks. A placement made anew is taken whole or not at all.

    Args:
        problem: loads, placements and settings.

    Returns:
        One plan for each layer. It depends on the problem alone; one thread computes it, almost all without the GIL.
    """
    plans = [LayerPlan(placement, False, "no loads", 1.0, 1.0, 0) for placement in problem.placements]
    budget, layers = problem.settings.budget(), _loaded(problem)
    found = []
    for (layer, _), f in zip(layers, _plan_layers(problem, layers), strict=True):
        found.append(f)
        plans[layer] = _as_plan(f)
    if budget is not None and sum(p.n_moves for p in plans) > budget:
        for (layer, _), f in zip(layers, _share_out(found, budget), strict=True):
            plans[layer] = _as_plan(f)
    return tuple(plans)


def plans_digest(plans: Sequence[LayerPlan]) -> str:
    """Hex; equal on two ranks if and only if the plans are, but for a collision of BLAKE2b."""
    parts: list[object] = ["lplb plans 1"]
    for p in plans:
        parts += [p.placement.n_ranks, p.placement.n_logical, p.placement.phy2log.numpy()]
        parts += [p.worth, p.reason, p.imbalance_before, p.imbalance_after, p.n_moves]
    return _digest(parts)


# ---- one layer


def _loaded(problem: Problem) -> list[tuple[int, _Ints]]:
    """The layers that have loads, and their rows that have."""
    rows = [layer[layer.any(axis=1)][-MOST_BATCHES:] for layer in problem.history]
    return [(i, r) for i, r in enumerate(rows) if len(r)]


def _plan_layers(problem: Problem, layers: Sequence[tuple[int, _Ints]]) -> Iterator[Found]:
    """What every layer would do if the budget were its own."""
    settings, currents = problem.settings, [problem.placements[layer] for layer, _ in layers]
    if not layers:
        return
    limits = settings.limits(currents[0].n_logical)
    ground = Ground(problem.group_size, settings.n_nodes)
    if settings.policy != "change":
        yield from (_resolve(problem, layer, rows, limits, ground) for layer, rows in layers)
        return
    all_rows = [rows for _, rows in layers]
    found = list(plan_layers(currents, all_rows, limits, ground, steady=settings.steady))
    _look_again(found, all_rows, limits, ground)
    yield from found


def _look_again(found: list[Found], layers: Sequence[_Ints], limits: Limits, ground: Ground) -> None:
    """Look at the newest rows alone, where the imbalance has risen there by more than the older half explains.

    What is found so replaces what is in ``found``.
    """
    doubtful = [i for i, f in enumerate(found) if not f.change.worth and len(layers[i]) >= _LEAST_ROWS]
    older = [layers[i][: len(layers[i]) // 2] for i in doubtful]
    before = rate_layers([found[i].judge.current for i in doubtful], older, ground)
    newest = [_newest(found[i].judge.before, b, limits.min_gain) for i, b in zip(doubtful, before, strict=True)]
    for n in sorted(set(newest) - {0}):
        which = [k for k, size in enumerate(newest) if size == n]
        currents = [found[doubtful[k]].judge.current for k in which]
        again = list(plan_layers(currents, [layers[doubtful[k]][-n:] for k in which], limits, ground))
        after = rate_layers([f.change.placement for f in again], [older[k] for k in which], ground)
        for k, f, there in zip(which, again, after, strict=True):
            # Loads that wander come back: their like is in the older half, where the moves gain now more and now less.
            gained = f.change.imbalance_before - f.change.imbalance_after
            if f.change.worth and gained > noise_of(before[k] - there, n // 2):
                reason = f"on the newest {n} rows alone, {f.change.reason}"
                found[doubtful[k]] = f._replace(change=replace(f.change, reason=reason))


def _newest(newer: _Floats, older: _Floats, min_gain: float) -> int:
    """How many of the newest rows have more imbalance than the older ones explain: 0, 16 or 32."""
    n = FEWEST_BATCHES
    line = mean_of(older) + max(min_gain, noise_of(older, n))
    if not mean_of(newer[-n:]) > line:
        return 0
    return 2 * n if len(newer) >= 2 * n and mean_of(newer[-2 * n : -n]) > line else n


def _resolve(problem: Problem, layer: int, rows: _Ints, limits: Limits, ground: Ground) -> Found:
    """Place anew on what the search would see, relabelled; gated as any change."""
    settings, current = problem.settings, problem.placements[layer]
    judge = Judge(current, deal_out(rows), limits, ground)
    stay, _ = survey(judge, settings.steady)
    if stay.reason:
        return Found(stay, judge, [])
    local = settings.policy == "lp" and settings.mode != "AG" and problem.sources is not None
    sources = cast(_Ints, problem.sources)[layer] if local else None
    placed = place(
        judge.scenarios.search,
        n_ranks=current.n_ranks,
        n_physical=current.n_physical,
        policy=settings.policy,
        group_size=ground.group_size,
        n_nodes=settings.n_nodes,
        sources=sources if sources is not None and sources.any() else None,
    )
    target = _renamed(problem, cast(Placement, placed), current, local)
    chosen = judge.rate(target.phy2log.numpy())
    stay = replace(stay, imbalance_resolve=judge.figure(chosen.phy2log))
    if not judge.allows(chosen.phy2log):
        reason = f"a placement made anew takes {chosen.n_moves} moves, more than the budget"
        return Found(replace(stay, reason=reason), judge, [])
    if chosen.n_moves == 0:
        return Found(replace(stay, reason="a placement made anew is the current one"), judge, [])
    change = decide(stay, chosen, judge)
    if change.worth and settings.policy == "lp" and judge.scenarios.few:
        # Drift does not have to be reckoned with where loads are steady: these very loads are levelled out.
        finer = _renamed(problem, levelled(target, judge.scenarios.shown, ground), current, local)
        rated = judge.rate(finer.phy2log.numpy())
        again = decide(stay, rated, judge)
        if again.worth and judge.allows(rated.phy2log) and again.imbalance_after < change.imbalance_after:
            change = again
    return Found(change, judge, [])


def _renamed(problem: Problem, placed: Placement, current: Placement, local: bool) -> Placement:
    """Name ranks and slots so that most experts stay; local: a rank that was put on a node stays there."""
    n_nodes = problem.settings.n_nodes
    node = [1.0 + r // (current.n_ranks // n_nodes) for r in range(current.n_ranks)]
    return relabel(current, placed, group_size=problem.group_size, n_nodes=n_nodes, rank_speed=node if local else None)


def _n_moves(found: Found) -> int:
    return int((found.change.placement.phy2log.numpy() != found.judge.slots).sum())


def _as_plan(found: Found) -> LayerPlan:
    c = found.change
    return LayerPlan(c.placement, c.worth, c.reason, c.imbalance_before, c.imbalance_after, _n_moves(found))


# ---- one budget for all layers


def _share_out(found: Sequence[Found], budget: int) -> list[Found]:
    """Of every layer as many moves that all together gain most within the budget, exactly: a knapsack, layer by layer.

    What a layer gains counts by its tokens.
    """
    stops = [_stops(f) for f in found]
    best = np.zeros(budget + 1)  # tokens saved with at most so many moves in the layers so far
    taken: list[_Ints] = []  # the stop of each layer for every number of moves, -1 for none
    for ways in stops:
        before, choice = best, np.full(budget + 1, -1)
        best = before.copy()
        for i, (candidate, tokens) in enumerate(ways):
            n = candidate.n_moves
            reached = before[: budget + 1 - n] + tokens
            better = reached > best[n:]
            best[n:][better] = reached[better]
            choice[n:][better] = i
        taken.append(choice)
    left, shared = budget, list(found)
    for layer in reversed(range(len(found))):
        f = found[layer]
        if not f.change.worth:
            continue
        i = int(taken[layer][left])
        if i < 0:
            shared[layer] = f._replace(change=_kept(f, "other layers gain more within the budget"))
            continue
        candidate = stops[layer][i][0]
        left -= candidate.n_moves
        if candidate.n_moves < _n_moves(f):
            change = decide(_kept(f, ""), candidate, f.judge)
            shared[layer] = f._replace(change=replace(change, reason=f"{change.reason}, the share of the budget"))
    return shared


def _stops(found: Found) -> list[tuple[Candidate, float]]:
    """Where a layer may stop on the way to its change, and the tokens per row that this takes off its busiest rank."""
    judge, change = found.judge, found.change
    if not change.worth:
        return []
    mean = float(judge.scenarios.tokens.mean()) / change.placement.n_ranks
    most = _n_moves(found)
    path = [p for p in found.path if 0 < (p != judge.slots).sum() < most]
    every = -(-len(path) // _MOST_STOPS) if path else 1
    ways = [judge.rate(p) for p in path[::every]] + [judge.rate(change.placement.phy2log.numpy())]
    return [(c, c.gain * mean) for c in ways if c.n_moves == most or _holds(c, judge)]


def _holds(candidate: Candidate, judge: Judge) -> bool:
    if candidate.n_moves == 0 or judge.doubt(candidate.gains, candidate.n_moves):
        return False
    saving, cost = judge.seconds(candidate)
    return judge.limits.horizon is None or saving > cost


def _kept(found: Found, reason: str) -> Change:
    """The change that is none, in the place of what was found."""
    change = found.change
    current = found.judge.current
    return replace(
        change,
        placement=current,
        bytes=None if change.bytes is None else 0,
        imbalance_after=change.imbalance_before,
        saving=None if change.saving is None else 0.0,
        cost=None if change.cost is None else 0.0,
        worth=False,
        reason=reason,
    )


# ---- checks


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {seen(value)}, allowed is a str")
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed are {', '.join(map(repr, allowed))}")


def _checked_placements(given: object) -> tuple[Placement, ...]:
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise TypeError(f"placements is {seen(given)}, allowed is a sequence of lplb.Placement, one per layer")
    if not given:
        raise ValueError("placements has no layers, allowed is at least one")
    for i, placement in enumerate(given):
        if not isinstance(placement, Placement):
            raise TypeError(f"placements[{i}] is {seen(placement)}, allowed is a lplb.Placement")
        sizes = placement.n_ranks, placement.n_logical, placement.n_physical
        if sizes != (given[0].n_ranks, given[0].n_logical, given[0].n_physical):
            raise ValueError(f"placements[{i}] is {placement!r}, allowed are the sizes of placements[0], {given[0]!r}")
    return tuple(given)


def _checked_counts(name: str, given: object) -> _Ints:
    """Contiguous int64, not negative, of any shape."""
    if not isinstance(given, np.ndarray):
        raise TypeError(f"{name} is {seen(given)}, allowed is a NumPy array")
    if given.dtype != np.int64:
        raise TypeError(f"{name} has dtype {given.dtype}, allowed is int64")
    if given.size and (given.min() < 0 or given.max() > _MOST_TOKENS or given.sum(axis=-1).max() > _MOST_TOKENS):
        odd = int(given.min()) if given.min() < 0 else int(given.sum(axis=-1, dtype=np.float64).max())
        raise ValueError(f"{name} has {odd}, allowed are 0 or more, and 2**45 tokens in a row")
    return np.ascontiguousarray(given)


# ---- digests


def _items(settings: Settings) -> Iterable[tuple[str, object]]:
    return ((f.name, getattr(settings, f.name)) for f in fields(settings))


def _digest(parts: Iterable[object]) -> str:
    """BLAKE2b over every part with its kind and length, little-endian: no two lists of parts share their bytes."""
    found = hashlib.blake2b(digest_size=32)
    for part in parts:
        kind, content = _canonical(part)
        found.update(kind.encode().ljust(8) + struct.pack("<q", len(content)))
        found.update(content)
    return found.hexdigest()


def _canonical(part: object) -> tuple[str, bytes]:
    if isinstance(part, np.ndarray):
        kind = f"{part.dtype.kind}{part.dtype.itemsize}"
        shape = struct.pack(f"<{part.ndim + 1}q", part.ndim, *part.shape)
        return kind, shape + part.astype(part.dtype.newbyteorder("<"), order="C", copy=False).tobytes()
    if isinstance(part, float):
        return "float", struct.pack("<d", part)
    return type(part).__name__, ("" if part is None else str(part)).encode()
