"""A stand-in for DeepEP on machines without GPUs: the part of its interface that lplb and the example use, over gloo.

Names, arguments, results and dtypes are those of https://github.com/deepseek-ai/DeepEP (``deep_ep.Buffer`` of 1.x and
``deep_ep.ElasticBuffer`` of 2.x); what DeepEP asserts is refused here, too. Written for clarity and not for speed.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

__all__ = ["Buffer", "ElasticBuffer"]


class _Runtime:
    """What DeepEP's C++ says of the nodes."""

    def __init__(self, rank: int, size: int, ranks_per_node: int) -> None:
        self.rank, self.size, self.ranks_per_node = rank, size, ranks_per_node

    def get_num_rdma_ranks(self) -> int:
        """How many nodes there are."""
        return max(1, self.size // self.ranks_per_node)

    def get_rdma_rank(self) -> int:
        """Which node this rank is on."""
        return self.rank // self.ranks_per_node


class _Handle(NamedTuple):
    """What combine needs of its dispatch."""

    tokens: torch.Tensor
    """The tokens in the order of sending; one is there once for every rank that has one of its experts."""
    sent: list[int]
    received: list[int]
    n_tokens: int


class Buffer:
    """The interface of ``deep_ep.Buffer``; ``ranks_per_node`` is 8 there, whatever the servers have."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        *,
        ranks_per_node: int = 8,
    ) -> None:
        """See the class."""
        self.group = group
        self.rank, self.group_size = group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.runtime = _Runtime(self.rank, self.group_size, ranks_per_node)

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[Any, ...]:
        """Count what goes where.

        Returns:
            Tokens per rank int32 ``[ranks]``, per node int32 ``[nodes]`` or ``None`` where there is one, tokens per
            expert int32 ``[num_experts]``, which token goes to which rank bool ``[tokens, ranks]``, and the event.
        """
        in_rank = _in_rank(topk_idx, num_experts, self.group_size)
        nodes = self.runtime.get_num_rdma_ranks()
        in_node = in_rank.view(len(in_rank), nodes, self.group_size // nodes).any(2)
        per_node = in_node.sum(0, dtype=torch.int32) if nodes > 1 else None
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return in_rank.sum(0, dtype=torch.int32), per_node, per_expert, in_rank, None

    def dispatch(
        self,
        x: torch.Tensor,
        *,
        num_tokens_per_rank: torch.Tensor,
        num_tokens_per_rdma_rank: torch.Tensor | None,
        is_token_in_rank: torch.Tensor,
        num_tokens_per_expert: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> tuple[Any, ...]:
        """Send every token once to every rank that has one of its experts.

        Returns:
            Received tokens, their experts counted from the rank's first (-1: on another rank), their weights, the list
            of tokens per local expert, the handle for `combine`, and the event.
        """
        found = _dispatch(self.group, x, is_token_in_rank, topk_idx, topk_weights, len(num_tokens_per_expert))
        received, experts, weights, handle = found
        n_local = len(num_tokens_per_expert) // self.group_size
        counts = torch.bincount(experts[experts >= 0], minlength=n_local).tolist()
        return received, experts, weights, counts, handle, None

    def combine(self, x: torch.Tensor, handle: _Handle) -> tuple[torch.Tensor, None, None]:
        """Send results back and add up those of each token, without weights."""
        return _combine(self.group, x, handle), None, None


class ElasticBuffer:
    """The interface of ``deep_ep.ElasticBuffer``; ``ranks_per_node`` is the NVLink domain there."""

    def __init__(self, group: dist.ProcessGroup, *, allow_hybrid_mode: bool = True, ranks_per_node: int = 8) -> None:
        """See the class."""
        self.group = group
        self.rank_idx, self.num_ranks = group.rank(), group.size()
        self._domains = max(1, self.num_ranks // ranks_per_node), min(self.num_ranks, ranks_per_node)
        self._hybrid = allow_hybrid_mode

    def get_physical_domain_size(self) -> tuple[int, int]:
        """Nodes, and ranks of each."""
        return self._domains

    def get_logical_domain_size(self) -> tuple[int, int]:
        """The same in hybrid mode, otherwise one domain."""
        return self._domains if self._hybrid else (1, self.num_ranks)

    def dispatch(
        self, x: torch.Tensor, *, topk_idx: torch.Tensor, topk_weights: torch.Tensor, num_experts: int
    ) -> tuple[Any, ...]:
        """As `Buffer.dispatch`, which here finds the layout by itself; no list of counts among the results."""
        in_rank = _in_rank(topk_idx, num_experts, self.num_ranks)
        return *_dispatch(self.group, x, in_rank, topk_idx, topk_weights, num_experts), None

    def combine(self, x: torch.Tensor, handle: _Handle) -> tuple[torch.Tensor, None, None]:
        """As `Buffer.combine`."""
        return _combine(self.group, x, handle), None, None


def _in_rank(topk_idx: torch.Tensor, num_experts: int, n_ranks: int) -> torch.Tensor:
    assert topk_idx.dtype == torch.int64, topk_idx.dtype
    assert topk_idx.dim() == 2, topk_idx.shape
    assert topk_idx.is_contiguous()
    assert num_experts % n_ranks == 0, (num_experts, n_ranks)
    ranks = torch.where(topk_idx < 0, -1, topk_idx // (num_experts // n_ranks))
    return (ranks[:, :, None] == torch.arange(n_ranks)).any(1)


def _dispatch(
    group: dist.ProcessGroup,
    x: torch.Tensor,
    in_rank: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
) -> tuple[Any, ...]:
    assert x.dtype == torch.bfloat16, x.dtype
    assert topk_weights.dtype == torch.float32, topk_weights.dtype
    n_local = num_experts // group.size()
    ranks, tokens = in_rank.T.nonzero(as_tuple=True)  # by rank, then by token
    local = topk_idx[tokens] - ranks[:, None] * n_local
    here = (local >= 0) & (local < n_local) & (topk_idx[tokens] >= 0)
    sent = in_rank.sum(0)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    handle = _Handle(tokens, sent.tolist(), received.tolist(), len(x))
    rows = (x[tokens], torch.where(here, local, -1), torch.where(here, topk_weights[tokens], 0.0))
    return *(_exchanged(group, row, handle.received, handle.sent) for row in rows), handle


def _combine(group: dist.ProcessGroup, x: torch.Tensor, handle: _Handle) -> torch.Tensor:
    back = _exchanged(group, x, handle.sent, handle.received)
    sums = torch.zeros(handle.n_tokens, x.shape[1])
    return sums.index_add_(0, handle.tokens, back.float()).bfloat16()


def _exchanged(group: dist.ProcessGroup, rows: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
    as_bytes = rows.contiguous().view(torch.uint8)  # gloo has no bfloat16
    found = as_bytes.new_empty(sum(received), as_bytes.shape[1])
    dist.all_to_all_single(found, as_bytes, received, sent, group=group)
    return found.view(rows.dtype)
