"""What a rank computes with its own experts and with guests, and its gradient: three steps that autograd sees.

    lent     own weights on their way into the layer; backward they wait for what guests' gradients add to them
    served   rows through the experts; backward it has guests' weights sent again, and their gradients sent home
    ahead    rows as they are; backward it lets guests' weights set out before the gradients of tokens do

`served` lies between the two exchanges of tokens, forward and backward, so all ranks come to it in one order.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

if TYPE_CHECKING:
    from lplb.lending import Lender, Loan

__all__ = ["ahead", "lent", "row_bytes", "served"]


def row_bytes(hidden_size: int, ffn_size: int, itemsize: int) -> tuple[int, int]:
    """Bytes for every row that a rank receives: kept from forward to backward, and beside them at the peak of backward.

    Kept are the row and its two products with gate and up, and its place among the rows as they came and as experts
    have them. At the peak there are gradients of what the expert made of it and of the row, three times ``ffn_size`` on
    the way from one to the other, and what came in the exchange before, which its backend lets go of when it likes.
    """
    kept = itemsize * (hidden_size + 2 * ffn_size) + 2 * torch.int64.itemsize
    return kept, itemsize * (3 * hidden_size + 3 * ffn_size)


class Bank:
    """Experts in consecutive slots, and how many consecutive rows each has.

    Args:
        gate_up: weights by slot, ``[hidden_size, 2 * ffn_size]``.
        down: weights by slot, ``[ffn_size, hidden_size]``.
        per_slot: rows of each.
        grouped: whether one launch is to do all slots; weights are stacked tensors then.
    """

    def __init__(self, gate_up: Any, down: Any, per_slot: list[int], grouped: bool) -> None:
        """See the class."""
        self.gate_up, self.down = gate_up, down
        self._per_slot = per_slot
        self._ends: Tensor | None = None
        if grouped and per_slot:
            self._ends = torch.tensor(per_slot).cumsum(0).to(gate_up.device, torch.int32)

    def _times(self, rows: Tensor, weights: Any, out: Tensor, *, turned: bool = False) -> None:
        """Write the product of every row with its expert's weights."""
        if self._ends is not None:
            out.copy_(functional.grouped_mm(rows, weights.mT if turned else weights, offs=self._ends))
            return
        for part, weight, into in zip(
            torch.split(rows, self._per_slot), weights, torch.split(out, self._per_slot), strict=True
        ):
            if len(part):
                torch.mm(part, weight.T if turned else weight, out=into)

    def _outer(self, left: Tensor, right: Tensor, out: Any) -> None:
        """Write, for every slot, the sum of the outer products of its rows; zeros for a slot without rows."""
        if self._ends is not None:
            out.copy_(functional.grouped_mm(left.T, right, offs=self._ends))
            return
        for a, b, into in zip(torch.split(left, self._per_slot), torch.split(right, self._per_slot), out, strict=True):
            torch.mm(a.T, b, out=into)

    def serve(self, rows: Tensor, inner: Tensor, out: Tensor) -> None:
        """Write into ``inner`` what gate and up make of the rows, and into ``out`` what the experts do."""
        if not self._per_slot:
            return
        self._times(rows, self.gate_up, inner)
        gate, up = inner.chunk(2, -1)
        self._times(functional.silu(gate).mul_(up), self.down, out)

    def differentiate(
        self, rows: Tensor, inner: Tensor, grad: Tensor, d_rows: Tensor | None, d_weights: tuple[Tensor, Tensor] | None
    ) -> None:
        """Write the gradients that are not ``None``; those of weights may be written over the weights themselves."""
        if not self._per_slot:
            return
        gate, up = inner.chunk(2, -1)
        d_inner = torch.empty_like(inner)
        d_gate, d_up = d_inner.chunk(2, -1)
        d_active = inner.new_empty(len(inner), inner.shape[1] // 2)
        self._times(grad, self.down, d_active, turned=True)
        torch.ops.aten.silu.out(gate, out=d_gate)
        if d_weights is not None:
            torch.mul(d_gate, up, out=d_up)
            self._outer(d_up, grad, d_weights[1])
        torch.mul(d_active, d_gate, out=d_up)
        d_active.mul_(up)
        torch.ops.aten.silu_backward.grad_input(d_active, gate, grad_input=d_gate)
        del d_active
        if d_rows is not None:
            self._times(d_inner, self.gate_up, d_rows, turned=True)
        if d_weights is not None:
            self._outer(rows, d_inner, d_weights[0])


def lent(lender: "Lender", leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The weights of this rank's slots; their gradients wait until those of guests have been added."""
    found: tuple[Tensor, ...] = _Lent.apply(lender, *leaves)  # type: ignore[no-untyped-call, unused-ignore]
    return found


class _Lent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lender: "Lender", *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.lender = lender
        ctx.set_materialize_grads(False)
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.lender.guests.wait()
        return None, *grads


def ahead(rows: Tensor, lender: "Lender", loan: "Loan", batch: int) -> Tensor:
    """The rows, whose gradients have guests' weights set out."""
    same: Tensor = _Ahead.apply(rows, lender, loan, batch)  # type: ignore[no-untyped-call, unused-ignore]
    return same


class _Ahead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, lender: "Lender", loan: "Loan", batch: int) -> Tensor:
        ctx.lender, ctx.loan = lender, loan
        ctx.save_for_backward(torch.tensor(batch))
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.lender.send_again(ctx.loan, int(ctx.saved_tensors[0]))
        return grad, None, None, None


def served(
    rows: Tensor,
    per_slot: list[int],
    lender: "Lender",
    loan: "Loan",
    batch: int,
    kept: Sequence[Tensor] | None,
    leaves: Sequence[Tensor],
    grouped: bool,
) -> Tensor:
    """What own experts and guests make of their rows. Collective, and so is its gradient.

    Args:
        rows: slot after slot, guests last, ``[rows, hidden_size]``.
        per_slot: rows of each slot.
        lender: of the layer.
        loan: what it lends for this batch.
        batch: its number.
        kept: where guests' weights come to and stay until the backward pass; ``None`` where they come to the shared
            slots, and come again for the backward pass.
        leaves: of `lent`, first gate and up, then down.
        grouped: as for `Bank`.
    """
    out: Tensor = _Served.apply(rows, per_slot, lender, loan, batch, kept, grouped, *leaves)  # type: ignore[no-untyped-call, unused-ignore]
    return out


class _Served(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        per_slot: list[int],
        lender: "Lender",
        loan: "Loan",
        batch: int,
        kept: Sequence[Tensor] | None,
        grouped: bool,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.per_slot, ctx.lender, ctx.loan, ctx.grouped, ctx.keeps = per_slot, lender, loan, grouped, kept is not None
        inner = rows.new_empty(len(rows), 2 * lender.guests.ffn_size)
        out = torch.empty_like(rows)
        residents, guests, n = _banks(ctx, leaves, lender.guests.fields if kept is None else kept)
        residents.serve(rows[:n], inner[:n], out[:n])
        lender.guests.wait()
        guests.serve(rows[n:], inner[n:], out[n:])
        # The number too is a tensor: what is computed again in a checkpointed region is another batch.
        ctx.save_for_backward(torch.tensor(batch), rows, inner, *leaves, *(kept or ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        batch, rows, inner, *weights = ctx.saved_tensors
        lender, loan = ctx.lender, ctx.loan
        n_leaves = 2 * lender.n_residents
        leaves, kept = weights[:n_leaves], weights[n_leaves:]
        room = lender.guests.fields
        if not ctx.keeps:
            lender.send_again(loan, int(batch))
        grad = grad.contiguous()
        d_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        own = lender.gradient_room() if any(ctx.needs_input_grad[-n_leaves:]) else None
        residents, guests, n = _banks(ctx, leaves, kept if ctx.keeps else room)
        residents.differentiate(rows[:n], inner[:n], grad[:n], None if d_rows is None else d_rows[:n], own)
        lender.guests.wait()
        theirs = lender.spoiled(loan) if loan.trained else None
        guests.differentiate(rows[n:], inner[n:], grad[n:], None if d_rows is None else d_rows[n:], theirs)
        if loan.trained:
            lender.bring_home(loan, own)
            # `lent` waits for that where its gradients are wanted; that no rank's backward pass ends before it is done,
            # and that an error in it is raised there, takes this.
            torch.autograd.Variable._execution_engine.queue_callback(lender.guests.wait)
        grads = [None] * n_leaves if own is None else [*own[0].unbind(), *own[1].unbind()]
        return d_rows, None, None, None, None, None, None, *grads


def _banks(ctx: Any, leaves: Sequence[Tensor], room: Sequence[Tensor]) -> tuple[Bank, Bank, int]:
    """Residents, guests, and how many rows are the residents'."""
    n, m, per_slot = ctx.lender.n_residents, ctx.loan.n_guests, ctx.per_slot
    stacked = ctx.lender.stacked() if ctx.grouped else (leaves[:n], leaves[n:])
    guests = Bank(room[0][:m], room[1][:m], per_slot[n : n + m], ctx.grouped)
    return Bank(stacked[0], stacked[1], per_slot[:n], ctx.grouped), guests, sum(per_slot[:n])
