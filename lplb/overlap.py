"""Work that goes on beside what the caller does next: on a thread, or on a CUDA stream of its own."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

__all__ = ["OnStream", "OnThread", "Overlap"]


class Overlap(Protocol):
    """One piece of work at a time."""

    def start(self, work: Callable[[], None]) -> None:
        """Let ``work`` begin once all that was done before is done; the last one must have been waited for."""

    def wait(self) -> None:
        """Let what comes now come after the work, whether it failed or not."""

    def take_error(self) -> Exception | None:
        """What the work that was waited for raised, once."""


class OnThread:
    """Work on a thread of its own, which is made when it is first needed."""

    def __init__(self) -> None:
        """No thread yet."""
        self._threads: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Hand ``work`` to the thread."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="lplb")
        self._running = self._threads.submit(work)

    def wait(self) -> None:
        """Wait for the thread."""
        if self._running is None:
            return
        error = self._running.exception()
        self._running = None
        if error is not None and not isinstance(error, Exception):
            raise error
        self._error = error

    def take_error(self) -> Exception | None:
        """What the work that was waited for raised, once."""
        error, self._error = self._error, None
        return error


class OnStream:
    """Work on a side stream of a CUDA device; what cannot be launched is raised by `start` itself.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        """No stream yet."""
        self._device = device
        self._side: torch.cuda.Stream | None = None
        self._busy = False

    def start(self, work: Callable[[], None]) -> None:
        """Launch ``work`` on the side stream, behind what the current stream has."""
        if self._side is None:
            self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call, unused-ignore]
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        self._busy = True
        with torch.cuda.stream(self._side):
            work()

    def wait(self) -> None:
        """Let the current stream wait for the side stream; the host does not."""
        if self._busy and self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
            self._busy = False

    def take_error(self) -> Exception | None:
        """Nothing: `start` raised it."""
        return None
