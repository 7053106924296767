"""Advice for a deployment: how many redundant slots, which policy, an LP or not, and from what batch size it pays.

`study` models a layer's time, see `lplb.cost`, for every choice and many batch sizes; `lplb.advise.worth` reads the
advice off. ``lplb advise`` is this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch

from lplb import cost, scenes
from lplb.advise import profiles
from lplb.advise.profiles import Profile
from lplb.advise.worth import MOST_DIRECT, Option, Study
from lplb.arguments import MAX_GROUP_SIZE, MOST_TOKENS, check_divides, seen, whole_number
from lplb.cost import ASSUMED_PLANNER_SECONDS, HARDWARE, Hardware, hardware_by_name, layer_parts
from lplb.formats import read_loads
from lplb.formats.loads import FirstAxis
from lplb.models import ModelShape, model_by_name
from lplb.placement import Placement, split_evenly
from lplb.plan import checked_solver
from lplb.planner import Planner
from lplb.policies import place

__all__ = [
    "EXCHANGES",
    "LOADS",
    "MOST_DIRECT",
    "SIZES",
    "by_exchange",
    "generated",
    "loads_by_name",
    "nodes_of",
    "recorded",
    "study",
]

SIZES = tuple(sorted({2**i for i in range(15)} | {3 * 2**i for i in range(13)}))
"""Tokens per rank that are looked at: 1 to 16,384, in steps of a third to a half."""

LOADS = ("lognormal", "trace")
"""Loads that need no file."""

EXCHANGES = ("auto", *cost.EXCHANGES)
"""How tokens travel between nodes: `lplb.cost.EXCHANGES`, or by the batch size."""

_WAYS = (("eplb", "even"), ("eplb-distinct", "even"), ("lp", "even"), ("eplb", "lp"), ("lp", "lp"))
_MOST_SLOTS = 64  # redundant ones per rank
_MOST_RANKS = 1024

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


# ---- loads


def generated(model: ModelShape, *, sigma: float = 0.85, noise: float = 0.3, seed: int = 0) -> Profile:
    """Return log-normal loads that drift, see `lplb.scenes.lognormal`, of four layers.

    Args:
        model: whose experts they are.
        sigma: standard deviation of the logarithm of an expert's popularity; 0 for balanced experts.
        noise: that of each batch's own factors.
        seed: of the generator.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """
    fine = 1 << 26  # so many tokens that shares are not rounded
    counts = scenes.lognormal(
        profiles.BATCHES, profiles.MOST_CASES, model.n_logical, tokens=fine, sigma=sigma, noise=noise, seed=seed
    )
    name = f"generated: popularities log-normal, sigma {sigma:g}, each batch's factors too, sigma {noise:g}"
    return profiles.profile(np.maximum(counts, 1).transpose(1, 0, 2), model, name)


def recorded(model: ModelShape) -> Profile:
    """Return the recorded router trace; its layers of 64 experts stand side by side for a layer of the model's.

    Raises:
        ValueError: they do not make up the model's experts: 64, 128, 192 or 256.
    """
    name = "the recorded router trace"
    layers, notes = profiles.side_by_side(scenes.trace().counts.transpose(1, 0, 2), model, name)
    return profiles.profile(layers, model, name, notes)


def loads_by_name(
    name: str | Sequence[str],
    model: ModelShape,
    *,
    sigma: float = 0.85,
    noise: float = 0.3,
    seed: int = 0,
    first_axis: FirstAxis | None = None,
) -> Profile:
    """Return the loads that ``lplb advise --load`` names: one of `LOADS`, or files that `lplb.formats` reads.

    Args:
        name: which, or several files, as for `lplb.formats.read_loads`.
        model: whose experts they are.
        sigma: as for `generated`, like the next two.
        noise: see there.
        seed: see there.
        first_axis: of files, as for `lplb.formats.read_loads`.

    Raises:
        TypeError, ValueError: loads or file do not fit the model; see `lplb.formats.read_loads`.
        OSError: the file cannot be read.
    """
    names = [name] if isinstance(name, str) else list(name)
    if not all(names):
        raise ValueError("loads is '', allowed are 'lognormal', 'trace' and files")
    if len(names) > 1 and (own := [one for one in names if one in LOADS]):
        raise ValueError(f"loads is {own[0]!r} and others, allowed is {own[0]!r} alone, or files")
    if names == ["lognormal"]:
        return generated(model, sigma=sigma, noise=noise, seed=seed)
    if names == ["trace"]:
        return recorded(model)
    loads = read_loads(names, first_axis=first_axis, n_logical=model.n_logical)
    return profiles.profile(loads, model, ", ".join(names))


# ---- what every option takes


def study(
    model: ModelShape | str,
    hardware: Hardware | str,
    n_ranks: SupportsIndex,
    *,
    loads: Profile | None = None,
    n_nodes: SupportsIndex | None = None,
    group_size: SupportsIndex | None = None,
    redundancy: Sequence[SupportsIndex] = (0, 1, 2, 4),
    tokens: Sequence[SupportsIndex] = (64, 4096),
    sizes: Sequence[SupportsIndex] = SIZES,
    planner_seconds: float = ASSUMED_PLANNER_SECONDS,
    exchange: str = "auto",
    solver: str = "ipm",
    seed: SupportsIndex = 0,
    on_progress: Callable[[int, int], object] = lambda done, of: None,
) -> Study:
    """Model a layer's time for every redundancy, policy, split and batch size.

    Experts are placed from the profile's histories; each option then serves the same drawn batches: even splits as they
    fall, LPs in whole tokens. Policies and the LP see all ranks of a balance group alike, whatever node they are on.

    Args:
        model: a shape, or the name of one of `lplb.models.MODELS`.
        hardware: one GPU and its links, or the name of one of `lplb.cost.HARDWARE`.
        n_ranks: ranks of the expert-parallel group.
        loads: how popular the experts are; `generated` by default.
        n_nodes: nodes that the ranks are on, a divisor of ``n_ranks``; by default one per 8 ranks.
        group_size: consecutive ranks that balance among themselves; by default all, or, of more than 128, the largest
            part that divides ranks and experts.
        redundancy: redundant slots per rank to look at. 0 is always looked at; what would hold an expert twice on a
            rank, or experts that do not fit into memory, is left out.
        tokens: tokens per rank that advice is for. A token has ``model.top_k`` experts; all ranks together have at most
            2**31 - 1 choices.
        sizes: further tokens per rank; the batch size from which the LP pays is one of all these.
        planner_seconds: the planner's time per layer and batch, an assumption.
        exchange: how tokens travel between nodes, see `lplb.cost`; ``"auto"`` is ``"direct"`` up to `MOST_DIRECT`
            tokens per rank and ``"by_node"`` beyond.
        solver: ``"ipm"``, the planner's default, or ``"flow"``. The busiest rank is the same; what the plan leaves open
            is not, and the interior point spreads it more evenly.
        seed: of the tokens that are drawn.
        on_progress: called with how much is done, and of how much.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a value is not allowed; the message has the value seen and the value allowed.
    """
    at = _checked_deployment(model, hardware, n_ranks, n_nodes, group_size, exchange, solver)
    seed = whole_number("seed", seed, 0)
    loads = generated(at.model, seed=seed) if loads is None else loads
    if not isinstance(loads, Profile):
        raise TypeError(f"loads is {seen(loads)}, allowed is a Profile")
    if loads.n_logical != at.model.n_logical:
        raise ValueError(f"loads has {loads.n_logical} experts, allowed are {at.model.name}'s {at.model.n_logical}")
    if isinstance(planner_seconds, bool) or not isinstance(planner_seconds, (int, float)):
        raise TypeError(f"planner_seconds is {planner_seconds!r}, allowed is a number")
    if not 0 <= planner_seconds <= 1:
        raise ValueError(f"planner_seconds is {planner_seconds}, allowed are 0 to 1")
    most = MOST_TOKENS // (at.n_ranks * at.model.top_k)
    asked = sorted({whole_number("tokens", size, 1, most) for size in tokens})
    if not asked:
        raise ValueError("tokens is empty, allowed is at least one number")
    grid = sorted({whole_number("sizes", size, 1, most) for size in sizes} | set(asked))
    levels, notes = _levels(at, {whole_number("redundancy", level, 0, _MOST_SLOTS) for level in redundancy})
    counts = np.stack([loads.counts(size * at.n_ranks * at.model.top_k, seed) for size in grid], axis=1)
    return Study(
        model=at.model,
        hardware=at.hardware,
        n_ranks=at.n_ranks,
        n_nodes=at.n_nodes,
        group_size=at.group_size,
        exchange=exchange,
        solver=at.solver,
        loads=loads.name,
        notes=[*loads.notes, *notes],
        seed=seed,
        planner_seconds=float(planner_seconds),
        sizes=grid,
        asked=asked,
        options=_options(at, loads, counts, grid, levels, on_progress),
    )


@dataclass(frozen=True)
class _Deployment:
    """Ranks, and what is on them."""

    model: ModelShape
    hardware: Hardware
    n_ranks: int
    n_nodes: int
    group_size: int
    exchange: str
    solver: str

    def slots(self, redundant: int) -> int:
        """Slots per rank."""
        return -(-self.model.n_logical // self.n_ranks) + redundant


def nodes_of(n_ranks: int) -> int:
    """Return how many nodes ranks are taken to be on: one per 8, or the fewest with at most 8 that all have as many."""
    return next(n for n in range(-(-n_ranks // 8), n_ranks + 1) if n_ranks % n == 0)


def by_exchange(exchange: str, tokens_per_rank: npt.NDArray[Any]) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    """Return which batches travel which way, of `lplb.cost.EXCHANGES`: masks over batches, none empty.

    Args:
        exchange: one of `EXCHANGES`.
        tokens_per_rank: of each batch, ``[n]``.

    Raises:
        ValueError: there is no such exchange.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange is {exchange!r}, allowed are {', '.join(map(repr, EXCHANGES))}")
    few = tokens_per_rank <= {"auto": MOST_DIRECT, "direct": np.inf, "by_node": -1}[exchange]
    return [(way, some) for way, some in (("direct", few), ("by_node", ~few)) if some.any()]


