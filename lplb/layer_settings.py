"""Checks of what an EP layer is given, and the placement that it begins with."""

import torch
import torch.distributed as dist
from torch import Tensor

from lplb import exchange
from lplb.arguments import check_divides, seen
from lplb.exchange import Exchange
from lplb.guests import placement_of
from lplb.placement import Placement
from lplb.planner import Planner
from lplb.transfers import TransferPlanner

__all__ = ["check_balancer", "checked_dtype", "first_placement"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Return a dtype that layers have, or raise TypeError."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in _FLOATS:
        raise TypeError(f"dtype is {dtype!r}, allowed are {', '.join(map(str, _FLOATS))}")
    return dtype


def check_balancer(
    balancer: Planner | None, ranks: Exchange, n_experts: int, device: torch.device, transfers: object = None
) -> None:
    """Refuse a balancer that does not plan for the layer, and ranks and experts that do not fit without one.

    Raises:
        TypeError, ValueError: with the value seen and the value allowed.
    """
    if not isinstance(ranks, (exchange.Local, exchange.Distributed)):
        raise TypeError(f"group is {seen(ranks)}, allowed is a torch.distributed.ProcessGroup or None")
    if balancer is not None and transfers is not None:
        raise ValueError("balancer and transfers are both given, allowed is one of them")
    if transfers is not None:
        return
    if balancer is None:
        check_divides("n_experts", n_experts, "the number of ranks", ranks.size)
        return
    if not isinstance(balancer, Planner):
        raise TypeError(f"balancer is {seen(balancer)}, allowed is an lplb.Planner or None")
    members, own = _members(exchange.exchange_for(balancer.ep_group)), _members(ranks)
    if members != own:
        raise ValueError(f"balancer plans for {members}, allowed is a planner of this layer's group, {own}")
    if balancer.n_logical_routed_experts != n_experts:
        raise ValueError(
            f"balancer plans for {balancer.n_logical_routed_experts} experts, allowed is n_experts = {n_experts}"
        )
    if balancer.device != device:
        raise ValueError(f"balancer works on {str(balancer.device)!r}, allowed is the layer's device, {str(device)!r}")


def first_placement(
    balancer: Planner | None, n_experts: int, n_ranks: int, transfers: TransferPlanner | None = None
) -> tuple[Placement, Tensor]:
    """Where the experts are, and the slots of their originals."""
    if transfers is not None:
        placement = placement_of(transfers)
        return placement, placement.log2phy[:, 0].long()
    if balancer is None:
        placement = Placement(range(n_experts), n_ranks)
        return placement, placement.log2phy[:, 0].long()
    return balancer.placement, balancer.home.long().cpu()


def _members(ranks: Exchange) -> str:
    if isinstance(ranks, exchange.Local):
        return "one process without a group"
    if isinstance(ranks, exchange.Distributed):
        return f"the processes {dist.get_process_group_ranks(ranks.group)}"
    return f"a {type(ranks).__name__} exchange"
