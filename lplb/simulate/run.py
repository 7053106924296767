"""What a configuration would do with given loads: placements made anew from time to time, every batch planned.

`simulate` is for one configuration: a policy that places experts, and a split that shares out every batch. Each plan is
checked: the tokens of every expert are all served by its copies, and no split is below the certified bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lplb.arguments import MOST_TOKENS, check_divides, checked_group_size, seen, whole_number
from lplb.placement import Placement, split_evenly
from lplb.plan import SolveStatus, checked_solver
from lplb.planner import Planner
from lplb.replay import CheckFailed, one_thread
from lplb.simulate.placers import NAMES, Placer, placer
from lplb.simulate.simulation import Setting, Simulation

__all__ = ["SPLITS", "LayerSeconds", "Setting", "Simulation", "check_configuration", "simulate"]

SPLITS = ("lp", "even")

_MOST_RANKS_OF_A_THREAD = 64
"""Up to here a few batches are solved in a millisecond or two: waking other threads costs more, and most on a busy
machine."""

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
LayerSeconds = Callable[[_Ints, Placement], _Floats]
"""From tokens of each slot, ``[n, n_physical]``, and where they are, to seconds ``[n]``."""


def simulate(
    loads: npt.NDArray[Any] | torch.Tensor,
    *,
    n_ranks: int,
    n_physical: int | None = None,
    policy: str | Placer = "lp",
    split: str = "lp",
    group_size: int | None = None,
    n_groups: int = 1,
    n_nodes: int = 1,
    refresh: int = 16,
    window: int = 32,
    warmup: int | None = None,
    solver: str = "ipm",
    expert_bytes: int = 0,
    layer_seconds: LayerSeconds | None = None,
    on_batches: Callable[[int], object] | None = None,
) -> Simulation:
    """Run loads through one configuration.

    Experts are placed from the ``window`` batches before (fewer where there are not as many), each layer by itself, at
    batch ``warmup`` and every ``refresh`` batches after it. Batches before ``warmup`` are history only. The LP is
    solved in every batch, for its certified bound where ``split`` is ``"even"``.

    Args:
        loads: whole tokens, ``[batches, layers, n_logical]``, or with where they come from ``[batches, layers, sources,
            n_logical]``: consecutive sources are of one node, as many for each.
        n_ranks: ranks. More than 128 need a ``group_size``.
        n_physical: slots on all ranks, a multiple of ``n_ranks``; by default two redundant ones per rank, but none
            for ``"none"``, which allows no other.
        policy: who places experts: ``"lp"``, ``"eplb"`` or ``"eplb-distinct"`` of `lplb.place`;
            ``"lp-change"``, ``"lp"`` once and then few moves by `lplb.plan_change`; ``"none"``, one slot each, in
            order; a topology of LPLB by name, see `topology_by_name`, re-mapped at each refresh; or a function from
            history, int64 ``[layers, batches, n_logical]``, to one `Placement` per layer. It is called in the order of
            batches, so it may go on from what it placed before.
        split: ``"lp"`` is the optimum of each batch; ``"even"`` deals every expert's tokens out evenly over its copies.
        group_size: consecutive ranks that balance among themselves, at most 128, a divisor of ``n_ranks``; by default
            all.
        n_groups: groups of experts that node-limited routing knows, for `lplb.place`.
        n_nodes: nodes of consecutive ranks.
        refresh: batches from one placement to the next; 0 places once.
        window: batches that a placement is made from.
        warmup: batches before the first placement, which nothing counts; by default ``refresh``, or ``window`` where
            experts are placed once.
        solver: ``"ipm"`` or ``"flow"``; maxima and bounds are the same, steps and gaps are not.
        expert_bytes: bytes of one expert's weights, for what is moved.
        layer_seconds: models a layer's time, see `LayerSeconds`.
        on_batches: called with how many batches are done, after those of each placement.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message has the value seen and the value allowed.
        CheckFailed: a plan loses or invents tokens, or is below its bound.
    """
    counts, sources = _checked_loads(loads)
    setting, at = _checked_setting(
        loads.shape, n_ranks, n_physical, policy, split, group_size, n_nodes, refresh, window, warmup, solver
    )
    expert_bytes = whole_number("expert_bytes", expert_bytes, 0)
    place = policy if callable(policy) else placer(setting, n_groups)
    by_node = None if sources is None else _by_node(sources, setting.n_nodes)
    run = _Run(setting, counts, by_node, at[0], layer_seconds)
    placements: list[list[Placement]] = []
    moved = np.zeros((len(at), counts.shape[1]), dtype=np.int64)
    for i, (begin, end) in enumerate(zip(at, [*at[1:], len(counts)], strict=True)):
        if i == 0 or policy != "none":
            history = np.ascontiguousarray(counts[max(0, begin - window) : begin].transpose(1, 0, 2))
            placed = _checked_placements(place(history), setting, counts.shape[1])
        placements.append(placed)
        if i:
            moved[i] = [_moved(old, new) for old, new in zip(placements[-2], placed, strict=True)]
        with nullcontext() if setting.n_ranks > _MOST_RANKS_OF_A_THREAD else one_thread():
            run.batches(begin, end, placed)
        if on_batches is not None:
            on_batches(end - begin)
    return run.result(at, moved, expert_bytes, placements)


# ---- checks


def _checked_loads(loads: object) -> tuple[_Ints, npt.NDArray[Any] | None]:
    """Tokens ``[batches, layers, n_logical]``, and by source where that is known."""
    given = loads.detach().cpu().numpy() if isinstance(loads, torch.Tensor) else loads
    if not isinstance(given, np.ndarray):
        raise TypeError(f"loads is {seen(loads)}, allowed is an array or a tensor of integers")
    if given.dtype.kind not in "iu":
        raise TypeError(f"loads has dtype {given.dtype}, allowed is an integer dtype: whole tokens")
    if given.ndim not in (3, 4) or not given.size:
        raise ValueError(
            f"loads has shape {list(given.shape)}, allowed is [batches, layers, n_logical] or "
            "[batches, layers, sources, n_logical], nothing empty"
        )
    least, most = given.min(), given.max()
    if least < 0 or most > MOST_TOKENS:
        raise ValueError(f"loads has {least if least < 0 else most}, allowed are 0 to {MOST_TOKENS} tokens")
    if given.ndim == 3:
        return np.ascontiguousarray(given, dtype=np.int64), None
    total = given.sum(2, dtype=np.int64)
    if total.max() > MOST_TOKENS:
        raise ValueError(f"loads has {total.max()} tokens of an expert over all sources, allowed are {MOST_TOKENS}")
    return total, given


def check_configuration(loads: npt.NDArray[Any], **options: Any) -> None:
    """Raise what `simulate` would for a configuration, without simulating; the values of loads are not looked at.

    Args:
        loads: as for `simulate`.
        options: as for `simulate`; ``n_ranks`` is a must.

    Raises:
        TypeError, ValueError: as `simulate`.
    """
    n_groups = options.pop("n_groups", 1)
    for name in ("expert_bytes", "layer_seconds", "on_batches"):
        options.pop(name, None)
    setting, _ = _checked_setting(loads.shape, **options)
    if not callable(options.get("policy")):
        placer(setting, n_groups)(np.ones((1, 1, setting.n_logical), dtype=np.int64))


def _checked_setting(
    shape: Sequence[int],
    n_ranks: int,
    n_physical: int | None = None,
    policy: object = "lp",
    split: str = "lp",
    group_size: int | None = None,
    n_nodes: int = 1,
    refresh: int = 16,
    window: int = 32,
    warmup: int | None = None,
    solver: str = "ipm",
) -> tuple[Setting, list[int]]:
    """The configuration, and at which batches experts are placed."""
    n_batches, *_, n_logical = shape
    n_ranks = whole_number("n_ranks", n_ranks, 1)
    if not callable(policy) and policy not in NAMES:
        raise ValueError(f"policy is {policy!r}, allowed are {', '.join(map(repr, NAMES))} or a function")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, allowed are {', '.join(map(repr, SPLITS))}")
    if n_physical is None:
        n_physical = n_logical if policy == "none" else (-(-n_logical // n_ranks) + 2) * n_ranks
    n_physical = whole_number("n_physical", n_physical, n_logical, n_logical if policy == "none" else None)
    check_divides("n_physical", n_physical, "n_ranks", n_ranks)
    group_size = checked_group_size(n_ranks, group_size)
    check_divides("n_ranks", n_ranks, "group_size", group_size)
    n_nodes = whole_number("n_nodes", n_nodes, 1)
    check_divides("n_ranks", n_ranks, "n_nodes", n_nodes)
    if len(shape) == 4 and shape[2] % n_nodes:
        raise ValueError(f"loads has {shape[2]} sources, allowed is a multiple of n_nodes = {n_nodes}")
    refresh, window = whole_number("refresh", refresh, 0), whole_number("window", window, 1)
    warmup = (refresh or window) if warmup is None else whole_number("warmup", warmup, 1)
    if n_batches <= warmup:
        raise ValueError(
            f"loads has {n_batches} batches, allowed are {warmup + 1} or more: the first {warmup} are history for the "
            "first placement"
        )
    name = "own" if callable(policy) else str(policy)
    setting = Setting(
        name, split, n_ranks, n_logical, n_physical, group_size, n_nodes, refresh, window, checked_solver(solver)
    )
    return setting, list(range(warmup, n_batches, refresh)) if refresh else [warmup]


def _checked_placements(placed: object, setting: Setting, n_layers: int) -> list[Placement]:
    if not isinstance(placed, list) or len(placed) != n_layers:
        raise TypeError(f"policy returned {seen(placed)}, allowed is a list of {n_layers} placements, one per layer")
    for placement in placed:
        if not isinstance(placement, Placement):
            raise TypeError(f"policy returned a list with {seen(placement)}, allowed is an lplb.Placement")
        found = placement.n_ranks, placement.n_logical, placement.n_physical
        if found != (setting.n_ranks, setting.n_logical, setting.n_physical):
            raise ValueError(
                f"policy returned a placement of {found} (ranks, experts, slots), allowed is "
                f"{(setting.n_ranks, setting.n_logical, setting.n_physical)}"
            )
    return placed


def _checked_seconds(seconds: object, n: int) -> _Floats:
    values = np.asarray(seconds, dtype=np.float64)
    if values.shape != (n,):
        raise ValueError(f"layer_seconds returned shape {list(values.shape)}, allowed is one per batch, [{n}]")
    return values


# ---- batches


def _moved(old: Placement, new: Placement) -> int:
    """Slots of ``new`` whose rank did not have their expert; in which of its slots a rank has one does not matter."""
    had, has = (_key(p.rank_of, p.phy2log, p.n_logical) for p in (old, new))
    return int(np.isin(has, had, invert=True).sum())


def _key(rows: torch.Tensor, experts: torch.Tensor, n_logical: int) -> _Ints:
    key: _Ints = rows.numpy().astype(np.int64) * n_logical + experts.numpy()
    return key


def _by_node(sources: npt.NDArray[Any], n_nodes: int) -> _Ints:
    n_batches, n_layers, n_sources, n_logical = sources.shape
    nodes = sources.reshape(n_batches, n_layers, n_nodes, n_sources // n_nodes, n_logical)
    counts: _Ints = nodes.sum(3, dtype=np.int64)
    return counts


class _Run:
    """The arrays of a simulation while they are filled."""

    def __init__(
        self, setting: Setting, counts: _Ints, by_node: _Ints | None, first: int, layer_seconds: LayerSeconds | None
    ) -> None:
        self.setting, self.counts, self.by_node, self.first = setting, counts, by_node, first
        self.model = layer_seconds
        shape = len(counts) - first, counts.shape[1]
        self.rank_load = np.zeros((*shape, setting.n_ranks), dtype=np.int64)
        self.lower_bound, self.gap = np.zeros(shape), np.zeros(shape)
        self.iterations = np.zeros(shape, dtype=np.int32)
        self.solved = np.zeros(shape, dtype=bool)
        self.cross_node = None if by_node is None else np.zeros(shape, dtype=np.int64)
        self.seconds = None if layer_seconds is None else np.zeros(shape)

    def batches(self, begin: int, end: int, placements: Sequence[Placement]) -> None:
        """Plan batches ``begin`` to ``end`` of every layer."""
        s = self.setting
        rows = slice(begin - self.first, end - self.first)
        for layer, placement in enumerate(placements):
            loads = np.ascontiguousarray(self.counts[begin:end, layer])
            planner = Planner.from_placement(placement, group_size=s.group_size, solver=s.solver)
            plan = planner.solve(torch.from_numpy(loads))
            quota = plan.quota.numpy().astype(np.int64) if s.split == "lp" else split_evenly(placement, loads)
            load = quota.reshape(len(loads), s.n_ranks, -1).sum(2)
            bound = plan.lower_bound.amax(-1).numpy()
            _check(placement, loads, quota, load, bound)
            if s.split == "lp" and not np.array_equal(load, plan.rank_load.numpy()):
                raise CheckFailed(f"batches {begin} to {end - 1}, layer {layer}: quotas do not give the rank loads")
            self.rank_load[rows, layer] = load
            self.lower_bound[rows, layer] = bound
            self.iterations[rows, layer] = plan.iterations.amax(-1).numpy()
            self.gap[rows, layer] = plan.gap.amax(-1).numpy()
            self.solved[rows, layer] = (plan.status == int(SolveStatus.SOLVED)).all(-1).numpy()
            if self.by_node is not None and self.cross_node is not None:
                self.cross_node[rows, layer] = _cross_node(placement, self.by_node[begin:end, layer], quota)
            if self.seconds is not None and self.model is not None:
                self.seconds[rows, layer] = _checked_seconds(self.model(quota, placement), len(loads))

    def result(self, at: list[int], moved: _Ints, expert_bytes: int, placements: list[list[Placement]]) -> Simulation:
        """What has been filled."""
        return Simulation(
            self.setting,
            self.first,
            self.rank_load,
            self.lower_bound,
            self.iterations,
            self.gap,
            self.solved,
            self.cross_node,
            self.seconds,
            at,
            moved,
            expert_bytes,
            placements,
        )


def _check(placement: Placement, loads: _Ints, quota: _Ints, rank_load: _Ints, bound: _Floats) -> None:
    """Check that experts' copies serve their tokens, none is negative, and no busiest rank is below its bound."""
    experts = placement.phy2log.numpy()
    order = np.argsort(experts, kind="stable")
    starts = np.searchsorted(experts[order], np.arange(placement.n_logical))
    served = np.add.reduceat(quota[:, order], starts, axis=1)
    wrong = np.argwhere(served != loads)
    if len(wrong):
        b, e = wrong[0].tolist()
        raise CheckFailed(f"expert {e} has {loads[b, e]} tokens, its copies serve {served[b, e]}")
    if quota.min() < 0:
        raise CheckFailed(f"a slot serves {quota.min()} tokens")
    below = np.flatnonzero(bound > rank_load.max(-1))
    if below.size:
        b = below[0]
        raise CheckFailed(f"the busiest rank has {rank_load[b].max()} tokens, below the certified bound {bound[b]}")


def _cross_node(placement: Placement, by_node: _Ints, quota: _Ints) -> _Ints:
    """The fewest tokens that quotas ``[n, n_physical]`` let leave their node, ``[n]``.

    A node's copies of an expert together take as many of its tokens as there are and as they have quota for.
    """
    ranks_per_node = placement.n_ranks // by_node.shape[1]
    key = _key(placement.rank_of // ranks_per_node, placement.phy2log, placement.n_logical)
    order = np.argsort(key, kind="stable")
    kinds, starts = np.unique(key[order], return_index=True)
    wanted = np.add.reduceat(quota[:, order], starts, axis=1)
    there = by_node.reshape(len(by_node), -1)[:, kinds]
    stays: _Ints = np.minimum(wanted, there).sum(1)
    return np.asarray(quota.sum(1) - stays)
