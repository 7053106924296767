"""How much memory this process has in use: nothing in ZeroMQ limits what a message without end takes."""

from __future__ import annotations

import contextlib
import ctypes
import os

__all__ = ["Resident", "give_back"]


class Resident:
    """Reads the memory in use, through a file that stays open: later there may be no descriptor for it."""

    def __init__(self) -> None:
        """Open the file, where there is one."""
        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    def bytes(self) -> int:
        """Bytes in use, or 0 where that is not known."""
        if self._file is None:
            return 0
        return int(os.pread(self._file, 200, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def give_back() -> None:
    """Let the C library return to the system what has been freed, where it has a call for that."""
    with contextlib.suppress(AttributeError):
        _LIBC.malloc_trim(0)


_LIBC = ctypes.CDLL(None)
