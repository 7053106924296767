"""What routing reads of a placement, as one rank sees it: tables on the host, and tensors that keep their addresses."""

import numpy as np
import numpy.typing as npt
import torch

from lplb.placement import Placement

__all__ = ["Maps", "ranks_asked", "tables"]

_ALIGNMENT = 4  # int32 entries: tables begin at multiples of 16 bytes, as kernels like to read them


def ranks_asked(placement: Placement, rank: int, ranks_per_node: int) -> npt.NDArray[np.int32]:
    """Say which rank a source sends each expert's tokens to, if it may send them to one rank alone.

    A rank that has the expert asks itself. One whose node has it asks there: the ranks of a node that lack it take its
    copies on the node in turn. What is left, in the order of ranks, asks whichever copy the fewest sources ask so far.
    Among equals copy ``e`` (modulo the number of copies) of expert ``e`` comes first, so that no rank gets what is left
    over of every expert.

    Args:
        placement: where the experts are.
        rank: the source.
        ranks_per_node: consecutive ranks that are one node.

    Returns:
        int32 ``[n_logical]``, ranks.
    """
    copies = _Copies(placement, ranks_per_node)
    own, on_node = copies.rank == rank, copies.node == rank // ranks_per_node
    lacking = rank % ranks_per_node - (on_node & (copies.rank < rank)).sum(1)  # ranks of the node before this one
    near = on_node & (copies.position == lacking[:, None] % copies.on_node)
    chosen = np.where(on_node.any(1, keepdims=True), near, copies.asked_from_afar(rank))
    chosen = np.where(own.any(1, keepdims=True), own, chosen)
    asked: npt.NDArray[np.int32] = copies.rank[chosen].astype(np.int32)
    return asked


class _Copies:
    """Tables ``[n_logical, copies]`` of an expert's copies, in the order in which they are asked among equals."""

    def __init__(self, placement: Placement, ranks_per_node: int) -> None:
        slots = placement.log2phy.numpy().astype(np.int64)
        n_logical, most = slots.shape
        count = placement.logcnt.numpy().astype(np.int64)[:, None]
        turn = (np.arange(most) - np.arange(n_logical)[:, None]) % count
        turn[slots < 0] = most  # padding comes last
        slots = np.take_along_axis(slots, turn.argsort(1, kind="stable"), 1)
        self.held = slots >= 0
        self.rank = np.where(self.held, slots // placement.slots_per_rank, -1)
        self.node = np.where(self.held, self.rank // ranks_per_node, -1)
        self.first = self.node * ranks_per_node  # rank of its node
        self.node_size = np.minimum(ranks_per_node, placement.n_ranks - self.first)
        same_node = self.node[:, :, None] == self.node[:, None, :]
        self.on_node = same_node.sum(2)  # copies, itself included
        self.position = np.tril(same_node, -1).sum(2)  # among those

    def asked_from_afar(self, rank: int) -> npt.NDArray[np.bool_]:
        """Which copy, one in each row, a rank asks whose node lacks the expert."""
        lacking = self.node_size - self.on_node
        taken = 1 - (self.position - lacking) // self.on_node  # by itself and its share of its node's, rounded up
        # this rank is the nth that asks from afar: not counted are the nodes that have the expert
        ahead = np.clip(rank - self.first, 0, self.node_size) * (self.held & (self.position == 0))
        nth = rank - ahead.sum(1)
        # copy c is asked for the (taken[c] + i)-th time at level taken[c] + i; levels fill one after the other
        low = np.where(self.held, taken, np.iinfo(np.int64).max).min(1)
        high = low + nth + 1
        while (high - low > 1).any():
            middle = (low + high) // 2
            full = (np.maximum(middle[:, None] - taken, 0) * self.held).sum(1) <= nth
            low, high = np.where(full, middle, low), np.where(full, high, middle)
        nth_at_level = nth - (np.maximum(low[:, None] - taken, 0) * self.held).sum(1)
        has_room = self.held & (taken <= low[:, None])
        chosen: npt.NDArray[np.bool_] = has_room & (has_room.cumsum(1) == nth_at_level[:, None] + 1)
        return chosen


def tables(placement: Placement, rank: int, ranks_per_node: int) -> dict[str, npt.NDArray[np.int32]]:
    """Return the tables of a placement that `Maps` has, by name, as one rank sees them."""
    n, most = placement.slots_per_rank, most_copies(placement)
    own = placement.phy2log.numpy()[rank * n : (rank + 1) * n]
    local = np.full(placement.n_logical, -1, dtype=np.int32)
    local[own] = np.arange(n)
    log2phy = np.full((placement.n_logical, most), -1, dtype=np.int32)
    log2phy[:, : placement.log2phy.shape[1]] = placement.log2phy.numpy()
    return {
        "device_indices_map": ranks_asked(placement, rank, ranks_per_node),
        "local_expert_indices_map": local,
        "phy2log": placement.phy2log.numpy(),
        "log2phy": log2phy,
        "logcnt": placement.logcnt.numpy(),
    }


def most_copies(placement: Placement) -> int:
    """The most copies that an expert can have in any placement of these sizes."""
    return min(placement.n_ranks, placement.n_physical - placement.n_logical + 1)


class Maps:
    """The tables of a placement in one int32 tensor, so that one copy makes another placement's current.

    Args:
        host: what `tables` returned.
        device: where the tensors are.
    """

    device_indices_map: torch.Tensor
    """For each expert the one rank that this rank sends its tokens to, ``[n_logical]``: see `ranks_asked`."""
    local_expert_indices_map: torch.Tensor
    """For each expert its slot on this rank, counted from 0; -1 where it has none, ``[n_logical]``."""
    phy2log: torch.Tensor
    """The expert of each slot of all ranks, ``[n_physical]``."""
    log2phy: torch.Tensor
    """Slots of each expert, ascending, padded with -1 to what any placement of these sizes needs."""
    logcnt: torch.Tensor
    """Number of slots of each expert, ``[n_logical]``."""
    flat: torch.Tensor
    """All of them, one behind the other."""

    def __init__(self, host: dict[str, npt.NDArray[np.int32]], device: torch.device) -> None:
        """See the class."""
        ends = np.cumsum([-(-table.size // _ALIGNMENT) * _ALIGNMENT for table in host.values()]).tolist()
        with torch.inference_mode(False):  # whatever mode the caller builds models in
            self.flat = torch.zeros(ends[-1], dtype=torch.int32, device=device)
            for (name, table), begin in zip(host.items(), [0, *ends], strict=False):
                setattr(self, name, self.flat[begin : begin + table.size].view(table.shape))
        self.write(host)

    def write(self, host: dict[str, npt.NDArray[np.int32]]) -> None:
        """Take over other tables, of the same sizes; on CUDA the host may wait for the current stream."""
        with torch.inference_mode(False):
            packed = torch.zeros_like(self.flat, device="cpu")
            for name, table in host.items():
                begin = getattr(self, name).storage_offset()
                packed[begin : begin + table.size] = torch.from_numpy(np.ascontiguousarray(table).reshape(-1))
            self.flat.copy_(packed)
