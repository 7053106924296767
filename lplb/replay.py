"""The recorded router trace on simulated ranks, with and without balancing.

Every simulated rank has planners of its own and gives them its own tokens; an `lplb.exchange.Known` stands in for the
all-gather. What all ranks return is checked against the plan, batch by batch.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lplb import topology
from lplb.arguments import whole_number
from lplb.exchange import Known
from lplb.placement import Placement, split_evenly
from lplb.plan import Plan
from lplb.planner import Planner
from lplb.policies import place
from lplb.trace import RouterTrace

__all__ = ["CheckFailed", "Replay", "SimulatedRanks", "one_thread", "replay_trace"]

NONE, EVEN, LPLB = "no balancing", "EPLB, even splits", "LPLB topology"
ON_EPLB, LP = "LP on EPLB placement", "LP on a placement for it"
METHODS = (NONE, EVEN, LPLB, ON_EPLB, LP)

TOPOLOGIES: dict[int, tuple[str, Callable[[], torch.Tensor]]] = {
    8: ("cube", topology.cube),
    16: ("hypercube", topology.hypercube),
    32: ("4×8 torus", lambda: topology.torus(4, 8)),
}
"""For each number of ranks the graph of LPLB; all have two redundant slots per rank, and so have placements here."""

SPARE_SLOTS = 2
"""Redundant slots per rank."""
REFRESH = 16
"""Batches from one placement to the next."""
WINDOW = 16
"""Batches before it that a placement is made from."""

_Counts = npt.NDArray[np.int64]


class CheckFailed(RuntimeError):
    """What a planner returned is not what it promises."""


@dataclass(frozen=True)
class Replay:
    """What came out of a replay."""

    n_ranks: int
    """How many ranks were simulated."""
    n_slots: int
    """Expert slots on all ranks with replicas; without balancing there is one per logical expert."""
    domain: list[str]
    """What each batch is made of, as in the trace."""
    loads: dict[str, _Counts]
    """By method: token choices on each rank, ``[batches, layers, ranks]``."""
    moved: dict[str, _Counts]
    """By method: token choices that went to a copy which is not the expert's first, ``[batches, layers]``."""
    bound: npt.NDArray[np.float64]
    """The certified lower bound of the largest load on the placement made for the LP, ``[batches, layers]``."""
    micros: dict[str, npt.NDArray[np.float64]]
    """By method that has a planner: microseconds of each `Planner.run`, one after the other."""

    @property
    def first_counted(self) -> int:
        """The first batch that figures count, for all methods alike: the one with the first history, if there is."""
        return REFRESH if len(self.domain) > REFRESH else 0

    def imbalance(self, method: str) -> npt.NDArray[np.float64]:
        """Largest over mean rank load of each batch and layer, ``[batches, layers]``."""
        loads = self.loads[method]
        ratio: npt.NDArray[np.float64] = loads.max(-1) / loads.mean(-1)
        return ratio

    @property
    def bound_imbalance(self) -> npt.NDArray[np.float64]:
        """The lower bound over the mean rank load, ``[batches, layers]``."""
        ratio: npt.NDArray[np.float64] = self.bound / self.loads[LP].mean(-1)
        return ratio


# ---- the methods


class SimulatedRanks:
    """The planners of all ranks for one layer, run one after the other as if they were apart.

    Args:
        make: makes the planner of a rank from its exchange.
        n_ranks: number of ranks.
    """

    def __init__(self, make: Callable[[Known], Planner], n_ranks: int) -> None:
        """See the class."""
        self.exchanges = [Known(rank, n_ranks) for rank in range(n_ranks)]
        self.planners = [make(exchange) for exchange in self.exchanges]
        self.counters = torch.zeros(n_ranks, 1, dtype=torch.int64)
        self.micros: list[float] = []

    def run(self, chosen: torch.Tensor, counts: torch.Tensor) -> Plan:
        """Let every rank plan and map its own tokens, and check what they return.

        Args:
            chosen: logical experts, int64 ``[ranks, tokens, top_k]``.
            counts: of each rank's tokens, int32 ``[ranks, n_logical]``.

        Returns:
            The plan, the same on all ranks.

        Raises:
            CheckFailed: an index is of another expert, a slot did not get its quota, or ranks or counters disagree.
        """
        mapped, plans = [], []
        before = self.counters.clone()
        for rank, (planner, exchange) in enumerate(zip(self.planners, self.exchanges, strict=True)):
            exchange.counts = counts
            start = time.perf_counter()
            mapped.append(planner.run(chosen[rank], self.counters[rank]))
            self.micros.append((time.perf_counter() - start) * 1e6)
            plan = planner.last_plan
            if plan is None:
                raise CheckFailed(f"rank {rank} has no plan after run")
            plans.append(plan)
        check(self.planners[0], chosen, torch.stack(mapped), plans)
        n_group = self.planners[0].n_group
        raised = (self.counters - before).flatten().tolist()
        if any(by != n_group for by in raised):
            raise CheckFailed(f"the ranks' counters were raised by {raised}, expected {n_group} solved groups each")
        return plans[0]


