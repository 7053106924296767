"""Rows of tokens: put in another order, exchanged between ranks, served by experts; each with its gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from lplb import exchange
from lplb.exchange import Exchange

__all__ = ["all_to_all", "grouped", "has_grouped_matmul", "inverse", "one_by_one", "permuted"]


def permuted(source: Tensor, index: Tensor, back: Tensor, times: int = 1) -> Tensor:
    """``source[index // times]``, where ``index`` is a permutation and ``back`` its inverse."""
    rows: Tensor = _Permuted.apply(source, index, back, times)  # type: ignore[no-untyped-call, unused-ignore]
    return rows


class _Permuted(torch.autograd.Function):
    """The gradient of a row of ``source`` adds its ``times`` parts in their order, not in that of ``index``."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor, back: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.times = times
        return source.index_select(0, index // times if times > 1 else index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        parts = grad.index_select(0, back)
        return (parts.view(-1, ctx.times, grad.shape[1]).sum(1) if ctx.times > 1 else parts), None, None, None


def all_to_all(rows: Tensor, receive: list[int], send: list[int], ranks: Exchange) -> Tensor:
    """Give ``send[r]`` rows to every rank ``r``, for ``receive[r]`` of its rows; gradients go back."""
    return _sent(rows, receive, send, ranks.group) if isinstance(ranks, exchange.Distributed) else rows


def _sent(rows: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
    got: Tensor = _AllToAll.apply(rows, receive, send, group)  # type: ignore[no-untyped-call, unused-ignore]
    return got


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, group
        got = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(got, rows.contiguous(), receive, send, group=group)
        return got

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _sent(grad, ctx.send, ctx.receive, ctx.group), None, None, None


def one_by_one(rows: Tensor, per_slot: list[int], gate_up: list[Tensor], down: list[Tensor]) -> Tensor:
    """Every slot's expert on its rows, slot after slot; slots without rows too, so that their gradients are zeros."""
    parts = zip(torch.split(rows, per_slot), gate_up, down, strict=True)
    return torch.cat([_swiglu(part @ first) @ second for part, first, second in parts])


def grouped(rows: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same in two launches; ``offsets`` int32 ``[slots]`` is where the rows of each slot end."""
    inner = _swiglu(functional.grouped_mm(rows, gate_up, offs=offsets))
    return functional.grouped_mm(inner, down, offs=offsets)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def has_grouped_matmul(rows: Tensor, ffn_size: int) -> bool:
    """Whether torch has it, for this device and dtype, and rows of matrices are whole 16 bytes, as it wants them."""
    aligned = rows.shape[1] * rows.element_size() % 16 == 0 and ffn_size * rows.element_size() % 16 == 0
    return rows.is_cuda and hasattr(functional, "grouped_mm") and rows.dtype != torch.float64 and aligned


def inverse(permutation: Tensor) -> Tensor:
    """Return where each number is in a permutation."""
    order = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, order)
