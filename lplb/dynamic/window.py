"""Where a collector's loads lie: a row that is being counted, and the complete rows before it, which others may read.

One thread counts; any other may copy complete rows meanwhile, without a lock and without keeping the first one waiting.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lplb import _C
from lplb.arguments import MOST_TOKENS, refuse_without_memory, seen

__all__ = ["CudaWindow", "DeviceWindow", "HostWindow", "Ring", "Window", "window_for"]

_TOKENS_PER_THREAD = 1 << 16  # as in lplb.cpu: below this a thread costs more than it saves
_COUNTED = frozenset((torch.int32, torch.int64))
_OTHER_WHOLE = frozenset(
    getattr(torch, name) for name in ("int8", "int16", "uint8", "uint16", "uint32", "uint64") if hasattr(torch, name)
)
_MASKED = -1


class Ring:
    """Complete rows, of which a new one overwrites the oldest.

    Row ``r`` lies in line ``r % len(lines)``, which is written only while `clock` is ``r``. So a copy of rows from
    ``first`` on, up to the clock at its beginning, is whole if `keeps` still says so of ``first`` after it.
    """

    __slots__ = ("clock", "lines", "outside", "raised", "start")

    def __init__(self, lines: Any, start: int, clock: int, outside: int) -> None:
        """See the class."""
        self.lines = lines
        self.clock = clock
        """How many rows are complete: 0 to clock - 1."""
        self.start = start
        """The first row that was ever written here."""
        self.outside = self.raised = outside
        """Entries that were not allowed, as far as a reader has seen; and how many of them an error has told."""

    def keeps(self, first: int) -> bool:
        """Whether row ``first`` has not been overwritten, and is not being overwritten now."""
        return self.start <= first and self.clock - first < len(self.lines)


class Window(Protocol):
    """Counts of phases in an open row, and complete rows. What is added was not checked before."""

    ring: Ring

    def add(self, phase: int, indices: object, mask: object) -> bool:
        """Count indices; whether the host knows when they are counted: not while a CUDA graph is captured.

        Raises:
            TypeError, ValueError: they are not allowed; nothing is counted.
        """

    def add_counts(self, phase: int, counts: object) -> bool:
        """Add counts; otherwise as `add`."""

    def close(self) -> None:
        """Let the open row be complete, and begin another."""

    def copy(self, ring: Ring, first: int, n: int) -> Tensor:
        """Copy complete rows, int64 ``[n, phases, n_logical]`` on the CPU. From any thread."""

    def open_row(self) -> Tensor:
        """Copy the open row, int64 ``[phases, n_logical]`` on the CPU."""

    def restart(self, rows: Tensor, clock: int, open_row: Tensor, outside: int) -> None:
        """Go on from complete rows up to a clock, and an open one; readers under way have what was before."""

    def refuse_capture(self, method: str) -> None:
        """Raise RuntimeError while a CUDA graph is captured."""


def window_for(device: torch.device, n_logical: int, n_phases: int, n_rows: int) -> Window:
    """Return an empty window of ``n_rows`` rows on a device."""
    if device.type == "cpu":
        return HostWindow(n_logical, n_phases, n_rows)
    if device.type == "cuda":
        return CudaWindow(n_logical, n_phases, n_rows, device)
    return DeviceWindow(n_logical, n_phases, n_rows, device)


class HostWindow:
    """A `Window` in host memory, counted by `lplb._C`. The open row is in its place in the ring.

    Args:
        n_logical: experts.
        n_phases: phases.
        n_rows: lines of the ring.
    """

    def __init__(self, n_logical: int, n_phases: int, n_rows: int) -> None:
        """See the class."""
        self._n_logical, self._n_phases, self._n_rows = n_logical, n_phases, n_rows
        self._most_threads = max(1, torch.get_num_threads())
        # of a placement with one rank, since only its counting is wanted
        self._count = _C.CpuPlanner(range(n_logical), n_logical, 1, 1, [1.0], self._most_threads).count
        counts = np.zeros((self._most_threads, n_logical), np.int32)
        self._address = counts.ctypes.data
        self._totals = list(counts)  # of batches in 1, 2, … parts
        self._all = (1 << n_phases) - 1
        self._begin(Ring(np.zeros((n_rows, n_phases, n_logical), np.int64), 0, 0, 0))

    def _begin(self, ring: Ring) -> None:
        self.ring = ring
        self._open: npt.NDArray[np.int64] = ring.lines[ring.clock % self._n_rows]
        self._touched = 0  # a bit for each phase whose counts in the open row are of this row

    def add(self, phase: int, indices: object, mask: object) -> bool:
        """See `Window.add`."""
        if (
            mask is None
            and type(indices) is Tensor
            and indices.dtype in _COUNTED
            and indices.is_cpu
            and indices.layout is torch.strided
            and indices.is_contiguous()
            and indices.dim()
        ):
            plain = indices
        else:
            plain = _on_host(indices, mask)
        n, threads = plain.numel(), 1
        if n >= 2 * _TOKENS_PER_THREAD:
            threads = min(self._most_threads, n // _TOKENS_PER_THREAD)
            _check_number(n)
        chunks = n, threads, -(-n // threads) or 1
        bad = self._count(plain.data_ptr(), plain.element_size(), chunks, self._address, threads)
        if bad >= 0:
            assert isinstance(indices, Tensor)
            at = (
                bad
                if not isinstance(mask, Tensor)
                else int(_trailing(mask, indices).expand_as(indices).flatten().nonzero()[bad])
            )
            raise ValueError(
                f"indices has {indices.flatten()[at].item()} at flat position {at}, allowed is -1 (masked) or 0 to "
                f"n_logical - 1 = {self._n_logical - 1}"
            )
        self._put(phase, self._totals[threads - 1])
        return True

    def add_counts(self, phase: int, counts: object) -> bool:
        """See `Window.add_counts`."""
        checked = _checked_counts(counts, self._n_logical, torch.device("cpu"))
        least, most = (int(v) for v in checked.aminmax())
        if least < 0 or most > MOST_TOKENS:
            raise ValueError(
                f"counts has {least if least < 0 else most}, allowed are 0 to {MOST_TOKENS} tokens per expert"
            )
        self._put(phase, checked.numpy())
        return True

    def _put(self, phase: int, counts: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> None:
        line, bit = self._open[phase], 1 << phase
        if self._touched & bit:
            np.add(line, counts, out=line)
        else:
            np.copyto(line, counts)
            self._touched |= bit

    def close(self) -> None:
        """See `Window.close`."""
        ring = self.ring
        self._clear_untouched()
        ring.clock += 1  # from here on the next line is this row's: see Ring
        self._open = ring.lines[ring.clock % self._n_rows]
        self._touched = 0

    def _clear_untouched(self) -> None:
        if self._touched != self._all:
            for phase in range(self._n_phases):
                if not self._touched >> phase & 1:
                    self._open[phase] = 0
            self._touched = self._all

    def copy(self, ring: Ring, first: int, n: int) -> Tensor:
        """See `Window.copy`."""
        lines: npt.NDArray[np.int64] = ring.lines
        out = np.empty((n, *lines.shape[1:]), np.int64)
        at = first % len(lines)
        head = min(n, len(lines) - at)
        out[:head] = lines[at : at + head]
        out[head:] = lines[: n - head]
        return torch.from_numpy(out)

    def open_row(self) -> Tensor:
        """See `Window.open_row`."""
        self._clear_untouched()
        return torch.from_numpy(self._open.copy())

    def restart(self, rows: Tensor, clock: int, open_row: Tensor, outside: int) -> None:
        """See `Window.restart`; ``outside`` is 0, since they are refused."""
        lines = np.zeros((self._n_rows, self._n_phases, self._n_logical), np.int64)
        ring = Ring(lines, clock - len(rows), clock, outside)
        lines[np.arange(ring.start, clock) % self._n_rows] = rows.numpy()
        self._begin(ring)
        self._open[:] = open_row.numpy()
        self._touched = self._all

    def refuse_capture(self, method: str) -> None:
        """See `Window.refuse_capture`; this is not captured."""


class DeviceWindow:
    """A `Window` on a device, counted by torch's kernels; nothing waits for them but `copy` and `open_row`.

    Each phase's counts have two bins in front, of indices below -1 and of -1, and one behind, of indices above: so one
    kernel counts them all. Those outside are never cleared by `close`. The open row has its own memory, which graphs
    may go on adding to. Here all work is taken to go to one stream of the device, readers' too; see `CudaWindow`.

    Args:
        n_logical: experts.
        n_phases: phases.
        n_rows: lines of the ring.
        device: where.
    """

    def __init__(self, n_logical: int, n_phases: int, n_rows: int, device: torch.device) -> None:
        """See the class."""
        self._n_logical, self._n_phases, self._n_rows, self._device = n_logical, n_phases, n_rows, device
        with torch.inference_mode(False):  # updated in whatever mode the caller is by then
            self._open = self._zeros(n_phases, n_logical + 3)
            self._one = torch.ones(1, dtype=torch.int64, device=device)
            self.ring = Ring(self._zeros(n_rows, n_phases, n_logical + 3), 0, 0, 0)
        self._lines = self._open.unbind()
        self._counts = self._open[:, 2:-1]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)

    def _order(self) -> bool:
        """Let what comes now come after what was counted before; whether it is counted now, not captured."""
        return True

    def _written(self) -> None:
        """Let readers wait for what was written up to now."""

    def add(self, phase: int, indices: object, mask: object) -> bool:
        """See `Window.add`; indices outside ``[-1, n_logical)`` are counted apart."""
        plain = _checked_indices(indices, mask, self._device)
        if mask is not None:
            assert isinstance(mask, Tensor)
            plain = torch.where(_trailing(mask, plain), plain, _MASKED)
        now = self._order()
        bins = plain.clamp(-2, self._n_logical).add_(2).reshape(-1)
        self._lines[phase].index_add_(0, bins, self._one.expand(bins.numel()))
        return now

    def add_counts(self, phase: int, counts: object) -> bool:
        """See `Window.add_counts`; entries outside ``[0, 2**31)`` are taken for the nearest, and counted apart."""
        checked = _checked_counts(counts, self._n_logical, self._device)
        now = self._order()
        allowed = checked.clamp(0, MOST_TOKENS)
        line = self._lines[phase]
        line[2:-1] += allowed
        line[0] += (allowed != checked).sum()
        return now

    def close(self) -> None:
        """See `Window.close`."""
        self._order()
        ring = self.ring
        ring.lines[ring.clock % self._n_rows].copy_(self._open)
        self._counts.zero_()
        self._written()
        ring.clock += 1

    def copy(self, ring: Ring, first: int, n: int) -> Tensor:
        """See `Window.copy`; waits for the device."""
        return self._taken(ring, torch.cat([part.cpu() for part in _parts(ring, first, n)]))

    def _taken(self, ring: Ring, rows: Tensor) -> Tensor:
        """The counts of rows copied with all their bins; what they say of indices outside is noted."""
        if len(rows):
            ring.outside = max(ring.outside, int(rows[-1, :, 0].sum() + rows[-1, :, -1].sum()))
        return rows[..., 2:-1].contiguous()

    def open_row(self) -> Tensor:
        """See `Window.open_row`; waits for the device."""
        self._order()
        found = self._open.cpu()
        return self._taken(self.ring, found[None])[0]

    def restart(self, rows: Tensor, clock: int, open_row: Tensor, outside: int) -> None:
        """See `Window.restart`; graphs go on adding to the open row."""
        self._order()
        with torch.inference_mode(False):
            lines = self._zeros(self._n_rows, self._n_phases, self._n_logical + 3)
            ring = Ring(lines, clock - len(rows), clock, outside)
            whole = torch.zeros(len(rows) + 1, *self._open.shape, dtype=torch.int64, device="cpu")
            whole[:-1, :, 2:-1], whole[-1, :, 2:-1], whole[:, 0, 0] = rows, open_row, outside
            at = torch.arange(ring.start, clock, device="cpu") % self._n_rows
            lines[at.to(self._device)] = whole[:-1].to(self._device)
            self._open.copy_(whole[-1])
        self._written()
        self.ring = ring

    def refuse_capture(self, method: str) -> None:
        """See `Window.refuse_capture`; this is not captured."""


class CudaWindow(DeviceWindow):
    """A `DeviceWindow` whose rows are copied over a stream of their own, which waits for the end of the last row.

    Other threads' calls of CUDA disturb a capture that does not know of them: graphs are captured with
    ``torch.cuda.graph(…, capture_error_mode="thread_local")`` where rows may be read meanwhile.
    """

    def __init__(self, n_logical: int, n_phases: int, n_rows: int, device: torch.device) -> None:
        """See the class."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the first collect is inside CUDA graph capture, allowed is outside; or give the collector its device"
            )
        super().__init__(n_logical, n_phases, n_rows, device)
        with torch.inference_mode(False):
            self._pinned = torch.empty(self.ring.lines.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        self._reading = threading.Lock()  # readers share the pinned memory
        self._side: torch.cuda.Stream | None = None
        self._end = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]
        self._last = torch.cuda.current_stream(device)
        self._written()

    def _order(self) -> bool:
        if torch.cuda.is_current_stream_capturing():
            return False
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream != self._last.cuda_stream:
            stream.wait_stream(self._last)
            self._last = stream
            for tensor in (self._open, self._one, self.ring.lines):
                tensor.record_stream(stream)  # freed only when this stream is done with it, too
        return True

    def _written(self) -> None:
        self._end.record(self._last)  # type: ignore[no-untyped-call, unused-ignore]

    def copy(self, ring: Ring, first: int, n: int) -> Tensor:
        """See `Window.copy`; the calling thread waits for the device, no stream but the own one does."""
        with self._reading, torch.cuda.device(self._device):
            if self._side is None:
                self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call, unused-ignore]
            with torch.cuda.stream(self._side):
                self._side.wait_event(self._end)  # type: ignore[no-untyped-call, unused-ignore]
                done = 0
                for part in _parts(ring, first, n):
                    self._pinned[done : done + len(part)].copy_(part, non_blocking=True)
                    done += len(part)
            self._side.synchronize()  # type: ignore[no-untyped-call, unused-ignore]
            return self._taken(ring, self._pinned[:n])

    def refuse_capture(self, method: str) -> None:
        """See `Window.refuse_capture`."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{method} is called while a CUDA graph is captured, allowed is before and after")


def _parts(ring: Ring, first: int, n: int) -> list[Tensor]:
    """The rows from ``first`` on, up to the ring's end and from its beginning."""
    lines: Tensor = ring.lines
    at = first % len(lines)
    head = min(n, len(lines) - at)
    return [lines[at : at + head], lines[: n - head]]