def check(planner: Planner, chosen: torch.Tensor, physical: torch.Tensor, plans: Sequence[Plan]) -> None:
    """Check the physical indices of all ranks against what was asked for and what was planned.

    Args:
        planner: any rank's.
        chosen: logical experts, ``[ranks, tokens, top_k]``.
        physical: what the planners made of them.
        plans: every rank's.

    Raises:
        CheckFailed: an index is outside the slots or of another expert, a slot or rank did not get its quota, the
            ranks' plans differ, or the plan is below its lower bound.
    """
    n_slots = planner.n_routed_experts
    if int(physical.min()) < 0 or int(physical.max()) >= n_slots:
        raise CheckFailed(
            f"physical indices go from {int(physical.min())} to {int(physical.max())}, expected 0 to {n_slots - 1}"
        )
    wrong = (planner.phy2log[physical] != chosen).nonzero()
    if len(wrong):
        rank, token, choice = wrong[0].tolist()
        slot, expert = int(physical[rank, token, choice]), int(chosen[rank, token, choice])
        raise CheckFailed(
            f"rank {rank}, token {token}, choice {choice} asked for expert {expert} and got physical expert {slot}, "
            f"which is expert {int(planner.phy2log[slot])}"
        )
    got = physical.flatten().bincount(minlength=n_slots)
    quota = torch.stack([plan.quota for plan in plans])
    wrong = (quota != got).nonzero()
    if len(wrong):
        rank, slot = wrong[0].tolist()
        raise CheckFailed(f"physical expert {slot} got {got[slot]} tokens, rank {rank} planned {quota[rank, slot]}")
    load = torch.stack([plan.rank_load for plan in plans])
    if bool((load != got.view(planner.ep_size, -1).sum(1)).any()):
        raise CheckFailed(f"the ranks planned rank loads {load.tolist()}, which the quotas do not give")
    bound, reached = (torch.stack([getattr(plan, name) for plan in plans]) for name in ("lower_bound", "max_load"))
    if bool((bound > reached).any()):
        raise CheckFailed(f"max_load {reached.tolist()} is below lower_bound {bound.tolist()}")


# ---- the replay


