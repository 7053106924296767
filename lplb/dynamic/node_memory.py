"""Host memory that the ranks of a node share, one copy for all of them, and pinned where there is CUDA."""

from __future__ import annotations

import mmap
import os
import secrets
import sys
import warnings
import weakref
from collections.abc import Callable

import torch

from lplb import exchange

__all__ = ["NodeMemory"]

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all devices
_NO_FILE = -1  # for mmap: memory of this process alone
_NO_ONE_ELSE = "ranks of a node are processes of one user, in one container"


class NodeMemory:
    """A block of zeros, the same memory in all processes of a node.

    It has no name in any file system: the kernel frees it when the last process has closed it or is dead, however it
    died. It counts as shared memory of the processes, not as a file of ``/dev/shm``, which containers make small.

    Args:
        nbytes: size, 1 or more; the same on all ranks of a node.
        ranks: whose constructors are collective.
        ranks_per_node: consecutive ranks that share a block.
        pin: whether to pin it for CUDA. Where that is refused, a warning says so, and transfers are slower.

    Raises:
        RuntimeError: there is not so much memory, or ranks of a node do not find the first one's. On every rank.
    """

    flat: torch.Tensor
    """uint8 ``[nbytes]``."""
    pinned: bool
    """Whether CUDA copies from it without a detour."""

    def __init__(
        self, nbytes: int, ranks: exchange.Local | exchange.Distributed, ranks_per_node: int, pin: bool
    ) -> None:
        """See the class."""
        self.nbytes = nbytes
        first = ranks.rank // ranks_per_node * ranks_per_node
        alone = min(ranks_per_node, ranks.size - first) == 1
        made: list[int] = []  # file descriptors, closed when all ranks have the block mapped

        def make() -> tuple[int, int, int, int]:
            if ranks.rank == first:
                _check_room(nbytes)
            if alone or ranks.rank != first:
                return 0, 0, 0, 0
            name = secrets.randbits(31), secrets.randbits(31)
            made.append(_new_block(nbytes, _named(*name)))
            return os.getpid(), made[0], *name

        try:
            told = _told(ranks, make)

            def take() -> torch.Tensor:
                if not made and not alone:
                    made.append(_opened(told[first], first, ranks_per_node))
                return _mapped(nbytes, made[0] if made else _NO_FILE)

            self.flat = exchange.together(ranks, take, lambda _: exchange.fingerprint("node memory"))
        finally:
            for descriptor in made:
                os.close(descriptor)
        self.pinned = pin and _pin(self.flat)
        self._end = weakref.finalize(self, _unpin, self.flat if self.pinned else None)

    def close(self) -> None:
        """Give it up; what still uses `flat` keeps it in this process."""
        self._end()
        self.flat = torch.empty(0, dtype=torch.uint8)
        self.pinned = False


def _told(
    ranks: exchange.Local | exchange.Distributed, action: Callable[[], tuple[int, int, int, int]]
) -> list[list[int]]:
    """Return the four numbers that the action returned on each rank; raise on all if it fails on one. Collective."""
    error: Exception | None = None
    numbers = 0, 0, 0, 0
    try:
        numbers = action()
    except Exception as problem:
        error = problem
    words = exchange.fingerprint("numbers")
    row = torch.tensor([*numbers, exchange.error_word(error), exchange.AGREE, *words], dtype=torch.int32, device="cpu")
    table = torch.zeros(ranks.size, len(row), dtype=torch.int32, device="cpu")
    if error is not None and isinstance(ranks, exchange.Local):
        raise error
    with exchange.turn(ranks):
        exchange.gather(ranks, exchange.AGREE, row, table)
        exchange.raise_together(ranks, table[:, len(numbers) :].tolist(), error)
    found: list[list[int]] = table[:, : len(numbers)].tolist()
    return found


def _named(high: int, low: int) -> str:
    return f"lplb-{high:08x}{low:08x}"


def _new_block(nbytes: int, name: str) -> int:
    """Return the file descriptor of new memory, all of which is there."""
    if sys.platform != "linux":
        raise RuntimeError(
            f"memory that ranks share is made on Linux only, this is {sys.platform!r}; allowed is 1 rank"
        )
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)  # an error here, and not a bus error at the first write
    except OSError as error:
        os.close(descriptor)
        raise RuntimeError(f"no memory on this host for {nbytes} bytes of weights: {error}") from error
    return descriptor


def _check_room(nbytes: int) -> None:
    available = _available()
    if nbytes > available:
        raise RuntimeError(f"no memory on this host for {nbytes} bytes of weights: {available} bytes are available")


def _available() -> int:
    """Bytes that the system can still give away; any number where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return sys.maxsize


def _opened(told: list[int], first: int, ranks_per_node: int) -> int:
    """Return a file descriptor of the block that the first rank of the node has made."""
    process, number, *name = told
    path = f"/proc/{process}/fd/{number}"
    try:
        # a process of another machine or container has this number for something else, which must not be opened
        if not os.readlink(path).startswith(f"/memfd:{_named(*name)}"):
            raise FileNotFoundError(f"{path} is something else")
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise RuntimeError(
            f"ranks_per_node is {ranks_per_node}, but the memory of rank {first} is not found in this process; "
            f"{_NO_ONE_ELSE}: {error}"
        ) from error


def _mapped(nbytes: int, descriptor: int) -> torch.Tensor:
    block = mmap.mmap(descriptor, nbytes)  # it has a descriptor of its own
    with torch.inference_mode(False):  # so that it can be written in any mode
        return torch.frombuffer(block, dtype=torch.uint8)


def _pin(flat: torch.Tensor) -> bool:
    status = torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), _PORTABLE)  # type: ignore[no-untyped-call, unused-ignore]
    if int(status) != 0:
        warnings.warn(
            f"CUDA does not pin {flat.numel()} bytes of host memory (error {int(status)}): transfers are slower",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    return True


def _unpin(flat: torch.Tensor | None) -> None:
    """Before the memory is unmapped; the tensor keeps it until then."""
    if flat is not None:
        torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())  # type: ignore[no-untyped-call, unused-ignore]
