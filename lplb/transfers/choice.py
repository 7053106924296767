"""What a transfer is worth: of several plans for a batch, the one whose layer is modelled to be quickest."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lplb.cost import layer_time, transfer_time
from lplb.transfers.plan import CAP, FEASIBLE, MAX_LOAD, TOKENS, TransferPlan
from lplb.transfers.settings import Costs

_Floats = npt.NDArray[np.float64]


def at_home(plan: TransferPlan) -> TransferPlan:
    """Return plain expert parallelism for the batch of a plan without transfers: every expert on its home only."""
    plain = replace(plan, memory=plan.memory.clone(), strategy="plain")
    tokens = plan.quota.sum(1).numpy()
    home = np.array(plan.residents.home)
    quota, load, numbers = plain.quota.numpy(), plain.rank_load.numpy(), plain.numbers.numpy()
    quota[:] = 0
    quota[np.arange(len(home)), home] = tokens
    load[:] = quota.sum(0)
    numbers[MAX_LOAD] = load.max()
    return plain


ABOVE = (0.0, *(2.0**i for i in range(-6, 7)))
"""How far above the least maximum, relative, the caps are for whose fewest transfers the cost model is asked."""


def quickest(
    costs: Costs,
    replicas: TransferPlan,
    solve: Callable[[float], TransferPlan],
    tolerance: float,
    max_tokens: int | None,
    *,
    plain: bool,
) -> TransferPlan:
    """Return the plan with the least modelled time of those that fit; the first of equals.

    Args:
        costs: model, hardware and nodes.
        replicas: the best plan without transfers.
        solve: the plan with the fewest transfers found for a tolerance.
        tolerance: the least one to look at.
        max_tokens: plans with more tokens on a rank do not fit; if none fits, the one with the least is returned.
        plain: look at plain expert parallelism too.

    Returns:
        One of the plans with its ``seconds``, and what was asked for in its numbers: ``max_tokens``, or its own load.
    """
    plans = [at_home(replicas)] * plain + [replicas]
    more = _with_transfers(solve, tolerance, replicas.max_load)
    if more:
        least = least_seconds(costs, more)
        first = int(least.argmin())
        plans.append(more[first])
        times = layer_seconds(costs, plans)
        # What is slower than this, whatever the plan looks like, is not looked at.
        within = min((t for plan, t in zip(plans, times, strict=True) if _above(plan, max_tokens) == 0), default=np.inf)
        left = [plan for i, plan in enumerate(more) if i != first and least[i] <= within]
        times = np.concatenate([times, layer_seconds(costs, left)])
        plans += left
    else:
        times = layer_seconds(costs, plans)
    best = min(range(len(plans)), key=lambda i: (_above(plans[i], max_tokens), times[i], plans[i].n_transfers))
    seconds: dict[str, float] = {}
    for plan, time in zip(plans, times.tolist(), strict=True):
        seconds[plan.strategy] = min(time, seconds.get(plan.strategy, np.inf))
    numbers = plans[best].numbers.numpy()
    numbers[CAP] = numbers[MAX_LOAD] if max_tokens is None else max_tokens
    numbers[FEASIBLE] = numbers[MAX_LOAD] <= numbers[CAP]
    return replace(plans[best], seconds=seconds)


def _above(plan: TransferPlan, max_tokens: int | None) -> int:
    """Tokens that do not fit."""
    return 0 if max_tokens is None else max(0, plan.max_load - max_tokens)


def _with_transfers(solve: Callable[[float], TransferPlan], tolerance: float, most: int) -> list[TransferPlan]:
    """The fewest transfers found for caps from the tolerance's up to ``most`` tokens, fewer in every plan."""
    plans: list[TransferPlan] = []
    for above in ABOVE:
        plan = solve((1 + tolerance) * (1 + above) - 1)
        if plan.n_transfers == 0:
            break
        if not plans or plan.n_transfers < plans[-1].n_transfers:
            plans.append(plan)
        if plan.cap >= most:
            break
    return plans


def layer_seconds(costs: Costs, plans: Sequence[TransferPlan]) -> _Floats:
    """The modelled seconds of each plan's layer, transfers included."""
    if not plans:
        return np.zeros(0)
    used = [_by_rank(plan) for plan in plans]
    tokens = np.zeros((len(plans), used[0].shape[0], max(rows.shape[1] for rows in used)))
    for i, rows in enumerate(used):
        tokens[i, :, : rows.shape[1]] = rows
    n_ranks, node = tokens.shape[1], costs.ranks_per_node
    travel = [
        transfer_time(plan.transfers[: plan.n_transfers], n_ranks, costs.model, costs.hardware, ranks_per_node=node)
        for plan in plans
    ]
    return layer_time(
        tokens.reshape(len(plans), -1),
        n_ranks,
        costs.model,
        costs.hardware,
        ranks_per_node=node,
        transfer_seconds=np.array(travel),
    )


def least_seconds(costs: Costs, plans: Sequence[TransferPlan]) -> _Floats:
    """What the layer of each plan takes at least, from its transfers and its largest load alone.

    The busiest rank's experts take at least what one expert with all its tokens does; no other rank has more, its node
    has at least its share; and some rank gets its share of the copies, at best over NVLink and its card together.
    """
    n_ranks, node = plans[0].frame.n_ranks, costs.ranks_per_node
    total = int(plans[0].numbers[TOKENS])
    most = np.array([plan.max_load for plan in plans], dtype=np.float64)
    near = np.maximum(0.0, total * node / n_ranks - most)  # on the rest of its node
    tokens = np.empty((len(plans), n_ranks))
    tokens[:, node:] = ((total - most - near) / max(1, n_ranks - node))[:, None]
    tokens[:, 1:node] = (near / max(1, node - 1))[:, None]
    tokens[:, 0] = most
    per_second = sum(
        1 / transfer_time(np.array([[0, 0, to]]), n_ranks, costs.model, costs.hardware, ranks_per_node=node)
        for to in {1 % node, node % n_ranks} - {0}  # in the node of rank 0 and out of it, where there are such
    )
    each = np.ceil(np.array([plan.n_transfers for plan in plans]) / n_ranks)
    travel = each / per_second if per_second else np.zeros(len(plans))
    return layer_time(tokens, n_ranks, costs.model, costs.hardware, ranks_per_node=node, transfer_seconds=travel)


def _by_rank(plan: TransferPlan) -> npt.NDArray[np.int64]:
    """The tokens of each rank's experts, those that have some, padded with 0: ``[ranks, most experts of a rank]``."""
    quota = plan.quota.numpy().T
    ranks, experts = quota.nonzero()
    used = np.bincount(ranks, minlength=len(quota))
    rows = np.zeros((len(quota), max(1, int(used.max()))), dtype=np.int64)
    rows[ranks, np.arange(len(ranks)) - (np.cumsum(used) - used)[ranks]] = quota[ranks, experts]
    return rows