class _Layer:
    """One layer's placements and planners."""

    def __init__(self, n_logical: int, n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self.n_slots = n_logical + SPARE_SLOTS * n_ranks
        r2o = TOPOLOGIES[n_ranks][1]()
        self.lplb = SimulatedRanks(lambda rank: Planner(r2o, self.n_slots, n_logical, group=rank), n_ranks)
        self.micros: dict[str, list[float]] = {LPLB: self.lplb.micros, ON_EPLB: [], LP: []}
        self._use(self.lplb.planners[0].placement, self.lplb.planners[0].placement)

    def refresh(self, history: torch.Tensor) -> None:
        """Place the experts anew by what the past batches asked for, ``[batches, n_logical]``."""
        for planner in self.lplb.planners:
            planner.update_redundancy_mapping(history.sum(0))
        eplb, lp = (
            place(history, n_ranks=self.n_ranks, n_physical=self.n_slots, policy=policy) for policy in ("eplb", "lp")
        )
        assert isinstance(eplb, Placement)
        assert isinstance(lp, Placement)
        self._use(eplb, lp)

    def _use(self, eplb: Placement, lp: Placement) -> None:
        self.placements = {ON_EPLB: eplb, LP: lp}
        self.lps = {name: self._ranks(name, placement) for name, placement in self.placements.items()}

    def _ranks(self, name: str, placement: Placement) -> SimulatedRanks:
        ranks = SimulatedRanks(lambda rank: Planner.from_placement(placement, group=rank), self.n_ranks)
        ranks.micros = self.micros[name]
        return ranks

    def quotas(self, chosen: torch.Tensor, counts: torch.Tensor) -> tuple[dict[str, _Counts], float]:
        """Return each method's tokens per slot, and the lower bound on the placement made for the LP."""
        total: _Counts = counts.sum(0).numpy().astype(np.int64)
        plans = {name: ranks.run(chosen, counts) for name, ranks in self.lps.items()}
        quotas = {
            NONE: total,
            EVEN: split_evenly(self.placements[ON_EPLB], total),
            LPLB: self.lplb.run(chosen, counts).quota.numpy().astype(np.int64),
            **{name: plan.quota.numpy().astype(np.int64) for name, plan in plans.items()},
        }
        return quotas, float(plans[LP].lower_bound.max())

    def firsts(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Tell for each method which slots are the first copy of their expert (LPLB: its own, not redundant, slot)."""
        planner = self.lplb.planners[0]
        own = np.arange(self.n_slots) % planner.n_local_routed_experts < planner.n_local_logical_routed_experts
        first = {name: np.zeros(self.n_slots, dtype=bool) for name in self.placements}
        for name, placement in self.placements.items():
            first[name][placement.log2phy[:, 0].numpy()] = True
        return {NONE: np.ones(len(planner.placement.logcnt), dtype=bool), EVEN: first[ON_EPLB], LPLB: own, **first}


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: the tensors are so small that waking others costs more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def replay_trace(
    trace: RouterTrace, n_ranks: int, n_batches: int | None = None, on_batch: Callable[[], object] | None = None
) -> Replay:
    """Replay a trace on simulated ranks with every method.

    The tokens of a batch are dealt out in blocks, one per rank. Placements are made every `REFRESH`
    batches from the loads of the `WINDOW` batches before, each layer by itself. Until there is a history, all use the
    topology with the experts in order.

    Args:
        trace: what the router chose; 1,024 tokens and 64 experts can be dealt to 8, 16 and 32 ranks.
        n_ranks: 8, 16 or 32.
        n_batches: how many, from the first on; by default all.
        on_batch: called after each batch.

    Returns:
        Loads, certified bound, tokens moved and plan times of every batch and layer.

    Raises:
        TypeError, ValueError: an argument is not allowed.
        CheckFailed: a planner did not return what it planned.
    """
    all_batches, n_layers, n_tokens, _ = trace.indices.shape
    n_batches = whole_number("n_batches", all_batches if n_batches is None else n_batches, 1, all_batches)
    if n_ranks not in TOPOLOGIES or n_tokens % n_ranks or trace.n_experts % n_ranks:
        raise ValueError(
            f"n_ranks is {n_ranks}, allowed is one of {list(TOPOLOGIES)} that divides {n_tokens} tokens and "
            f"{trace.n_experts} experts"
        )
    layers = [_Layer(trace.n_experts, n_ranks) for _ in range(n_layers)]
    loads = {method: np.zeros((n_batches, n_layers, n_ranks), dtype=np.int64) for method in METHODS}
    moved = {method: np.zeros((n_batches, n_layers), dtype=np.int64) for method in METHODS}
    bound = np.zeros((n_batches, n_layers))
    asked = torch.zeros(n_batches, n_layers, trace.n_experts, dtype=torch.int64)
    for b in range(n_batches):
        for i, layer in enumerate(layers):
            if b and b % REFRESH == 0:
                layer.refresh(asked[max(0, b - WINDOW) : b, i])
            chosen = torch.from_numpy(trace.indices[b, i].astype(np.int64)).view(n_ranks, n_tokens // n_ranks, -1)
            counts = _count(chosen, trace.n_experts)
            asked[b, i] = counts.sum(0)
            quotas, bound[b, i] = layer.quotas(chosen, counts)
            first = layer.firsts()
            for method, quota in quotas.items():
                loads[method][b, i] = quota.reshape(n_ranks, -1).sum(1)
                moved[method][b, i] = quota[~first[method]].sum()
        if on_batch is not None:
            on_batch()
    micros = {name: np.array([t for layer in layers for t in layer.micros[name]]) for name in (LPLB, ON_EPLB, LP)}
    return Replay(n_ranks, layers[0].n_slots, trace.domain[:n_batches], loads, moved, bound, micros)


def _count(chosen: torch.Tensor, n_logical: int) -> torch.Tensor:
    """Tokens of each expert on each rank, int32 ``[ranks, n_logical]``; not by a planner, so that it checks theirs."""
    n_ranks = len(chosen)
    of_rank = chosen.flatten(1) + torch.arange(n_ranks)[:, None] * n_logical
    return of_rank.flatten().bincount(minlength=n_ranks * n_logical).view(n_ranks, n_logical).int()


# ---- what is shown
