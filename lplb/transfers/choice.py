"""What a transfer is worth: of several plans for a batch, the one whose layer is modelled to be quickest."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lplb.cost import layer_parts, layer_time, transfer_time
from lplb.transfers.plan import CAP, FEASIBLE, MAX_LOAD, TransferPlan
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


def quickest(
    costs: Costs,
    replicas: TransferPlan,
    solve: Callable[[int], TransferPlan],
    front: Sequence[tuple[int, int]],
    max_tokens: int | None,
    *,
    plain: bool,
) -> TransferPlan:
    """Return the plan with the least modelled time of those that fit; the first of equals.

    Args:
        costs: model, hardware and nodes.
        replicas: the best plan without transfers.
        solve: the best plan with so many transfers.
        front: transfers and largest load of plans to look at, transfers ascending from 1.
        max_tokens: plans with more tokens on a rank do not fit; if none fits, the one with the least is returned.
        plain: look at plain expert parallelism too.

    Returns:
        One of the plans with its ``seconds``, and what was asked for in its numbers: ``max_tokens``, or its own load.
    """
    plans = [at_home(replicas)] * plain + [replicas] + [solve(k) for k, _ in front[-1:]]
    times: list[float] = layer_seconds(costs, plans).tolist()
    fitting = [t for plan, t in zip(plans, times, strict=True) if max_tokens is None or plan.max_load <= max_tokens]
    # What is slower than the best so far, whatever the plan looks like, needs no plan.
    within = min(fitting, default=np.inf)
    between = front[:-1]
    least = least_seconds(costs, between, replicas.frame.n_ranks)
    more = [solve(k) for (k, _), seconds in zip(between, least, strict=True) if seconds < within]
    plans += more
    times.extend(layer_seconds(costs, more).tolist())

    def rank(i: int) -> tuple[int, float, int]:
        most = plans[i].max_load
        return (0 if max_tokens is None else max(0, most - max_tokens)), times[i], plans[i].n_transfers

    chosen = plans[min(range(len(plans)), key=rank)]
    seconds: dict[str, float] = {}
    for plan, time in zip(plans, times, strict=True):
        seconds[plan.strategy] = min(time, seconds.get(plan.strategy, np.inf))
    numbers = chosen.numbers.numpy()
    numbers[CAP] = numbers[MAX_LOAD] if max_tokens is None else max_tokens
    numbers[FEASIBLE] = numbers[MAX_LOAD] <= numbers[CAP]
    return replace(chosen, seconds=seconds)


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
        transfer_time(plan.transfers, n_ranks, costs.model, costs.hardware, ranks_per_node=node) for plan in plans
    ]
    return layer_time(
        tokens.reshape(len(plans), -1),
        n_ranks,
        costs.model,
        costs.hardware,
        ranks_per_node=node,
        transfer_seconds=np.array(travel),
    )


def least_seconds(costs: Costs, front: Sequence[tuple[int, int]], n_ranks: int) -> _Floats:
    """What no layer is quicker than that has so many transfers and so many tokens on its busiest rank.

    Its experts take at least what one expert with all these tokens does, and some rank gets its share of the copies.
    """
    if not front:
        return np.zeros(0)
    transfers, most = np.array(front, dtype=np.float64).T
    tokens = np.zeros((len(front), n_ranks))
    tokens[:, 0] = most
    node = costs.ranks_per_node
    experts = layer_parts(tokens, n_ranks, costs.model, costs.hardware, ranks_per_node=node).experts
    copy = [
        transfer_time(np.array([[0, 0, to]]), n_ranks, costs.model, costs.hardware, ranks_per_node=node)
        for to in {1 % n_ranks, node % n_ranks} - {0}  # in the node of rank 0 and out of it, where there are such
    ]
    least: _Floats = experts + np.ceil(transfers / n_ranks) * min(copy, default=0.0)
    return least


def _by_rank(plan: TransferPlan) -> npt.NDArray[np.int64]:
    """The tokens of each rank's experts, those that have some, padded with 0: ``[ranks, most experts of a rank]``."""
    quota = plan.quota.numpy().T
    ranks, experts = quota.nonzero()
    used = np.bincount(ranks, minlength=len(quota))
    rows = np.zeros((len(quota), max(1, int(used.max()))), dtype=np.int64)
    rows[ranks, np.arange(len(ranks)) - (np.cumsum(used) - used)[ranks]] = quota[ranks, experts]
    return rows
