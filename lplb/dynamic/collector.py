"""How many tokens the experts of a layer got, forward pass by forward pass, without slowing it down."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lplb import exchange, files
from lplb.arguments import checked_device, real_number, seen, whole_number
from lplb.cuda import strict
from lplb.dynamic import ops
from lplb.dynamic.window import Ring, Window, window_for
from lplb.exchange import EarlierFault, Exchange

__all__ = ["LoadCollector"]

_LEAST_SPARE = 16  # rows that may be completed while a reader copies a whole window
_TRIES = 1000
_VERSION = 1


class LoadCollector:
    """The loads of one layer: a row for every ``interval`` calls of `collect`, and the last rows kept.

    `collect` and `advance` are for the thread that runs the model, one call at a time, as are `reset` and the state
    dicts. `rows`, `rows_until` and `average` may be called from any other thread meanwhile: they neither keep it
    waiting nor see a row half written.

    On the CPU indices are counted before `collect` returns, and refused where they are not allowed. On other devices
    they are counted in the order of the current stream; the host does not wait. Indices outside ``[-1, n_logical)``
    are then mapped to -1 and counted (`indices_outside`), and with ``LPLB_CHECK=1`` in the environment `collect` raises
    once a reader has seen them.

    In CUDA graph capture `collect` records that its indices are counted, and nothing else: what a replay counts goes to
    the row that is open then. The caller calls `advance` after each replay, on the stream that replayed.

    Args:
        n_logical: logical experts.
        interval: calls of `collect` in a row.
        window: rows that readers can ask for, 1 or more. Memory on the device is about
            ``16 * window * len(phases) * n_logical`` bytes.
        phases: what is counted apart: names, or names and the denoising steps that they stand for, as ranges of step 1
            that do not overlap. ``None`` for one phase, called "all".
        device: where indices are counted; ``None`` for that of the first that are collected.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """

    def __init__(
        self,
        n_logical: int,
        interval: int = 1,
        *,
        window: int = 64,
        phases: Sequence[str] | Mapping[str, range] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """See the class."""
        self.n_logical = whole_number("n_logical", n_logical, 1)
        self.interval = whole_number("interval", interval, 1, 2**31 - 1)
        self.window = whole_number("window", window, 1)
        self._steps = _checked_steps(phases)
        self.phases = tuple(self._steps)
        self._ranges = [steps for steps in self._steps.values() if steps is not None]
        self._numbers = {name: number for number, name in enumerate(self.phases)}
        self._n_rows = max(2 * self.window, self.window + _LEAST_SPARE)
        self._strict = strict()
        most = files.MOST_VALUES // (len(self.phases) * self.n_logical)
        if self._n_rows > most:
            raise ValueError(
                f"window is {window}, allowed for {len(self.phases)} phases of {n_logical} experts are "
                f"{max(0, min(most // 2, most - _LEAST_SPARE))} rows"
            )
        self._device = None if device is None else checked_device(device)
        self._window = self._new_window(self._device or torch.device("cpu"))
        self._collected = 0  # of the open row
        self._handle = ops.handle_of(self)
        with torch.inference_mode(False):
            self._token = torch.zeros(1, device="cpu")  # see lplb.dynamic.ops

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be copied and pickled.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a LoadCollector was copied or pickled, allowed is its state_dict(), for another one to load: a copy would "
            "count apart from then on"
        )

    def _new_window(self, device: torch.device) -> Window:
        return window_for(device, self.n_logical, len(self.phases), self._n_rows)

    @property
    def device(self) -> torch.device | None:
        """Where indices are counted; ``None`` while that is not known."""
        return self._device

    @property
    def clock(self) -> int:
        """How many rows are complete, since the beginning or `reset`. Known without waiting for a device."""
        return self._window.ring.clock

    @property
    def indices_outside(self) -> int:
        """Indices that were mapped to -1, as far as the last `rows`, `rows_until`, `average` or `state_dict` saw.

        0 on the CPU, where they are refused.
        """
        return self._window.ring.outside

    # ---- for the thread that runs the model

    def collect(
        self,
        indices: Tensor | None = None,
        phase: str | int | None = None,
        mask: Tensor | None = None,
        *,
        counts: Tensor | None = None,
    ) -> None:
        """Add a batch to the open row.

        Args:
            indices: logical experts of tokens, any shape but none, any dtype of integers, in any order; -1 counts
                nowhere. May be empty.
            phase: a name of `phases`, or a denoising step; ``None`` where there is one phase only.
            mask: bool, of the shape of ``indices`` or its first dimensions; what stands where it is False is not
                looked at.
            counts: instead of indices, tokens per expert, integers from 0 to 2**31 - 1, ``[n_logical]``.

        Raises:
            TypeError, ValueError: an argument is not allowed, or indices or counts on the CPU are out of bounds. The
                row is as before.
            lplb.exchange.EarlierFault: see the class; the row is as before.
            RuntimeError: the device is not known, and a CUDA graph is captured.
        """
        number = 0 if phase is None and len(self.phases) == 1 else self._number_of(phase)
        if counts is not None and (indices is not None or mask is not None):
            raise TypeError("counts is given with indices or a mask, allowed is either indices or counts")
        if torch.compiler.is_compiling():
            ops.collect(self._token, self._handle, number, indices, mask, counts)
        else:
            self._collect(number, indices, mask, counts)

    def _collect(self, number: int, indices: Tensor | None, mask: Tensor | None, counts: Tensor | None) -> None:
        window = self._window
        if self._device is None or window.ring.outside:
            window = self._looked_at(indices if counts is None else counts)
        if window.add(number, indices, mask) if counts is None else window.add_counts(number, counts):
            self._tick()

    def advance(self) -> None:
        """Let the clock go on by one `collect`: once after each replay of a CUDA graph that holds one.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        self._window.refuse_capture("advance")
        self._tick()

    def _tick(self) -> None:
        self._collected += 1
        if self._collected == self.interval:
            self._collected = 0
            self._window.close()

    def reset(self) -> None:
        """Forget all rows, the open one and `indices_outside`; the clock is 0. Readers under way get what was before.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        self._window.refuse_capture("reset")
        plane = (len(self.phases), self.n_logical)
        rows, open_row = (torch.zeros(shape, dtype=torch.int64, device="cpu") for shape in ((0, *plane), plane))
        self._window.restart(rows, 0, open_row, 0)
        self._collected = 0

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on from here; waits for the device.

        Returns:
            Numbers, strings and int64 tensors on the CPU, the caller's own.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        self._window.refuse_capture("state_dict")
        open_row = self._window.open_row()
        clock, rows = self.rows()
        return {
            "version": _VERSION,
            "n_logical": self.n_logical,
            "interval": self.interval,
            "phases": list(self.phases),
            "clock": clock,
            "collected": self._collected,
            "rows": rows,
            "open": open_row,
            "indices_outside": self.indices_outside,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; of more rows than `window` the last are kept.

        Raises:
            TypeError, ValueError: it is of another collector, or of none; nothing is changed.
            RuntimeError: a CUDA graph is being captured.
        """
        self._check_state(state)
        self._window.refuse_capture("load_state_dict")
        rows = state["rows"][-self.window :]
        self._window.restart(rows, state["clock"], state["open"], state["indices_outside"])
        self._collected = state["collected"]

    def _looked_at(self, given: object) -> Window:
        """Raise what readers have seen, and move to the device of what is collected first."""
        ring = self._window.ring
        if self._strict and ring.outside > ring.raised:
            new, ring.raised = ring.outside - ring.raised, ring.outside
            raise EarlierFault(
                f"indices or counts had {new} entries in earlier calls that are not allowed; allowed indices are -1 "
                f"(masked) or 0 to n_logical - 1 = {self.n_logical - 1}, and counts 0 to 2**31 - 1"
            )
        if self._device is None and isinstance(given, Tensor):
            window = self._window
            if given.device.type != "cpu":
                clock, rows = self.rows()
                window = self._new_window(given.device)
                window.restart(rows, clock, self._window.open_row(), self.indices_outside)
            self._window, self._device = window, given.device
        return self._window

    def _number_of(self, phase: object) -> int:
        """Return which phase is meant."""
        if isinstance(phase, str) and phase in self._numbers:
            return self._numbers[phase]
        if self._ranges and not isinstance(phase, (str, bool, np.bool_, Tensor)) and hasattr(phase, "__index__"):
            step = operator.index(phase)  # a Tensor has it too, and its device would have to be waited for
            for number, steps in enumerate(self._ranges):
                if step in steps:
                    return number
        names = ", ".join(
            repr(name) + ("" if s is None else f" ({s[0]} to {s[-1]})") for name, s in self._steps.items()
        )
        what = "a name or a step as an int" if self._ranges else "a name"
        error = ValueError if phase is None or isinstance(phase, (str, int)) else TypeError
        found = seen(phase) if isinstance(phase, Tensor) else repr(phase)
        raise error(f"phase is {found}, allowed is {what} of {names}")

    # ---- for any thread

    def rows(self, n: int | None = None, phases: Sequence[str] | None = None) -> tuple[int, Tensor]:
        """Copy the last complete rows.

        On a device the calling thread waits for its work up to the last of them, on a stream of its own. While another
        thread captures a CUDA graph, that is disturbed unless captured with ``capture_error_mode="thread_local"``.

        Args:
            n: how many, at most `window` and as many as there are; ``None`` for that many.
            phases: names, in the order wanted; ``None`` for all.

        Returns:
            Up to which clock, and int64 ``[n, len(phases), n_logical]`` on the CPU, the oldest first, the caller's own.

        Raises:
            TypeError, ValueError: an argument is not allowed.
            RuntimeError: row after row was overwritten while they were copied.
        """
        chosen = self._chosen(phases)
        for _ in range(_TRIES):
            window = self._window
            ring = window.ring
            clock = ring.clock
            most = min(clock - ring.start, self.window)
            number = most if n is None else whole_number("n", n, 0, most)
            rows = self._copied(window, ring, clock - number, number)
            if rows is not None:
                return clock, rows if chosen is None else rows[:, chosen]
        raise RuntimeError(f"rows were overwritten {_TRIES} times while they were copied; window is {self.window}")

    def rows_until(self, clock: int, n: int, phases: Sequence[str] | None = None) -> Tensor:
        """Copy rows ``clock - n`` to ``clock - 1``; otherwise as `rows`.

        Args:
            clock: up to which, at most `clock`.
            n: how many, at most `window`.
            phases: as for `rows`.

        Raises:
            TypeError, ValueError: an argument is not allowed, or a row is not there, not yet or no more.
        """
        chosen = self._chosen(phases)
        window = self._window
        ring = window.ring
        clock = whole_number("clock", clock, 0, ring.clock)
        n = whole_number("n", n, 0, min(clock, self.window))
        rows = self._copied(window, ring, clock - n, n)
        if rows is None:
            oldest = max(ring.start, ring.clock - self._n_rows + 1)
            raise ValueError(f"rows from {clock - n} on are no longer there, allowed are those from {oldest} on")
        return rows if chosen is None else rows[:, chosen]

    def _copied(self, window: Window, ring: Ring, first: int, n: int) -> Tensor | None:
        """Copy rows; ``None`` if the first of them is overwritten by then."""
        if n == 0:
            return torch.zeros(0, len(self.phases), self.n_logical, dtype=torch.int64, device="cpu")
        rows = window.copy(ring, first, n)
        return rows if ring.keeps(first) else None

    def _chosen(self, phases: Sequence[str] | None) -> list[int] | None:
        if phases is None:
            return None
        if isinstance(phases, str):
            raise TypeError(f"phases is {phases!r}, allowed is a sequence of names, of {', '.join(self.phases)}")
        return [self._number_of(name) for name in phases]

    def average(self, decay: float, phases: Sequence[str] | None = None) -> Tensor:
        """Return the mean row of the window, in which a row weighs ``decay`` times the row after it.

        Args:
            decay: above 0; 1 for the plain mean. The weight halves in ``log(0.5) / log(decay)`` rows.
            phases: whose counts are added up; ``None`` for all.

        Returns:
            Tokens of a row, float64 ``[n_logical]`` on the CPU.

        Raises:
            TypeError, ValueError: an argument is not allowed, or there is no row.
        """
        weight = real_number("decay", decay)
        if not 0 < weight <= 1:
            raise ValueError(f"decay is {decay}, allowed are numbers above 0, up to 1")
        _, rows = self.rows(None, phases)
        if not len(rows):
            raise ValueError("an average of 0 rows was asked for, allowed are 1 or more")
        weights = weight ** np.arange(len(rows) - 1, -1, -1, dtype=np.float64)
        return torch.from_numpy(weights @ rows.sum(1).numpy().astype(np.float64) / weights.sum())

    def by_source(
        self,
        group: dist.ProcessGroup | Exchange | None,
        n: int | None = None,
        phases: Sequence[str] | None = None,
        *,
        clock: int | None = None,
    ) -> Tensor:
        """Return what each rank counted in the last rows. Collective.

        Args:
            group: the ranks; ``None`` for this one alone.
            n: how many rows, added up; ``None`` for all of the window, as many as there are on each rank.
            phases: whose counts are added up; ``None`` for all.
            clock: up to which clock; ``None`` for each rank's own.

        Returns:
            int64 ``[ranks, n_logical]`` on the CPU, the same on every rank.

        Raises:
            TypeError, ValueError: an argument is not allowed, or is another on another rank; on all ranks.
            RuntimeError: a rank is lost, or did not come within the group's timeout.
        """
        ranks = exchange.exchange_for(group)

        def own() -> Tensor:
            if clock is None:
                return self.rows(n, phases)[1].sum((0, 1))
            until = whole_number("clock", clock, 0, self.clock)
            return self.rows_until(until, min(until, self.window) if n is None else n, phases).sum((0, 1))

        settings = f"by_source of {self.n_logical} experts with n={n}, phases={phases}, clock={clock}"
        with exchange.turn(ranks):
            counts = exchange.together(ranks, own, lambda _: exchange.fingerprint(settings), settings=settings)
            table = torch.empty(ranks.size, 2 * self.n_logical + exchange.WORDS, dtype=torch.int32, device="cpu")
            row = torch.zeros(table.shape[1], dtype=torch.int32, device="cpu")
            row[: 2 * self.n_logical] = counts.view(torch.int32)
            exchange.gather(ranks, exchange.AGREE, row, table)
        return table[:, : 2 * self.n_logical].contiguous().view(torch.int64)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"state is {seen(state)}, allowed is what state_dict returned")
        if set(state) != _STATE:
            odd = sorted(map(str, _STATE ^ set(state)))
            raise ValueError(f"state has or lacks {', '.join(odd)}, allowed are exactly {', '.join(sorted(_STATE))}")
        allowed = {"version": _VERSION, **{name: getattr(self, name) for name in ("n_logical", "interval")}}
        for name, value in (allowed | {"phases": list(self.phases)}).items():
            if state[name] != value:
                raise ValueError(f"{name} of state is {state[name]!r}, allowed is {value!r}")
        clock = whole_number("clock of state", state["clock"], 0, files.MOST_COUNT)
        whole_number("collected of state", state["collected"], 0, self.interval - 1)
        whole_number("indices_outside of state", state["indices_outside"], 0, files.MOST_COUNT)
        plane = [len(self.phases), self.n_logical]
        for name, dims in (("rows", 3), ("open", 2)):
            given = state[name]
            if not isinstance(given, Tensor) or given.dtype != torch.int64 or given.device.type != "cpu":
                raise TypeError(f"{name} of state is {seen(given)}, allowed is an int64 tensor on the CPU")
            if given.dim() != dims or list(given.shape[-2:]) != plane:
                shape = [*["rows"][: dims - 2], *plane]
                raise ValueError(f"{name} of state has shape {list(given.shape)}, allowed is {shape}")
            if given.numel() and int(given.min()) < 0:
                raise ValueError(f"{name} of state has {int(given.min())}, allowed is 0 or more")
        if len(state["rows"]) > clock:
            raise ValueError(f"rows of state are {len(state['rows'])}, allowed with clock {clock} are {clock}")


