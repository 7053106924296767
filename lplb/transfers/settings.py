"""What a transfer planner is asked for, checked before anything else happens."""

import math
from dataclasses import dataclass
from typing import SupportsIndex

from lplb import _C
from lplb.arguments import check_divides, real_number, whole_number
from lplb.cost import HARDWARE, Hardware
from lplb.models import ModelShape

__all__ = ["STRATEGIES", "Settings"]

STRATEGIES = ("llep", "joint", "auto")
"""LLEP's least-loaded assignment; replicas and transfers decided together; what the cost model says is quickest."""

MOST_BATCH = _C.most_transfer_tokens - 1
"""Most tokens of a batch: sums stay exact in float64."""
_LLEP_M = 1024  # as published
_MOST_RATIO = 1000.0  # no batch has a larger imbalance than its ranks, 128 at most
_MOST_SLOTS = 2**31 - 1  # virtual slots are int32


@dataclass(frozen=True)
class Settings:
    """Arguments of `lplb.TransferPlanner` that are the same for every batch."""

    strategy: str
    alpha: float
    m: int
    lam: float
    compat: bool
    tolerance: float
    slots: int
    domain: int
    expert_bytes: int | None
    max_transfers: int
    """By ``max_bytes``; -1 for any number."""
    ranks_per_node: int


@dataclass(frozen=True)
class Costs:
    """What the cost model needs."""

    model: ModelShape
    hardware: Hardware
    ranks_per_node: int


def checked_settings(
    n_ranks: int,
    n_logical: int,
    width: int,
    *,
    strategy: object,
    alpha: object,
    m: SupportsIndex | None,
    lam: object,
    compat: object,
    slots: SupportsIndex | None,
    tolerance: object,
    domain: SupportsIndex | None,
    max_bytes: SupportsIndex | None,
    expert_bytes: SupportsIndex | None,
    model: ModelShape | None,
    ranks_per_node: SupportsIndex | None,
) -> Settings:
    """Return the settings, or refuse one; see `lplb.TransferPlanner`. ``width`` is the most residents of a rank."""
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}, allowed are {', '.join(map(repr, STRATEGIES))}")
    if not isinstance(compat, bool):
        raise TypeError(f"compat is {compat!r}, allowed is True or False")
    if model is not None and not isinstance(model, ModelShape):
        raise TypeError(f"model is a {type(model).__name__}, allowed is an lplb.models.ModelShape or None")
    if strategy == "auto" and model is None:
        raise ValueError(
            "model is None, allowed with strategy 'auto' is an lplb.models.ModelShape, whose cost it goes by"
        )
    m = whole_number("m", (_LLEP_M if strategy == "llep" else 1) if m is None else m, 0, MOST_BATCH)
    slots = n_logical if slots is None else whole_number("slots", slots, 1, n_logical)
    if n_ranks * (width + slots) > _MOST_SLOTS:
        raise ValueError(
            f"slots is {slots}, which makes {n_ranks * (width + slots)} slots on {n_ranks} ranks, allowed are "
            f"{_MOST_SLOTS}"
        )
    domain = n_ranks if domain is None else whole_number("domain", domain, 1, n_ranks)
    check_divides("ep_size", n_ranks, "domain", domain)
    if expert_bytes is not None:
        expert_bytes = whole_number("expert_bytes", expert_bytes, 1)
    elif model is not None:
        expert_bytes = math.ceil(model.expert_bytes)
    tolerance = _ratio("tolerance", tolerance, 0.0, _MOST_RATIO)
    return Settings(
        strategy=strategy,
        alpha=_ratio("alpha", alpha, 1.0, _MOST_RATIO),
        m=m,
        lam=_ratio("lam", lam, 1.0, math.inf),
        compat=compat,
        tolerance=0.0 if strategy == "auto" else tolerance,
        slots=slots,
        domain=domain,
        expert_bytes=expert_bytes,
        max_transfers=_affordable(max_bytes, expert_bytes, strategy),
        ranks_per_node=min(8, n_ranks)
        if ranks_per_node is None
        else whole_number("ranks_per_node", ranks_per_node, 1, n_ranks),
    )


def checked_costs(
    settings: Settings, n_ranks: int, model: ModelShape | None, hardware: Hardware | None
) -> Costs | None:
    """Return what the cost model needs, ``None`` where it is not asked, or refuse it."""
    if hardware is not None and not isinstance(hardware, Hardware):
        raise TypeError(f"hardware is a {type(hardware).__name__}, allowed is an lplb.cost.Hardware or None")
    if model is None or settings.strategy == "llep":
        return None
    check_divides("ep_size", n_ranks, "ranks_per_node", settings.ranks_per_node)
    return Costs(model, HARDWARE["h200"] if hardware is None else hardware, settings.ranks_per_node)


def checked_max_tokens(max_tokens: SupportsIndex | None) -> int | None:
    """Return the most tokens that a rank can take, ``None`` for any number, or refuse it."""
    return None if max_tokens is None else whole_number("max_tokens", max_tokens, 0, MOST_BATCH)


def _ratio(name: str, value: object, lowest: float, highest: float) -> float:
    number = real_number(name, value)
    if not lowest <= number <= highest:  # true for NaN as well
        allowed = f"{lowest:g} to {highest:g}" if highest < math.inf else f"{lowest:g} or more"
        raise ValueError(f"{name} is {number:g}, allowed is {allowed}")
    return number


def _affordable(max_bytes: SupportsIndex | None, expert_bytes: int | None, strategy: str) -> int:
    """How many transfers a budget pays for; -1 without one."""
    if max_bytes is None:
        return -1
    max_bytes = whole_number("max_bytes", max_bytes, 0)
    if strategy == "llep":
        raise ValueError(f"max_bytes is {max_bytes}, allowed with strategy 'llep' is None: LLA knows no budget")
    if expert_bytes is None:
        raise ValueError(f"max_bytes is {max_bytes}, allowed without expert_bytes or a model is None")
    if 0 < max_bytes < expert_bytes:
        raise ValueError(f"max_bytes is {max_bytes}, allowed is 0 or at least expert_bytes = {expert_bytes}")
    return min(max_bytes // expert_bytes, _MOST_SLOTS)
