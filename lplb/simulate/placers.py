"""The policies of a simulation: functions from load history to one placement per layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from lplb import topology
from lplb.arguments import check_divides
from lplb.change import plan_change
from lplb.placement import Placement
from lplb.planner import Planner
from lplb.policies import POLICIES, place
from lplb.relabel import relabel
from lplb.simulate.simulation import Setting

__all__ = ["CHANGE", "NAMES", "TOPOLOGIES", "Placer", "placer", "topology_by_name"]

TOPOLOGIES = ("cube", "hypercube", "torus", "ring", "circulant")
CHANGE = "lp-change"
"""Placed for the LP once; from then on the few moves that `lplb.plan_change` finds worth making."""

NAMES = ("none", *POLICIES, CHANGE, *TOPOLOGIES)
"""Every policy that has a name."""

_Ints = npt.NDArray[np.int64]
Placer = Callable[[_Ints], list[Placement]]
"""From history, int64 ``[layers, batches, n_logical]``, to one placement per layer."""


def topology_by_name(name: str, group_size: int, n_redundant: int, ranks_per_node: int = 1) -> torch.Tensor:
    """Return a topology for a balance group: int32 ``[group_size, classes]``, ``classes`` dividing ``n_redundant``.

    ``"cube"`` is for 8 ranks, ``"hypercube"`` for 16, ``"torus"`` the squarest for any product of two numbers, all with
    2 classes; ``"ring"`` has one. ``"circulant"`` has ``n_redundant`` classes, its shifts spread over those that
    leave the original's node, or over all where those do not suffice.

    Args:
        name: one of `TOPOLOGIES`.
        group_size: ranks of the group.
        n_redundant: redundant slots per rank, 1 or more.
        ranks_per_node: consecutive ranks of a node.

    Raises:
        ValueError: there is no such topology of that size.
    """
    if name not in TOPOLOGIES:
        raise ValueError(f"topology is {name!r}, allowed are {', '.join(map(repr, TOPOLOGIES))}")
    sizes = {"cube": 8, "hypercube": 16}
    if group_size != sizes.get(name, group_size):
        raise ValueError(f"policy {name!r} has balance groups of {group_size} ranks, allowed are {sizes[name]}")
    n = group_size
    if name == "circulant":
        r2o = topology.circulant(n, *_shifts(n, n_redundant, ranks_per_node))
    elif name == "torus":
        rows = max((m for m in range(2, int(n**0.5) + 1) if n % m == 0), default=0)
        if not rows:
            raise ValueError(f"policy 'torus' has balance groups of {n} ranks, allowed are products of two numbers")
        r2o = topology.torus(rows, n // rows)
    else:
        r2o = {"cube": topology.cube, "hypercube": topology.hypercube}.get(name, lambda: topology.ring(n))()
    classes = r2o.shape[1]
    if n_redundant < 1 or n_redundant % classes:
        raise ValueError(
            f"policy {name!r} has {n_redundant} redundant slots per rank, allowed is a multiple of {classes}"
        )
    return r2o


def _shifts(n: int, classes: int, ranks_per_node: int) -> list[int]:
    """Shifts by the golden ratio, which are far from one another and from one another's negatives."""
    near = ranks_per_node if n - 2 * ranks_per_node + 1 >= classes else 1
    free = list(range(near, n - near + 1))
    if not 1 <= classes <= len(free):
        raise ValueError(
            f"policy 'circulant' has {classes} redundant slots per rank, allowed are 1 to {len(free)} in balance "
            f"groups of {n} ranks"
        )
    shifts = []
    for k in range(1, classes + 1):
        wanted = near + (k * 0.6180339887498949 % 1) * (n - 2 * near)
        nearest = min(free, key=lambda shift: abs(shift - wanted))
        free.remove(nearest)
        shifts.append(nearest)
    return shifts


def placer(setting: Setting, n_groups: int) -> Placer:
    """Return a setting's policy as a function from history to placements.

    What the policies of `lplb.place` make anew is relabelled onto what they placed before (`lplb.relabel`): they do not
    choose which rank holds what, and nobody would move experts for a name.

    Args:
        setting: the configuration.
        n_groups: as for `lplb.place`.

    Raises:
        ValueError: the policy's topology does not fit.
    """
    s = setting
    if s.policy == CHANGE and s.split != "lp":
        raise ValueError(f"policy is {CHANGE!r} with split {s.split!r}, allowed is split 'lp', which it is for")
    if s.policy == "none":
        return lambda history: [Placement(np.arange(s.n_logical), s.n_ranks)] * len(history)
    if s.policy in TOPOLOGIES:
        check_divides("n_logical", s.n_logical, "n_ranks", s.n_ranks)
        redundant = (s.n_physical - s.n_logical) // s.n_ranks
        r2o = topology_by_name(s.policy, s.group_size, redundant, s.n_ranks // s.n_nodes)
        planner = Planner(r2o, s.n_physical, s.n_logical, s.n_ranks, ranks_per_node=s.n_ranks // s.n_nodes)

        def remap(history: _Ints) -> list[Placement]:
            placed = []
            for layer in _nowhere_empty(history):
                planner.update_redundancy_mapping(torch.from_numpy(layer.sum(0)))
                placed.append(planner.placement)
            return placed

        return remap

    def by_policy(history: _Ints) -> list[Placement]:
        placed = place(
            _nowhere_empty(history),
            n_ranks=s.n_ranks,
            n_physical=s.n_physical,
            policy="lp" if s.policy == CHANGE else s.policy,
            group_size=s.group_size,
            n_groups=n_groups,
            n_nodes=s.n_nodes,
            fallback=s.split,
            threads=torch.get_num_threads() if s.policy == "lp" else 1,  # the others take less than waking them
        )
        assert isinstance(placed, list)
        return placed

    return _changing(setting, n_groups, by_policy) if s.policy == CHANGE else _relabelled(setting, by_policy)


def _relabelled(setting: Setting, anew: Placer) -> Placer:
    """Return a policy whose placements leave as many experts where they were as new names of ranks can."""
    per_node = setting.n_ranks // setting.n_nodes
    if setting.group_size % per_node and per_node % setting.group_size:
        return anew  # ranks of which neither nodes nor groups are whole have no other names
    current: list[Placement] = []

    def place_anew(history: _Ints) -> list[Placement]:
        nonlocal current
        placed = anew(history)
        if current:
            placed = [
                relabel(old, new, group_size=setting.group_size, n_nodes=setting.n_nodes)
                for old, new in zip(current, placed, strict=True)
            ]
        current = placed
        return placed

    return place_anew


def _changing(setting: Setting, n_groups: int, first: Placer) -> Placer:
    """Return a policy that places once and then changes what is there."""
    n_nodes = 1 if n_groups % setting.n_nodes else setting.n_nodes  # node-limited routing keeps experts on their node
    current: list[Placement] = []

    def change(history: _Ints) -> list[Placement]:
        nonlocal current
        if not current:
            current = first(history)
        else:
            changes = plan_change(
                current,
                _nowhere_empty(history),
                group_size=setting.group_size,
                n_nodes=n_nodes,
            )
            assert isinstance(changes, list)
            current = [change.placement for change in changes]
        return current

    return change


def _nowhere_empty(history: _Ints) -> _Ints:
    """History in which a layer without any token counts as uniform."""
    empty = history.sum((1, 2)) == 0
    return np.where(empty[:, None, None], 1, history) if empty.any() else history