# ---- checks of what is collected


def _on_host(indices: object, mask: object) -> Tensor:
    """Return indices, contiguous, without those that the mask leaves out."""
    plain = _checked_indices(indices, mask, torch.device("cpu"))
    if mask is None or not plain.numel():
        return plain.contiguous()
    assert isinstance(mask, Tensor)
    keep = mask.flatten().numpy()
    if len(keep) == plain.numel():
        return torch.from_numpy(plain.flatten().numpy()[keep])
    return torch.from_numpy(np.compress(keep, plain.reshape(len(keep), -1).numpy(), 0))


def _checked_indices(indices: object, mask: object, device: torch.device) -> Tensor:
    """Return indices as int32 or int64, whatever their values, once a mask is found to fit."""
    checked = _checked(indices, "indices", device)
    if checked.dim() == 0:
        raise ValueError("indices has shape [], allowed are one dimension or more")
    _check_number(checked.numel())
    if mask is not None:
        _check_mask(mask, checked, device)
    return checked if checked.dtype in _COUNTED else _widened(checked)


def _trailing(mask: Tensor, indices: Tensor) -> Tensor:
    """The mask with dimensions of size 1 behind, as many as it lacks."""
    return mask.reshape(mask.shape + (1,) * (indices.dim() - mask.dim()))