def _checked_deployment(
    model: ModelShape | str,
    hardware: Hardware | str,
    n_ranks: SupportsIndex,
    n_nodes: SupportsIndex | None,
    group_size: SupportsIndex | None,
    exchange: str,
    solver: str,
) -> _Deployment:
    model = model_by_name(model) if isinstance(model, str) else model
    hardware = hardware_by_name(hardware) if isinstance(hardware, str) else hardware
    for name, value, kind in (("model", model, ModelShape), ("hardware", hardware, Hardware)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {seen(value)}, allowed is a {kind.__name__} or its name")
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange is {exchange!r}, allowed are {', '.join(map(repr, EXCHANGES))}")
    ranks = whole_number("n_ranks", n_ranks, 1, _MOST_RANKS)
    if n_nodes is None and ranks > 8 and ranks % 8:
        raise ValueError(f"n_nodes is not given, allowed only where n_ranks, {ranks}, is up to 8 or a multiple of 8")
    nodes = nodes_of(ranks) if n_nodes is None else whole_number("n_nodes", n_nodes, 1)
    check_divides("n_ranks", ranks, "n_nodes", nodes)
    size = (
        _largest_group(ranks, model)
        if group_size is None
        else whole_number("group_size", group_size, 1, MAX_GROUP_SIZE)
    )
    check_divides("n_ranks", ranks, "group_size", size)
    check_divides("n_logical", model.n_logical, "n_ranks / group_size", ranks // size)
    return _Deployment(model, hardware, ranks, nodes, size, exchange, checked_solver(solver))


def _largest_group(n_ranks: int, model: ModelShape) -> int:
    """As many ranks as can balance among themselves."""
    for size in range(min(n_ranks, MAX_GROUP_SIZE), 0, -1):
        if n_ranks % size == 0 and model.n_logical % (n_ranks // size) == 0:
            return size
    raise ValueError(
        f"n_ranks is {n_ranks}, allowed is what parts of at most {MAX_GROUP_SIZE} ranks divide together with the "
        f"{model.n_logical} experts of {model.name}"
    )


def _levels(at: _Deployment, wanted: set[int]) -> tuple[list[int], list[str]]:
    """The redundancies that there is room for, and what a reader must know of it."""
    notes = []
    spare = at.slots(0) * at.n_ranks - at.model.n_logical
    if spare:
        notes.append(
            f"{at.model.n_logical} experts do not divide by {at.n_ranks} ranks: there are {at.slots(0)} slots per "
            f"rank before redundant ones, which leaves {spare} for copies."
        )
    room = int(at.hardware.memory_bytes // at.model.slot_bytes)
    if room < at.slots(0):
        notes.append(
            f"The experts alone take {at.slots(0) * at.model.slot_bytes / 1e9:.0f} GB of each rank's "
            f"{at.hardware.memory_bytes / 1e9:.0f}: they do not fit on {at.n_ranks} ranks of {at.hardware.name}."
        )
    distinct = at.model.n_logical // (at.n_ranks // at.group_size)  # no rank holds an expert twice
    fit = sorted(level for level in wanted if level == 0 or at.slots(level) <= min(room, distinct))
    left_out = sorted(wanted - set(fit))
    if left_out:
        notes.append(f"Not looked at, as there is no room for them: {', '.join(map(str, left_out))} redundant slots.")
    return sorted({0, *fit}), notes


def _options(
    at: _Deployment,
    loads: Profile,
    counts: _Ints,
    sizes: list[int],
    levels: list[int],
    on_progress: Callable[[int, int], object],
) -> list[Option]:
    """Every option; counts are ``[cases, sizes, batches, n_logical]``."""
    options: list[Option] = []
    ways = [(level, *way) for level in levels for way in _WAYS]
    if at.model.n_logical % at.n_ranks == 0:
        ways.insert(0, (0, "none", "even"))
    history = np.stack([case.history for case in loads.cases])
    for done, (level, policy, split) in enumerate(ways):
        on_progress(done, len(ways))
        n_physical = at.slots(level) * at.n_ranks
        if split == "lp" and n_physical == at.model.n_logical:
            continue  # no expert has a choice
        placements = _placements(at, history, n_physical, policy, split)
        options.append(_measure(at, placements, counts, sizes, level, policy, split))
    on_progress(len(ways), len(ways))
    return options


def _placements(at: _Deployment, history: _Floats, n_physical: int, policy: str, split: str) -> list[Placement]:
    if policy == "none":
        return [Placement(torch.arange(n_physical), at.n_ranks)] * len(history)
    placed = place(
        history, n_ranks=at.n_ranks, n_physical=n_physical, policy=policy, group_size=at.group_size, fallback=split
    )
    assert isinstance(placed, list)
    return placed


def _measure(
    at: _Deployment,
    placements: list[Placement],
    counts: _Ints,
    sizes: list[int],
    level: int,
    policy: str,
    split: str,
) -> Option:
    """An option's means over cases and batches."""
    cases, n_sizes, batches, n_logical = counts.shape
    names = {at.hardware.name: at.hardware, **{n: h for n, h in HARDWARE.items() if n != at.hardware.name}}
    seconds = {name: np.zeros(n_sizes) for name in names}
    imbalance, floor = np.zeros(n_sizes), np.zeros(n_sizes)
    for placement, drawn in zip(placements, counts, strict=True):
        rows = drawn.reshape(-1, n_logical)
        if split == "lp":
            planner = Planner.from_placement(placement, group_size=at.group_size, solver=at.solver)
            quota = planner.solve(torch.from_numpy(rows)).quota.numpy()
        else:
            quota = split_evenly(placement, rows)
        by_size = quota.reshape(n_sizes, batches, -1)
        load = by_size.reshape(n_sizes, batches, at.n_ranks, -1).sum(-1, dtype=np.float64)
        imbalance += (load.max(-1) / load.mean(-1)).mean(-1) / cases
        for name, hardware in names.items():
            time, floors = _layer(at, hardware, by_size, sizes)
            seconds[name] += time.mean(-1) / cases
            if name == at.hardware.name:
                floor += (floors / time).mean(-1) / cases
    return Option(level, policy, split, imbalance, seconds, floor)


def _layer(at: _Deployment, hardware: Hardware, quota: npt.NDArray[Any], sizes: list[int]) -> tuple[_Floats, _Floats]:
    """A layer's time without the planner's, and what of it slots in use cost at least, ``[sizes, batches]``."""
    time, floors = np.zeros(quota.shape[:2]), np.zeros(quota.shape[:2])
    for exchange, some in by_exchange(at.exchange, np.array(sizes)):
        parts = layer_parts(
            quota[some],
            at.n_ranks,
            at.model,
            hardware,
            ranks_per_node=at.n_ranks // at.n_nodes,
            exchange=exchange,
        )
        time[some] = parts.experts + parts.dispatch + parts.combine
        floors[some] = parts.floor
    return time, floors
