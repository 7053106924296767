"""``mindiesd.eplb.collector``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lplb.compat.mindie.names import either
from lplb.dynamic.collector import LoadCollector

__all__ = ["ExpertLoadCollector"]


class ExpertLoadCollector(LoadCollector):
    """The loads of one layer: a `LoadCollector` that also has MindIE-SD's names.

    A `Rebalancer` reads the rows of the last ``window * lb_interval`` passes; `get_expert_load` and `reset` leave them
    as they are.

    Args:
        expert_num: logical experts.
        lb_interval: passes in a row of loads; a cycle begins when some rows have come together, see ``interval`` of
            `lplb.dynamic.Rebalancer`.
        routed_expert_num: the same as ``expert_num``, as MindIE-SD's code calls it.
        window: as for `LoadCollector`.
        phases: as for `LoadCollector`.
        device: as for `LoadCollector`.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """

    def __init__(
        self,
        expert_num: int | None = None,
        lb_interval: int = 1,
        *,
        routed_expert_num: int | None = None,
        window: int = 64,
        phases: Sequence[str] | Mapping[str, range] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """See the class."""
        n_logical = either("expert_num", expert_num, "routed_expert_num", routed_expert_num)
        super().__init__(n_logical, lb_interval, window=window, phases=phases, device=device)
        self._told = 0, torch.zeros(self.n_logical, dtype=torch.int64)

    @property
    def routed_expert_num(self) -> int:
        """Logical experts."""
        return self.n_logical

    @property
    def lb_interval(self) -> int:
        """Passes in a row of loads."""
        return self.interval

    def collect_expert_load(
        self,
        expanded_indices: Tensor | None = None,
        phase: str | int | None = None,
        *,
        indices_expert: Tensor | None = None,
    ) -> None:
        """Count a pass; as `collect`, which says what is raised.

        Args:
            expanded_indices: the logical expert of every row that is sent to experts, in any order, such as
                ``npu_moe_init_routing`` returns them.
            phase: as for `collect`.
            indices_expert: the same as ``expanded_indices``, as MindIE-SD's code calls it.
        """
        self.collect(either("expanded_indices", expanded_indices, "indices_expert", indices_expert), phase)

    def get_expert_load(self) -> Tensor:
        """Return the tokens of each expert since the last call, or `reset`; waits for the device.

        For the thread that runs the model. If more than ``window`` rows have become complete since then, those of the
        last ``window``, and what the open row has.

        Returns:
            int64 ``[expert_num]`` on the CPU, the caller's own.
        """
        clock, rows, opened = self._read()
        before, told = self._told
        new = rows[max(0, len(rows) - (clock - before)) :]
        load = new.sum((0, 1)) + opened
        if len(new) == clock - before:  # what was told of the row that was open then is in the first of them
            load -= told
        self._told = clock, opened
        return load

    def reset(self) -> None:
        """Let `get_expert_load` begin anew; waits for the device."""
        clock, _, opened = self._read()
        self._told = clock, opened

    def _read(self) -> tuple[int, Tensor, Tensor]:
        """The clock, complete rows, and the tokens of each expert in the open one."""
        state = self.state_dict()
        return state["clock"], state["rows"], state["open"].sum(0)
