"""``mindiesd.eplb.dispatcher``."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from lplb.arguments import check_divides, checked_device, seen, whole_number
from lplb.compat.mindie.names import either
from lplb.dynamic.dispatcher import Dispatcher
from lplb.placement import Placement
from lplb.planner import Planner
from lplb.weights import Field

__all__ = ["DynamicDispatcher", "ModuleUpdate", "first_placement"]


class ModuleUpdate(NamedTuple):
    """What MindIE-SD's snippet unpacks: the first six of `lplb.dynamic.Update`."""

    weight1: Field
    """Weights of this rank's slots, ``[local_expert_num, ...]``; the same tensor in every update."""
    weight2: Field | None
    """The second of them."""
    local_expert_num: int
    """Slots of this rank."""
    device_indices_map: Tensor
    """For each expert the rank that this rank sends its tokens to, int32 ``[expert_num]``."""
    local_expert_indices_map: Tensor
    """For each expert its slot on this rank, or -1, int32 ``[expert_num]``."""
    local_expert_list: list[int]
    """The expert in each slot of this rank."""


class DynamicDispatcher(Dispatcher):
    """The live placement of one layer: a `Dispatcher` that is made of complete weights and has MindIE-SD's names.

    It begins with experts in order, as many on every rank; spare slots have copies of the next rank's first experts.
    The weights of this rank's slots are copied, to ``device``. The complete ones are kept until
    `construct_expert_info_transfer_pool` has taken them over.

    Args:
        expert_num: logical experts, a multiple of ``ep_size``.
        weight1: of all experts, ``[expert_num, ...]``, on the host.
        weight2: of all experts, ``[expert_num, ...]``, on the host.
        rank_in_group: this rank.
        ep_size: ranks.
        routed_expert_num: the same as ``expert_num``, as MindIE-SD's code calls it.
        ep_rank: the same as ``rank_in_group``, as MindIE-SD's code calls it.
        redundant: spare slots on every rank, the same as the scheduler's ``--redundant``; by default what
            EPLB_REDUNDANT in the environment says, or none.
        device: where the slots are; by default where ``weight1`` is, until `to`.
        planner: as for `Dispatcher`; of `first_placement`.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """

    complete: tuple[Tensor, Tensor] | None
    """The weights of all experts; ``None`` after they were taken over."""

    def __init__(
        self,
        expert_num: int | None = None,
        weight1: Tensor | None = None,
        weight2: Tensor | None = None,
        rank_in_group: int | None = None,
        ep_size: int | None = None,
        *,
        routed_expert_num: int | None = None,
        ep_rank: int | None = None,
        redundant: int | None = None,
        device: torch.device | str | None = None,
        planner: Planner | None = None,
    ) -> None:
        """See the class."""
        n_logical = whole_number(
            "expert_num", either("expert_num", expert_num, "routed_expert_num", routed_expert_num), 1
        )
        rank = either("rank_in_group", rank_in_group, "ep_rank", ep_rank)
        if ep_size is None:
            raise TypeError("ep_size is None, allowed is an int: the number of ranks")
        placement = first_placement(n_logical, ep_size, _spare(redundant))
        rank = whole_number("rank_in_group", rank, 0, placement.n_ranks - 1)
        weights = _checked_weights("weight1", weight1, n_logical), _checked_weights("weight2", weight2, n_logical)
        self._begin(placement, weights, rank, None if device is None else checked_device(device), planner)
        self.complete = weights

    def _begin(
        self,
        placement: Placement,
        weights: tuple[Tensor, Tensor],
        rank: int,
        device: torch.device | str | None,
        planner: Planner | None,
    ) -> None:
        mine = placement.phy2log.view(placement.n_ranks, -1)[rank].long()
        slots = [weight.detach()[mine.to(weight.device)].to(device) for weight in weights]
        super().__init__(placement, slots, rank, planner=planner)
        self._due = self._shown = False

    def to(self, device: torch.device | str | None) -> DynamicDispatcher:
        """Begin anew on another device, which MindIE-SD learns after the dispatcher is made; itself if it is there.

        Args:
            device: where the slots are to be; ``None`` for where they are.

        Raises:
            ValueError: torch has no such device here.
            RuntimeError: a forward pass has begun already, or the complete weights are gone.
        """
        if device is None or checked_device(device) == self.fields.device:
            return self
        if self.steps or self.complete is None:
            raise RuntimeError(
                f"the dispatcher has begun on {str(self.fields.device)!r}, allowed is another device only before "
                "the first forward pass"
            )
        self._begin(self.placement, self.complete, self.rank, device, self.planner)
        return self

    # ---- MindIE-SD's names

    @property
    def routed_expert_num(self) -> int:
        """Logical experts."""
        return self.n_logical

    @property
    def ep_rank(self) -> int:
        """This rank."""
        return self.rank

    @property
    def ep_size(self) -> int:
        """Ranks."""
        return self.placement.n_ranks

    def get_device_indices(self, indices_expert: Tensor) -> Tensor:
        """Return the rank that each index's expert is asked of, int32, shape of the indices."""
        return self.device_indices_map[indices_expert.long()]

    def get_local_expert_indices(self, indices_expert: Tensor) -> Tensor:
        """Return the slot of each index's expert on this rank, or -1, int32, shape of the indices."""
        return self.local_expert_indices_map[indices_expert.long()]

    def check_consistency(self) -> bool:
        """Begin a forward pass; as `Dispatcher.check_consistency`, and true in the first pass on every rank.

        Returns:
            `update_flag`.
        """
        self._due = super().check_consistency()
        self.update_flag = self._due or not self._shown
        return self.update_flag

    def update_module_weight_and_map(self) -> ModuleUpdate:  # type: ignore[override]
        """Make the swap that is due, if one is, and return what is live; as `Dispatcher.update_module_weight_and_map`.

        Returns:
            Six values, since that is how many callers unpack; `current` has the placement too.
        """
        begun = self.update_flag and not self._due  # nothing to swap, but the module has not seen the weights yet
        update = self.current() if begun else super().update_module_weight_and_map()
        self._due, self._shown, self.update_flag = False, True, False
        return ModuleUpdate(*update[:6])


