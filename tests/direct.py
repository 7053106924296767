"""`lplb._C.CpuPlanner` itself, with NumPy arrays: traffic costs without the planner around them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from cases import INT_ARRAY
from numpy.typing import ArrayLike, NDArray

from lplb import _C


@dataclass(frozen=True, eq=False)
class DirectPlan:
    """What a solve fills, in the order that it wants the addresses in."""

    quota: NDArray[np.int32]
    rank_load: INT_ARRAY
    max_load: INT_ARRAY
    lower_bound: NDArray[np.float64]
    gap: NDArray[np.float64]
    iterations: NDArray[np.int32]
    status: NDArray[np.int32]

    @property
    def objective(self) -> NDArray[np.float64]:
        """Of the fractional solution, per group."""
        objective: NDArray[np.float64] = self.lower_bound * (1 + self.gap)
        return objective

    def addresses(self) -> list[int]:
        return [getattr(self, field.name).ctypes.data for field in fields(self)]

    def bits(self) -> bytes:
        return b"".join(getattr(self, field.name).tobytes() for field in fields(self))


class DirectPlanner:
    """A placement compiled for the CPU; nothing is checked."""

    def __init__(
        self, phy2log: ArrayLike, n_logical: int, n_ranks: int, group_size: int, rank_speed: ArrayLike | None = None
    ) -> None:
        self._n_logical = n_logical
        self.n_physical, self.n_ranks, self.n_groups = np.size(phy2log), n_ranks, n_ranks // group_size
        speed = np.ones(n_ranks) if rank_speed is None else np.asarray(rank_speed, dtype=np.float64)
        slots = np.asarray(phy2log).tolist()
        self._planner = _C.CpuPlanner(slots, n_logical, n_ranks, group_size, speed.tolist(), 1)
        self.log = np.zeros((self.n_groups, _C.max_iterations + 1, len(_C.log_fields)))

    def _empty_plan(self) -> DirectPlan:
        groups = self.n_groups
        return DirectPlan(
            quota=np.full(self.n_physical, -1, dtype=np.int32),
            rank_load=np.full(self.n_ranks, -1, dtype=np.int64),
            max_load=np.full(groups, -1, dtype=np.int64),
            lower_bound=np.full(groups, np.nan),
            gap=np.full(groups, np.nan),
            iterations=np.full(groups, -1, dtype=np.int32),
            status=np.full(groups, -1, dtype=np.int32),
        )

    def solve(self, loads: INT_ARRAY) -> DirectPlan:
        """By the interior point, without costs; loads [n_logical]."""
        plan = self._empty_plan()
        self._planner.solve(loads.ctypes.data, 1, (0, 0, 1, 0), 0, 0, plan.addresses(), 0, 1)
        return plan

    def solve_traffic(self, counts: NDArray[np.int32], ranks_per_node: int, weight: float) -> DirectPlan:
        """Counts int32 [n_ranks, at least n_logical], rows one after the other. Fills `log` too."""
        plan = self._empty_plan()
        self.log[:] = 0
        columns = counts.strides[0] // counts.itemsize
        loads = counts[:, : self._n_logical].sum(axis=0, dtype=np.int64)
        table = counts.ctypes.data, columns, self.n_ranks, ranks_per_node
        solved = self._planner.solve_traffic(
            loads.ctypes.data, table, 0, weight, plan.addresses(), self.log.ctypes.data
        )
        assert solved == np.count_nonzero(plan.status == 0)
        return plan
