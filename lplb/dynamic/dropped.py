"""What is said of messages and connections that were dropped: little, however many there are."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

__all__ = ["Dropped"]


class Dropped:
    """Says what was received and dropped: the first of a kind at once, more of it once a minute, with their number.

    Args:
        log: where to.
        clock: seconds, for tests.
    """

    _PAUSE = 60.0  # seconds
    _MOST_KINDS = 64  # what others send must not fill the memory

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        """See the class."""
        self._log = log
        self._clock = clock
        self._said: dict[str, float] = {}
        self._since: dict[str, int] = {}

    def say(self, kind: str, message: str) -> None:
        """Count one; warn of it unless its kind was spoken of within the last minute.

        Args:
            kind: what it is counted as, one of few.
            message: what to say.
        """
        now = self._clock()
        if kind not in self._said and len(self._said) >= self._MOST_KINDS:
            return
        if now - self._said.get(kind, -math.inf) < self._PAUSE:
            self._since[kind] = self._since.get(kind, 0) + 1
            return
        more = self._since.pop(kind, 0)
        self._said[kind] = now
        self._log.warning("%s%s", message, f" (and {more} more like it before)" if more else "")