_STATE = frozenset(
    ("version", "n_logical", "interval", "phases", "clock", "collected", "rows", "open", "indices_outside")
)


def _checked_steps(phases: Sequence[str] | Mapping[str, range] | None) -> dict[str, range | None]:
    """Return phases by name, with their steps where they have such."""
    if phases is None:
        return {"all": None}
    if isinstance(phases, str) or not isinstance(phases, (Sequence, Mapping)):
        raise TypeError(f"phases is {phases!r}, allowed are names, or a mapping of names to ranges")
    steps = phases if isinstance(phases, Mapping) else dict.fromkeys(phases)
    if not steps or len(steps) != len(phases) or any(not isinstance(name, str) or not name for name in steps):
        raise ValueError(f"phases is {phases!r}, allowed are names, one or more, no two the same and none empty")
    if not isinstance(phases, Mapping):
        return dict(steps)
    for name, covered in phases.items():
        if not isinstance(covered, range):
            raise TypeError(f"phases[{name!r}] is {covered!r}, allowed is a range of steps")
        if not covered or covered.step != 1:
            raise ValueError(f"phases[{name!r}] is {covered}, allowed is a range of step 1 that is not empty")
    in_order = sorted(phases.items(), key=lambda item: item[1].start)
    for (before, first), (after, second) in itertools.pairwise(in_order):
        if second.start < first.stop:
            raise ValueError(f"phases {before!r} and {after!r} have steps {first} and {second}, allowed is no overlap")
    return dict(steps)
