"""What a solve returns: whole-token quotas and the certificate that they are the best there are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from lplb import _C

__all__ = ["Plan", "SolveStatus"]

SOLVERS = {"ipm": 0, "flow": 1}
"""The solvers by name, as the backend numbers them."""

_SENTENCES = (
    "The plan is within the gap tolerance of the lower bound, or its whole-token maximum is the least there is.",
    "The interior point stopped at its iteration limit; the plan is feasible, and its gap says how far it may be off.",
    "The solver met the limits of float64; the plan is feasible, and its gap says how far it may be off.",
)


class SolveStatus(IntEnum):
    """How the solve of one group ended."""

    SOLVED = 0
    ITERATION_LIMIT = 1
    NUMERICAL = 2

    @property
    def sentence(self) -> str:
        """What the value means, in one sentence."""
        return _SENTENCES[self]


@dataclass(frozen=True, eq=False)
class Plan:
    """The plan for one load, or for a batch of loads (every tensor then has a leading batch dimension).

    All tensors are on the planner's device and belong to the plan: later solves do not change them. On CUDA they are
    filled in the order of the stream that was current, and reading one waits as with any other tensor.
    """

    quota: torch.Tensor
    """Tokens for each physical expert, int32 ``[..., n_physical]``."""
    rank_load: torch.Tensor
    """Tokens on each rank, int64 ``[..., ep_size]``."""
    max_load: torch.Tensor
    """Tokens on the busiest rank of each group, int64 ``[..., n_group]``; with rank speeds the largest
    load / speed, rounded up."""
    lower_bound: torch.Tensor
    """No split of these loads has a smaller fractional maximum: float64 ``[..., n_group]``, tokens (per unit of
    speed)."""
    gap: torch.Tensor
    """(fractional maximum before rounding - lower_bound) / lower_bound, float64 ``[..., n_group]``."""
    iterations: torch.Tensor
    """Interior-point steps, or cuts of the flow solver, int32 ``[..., n_group]``."""
    status: torch.Tensor
    """`SolveStatus` values, int32 ``[..., n_group]``."""
    solver: str
    """``"ipm"`` or ``"flow"``."""

    @property
    def solved(self) -> bool:
        """Whether every group of every load was solved."""
        return bool((self.status == int(SolveStatus.SOLVED)).all())

    @property
    def imbalance(self) -> torch.Tensor:
        """Largest over mean rank load, float64 ``[...]``, at least 1; 1 without tokens. Speeds do not enter."""
        load = self.rank_load.double()
        mean = load.mean(-1)
        return torch.where(mean > 0, load.amax(-1) / mean.clamp_min(1e-300), torch.ones_like(mean))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, in the order of the fields."""
        return (
            self.quota,
            self.rank_load,
            self.max_load,
            self.lower_bound,
            self.gap,
            self.iterations,
            self.status,
        )

    def addresses(self) -> list[int]:
        """Where the tensors are, for the backend to fill them."""
        return [tensor.data_ptr() for tensor in self.tensors()]

    def copy(self) -> "Plan":
        """Return a plan that shares no memory with this one."""
        return replace(self, **{name: value.clone() for name, value in vars(self).items() if name != "solver"})

    def cpu(self) -> "Plan":
        """Return the plan on the CPU; waits for a CUDA device. Shares memory with a plan that is there already."""
        return replace(self, **{name: value.cpu() for name, value in vars(self).items() if name != "solver"})

    def __str__(self) -> str:
        """One line: size, solver, worst imbalance and gap, status."""
        n_loads = self.rank_load.numel() // self.rank_load.shape[-1]
        if n_loads == 0:
            return f"Plan(0 loads on {self.rank_load.shape[-1]} ranks, {self.solver})"
        status = ", ".join(SolveStatus(s).name.lower() for s in sorted(set(self.status.flatten().tolist())))
        return (
            f"Plan({n_loads} load{'s' * (n_loads != 1)} on {self.rank_load.shape[-1]} ranks, {self.solver}: "
            f"imbalance {float(self.imbalance.max()):.4f}, gap {float(self.gap.max()):.1e}, {status})"
        )


def empty_plan(
    batch: Sequence[int], n_physical: int, n_ranks: int, n_groups: int, solver: str, device: torch.device
) -> Plan:
    """Return a plan of zeros for the backend to fill."""

    def zeros(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(*batch, columns, dtype=dtype, device=device)

    return Plan(
        quota=zeros(n_physical, torch.int32),
        rank_load=zeros(n_ranks, torch.int64),
        max_load=zeros(n_groups, torch.int64),
        lower_bound=zeros(n_groups, torch.float64),
        gap=zeros(n_groups, torch.float64),
        iterations=zeros(n_groups, torch.int32),
        status=zeros(n_groups, torch.int32),
        solver=solver,
    )


def checked_solver(solver: str) -> str:
    """Return the solver's name, or refuse it."""
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, allowed is 'ipm' or 'flow'")
    return solver


def report(size: str, backend: str, tokens: int, plan: Plan, log: torch.Tensor | None) -> str:
    """Return problem, settings and one iteration table per group, as ``verbose`` prints them.

    Args:
        size: the problem's size in words.
        backend: the backend's name.
        tokens: tokens in all loads.
        plan: what came out, on the CPU.
        log: the backend's rows, float64 ``[n_group, max_iterations + 1, len(log_fields)]``, for a single load;
            ``None`` for a batch, which gets a summary only.
    """
    lines = [
        f"lplb: {size}; {tokens} tokens",
        f"      solver {plan.solver}, gap tolerance {_C.gap_tolerance:g}, at most {_C.max_iterations} iterations, "
        f"{backend}",
    ]
    if log is None:
        return "\n".join([*lines, f"      {plan}"])
    for group, rows in enumerate(log.tolist()):
        steps = int(plan.iterations[group])
        if any(rows[0]):
            lines.append("group  it    objective        bound       gap        mu  primal step  dual step")
            for i, (objective, bound, gap, mu, primal, dual) in enumerate(rows[: steps + 1]):
                moved = f"{primal:13.4f}{dual:11.4f}" if i < steps else ""
                lines.append(f"{group:5d}{i:4d}{objective:13.6f}{bound:13.6f}{gap:10.1e}{mu:10.1e}{moved}")
        kind = "iterations" if plan.solver == "ipm" else "cuts"
        lines.append(
            f"group {group}: busiest rank {int(plan.max_load[group])} tokens, "
            f"lower bound {float(plan.lower_bound[group]):.3f}, gap {float(plan.gap[group]):.1e}, {steps} {kind}. "
            f"{SolveStatus(int(plan.status[group])).sentence}"
        )
    return "\n".join(lines)
