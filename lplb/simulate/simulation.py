"""What a simulation of one configuration returns: every batch's rank loads and certificate, and a summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lplb.placement import Placement

__all__ = ["PhaseMeans", "Setting", "Simulation", "Summary"]

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """One configuration."""

    policy: str
    """``"none"``, a policy of `lplb.policies`, a topology's name, or ``"own"`` for a caller's function."""
    split: str
    """``"lp"`` or ``"even"``."""
    n_ranks: int
    """Ranks."""
    n_logical: int
    """Logical experts."""
    n_physical: int
    """Slots on all ranks."""
    group_size: int
    """Consecutive ranks that balance among themselves."""
    n_nodes: int
    """Nodes of consecutive ranks."""
    refresh: int
    """Batches from one placement to the next; 0: placed once."""
    window: int
    """Batches before it that a placement is made from."""
    solver: str
    """``"ipm"`` or ``"flow"``."""

    @property
    def name(self) -> str:
        """Policy and split, as tables show them: ``"eplb / lp"``."""
        return "none" if self.policy == "none" else f"{self.policy} / {self.split}"


@dataclass(frozen=True)
class Summary:
    """A simulation in a few numbers, over all counted batches and layers."""

    imbalance_mean: float
    """Busiest rank's tokens over the mean of all ranks: the mean,"""
    imbalance_p99: float
    """its 99th percentile,"""
    imbalance_max: float
    """and the largest."""
    bound_mean: float
    """The certified lower bound on this placement, over the mean of all ranks; mean. No split can have a lower mean
    imbalance."""
    balancedness: float
    """Mean over busiest, averaged; 1 is perfect. What serving engines print."""
    cross_node_share: float | None
    """Share of tokens (each once for each of its experts) that go to another node than theirs; None: not known."""
    slots_moved: int
    """Slots that a new placement filled with an expert which their rank did not have before; all refreshes, all layers.
    The first placement is not counted."""
    moved_bytes: int
    """The same in bytes."""
    refreshes: int
    """Placements after the first."""
    layer_seconds_mean: float | None
    """Modelled time of a layer; None: not asked for."""
    iterations_mean: float
    """Solver's steps (interior point) or cuts (flow), of the balance group with most: the mean,"""
    iterations_max: int
    """and the most."""
    gap_max: float
    """The largest certified gap of a solve."""
    unsolved: int
    """Solves that did not end as solved."""


class PhaseMeans(NamedTuple):
    """A simulation's imbalance over the batches of one phase, all layers."""

    batches: int
    """How many batches."""
    imbalance_mean: float
    """As in `Summary`, here and below."""
    imbalance_p99: float
    """Of these batches."""
    bound_mean: float
    """Of these batches."""


@dataclass(frozen=True, eq=False)
class Simulation:
    """What came out of one configuration; arrays are of the counted batches, ``first`` and later."""

    setting: Setting
    """The configuration."""
    first: int
    """Which batch of the loads is the first that is counted; before it there was no history."""
    rank_load: _Ints
    """Tokens on each rank, ``[batches, layers, ranks]``."""
    lower_bound: _Floats
    """No split over this placement has a smaller busiest rank: tokens, ``[batches, layers]``."""
    iterations: npt.NDArray[np.int32]
    """Steps or cuts of the solve, of the balance group with most, ``[batches, layers]``."""
    gap: _Floats
    """The largest certified gap of the balance groups, ``[batches, layers]``."""
    solved: npt.NDArray[np.bool_]
    """Whether all groups were solved, ``[batches, layers]``."""
    cross_node: _Ints | None
    """Tokens that go to another node, ``[batches, layers]``: the fewest that the split's quotas allow, which is what
    the source-aware split has. None where the loads do not say where tokens come from."""
    layer_seconds: _Floats | None
    """Modelled time, ``[batches, layers]``, where it was asked for."""
    placed_at: list[int]
    """The batches of the loads before which experts were placed, the first of them ``first``."""
    slots_moved: _Ints
    """Slots that each of these filled with an expert new to their rank, ``[len(placed_at), layers]``; the first: 0."""
    expert_bytes: int
    """Bytes that one moved slot costs."""
    placements: list[list[Placement]] = field(repr=False)
    """The placements, by refresh and layer."""

    @cached_property
    def max_load(self) -> _Ints:
        """Tokens on the busiest rank, ``[batches, layers]``."""
        most: _Ints = self.rank_load.max(-1)
        return most

    @cached_property
    def mean_load(self) -> _Floats:
        """Tokens on a rank on average, ``[batches, layers]``."""
        mean: _Floats = self.rank_load.mean(-1)
        return mean

    @cached_property
    def imbalance(self) -> _Floats:
        """Busiest over mean, ``[batches, layers]``; 1 without tokens."""
        return self._over_mean(self.max_load.astype(np.float64))

    @cached_property
    def bound_imbalance(self) -> _Floats:
        """Certified lower bound over mean, ``[batches, layers]``; 1 without tokens."""
        return self._over_mean(self.lower_bound)

    def _over_mean(self, load: _Floats) -> _Floats:
        return np.divide(load, self.mean_load, out=np.ones_like(load), where=self.mean_load > 0)

    @cached_property
    def summary(self) -> Summary:
        """The few numbers that tables show."""
        tokens = int(self.rank_load.sum())
        moved = int(self.slots_moved.sum())
        return Summary(
            imbalance_mean=float(self.imbalance.mean()),
            imbalance_p99=float(np.percentile(self.imbalance, 99)),
            imbalance_max=float(self.imbalance.max()),
            bound_mean=float(self.bound_imbalance.mean()),
            balancedness=float((1 / self.imbalance).mean()),
            cross_node_share=None if self.cross_node is None else int(self.cross_node.sum()) / max(tokens, 1),
            slots_moved=moved,
            moved_bytes=moved * self.expert_bytes,
            refreshes=len(self.placed_at) - 1,
            layer_seconds_mean=None if self.layer_seconds is None else float(self.layer_seconds.mean()),
            iterations_mean=float(self.iterations.mean()),
            iterations_max=int(self.iterations.max()),
            gap_max=float(self.gap.max()),
            unsolved=int((~self.solved).sum()),
        )

    def by_phase(self, phase: Sequence[str]) -> dict[str, PhaseMeans]:
        """Return the imbalance by what batches are made of, in the order in which that first comes.

        Args:
            phase: of every batch of the loads.

        Raises:
            ValueError: there are more counted batches than phases.
        """
        counted = np.array(list(phase[self.first : self.first + len(self.rank_load)]), dtype=object)
        if len(counted) < len(self.rank_load):
            raise ValueError(
                f"phase has {len(phase)} entries, allowed is one per batch, {self.first + len(self.rank_load)}"
            )
        means = {}
        for name in dict.fromkeys(counted):
            of = self.imbalance[counted == name]
            bound = self.bound_imbalance[counted == name]
            means[name] = PhaseMeans(len(of), float(of.mean()), float(np.percentile(of, 99)), float(bound.mean()))
        return means

    def row(self) -> dict[str, Any]:
        """Setting and summary as one flat row."""
        return {**asdict(self.setting), "expert_bytes": self.expert_bytes, **asdict(self.summary)}
