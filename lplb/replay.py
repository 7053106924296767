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
from lplb.eplb import rebalance_experts, spread_copies
from lplb.exchange import Known
from lplb.placement import Placement
from lplb.plan import Plan
from lplb.planner import Planner
from lplb.trace import RouterTrace

__all__ = ["CheckFailed", "Replay", "SimulatedRanks", "one_thread", "place", "replay_trace", "split_evenly"]

NONE, EVEN, LPLB, LP = "no balancing", "EPLB, even splits", "LPLB topology", "LP on EPLB placement"
METHODS = (NONE, EVEN, LPLB, LP)

TOPOLOGIES: dict[int, tuple[str, Callable[[], torch.Tensor]]] = {
    8: ("cube", topology.cube),
    16: ("hypercube", topology.hypercube),
    32: ("4×8 torus", lambda: topology.torus(4, 8)),
}
"""For each number of ranks the graph of LPLB; all have two redundant slots per rank, and so has EPLB here."""

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
    """The certified lower bound of the largest load on the EPLB placement, ``[batches, layers]``."""
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


def place(history: torch.Tensor, n_slots: int, n_ranks: int) -> Placement:
    """Return EPLB's placement (global policy) without an expert twice on a rank.

    EPLB may want more copies of an expert than there are ranks. Its load is then lowered until it gets one on each;
    as every rank has it, the packing of the others is the same for any load of it.

    Args:
        history: tokens of each logical expert, ``[n_logical]``.
        n_slots: physical experts on all ranks.
        n_ranks: number of ranks.
    """
    weight = history.double()[None]
    while True:
        phy2log, _, count = rebalance_experts(weight, n_slots, 1, 1, n_ranks)
        if int(count.max()) <= n_ranks:
            break
        lowered = torch.where(count > n_ranks, weight * (n_ranks / (count + 1)), weight)
        weight = lowered.clamp_min(1)  # an idle expert must be able to take the slot
    return Placement(spread_copies(phy2log, n_ranks, weight)[0], n_ranks, history.numel())


def split_evenly(placement: Placement, counts: _Counts) -> _Counts:
    """Return the tokens of each slot if every expert's tokens are dealt out evenly over its copies.

    What is left of a division goes to one copy each, beginning with copy ``e`` (modulo the number of copies), so that
    no rank gets it always.

    Args:
        placement: where the experts are.
        counts: tokens of each expert, ``[n_logical]`` or a batch ``[n, n_logical]``.
    """
    expert = placement.phy2log.numpy()
    copies = placement.logcnt.numpy()[expert].astype(np.int64)
    number = np.empty_like(copies)  # which of its expert's copies a slot is
    for slots in placement.log2phy.numpy():
        held = slots[slots >= 0]
        number[held] = np.arange(len(held))
    each, left = np.divmod(counts[..., expert], copies)
    quota: _Counts = each + ((number - expert) % copies < left)
    return quota


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
        self.lp_micros: list[float] = []
        self._use(self.lplb.planners[0].placement)

    def refresh(self, history: torch.Tensor) -> None:
        """Place the experts anew by what the past batches asked for, ``[n_logical]``."""
        for planner in self.lplb.planners:
            planner.update_redundancy_mapping(history)
        self._use(place(history, self.n_slots, self.n_ranks))

    def _use(self, placement: Placement) -> None:
        self.placement = placement
        self.lp = SimulatedRanks(lambda rank: Planner.from_placement(placement, group=rank), self.n_ranks)
        self.lp.micros = self.lp_micros

    def quotas(self, chosen: torch.Tensor, counts: torch.Tensor) -> tuple[dict[str, _Counts], float]:
        """Return each method's tokens per slot, and the lower bound on the EPLB placement."""
        total: _Counts = counts.sum(0).numpy().astype(np.int64)
        plan = self.lp.run(chosen, counts)
        quotas = {
            NONE: total,
            EVEN: split_evenly(self.placement, total),
            LPLB: self.lplb.run(chosen, counts).quota.numpy().astype(np.int64),
            LP: plan.quota.numpy().astype(np.int64),
        }
        return quotas, float(plan.lower_bound.max())

    def firsts(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Tell for each method which slots are the first copy of their expert (LPLB: its own, not redundant, slot)."""
        first = np.zeros(self.n_slots, dtype=bool)
        first[self.placement.log2phy[:, 0].numpy()] = True
        planner = self.lplb.planners[0]
        own = np.arange(self.n_slots) % planner.n_local_routed_experts < planner.n_local_logical_routed_experts
        return {NONE: np.ones(self.placement.n_logical, dtype=bool), EVEN: first, LPLB: own, LP: first}


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

    The tokens of a batch are dealt out in blocks, one per rank. EPLB's and LPLB's placements are made every `REFRESH`
    batches from the loads of the `WINDOW` batches before, each layer by itself. Until there is a history, both use the
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
                layer.refresh(asked[max(0, b - WINDOW) : b, i].sum(0))
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
    micros = {
        LPLB: np.array([t for layer in layers for t in layer.lplb.micros]),
        LP: np.array([t for layer in layers for t in layer.lp_micros]),
    }
    return Replay(n_ranks, layers[0].n_slots, trace.domain[:n_batches], loads, moved, bound, micros)


def _count(chosen: torch.Tensor, n_logical: int) -> torch.Tensor:
    """Tokens of each expert on each rank, int32 ``[ranks, n_logical]``; not by a planner, so that it checks theirs."""
    n_ranks = len(chosen)
    of_rank = chosen.flatten(1) + torch.arange(n_ranks)[:, None] * n_logical
    return of_rank.flatten().bincount(minlength=n_ranks * n_logical).view(n_ranks, n_logical).int()


# ---- what is shown
