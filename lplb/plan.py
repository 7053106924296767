"""What a solve returns: whole-token quotas and the certificate that they are the best there are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from lplb import _C

__all__ = ["Plan", "SolveStatus", "Traffic"]

SOLVERS = {"ipm": 0, "flow": 1}
"""The solvers by name, as the backend numbers them."""

SPLITS = {"plain": 0, "local_first": 1}
"""How source ranks share out the quotas, by name, as the backend numbers them."""

_SENTENCES = (
    "The plan is within the gap tolerance of the lower bound, or its whole-token maximum is the least there is.",
    "The interior point stopped at its iteration limit; the plan is feasible, and its gap says how far it may be off.",
    "The solver met the limits of float64; the plan is feasible, and its gap says how far it may be off.",
    "The group had fewer tokens than min_tokens: they take the fixed split, own rank first, then own node.",
    "A rank's input was refused on a CUDA device: the plan is of no batch, and tokens take the fixed split.",
)


class SolveStatus(IntEnum):
    """How the solve of one group ended."""

    SOLVED = 0
    ITERATION_LIMIT = 1
    NUMERICAL = 2
    SKIPPED = 3
    REFUSED = 4

    @property
    def sentence(self) -> str:
        """What the value means, in one sentence."""
        return _SENTENCES[self]


@dataclass(frozen=True)
class Rules:
    """Where the experts are, and how source ranks share out the quotas of a plan."""

    phy2log: tuple[int, ...]
    """Logical expert of each slot."""
    n_ranks: int
    """Ranks; each holds as many slots."""
    group_size: int
    """Consecutive ranks that balance among themselves."""
    ranks_per_node: int
    """Consecutive ranks of a node; 0 where the tokens are of no rank in particular."""
    split: str
    """``"plain"`` or ``"local_first"``."""


class Traffic(NamedTuple):
    """How far a batch travels under a plan, over all ranks; a token counts once for each of its experts."""

    stay: int
    """Tokens on the rank that they come from."""
    cross_ranks: int
    """Tokens that go to another rank of their node."""
    cross_nodes: int
    """Tokens that go to another node."""


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
    speed). With a ``traffic_weight``, no smaller sum of maximum and cost."""
    gap: torch.Tensor
    """(fractional maximum, or sum, before rounding - lower_bound) / lower_bound, float64 ``[..., n_group]``."""
    iterations: torch.Tensor
    """Interior-point steps, or cuts of the flow solver, int32 ``[..., n_group]``."""
    status: torch.Tensor
    """`SolveStatus` values, int32 ``[..., n_group]``."""
    solver: str
    """``"ipm"`` or ``"flow"``."""
    rules: Rules
    """The placement that the plan is for, and how sources share out its quotas."""
    counts: torch.Tensor | None = None
    """Tokens per source rank and logical expert, int32 ``[ep_size, n_logical]``; ``None`` where only loads were given,
    or tokens of no rank in particular."""

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

    def tokens_by_source(self) -> torch.Tensor:
        """Tokens that each source rank sends to each physical expert: int32 ``[ep_size, n_physical]``, on the CPU.

        Rows add up to `counts`, columns to `quota`. Waits for a CUDA device.

        Raises:
            ValueError: the plan does not know its sources.
        """
        if self.counts is None:
            raise ValueError("the plan has no counts, allowed is one of a planner with a group, from run or last_plan")
        plan, rules = self.cpu(), self.rules
        counts = plan.counts
        assert counts is not None
        n_ranks, n_logical = counts.shape
        planner = _C.CpuPlanner(rules.phy2log, n_logical, n_ranks, rules.group_size, [1.0] * n_ranks, 1)
        tokens = torch.zeros(n_ranks, len(rules.phy2log), dtype=torch.int32, device="cpu")
        table = counts.data_ptr(), counts.stride(0), n_ranks, rules.ranks_per_node
        addresses = plan.quota.data_ptr(), plan.status.data_ptr(), tokens.data_ptr()
        planner.tokens_by_source(table, SPLITS[rules.split], *addresses)
        return tokens

    def traffic(self, *, replicated_only: bool = False) -> Traffic:
        """How many tokens stay on their rank, cross ranks within their node, and cross nodes.

        Args:
            replicated_only: only tokens of experts that have a choice, those with two or more slots.

        Raises:
            ValueError: the plan does not know its sources.
        """
        tokens = self.tokens_by_source().long()
        n_ranks = self.rules.n_ranks
        rank_of = torch.arange(tokens.shape[1], device="cpu") * n_ranks // tokens.shape[1]
        if replicated_only:
            experts = torch.tensor(self.rules.phy2log, device="cpu")
            chosen = experts.bincount()[experts] > 1
            tokens, rank_of = tokens[:, chosen], rank_of[chosen]
        source = torch.arange(n_ranks, device="cpu")[:, None]
        node = self.rules.ranks_per_node
        stay = int(tokens[source == rank_of].sum())
        near = int(tokens[source // node == rank_of // node].sum())
        return Traffic(stay, near - stay, int(tokens.sum()) - near)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a solve fills, in the order of the fields."""
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
        return self._with(torch.clone)

    def cpu(self) -> "Plan":
        """Return the plan on the CPU; waits for a CUDA device. Shares memory with a plan that is there already."""
        return self._with(torch.Tensor.cpu)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Plan":
        changed: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **changed)

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


def empty_plan(batch: Sequence[int], rules: Rules, solver: str, device: torch.device) -> Plan:
    """Return a plan of zeros for the backend to fill."""
    n_groups = rules.n_ranks // rules.group_size

    def zeros(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(*batch, columns, dtype=dtype, device=device)

    return Plan(
        quota=zeros(len(rules.phy2log), torch.int32),
        rank_load=zeros(rules.n_ranks, torch.int64),
        max_load=zeros(n_groups, torch.int64),
        lower_bound=zeros(n_groups, torch.float64),
        gap=zeros(n_groups, torch.float64),
        iterations=zeros(n_groups, torch.int32),
        status=zeros(n_groups, torch.int32),
        solver=solver,
        rules=rules,
    )


def checked_solver(solver: str) -> str:
    """Return the solver's name, or refuse it."""
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, allowed is 'ipm' or 'flow'")
    return solver


def checked_split(split: str | None) -> str | None:
    """Return how sources share out quotas, ``None`` for the default, or refuse it."""
    if split is not None and (not isinstance(split, str) or split not in SPLITS):
        raise ValueError(f"split is {split!r}, allowed is 'local_first', 'plain' or None")
    return split


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
