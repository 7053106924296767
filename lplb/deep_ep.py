"""What a DeepEP buffer says of its ranks. DeepEP itself is not imported: what has its interface will do.

The interface is that of https://github.com/deepseek-ai/DeepEP: ``deep_ep.Buffer`` of 1.x (``deep_ep/buffer.py``), and
``deep_ep.ElasticBuffer`` of 2.x (``deep_ep/buffers/elastic.py``) with what has its methods.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from lplb.arguments import whole_number
from lplb.exchange import Distributed, Exchange, Known

__all__ = ["BufferRanks", "check_ranks", "group_of", "read"]

_ALLOWED = "allowed is a deep_ep.Buffer or a deep_ep.ElasticBuffer"


@dataclass(frozen=True)
class BufferRanks:
    """The ranks of a DeepEP buffer. Equal where nothing that a planner takes from a buffer differs."""

    group: dist.ProcessGroup
    """The expert-parallel group."""
    rank: int
    """This rank in it."""
    size: int
    """How many ranks."""
    ranks_per_node: int
    """Consecutive ranks that reach each other over NVLink, as DeepEP sees it."""


def group_of(buffer: Any) -> dist.ProcessGroup:
    """Return the process group of a buffer.

    Raises:
        TypeError: it has none; DeepEP can also be given an MPI communicator, over which lplb does not send.
    """
    if not hasattr(buffer, "group"):
        raise TypeError(f"buffer is a {type(buffer).__name__} without the attribute group, {_ALLOWED}")
    group = buffer.group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"buffer.group is a {type(group).__name__}, allowed is the torch.distributed.ProcessGroup that a DeepEP "
            "buffer is made with"
        )
    return group


def read(buffer: Any) -> BufferRanks:
    """Read a buffer. Local: no communication.

    A node is DeepEP's: for a ``Buffer`` what shares an RDMA rank, which are 8 ranks whatever a server has; for an
    ``ElasticBuffer`` the physical NVLink domain, in and out of hybrid mode.

    Args:
        buffer: what has the interface of ``deep_ep.Buffer`` or ``deep_ep.ElasticBuffer``.

    Raises:
        TypeError: it has another interface.
        ValueError: it was destroyed, or what it says does not fit together.
    """
    group = group_of(buffer)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in buffer.group, allowed is a buffer made by the ranks of its group")
    if getattr(buffer, "runtime", buffer) is None:
        raise ValueError("buffer.runtime is None, allowed is a buffer that was not destroyed")
    for names, found in ((("rank", "rank_idx"), rank), (("group_size", "num_ranks"), size)):
        for name in names:
            told = getattr(buffer, name, found)
            if told != found:
                raise ValueError(f"buffer.{name} is {told}, allowed is that of buffer.group, {found}")
    if hasattr(buffer, "get_physical_domain_size"):
        return BufferRanks(group, rank, size, _elastic_node(buffer, size))
    if hasattr(getattr(buffer, "runtime", None), "get_num_rdma_ranks"):
        return BufferRanks(group, rank, size, _node(buffer.runtime, rank, size))
    raise TypeError(
        f"buffer is a {type(buffer).__name__} with neither runtime.get_num_rdma_ranks nor get_physical_domain_size, "
        f"{_ALLOWED}"
    )


def _node(runtime: Any, rank: int, size: int) -> int:
    nodes = whole_number("buffer.runtime.get_num_rdma_ranks()", runtime.get_num_rdma_ranks(), 1)
    if size % nodes:
        raise ValueError(
            f"buffer.runtime.get_num_rdma_ranks() is {nodes}, allowed is a divisor of the group's size, {size}"
        )
    node, expected = runtime.get_rdma_rank(), rank // (size // nodes)
    if node != expected:
        raise ValueError(
            f"buffer.runtime.get_rdma_rank() is {node} on rank {rank}, allowed is {expected}: {nodes} nodes of "
            f"{size // nodes} consecutive ranks"
        )
    return size // nodes


def _elastic_node(buffer: Any, size: int) -> int:
    physical = _domains("get_physical_domain_size", buffer.get_physical_domain_size(), size)
    if hasattr(buffer, "get_logical_domain_size"):
        logical = _domains("get_logical_domain_size", buffer.get_logical_domain_size(), size)
        if logical not in (physical, (1, size)):
            raise ValueError(
                f"buffer.get_logical_domain_size() is {logical}, allowed is get_physical_domain_size() = {physical} "
                f"(hybrid mode) or {(1, size)}"
            )
    return physical[1]


def _domains(method: str, told: Any, size: int) -> tuple[int, int]:
    sizes = tuple(told) if isinstance(told, (tuple, list)) else (told,)
    if len(sizes) != 2 or not all(isinstance(n, int) and n >= 1 for n in sizes) or sizes[0] * sizes[1] != size:
        raise ValueError(
            f"buffer.{method}() is {told!r}, allowed are two whole numbers, nodes and ranks of a node, whose product "
            f"is the group's size, {size}"
        )
    return sizes[0], sizes[1]


def check_ranks(found: BufferRanks, ep_size: int, before: Exchange) -> None:
    """Refuse a buffer whose ranks are not the planner's.

    Args:
        found: the ranks of the buffer.
        ep_size: the planner's number of ranks.
        before: the planner's exchange, or that of the buffer for a planner without a group.

    Raises:
        ValueError: another number of ranks, other ranks, or the same in another order.
    """
    if isinstance(before, Known):
        raise ValueError("group is an lplb.exchange.Known, allowed with a DeepEP buffer are a process group and None")
    if found.size != ep_size:
        raise ValueError(f"buffer.group has {found.size} ranks, allowed is ep_size = {ep_size}")
    if isinstance(before, Distributed):
        theirs, ours = _members(found.group), _members(before.group)
        if sorted(theirs) != sorted(ours):
            raise ValueError(f"buffer.group is of ranks {theirs}, allowed are those of the planner's group, {ours}")
        if theirs != ours:
            raise ValueError(f"buffer.group has its ranks in the order {theirs}, allowed is the planner's, {ours}")
    if found.rank != before.rank:
        raise ValueError(f"this is rank {found.rank} of buffer.group, allowed is the planner's rank, {before.rank}")


def _members(group: dist.ProcessGroup) -> list[int]:
    """Global ranks in the order of the group."""
    return [dist.get_global_rank(group, rank) for rank in range(dist.get_world_size(group))]
