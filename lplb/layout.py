"""LPLB's layout of slots: on every rank its own experts, then copies by class; and its shares of classes.

Redundant slot ``c * classes + k`` of a rank copies own slot ``c * classes + k`` of the rank that the topology names. A
share says how much of all ``combined`` experts of a class stays with their owner.
"""

from dataclasses import dataclass

import torch

from lplb.arguments import MAX_GROUP_SIZE, check_divides, whole_number


@dataclass(frozen=True)
class Layout:
    """The sizes of one layout."""

    n_ranks: int
    group_size: int
    n_physical: int
    n_logical: int
    classes: int
    """Expert classes that a rank copies: columns of the topology."""
    combined: int
    """Redundant slots per rank and class."""

    @property
    def n_groups(self) -> int:
        """Balance groups."""
        return self.n_ranks // self.group_size

    @property
    def n_own(self) -> int:
        """Own slots of a rank."""
        return self.n_logical // self.n_ranks

    def own_slots(self, phy2log: torch.Tensor) -> torch.Tensor:
        """Logical experts of the own slots, int64 ``[n_groups, group_size, n_own]``."""
        return phy2log.view(self.n_groups, self.group_size, -1)[:, :, : self.n_own].long()

    def original_first(self, phy2log: torch.Tensor) -> torch.Tensor:
        """The slot of every expert's original and of its copy, or -1: int64 ``[n_logical, 2]``."""
        slot = torch.arange(self.n_physical, device=phy2log.device).view(self.n_ranks, -1)
        own, copies = slot[:, : self.n_own].flatten(), slot[:, self.n_own :].flatten()
        log2phy = torch.full((self.n_logical, 2), -1, device=phy2log.device)
        log2phy[phy2log[own].long(), 0] = own
        log2phy[phy2log[copies].long(), 1] = copies
        return log2phy

    def shares(
        self, phy2log: torch.Tensor, quota: torch.Tensor, loads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What quotas leave with the owners.

        Args:
            phy2log: the placement, int32 ``[n_physical]``.
            quota: int32 ``[n_physical]``.
            loads: int64 ``[n_logical]``.

        Returns:
            Share of each class, float32 ``[n_groups, group_size, classes]``, 1 for an empty class; and load of the
            expert in each own slot over the largest, float32 ``[n_groups, group_size, n_own]``.
        """
        own = self.own_slots(phy2log)
        original = self.original_first(phy2log)[:, 0]
        stays, load = quota[original][own].double(), loads[own].double()
        n_copied = self.classes * self.combined
        by_class = (self.n_groups, self.group_size, self.combined, self.classes)
        kept = stays[:, :, :n_copied].reshape(by_class).sum(2)
        whole = load[:, :, :n_copied].reshape(by_class).sum(2)
        share = torch.where(whole > 0, kept / whole.clamp_min(1), torch.ones_like(whole))
        return share.float(), (load / load.max().clamp_min(1)).float()

    def quotas(self, phy2log: torch.Tensor, counts: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Whole-token quotas that keep ``floor(share * count)`` tokens of each expert with its owner.

        Args:
            phy2log: the placement, int32 ``[n_physical]``.
            counts: tokens to be mapped, int32 ``[n_logical]``.
            share: float64 ``[n_groups, group_size, classes]``.

        Returns:
            int32 ``[n_physical]``.
        """
        own = self.own_slots(phy2log)
        stays = torch.ones(self.n_logical, dtype=torch.float64, device=phy2log.device)
        stays[own[:, :, : self.classes * self.combined]] = share.repeat(1, 1, self.combined)
        kept = (stays * counts).floor().int()
        original, copy = self.original_first(phy2log).unbind(1)
        copied = copy >= 0
        quota = torch.zeros(self.n_physical, dtype=torch.int32, device=phy2log.device)
        quota[original] = kept
        quota[copy[copied]] = (counts - kept)[copied]
        return quota


def checked_layout(shape: tuple[int, int], n_physical: int, n_logical: int, n_ranks: int) -> Layout:
    """Return the layout of a topology, or say why there is none.

    Args:
        shape: of the topology ``r2o``: ranks of a group, classes.
        n_physical: slots on all ranks.
        n_logical: experts.
        n_ranks: ranks.

    Raises:
        TypeError, ValueError: with the value seen and the value allowed.
    """
    group_size, classes = shape
    n_physical = whole_number("n_routed_experts", n_physical, 1)
    n_logical = whole_number("n_logical_routed_experts", n_logical, 1)
    whole_number("group_size (rows of redundant_to_original)", group_size, 1, MAX_GROUP_SIZE)
    check_divides("ep_size", n_ranks, "group_size", group_size)
    check_divides("n_routed_experts", n_physical, "ep_size", n_ranks)
    check_divides("n_logical_routed_experts", n_logical, "ep_size", n_ranks)
    n_own = n_logical // n_ranks
    redundant = n_physical // n_ranks - n_own
    if redundant < 0 or (redundant > 0 and classes == 0) or (classes > 0 and redundant % classes):
        raise ValueError(
            f"n_routed_experts is {n_physical}: {redundant} redundant slots on each of {n_ranks} ranks, "
            f"allowed is a multiple of the {classes} columns of redundant_to_original"
        )
    if redundant > n_own:
        raise ValueError(
            f"n_routed_experts is {n_physical}: {redundant} redundant slots on each rank copy as many own experts "
            f"of another, allowed are at most the {n_own} own experts of a rank"
        )
    if classes > n_own:
        raise ValueError(
            f"redundant_to_original has {classes} columns, allowed are at most the {n_own} own experts of a rank"
        )
    return Layout(n_ranks, group_size, n_physical, n_logical, classes, redundant // classes if classes else 0)
