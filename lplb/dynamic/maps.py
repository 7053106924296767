"""What routing reads of a placement, as one rank sees it: tables on the host, and tensors that keep their addresses."""

import numpy as np
import numpy.typing as npt
import torch

from lplb.placement import Placement

__all__ = ["Maps", "ranks_asked", "tables"]

_ALIGNMENT = 4  # int32 entries: tables begin at multiples of 16 bytes, as kernels like to read them


def ranks_asked(placement: Placement, ranks_per_node: int) -> npt.NDArray[np.int32]:
    """Say which rank each source sends an expert's tokens to, if it may send them to one rank alone.

    A rank that has the expert asks itself, others a rank of their own node, where one has it, and what is left asks
    the copies that the fewest sources ask so far. Among equals copy ``e`` (modulo the number of copies) of expert
    ``e`` comes first, so that no rank gets what is left over of every expert. The copies of a node are asked by
    numbers of its ranks that differ by one at most.

    Args:
        placement: where the experts are.
        ranks_per_node: consecutive ranks that are one node.

    Returns:
        int32 ``[n_ranks, n_logical]``, ranks.
    """
    slots = placement.log2phy.numpy()
    n_logical, most = slots.shape
    held = slots >= 0
    rank_of = np.where(held, slots // placement.slots_per_rank, -1)
    node_of = np.where(held, rank_of // ranks_per_node, -1)
    turn = (np.arange(most) - np.arange(n_logical)[:, None]) % placement.logcnt.numpy()[:, None].astype(np.int64)
    taken = held.astype(np.int64)  # by their own ranks
    asked = np.full((placement.n_ranks, n_logical), -1, dtype=np.int32)
    asked[placement.rank_of.numpy(), placement.phy2log.numpy()] = placement.rank_of.numpy()
    for far in (False, True):
        for rank in range(placement.n_ranks):
            on_node = node_of == rank // ranks_per_node
            experts = np.flatnonzero((asked[rank] < 0) & (on_node.any(1) != far))
            allowed = (held if far else on_node)[experts]
            order = taken[experts] * most + turn[experts]
            copy = np.where(allowed, order, np.iinfo(np.int64).max).argmin(1)
            taken[experts, copy] += 1
            asked[rank, experts] = rank_of[experts, copy]
    return asked


def tables(placement: Placement, rank: int, ranks_per_node: int) -> dict[str, npt.NDArray[np.int32]]:
    """Return the tables of a placement that `Maps` has, by name, as one rank sees them."""
    n, most = placement.slots_per_rank, most_copies(placement)
    own = placement.phy2log.numpy()[rank * n : (rank + 1) * n]
    local = np.full(placement.n_logical, -1, dtype=np.int32)
    local[own] = np.arange(n)
    log2phy = np.full((placement.n_logical, most), -1, dtype=np.int32)
    log2phy[:, : placement.log2phy.shape[1]] = placement.log2phy.numpy()
    return {
        "device_indices_map": ranks_asked(placement, ranks_per_node)[rank],
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
