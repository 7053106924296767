"""The port a scheduler listens on, and what is done when more comes in through it than the process can hold.

`zmq.MAXMSGSIZE` limits a frame, and nothing in ZeroMQ limits how many frames a message has: a socket keeps what has
come of one until its last frame is there, and hands out nothing, and counts nothing, before. So whoever gets as far as
to send messages can send one without end; and whoever can connect at all can take file descriptors. The one way to be
rid of either is to close the port: that ends all connections that came through it and frees what they had. Honest
clients connect again and ask again; what is planned goes on.

The memory is looked at ten times a second, so what comes in between is on top of the limit; where there is no
``/proc`` it is not looked at. A limit that holds in any case is one that the system keeps: a container's, for one.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lplb.dynamic.dropped import Dropped
from lplb.dynamic.resident import Resident, give_back

if TYPE_CHECKING:
    import zmq

__all__ = ["Door"]

_LOOK, _SHUT = 0.1, 0.5  # seconds between two looks at the memory, and until the port is opened again
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Door:
    """Opens the port of a socket, and closes it for a moment when memory or file descriptors run out.

    Args:
        router: the socket.
        address: where it listens, ``tcp://host:port``.
        most_memory: bytes by which the process may grow over what it has when the port is opened first.
        dropped: who is told.
        clock: seconds.
    """

    def __init__(
        self,
        router: zmq.Socket[Any],
        address: str,
        most_memory: int,
        dropped: Dropped,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """See the class; the port is not open yet."""
        self._router, self._most_memory, self._dropped, self._clock = router, most_memory, dropped, clock
        self.address = address
        """With the port that was picked, once it is open."""
        self._shut = True
        self._first = self._base = 0
        self._due = 0.0
        self._memory = Resident()

    def close(self) -> None:
        """Give back what is not the socket's; the port ends with that."""
        self._memory.close()

    @property
    def pause_ms(self) -> int:
        """Milliseconds until `look` wants to be called."""
        return max(0, int(1000 * (self._due - self._clock()))) + 1

    def open(self) -> None:
        """Open the port.

        Raises:
            OSError: the address cannot be listened on.
        """
        import zmq

        try:
            self._router.bind(self.address)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"cannot listen on {self.address}: {error.strerror}") from error
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._first = self._base = self._memory.bytes()
        self._shut = False
        self._due = self._clock() + _LOOK

    def look(self) -> None:
        """Close the port if memory has run out, and open it if its time has come; nothing before it is due."""
        now = self._clock()
        if now < self._due:
            return
        self._due = now + _LOOK
        if self._shut:
            self._open_again()
            return
        held = self._memory.bytes()
        self._base = max(self._first, min(self._base, held))
        if held - self._base > self._most_memory:  # perhaps only because the C library keeps what has been freed
            give_back()
            held = self._memory.bytes()
        if held - self._base > self._most_memory:
            self._close(
                "memory",
                f"closed all connections: {(held - self._base) >> 20} MiB came in or are being planned, "
                f"allowed are {self._most_memory >> 20}",
            )

    def not_accepted(self, error: int) -> None:
        """Somebody could not be let in: where that is for want of file descriptors, all have to leave."""
        if error in _EXHAUSTED and not self._shut:
            self._close("exhausted", f"closed all connections: no more can be accepted, {os.strerror(error)}")

    def _close(self, kind: str, why: str) -> None:
        self._router.unbind(self.address)
        self._shut = True
        self._due = self._clock() + _SHUT
        self._dropped.say(kind, why)

    def _open_again(self) -> None:
        import zmq

        give_back()
        try:
            self._router.bind(self.address)
        except zmq.ZMQError as error:  # the old one is not closed yet, or somebody else has it now
            self._due = self._clock() + _SHUT
            self._dropped.say("bind", f"cannot listen on {self.address}, trying again: {error.strerror}")
            return
        self._shut = False
        # What is left now is not from the connections; a limit below it would close the port for ever.
        self._base = max(self._base, self._memory.bytes())
