"""Weights of the experts in one rank's slots: homes are parameters, copies are leaves beside them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lplb.placement import Placement
from lplb.weights import Move, Moved, WeightMover, moves_between

__all__ = ["SlotWeights", "homes_kept", "moves_to_homes"]


class SlotWeights(nn.Module):
    """One tensor per field for all slots, and a leaf for every slot that is a row of it.

    The leaf of a home slot is a parameter, in a `torch.nn.ParameterDict` named after the field, under its expert's
    number. Those of other slots have gradients too, but belong to no module and so to no optimizer or state dict. An
    optimizer that changes a parameter changes the row. What replaces parameters (`to`, copies,
    ``load_state_dict(assign=True)``) makes the leaves rows again.

    Args:
        shapes: fields by name, and their shape for one expert.
        experts: the logical expert in each slot.
        is_home: for each slot whether its leaf is a parameter; one home at most for an expert.
        device: where the weights are.
        dtype: a floating dtype.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        experts: Sequence[int],
        is_home: Sequence[bool],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """See the class; the weights are not initialised."""
        super().__init__()
        self.experts = list(experts)
        self.is_home = list(is_home)
        self._rows: dict[str, Tensor] = {}
        self._leaves: dict[str, list[Tensor]] = {}
        with torch.inference_mode(False):  # whatever mode the caller builds models in
            for name, shape in shapes.items():
                setattr(self, name, nn.ParameterDict())
                rows = torch.empty(len(self.experts), *shape, device=device, dtype=dtype)
                self._rows[name] = rows
                self._leaves[name] = [row.detach().requires_grad_() for row in rows]
                for slot, row in enumerate(rows):
                    if self.is_home[slot]:
                        parameter = nn.Parameter(row.detach())
                        self._leaves[name][slot] = self._parameters_of(name)[self._key(slot)] = parameter
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call, unused-ignore]

    @property
    def trained(self) -> bool:
        """Whether any leaf requires gradients."""
        return any(leaf.requires_grad for leaves in self._leaves.values() for leaf in leaves)

    def check_trained_alike(self) -> None:
        """Refuse leaves of which some require gradients and others do not: their experts are about to move.

        Raises:
            ValueError: names the first that differs.
        """
        for name, leaves in self._leaves.items():
            odd = next(
                (slot for slot, leaf in enumerate(leaves) if leaf.requires_grad != leaves[0].requires_grad), None
            )
            if odd is not None:
                raise ValueError(
                    f"requires_grad of {name} is {leaves[odd].requires_grad} for expert {self.experts[odd]}, allowed "
                    f"is that of expert {self.experts[0]}, {leaves[0].requires_grad}, while experts move"
                )

    def leaves(self, name: str) -> list[Tensor]:
        """Return the leaf of every slot; the list is this module's own."""
        return self._leaves[name]

    def rows(self, name: str) -> Tensor:
        """Return the field's tensor ``[slots, ...]``, which has no gradient."""
        return self._rows[name]

    def stacked(self, name: str) -> Tensor:
        """Return the field's tensor ``[slots, ...]``; its gradient goes to the leaves, without a copy."""
        stacked: Tensor = _Stacked.apply(self._rows[name], *self._leaves[name])  # type: ignore[no-untyped-call, unused-ignore]
        return stacked

    def move_into(self, other: "SlotWeights", moves: Sequence[Move], group: dist.ProcessGroup | None) -> Moved:
        """Move experts into other slots, and make parameters the other's where experts stay at home. Collective.

        Args:
            other: of the same fields, not initialised. A slot that no move goes to has the expert of the same slot
                here.
            moves: on every rank the same.
            group: the ranks, ``None`` for one.

        Returns:
            What this rank sent and received.

        Raises:
            TypeError, ValueError, RuntimeError: as `lplb.weights.WeightMover.move`; these slots are as before.
        """
        rank = 0 if group is None else dist.get_rank(group)
        filled = {move.target_slot for move in moves if move.target_rank == rank}
        rows, into = list(self._rows.values()), list(other._rows.values())
        with torch.no_grad():
            for slot in set(range(len(other.experts))) - filled:
                for now, new in zip(rows, into, strict=True):
                    new[slot].copy_(now[slot])
        moved = WeightMover(rows, group).move(moves, into=into)
        other._adopt(self)
        return moved

    def _adopt(self, before: "SlotWeights") -> None:
        """Take over parameters, which take the values that are here; an optimizer keeps their state."""
        for name, leaves in self._leaves.items():
            old, new = before._parameters_of(name), self._parameters_of(name)
            trained = before._leaves[name][0].requires_grad
            for slot, leaf in enumerate(leaves):
                leaf.requires_grad_(trained)
                if self.is_home[slot] and self._key(slot) in old:
                    leaves[slot] = new[self._key(slot)] = old[self._key(slot)]
                    leaves[slot].data = self._rows[name][slot]

    @torch.no_grad()
    def fill(self, expert: int, weights: Mapping[str, Tensor]) -> None:
        """Copy an expert's weights, by field, into all its slots."""
        for slot, held in enumerate(self.experts):
            if held == expert:
                for name, weight in weights.items():
                    self._rows[name][slot].copy_(weight)

    def _key(self, slot: int) -> str:
        return str(self.experts[slot])

    def _parameters_of(self, name: str) -> nn.ParameterDict:
        parameters: nn.ParameterDict = getattr(self, name)
        return parameters

    def _copies(self) -> list[Tensor]:
        slots = [slot for slot, home in enumerate(self.is_home) if not home]
        return [leaves[slot] for leaves in self._leaves.values() for slot in slots]

    def _make_rows(self, *, copy: bool) -> None:
        """Make every leaf a row again, with its own values or with those of the row."""
        for name, rows in self._rows.items():
            leaves = self._leaves[name]
            for slot, row in enumerate(rows):
                leaf = self._parameters_of(name)[self._key(slot)] if self.is_home[slot] else leaves[slot]
                if copy and leaf.data_ptr() != row.data_ptr():
                    row.copy_(leaf.detach())
                if torch._has_compatible_shallow_copy_type(leaf, row):
                    leaf.data = row
                else:  # for example from "meta" to the CPU; parameters were replaced before
                    leaf = row.detach().requires_grad_(leaf.requires_grad)
                leaves[slot] = leaf

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SlotWeights":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call, unused-ignore]
        copies = self._copies()
        with torch.no_grad():
            self._rows = {name: fn(rows) for name, rows in self._rows.items()}
            grads = [None if leaf.grad is None else fn(leaf.grad) for leaf in copies]
        for leaf in copies:
            leaf.grad = None  # a gradient must be like its leaf at every moment
        self._make_rows(copy=False)
        for leaf, grad in zip(self._copies(), grads, strict=True):
            leaf.grad = grad
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles have parameters apart from the rows; join them again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call, unused-ignore]
        self._make_rows(copy=False)