def first_placement(expert_num: int, ep_size: int, redundant: int = 0) -> Placement:
    """Return where a `DynamicDispatcher` has experts at first.

    Args:
        expert_num: logical experts, a multiple of ``ep_size``.
        ep_size: ranks.
        redundant: spare slots on every rank.

    Returns:
        Rank ``r`` has the ``r``-th part of the experts, in order, and the ``redundant`` experts after them.

    Raises:
        TypeError, ValueError: a number is not allowed.
    """
    n_logical = whole_number("expert_num", expert_num, 1)
    n_ranks = whole_number("ep_size", ep_size, 1)
    check_divides("expert_num", n_logical, "ep_size", n_ranks)
    own = n_logical // n_ranks
    spare = whole_number("redundant", redundant, 0, n_logical - own)
    slots = [(rank * own + i) % n_logical for rank in range(n_ranks) for i in range(own + spare)]
    return Placement(slots, n_ranks, n_logical)


def _spare(redundant: int | None) -> int:
    """Return spare slots on every rank, from the environment by default."""
    if redundant is not None:
        return redundant
    text = os.environ.get("EPLB_REDUNDANT", "0")
    if not text.isdecimal():
        raise ValueError(f"EPLB_REDUNDANT in the environment is {text!r}, allowed is 0 or more")
    return int(text)


def _checked_weights(name: str, weight: Tensor | None, n_logical: int) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} is {seen(weight)}, allowed is a tensor [expert_num, ...] = [{n_logical}, ...]")
    if not weight.dim() or len(weight) != n_logical:
        raise ValueError(
            f"{name} has shape {list(weight.shape)}, allowed is [expert_num, ...] = [{n_logical}, ...]: of all experts"
        )
    return weight
