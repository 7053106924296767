"""Flat buffers from rank to rank: batches of point-to-point transfers within a process group."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from lplb import exchange
from lplb.arguments import seen
from lplb.weights.packing import FlatLayout

__all__ = ["Link", "checked_ranks", "says_where"]

TAG = 27000
"""Of the messages of a `Link`, for backends that have tags: away from those that callers use."""


def checked_ranks(name: str, group: object) -> exchange.Local | exchange.Distributed:
    """Return the ranks of a process group, or the one rank that ``None`` stands for.

    Raises:
        TypeError: ``group`` is neither.
        ValueError: this process is not in the group.
    """
    if group is None:
        return exchange.Local()
    if isinstance(group, dist.ProcessGroup):
        return exchange.Distributed(group)
    raise TypeError(f"{name} is {seen(group)}, allowed is a torch.distributed.ProcessGroup or None")


@contextlib.contextmanager
def says_where(where: str) -> Iterator[None]:
    """Say in what a backend raises, when a rank is lost or late, where it stopped."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{where}: {error}") from error


class Link:
    """Point-to-point transfers of flat buffers between the ranks of a group.

    Args:
        ranks: the group.
        device: where the tensors are that travel.
        tag: of all messages, for backends that have tags.

    Raises:
        ValueError: the group has no backend for the device.
    """

    backend: str
    """Of the group for the device; empty for one rank alone."""

    def __init__(self, ranks: exchange.Local | exchange.Distributed, device: torch.device, tag: int = TAG) -> None:
        """See the class."""
        self._group = ranks.group if isinstance(ranks, exchange.Distributed) else None
        self._tag = tag
        self._device = device
        self._carrier = device
        self.backend = ""
        if self._group is not None:
            # "cpu:gloo,cuda:nccl"
            carried = dict(part.split(":") for part in dist.get_backend_config(self._group).split(","))
            if device.type not in carried:
                raise ValueError(
                    f"the tensors are on {str(device)!r}, allowed are devices that the group has a backend for: "
                    f"{', '.join(sorted(carried))}"
                )
            self.backend = carried[device.type]
            if self.backend == "gloo":  # it sends tensors of the CPU only
                self._carrier = torch.device("cpu")

    def device_made_current(self) -> contextlib.AbstractContextManager[object]:
        """The tensors' CUDA device made current, as NCCL wants it."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def buffer(self, layout: FlatLayout) -> torch.Tensor:
        """A new flat buffer, uint8 ``[layout.nbytes]``, where the backend takes it from."""
        with torch.inference_mode(False):  # so that it can be written in any mode
            return torch.zeros(layout.nbytes, dtype=torch.uint8, device=self._carrier)

    def start(self, send: tuple[torch.Tensor, int] | None, receive: tuple[torch.Tensor, int] | None) -> list[Any]:
        """Begin one batch.

        Args:
            send: a buffer and the rank, within the group, that it goes to.
            receive: a buffer and the rank that it is filled from. Empty buffers do not travel.

        Returns:
            Works, to be waited for.
        """
        operations = []
        for operation, end in ((dist.isend, send), (dist.irecv, receive)):
            if end is not None and len(end[0]):
                assert self._group is not None
                peer = dist.get_global_rank(self._group, end[1])
                operations.append(dist.P2POp(operation, end[0], peer, self._group, self._tag))
        if not operations:
            return []
        with self.device_made_current():
            return list(dist.batch_isend_irecv(operations))

    def transfer(self, send: tuple[torch.Tensor, int] | None, receive: tuple[torch.Tensor, int] | None) -> None:
        """One batch from begin to end; on CUDA the current stream waits, the host does not."""
        for work in self.start(send, receive):
            work.wait()