class _Stacked(torch.autograd.Function):
    """Hands out a tensor whose gradient is that of its rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *leaves: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.unbind()


def _after_load(module: nn.Module, _: object) -> None:
    assert isinstance(module, SlotWeights)
    with torch.no_grad():
        module._make_rows(copy=True)


def homes_kept(home: Tensor, before: Placement, after: Placement, default: Tensor) -> Tensor:
    """Return the homes of experts in a new placement: on the rank of the old one where that still has the expert.

    Args:
        home: slots before, ``[n_logical]``.
        before: the placement that they are of.
        after: the new placement.
        default: slots for experts whose home rank has them no more, ``[n_logical]``.

    Returns:
        int64 ``[n_logical]``.
    """
    rank = before.rank_of[home]
    stays = (after.log2phy >= 0) & (after.rank_of[after.log2phy.long()] == rank[:, None])
    kept = after.log2phy.gather(1, stays.int().argmax(1, keepdim=True)).flatten()
    return torch.where(stays.any(1), kept, default).long()


def moves_to_homes(before: Placement, home: Tensor, after: Placement, new_home: Tensor) -> list[Move]:
    """Return the moves that lead to a new placement, so that homes come from homes, whatever copies hold.

    Args:
        before: where the experts are.
        home: the slots of originals, ``[n_logical]``.
        after: where they are to be, on as many ranks.
        new_home: the slots of originals then.

    Returns:
        Moves in the order of targets; what keeps rank and slot is none.
    """
    moves = {move[3:5]: move for move in moves_between(before, after)}
    for expert, (old, new) in enumerate(zip(home.tolist(), new_home.tolist(), strict=True)):
        source, target = divmod(old, before.slots_per_rank), divmod(new, after.slots_per_rank)
        if source != target:
            moves[target] = Move(expert, *source, *target)
    return [moves[target] for target in sorted(moves)]
