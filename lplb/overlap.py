"""Work that goes on beside what the caller does next: on a thread, or on a CUDA stream of its own."""

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Protocol, TypeAlias

import torch

__all__ = ["Inline", "OnStream", "OnThread", "Overlap", "Worker"]

_Item: TypeAlias = "tuple[Future[None], Callable[[], None]] | None"


class Overlap(Protocol):
    """One piece of work at a time."""

    def start(self, work: Callable[[], None]) -> None:
        """Let ``work`` begin once all that was done before is done; the last one must have been waited for."""

    def wait(self) -> None:
        """Let what comes now come after the work, whether it failed or not."""

    def take_error(self) -> Exception | None:
        """What the work that was waited for raised, once."""


class Worker:
    """A thread that does one piece of work after another, in the order in which they are given.

    It is made when it is first needed, made anew in a forked process, and ends with this object. A process that ends
    waits for it a few seconds, no longer: another rank may never come.
    """

    def __init__(self) -> None:
        """No thread yet."""
        self._queue: SimpleQueue[_Item] = SimpleQueue()
        self._process = -1
        self._last: Future[None] | None = None

    def submit(self, work: Callable[[], None]) -> "Future[None]":
        """Put work at the end of the queue."""
        if self._process != os.getpid():
            self._queue, self._process = SimpleQueue(), os.getpid()
            threading.Thread(target=_serve, args=(self._queue,), name="lplb", daemon=True).start()
            weakref.finalize(self, self._queue.put, None).atexit = False
            _workers.add(self)
        done: Future[None] = Future()
        self._last = done
        self._queue.put((done, work))
        return done

    def end(self) -> None:
        """Wait for what is under way, as long as a process that ends may."""
        if self._last is not None and self._process == os.getpid():
            wait([self._last], _AT_EXIT)

    def drain(self) -> None:
        """Wait until all that was given is done."""
        if self._process == os.getpid():
            self.submit(lambda: None).result()


_workers: "weakref.WeakSet[Worker]" = weakref.WeakSet()
_AT_EXIT = 5.0  # seconds


@atexit.register
def _end_all() -> None:
    for worker in list(_workers):
        worker.end()


def _serve(queue: "SimpleQueue[_Item]") -> None:
    while True:
        item = queue.get()
        if item is None:
            return
        done, work = item
        try:
            work()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)
        del item, done, work  # what they hold must not wait for the next


class OnThread:
    """Work on a thread that others may use as well.

    Args:
        worker: the thread; one of its own by default.
    """

    def __init__(self, worker: Worker | None = None) -> None:
        """See the class."""
        self._worker = Worker() if worker is None else worker
        self._running: Future[None] | None = None
        self._process = os.getpid()
        self._error: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Hand ``work`` to the thread."""
        self._process = os.getpid()
        self._running = self._worker.submit(work)

    def wait(self) -> None:
        """Wait for the thread. A forked process does not wait for what its parent has started."""
        running, self._running = self._running, None
        if running is None or self._process != os.getpid():
            return
        error = running.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        self._error = error

    def take_error(self) -> Exception | None:
        """What the work that was waited for raised, once."""
        error, self._error = self._error, None
        return error


class Inline:
    """No overlap: for exchanges that know beforehand what others would send."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._error: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Do the work at once; what it raises is kept as if it had come later."""
        try:
            work()
        except Exception as error:
            self._error = error

    def wait(self) -> None:
        """Nothing to wait for."""

    def take_error(self) -> Exception | None:
        """What the last work raised, once."""
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