def _checked(given: object, name: str, device: torch.device) -> Tensor:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is {seen(given)}, allowed is a torch.Tensor")
    if given.dtype not in _COUNTED and given.dtype not in _OTHER_WHOLE:
        raise TypeError(f"{name} has dtype {given.dtype}, allowed is torch.int32, torch.int64 or another of integers")
    refuse_without_memory(name, given)
    if given.device != device:
        raise ValueError(f"{name} is on {str(given.device)!r}, allowed is the collector's device, {str(device)!r}")
    if given.layout != torch.strided:
        raise TypeError(f"{name} has layout {given.layout}, allowed is torch.strided")
    return given


def _check_mask(mask: object, indices: Tensor, device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is {seen(mask)}, allowed is a torch.Tensor or None")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, allowed is torch.bool, False for padding")
    refuse_without_memory("mask", mask)
    if mask.device != device:
        raise ValueError(f"mask is on {str(mask.device)!r}, allowed is the collector's device, {str(device)!r}")
    if mask.layout != torch.strided:
        raise TypeError(f"mask has layout {mask.layout}, allowed is torch.strided")
    if mask.dim() == 0 or mask.shape != indices.shape[: mask.dim()]:
        raise ValueError(
            f"mask has shape {list(mask.shape)}, allowed is that of indices, {list(indices.shape)}, or its first "
            "dimensions"
        )


def _widened(given: Tensor) -> Tensor:
    """Return integers as int32 or int64; what no int64 holds as the largest."""
    if given.dtype == getattr(torch, "uint64", None):
        signed = given.view(torch.int64)
        return torch.where(signed < 0, torch.iinfo(torch.int64).max, signed)
    return given.to(torch.int64 if given.element_size() == 4 else torch.int32)


def _checked_counts(counts: object, n_logical: int, device: torch.device) -> Tensor:
    """Return counts as int64; their values are not looked at."""
    checked = _checked(counts, "counts", device)
    if checked.shape != (n_logical,):
        raise ValueError(f"counts has shape {list(checked.shape)}, allowed is [n_logical] = [{n_logical}]")
    return (checked if checked.dtype in _COUNTED else _widened(checked)).to(torch.int64)


def _check_number(n: int) -> None:
    if n > MOST_TOKENS:
        raise ValueError(f"indices has {n} elements, allowed are {MOST_TOKENS} per call")
