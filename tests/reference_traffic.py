"""Independent references for traffic: what plans send across ranks and nodes, and the linear program that weighs it.

Nothing of lplb. `traffic_of` counts tokens in whole numbers; `TrafficLP` is the linear program with costs, by HiGHS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from reference import INT_ARRAY, RankGroup, rank_groups

try:
    import highspy
except ModuleNotFoundError as error:  # traffic_of works without
    if error.name != "highspy":
        raise

NODE_COST = 1 / 8  # a token across a node's ranks, in tokens across nodes
FLOAT_ARRAY = NDArray[np.float64]


@dataclass(frozen=True)
class Traffic:
    """Tokens that leave the rank they are on."""

    across_nodes: float
    within_nodes: float  # across ranks, not across nodes

    @property
    def cost(self) -> float:
        return self.across_nodes + NODE_COST * self.within_nodes


def traffic_of(phy2log: ArrayLike, counts: ArrayLike, quota: ArrayLike, ranks_per_node: int) -> Traffic:
    """The least that quotas [n_physical] need: slots take their own rank's tokens first, then their node's.

    counts: tokens of each source rank by logical expert, [n_ranks, n_logical]; the last node may have fewer ranks.
    """
    table, slots = np.asarray(counts, dtype=np.int64), np.asarray(phy2log, dtype=np.int64)
    n_ranks = len(table)
    wanted = np.zeros_like(table)  # [n_ranks, n_logical]
    np.add.at(wanted, (np.arange(slots.size) * n_ranks // slots.size, slots), np.asarray(quota, dtype=np.int64))
    starts = np.arange(0, n_ranks, ranks_per_node)
    on_ranks = int(np.minimum(wanted, table).sum())
    on_nodes = int(np.minimum(np.add.reduceat(wanted, starts), np.add.reduceat(table, starts)).sum())
    return Traffic(int(wanted.sum()) - on_nodes, on_nodes - on_ranks)


class TrafficLP:
    """The LP of one group, with the least traffic that a split allows.

    Columns are t; for each replica its own rank's tokens, and others; for each node of an expert the node's tokens,
    and others. Rows are ranks, experts, and nodes, where replicas take what the node gives. Loads are divided by the
    group's mean load per unit of speed, so HiGHS' absolute tolerances are relative.
    """

    def __init__(self, group: RankGroup, first_rank: int, counts: ArrayLike, ranks_per_node: int) -> None:
        table = np.asarray(counts, dtype=np.float64)
        loads = table.sum(axis=0)
        homes = list(zip(group.experts, group.homes, strict=True))
        self.group = group
        self.speed = np.array(group.speed)
        self.replicated = [(expert, ranks) for expert, ranks in homes if len(ranks) > 1]
        self.tokens = np.array([loads[expert] for expert, _ in self.replicated])
        self.single = np.zeros(group.n_ranks)
        for expert, ranks in homes:
            if len(ranks) == 1:
                self.single[ranks[0]] += loads[expert]
        self.replicas: list[tuple[int, int, int]] = []  # rank in the group, and which of `replicated` and of the nodes
        own, node = [], []
        for e, (expert, ranks) in enumerate(self.replicated):
            seen: dict[int, int] = {}
            for rank in ranks:
                k = (first_rank + rank) // ranks_per_node
                if k not in seen:
                    seen[k] = len(node)
                    node.append(table[k * ranks_per_node : (k + 1) * ranks_per_node, expert].sum())
                self.replicas.append((rank, e, seen[k]))
                own.append(table[first_rank + rank, expert])
        self.own, self.node = np.array(own, dtype=np.float64), np.array(node, dtype=np.float64)

    def cost_of(self, tokens: FLOAT_ARRAY) -> float:
        """What `tokens` on the replicas, expert by expert, cost: own rank first, then node, then beyond."""
        on_nodes = np.bincount([node for _, _, node in self.replicas], tokens, self.node.size)
        across_nodes = np.maximum(on_nodes - self.node, 0).sum()
        across_ranks = np.maximum(tokens - self.own, 0).sum()
        return float(across_nodes + NODE_COST * (across_ranks - across_nodes))

    def solve(self, weight: float) -> float:
        """The least max_load + weight · cost / Σ speeds, in tokens. Raises `RuntimeError` if HiGHS finds none."""
        scale = float((self.single.sum() + self.tokens.sum()) / self.speed.sum()) or 1.0
        n_ranks, n, n_nodes, n_experts = self.group.n_ranks, len(self.replicas), self.node.size, len(self.replicated)
        price = weight / self.speed.sum()
        infinity = highspy.kHighsInf

        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = 1 + 2 * n + 2 * n_nodes, n_ranks + n_experts + n_nodes
        costs = [(1.0, 1), (0.0, n), (NODE_COST * price, n), (0.0, n_nodes), ((1 - NODE_COST) * price, n_nodes)]
        lp.col_cost_ = np.concatenate([np.full(count, cost) for cost, count in costs])
        lp.col_lower_ = np.zeros(lp.num_col_)
        upper = [np.full(1, infinity), self.own / scale, np.full(n, infinity), self.node / scale]
        lp.col_upper_ = np.concatenate([*upper, np.full(n_nodes, infinity)])
        lp.row_lower_ = np.concatenate([np.full(n_ranks, -infinity), self.tokens / scale, np.zeros(n_nodes)])
        lp.row_upper_ = np.concatenate([-self.single / scale, self.tokens / scale, np.zeros(n_nodes)])
        replicas = [(rank, n_ranks + e, n_ranks + n_experts + node) for rank, e, node in self.replicas]
        rows = np.array(replicas, dtype=np.int32).ravel()
        nodes = n_ranks + n_experts + np.arange(n_nodes)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        starts = np.concatenate([3 * np.arange(2 * n), 6 * n + np.arange(2 * n_nodes + 1)])
        lp.a_matrix_.start_ = np.concatenate([[0], n_ranks + starts]).astype(np.int32)
        lp.a_matrix_.index_ = np.concatenate([np.arange(n_ranks), rows, rows, nodes, nodes]).astype(np.int32)
        lp.a_matrix_.value_ = np.concatenate([-self.speed, np.ones(6 * n), -np.ones(2 * n_nodes)])

        model: Any = highspy.Highs()  # type: ignore[no-untyped-call]
        model.setOptionValue("output_flag", False)
        model.setOptionValue("threads", 1)
        model.setOptionValue("primal_feasibility_tolerance", 1e-10)
        model.setOptionValue("dual_feasibility_tolerance", 1e-10)
        model.passModel(lp)
        for presolve in ("choose", "off"):
            model.setOptionValue("presolve", presolve)
            model.clearSolver()
            model.run()
            if model.getModelStatus() == highspy.HighsModelStatus.kOptimal:
                return float(model.getObjectiveValue()) * scale
        raise RuntimeError(f"HiGHS ended with {model.getModelStatus()} on {self.group}, weight {weight}")


def traffic_lps(
    phy2log: ArrayLike,
    counts: INT_ARRAY,
    ranks_per_node: int,
    group_size: int | None = None,
    rank_speed: ArrayLike | None = None,
) -> list[TrafficLP]:
    """The LP of every group of a placement, for tokens [n_ranks, n_logical] of each source rank."""
    groups = rank_groups(phy2log, len(counts), group_size, rank_speed)
    return [TrafficLP(group, i * group.n_ranks, counts, ranks_per_node) for i, group in enumerate(groups)]
