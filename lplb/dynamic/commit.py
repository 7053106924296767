"""When a new placement becomes the live one: at a step that all ranks agree on ahead.

The forward passes of a layer come in one order on all ranks, coupled by the exchange of its tokens, and each rank
counts them: its *steps*. Once every rank holds the weights of a new placement, background threads gather the steps that
have begun, and all take the largest plus ``ahead`` as the step of the swap. Each rank then promises to swap there, or
says that it is too late for it; a second gather tells all ranks whether all have promised. Only then does any swap.

A forward pass compares one integer. Only a rank that has promised, and begins the step of the swap before the second
gather has told it the outcome, has to wait for that: this is a *stall*, is counted, and lets the next swaps be agreed
on further ahead. Without it two ranks could route one batch by different placements.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Generator, Sequence
from enum import Enum

__all__ = ["SwapPoint", "agreement"]

_NEVER = sys.maxsize


class _State(Enum):
    IDLE = "nothing is agreed"
    PROMISED = "this rank swaps if all do"
    AGREED = "all ranks swap"
    FAILED = "another rank is lost"


class SwapPoint:
    """Where the forward passes of one layer meet the background thread.

    `advance` and `done` belong to the thread of the forward passes, all else to the background thread.
    """

    steps: int
    """Forward passes that have begun."""
    stalls: int
    """How many had to wait for the outcome of an agreement."""
    stall_seconds: float
    """How long, together."""

    def __init__(self) -> None:
        """Nothing is agreed."""
        self.steps = self.stalls = 0
        self.stall_seconds = 0.0
        self._due = _NEVER
        self._state = _State.IDLE
        self._error: Exception | None = None
        self._changed = threading.Condition()

    # ---- the thread of the forward passes

    def advance(self) -> bool:
        """Begin a forward pass.

        Returns:
            Whether the swap belongs to this step; `done` is then to be called before the next.

        Raises:
            RuntimeError: the background thread has lost a rank, or the last swap was agreed on and not made.
        """
        self.steps += 1  # before the look at _due: promise() writes and reads the other way round
        return self.steps >= self._due and self._look()

    def done(self) -> None:
        """Say that the swap has been made."""
        with self._changed:
            self._set(_State.IDLE, _NEVER)

    def _look(self) -> bool:
        with self._changed:
            if self._state is _State.PROMISED:
                begin = time.perf_counter()
                self._changed.wait_for(lambda: self._state is not _State.PROMISED)
                self.stalls += 1
                self.stall_seconds += time.perf_counter() - begin
            if self._state is _State.FAILED:
                raise RuntimeError(f"rebalancing has stopped, the placement is as before: {self._error}")
            if self._state is _State.AGREED and self.steps > self._due:
                raise RuntimeError(
                    f"all ranks agreed on a swap at step {self._due}, update_flag said so, and at step {self.steps} it "
                    "has not been made; call update_module_weight_and_map() whenever update_flag is true"
                )
            return self._state is _State.AGREED

    # ---- the background thread

    @property
    def pending(self) -> bool:
        """Whether a swap is promised or agreed on, and not made."""
        return self._state in (_State.PROMISED, _State.AGREED)

    @property
    def in_doubt(self) -> bool:
        """Whether the next forward pass would wait for an outcome."""
        return self._state is _State.PROMISED and self.steps + 1 >= self._due

    def promise(self, step: int, notice: int) -> bool:
        """Promise to swap at a step, unless fewer than ``notice`` forward passes come before it.

        Args:
            step: the step, counted as `steps`.
            notice: 1 or more.

        Returns:
            Whether it is promised; `agree`, `drop` or `fail` follows.
        """
        with self._changed:
            if self._state is not _State.IDLE:
                return False
            # advance() writes steps before it reads _due. So either it sees this, or its step is seen here.
            self._set(_State.PROMISED, step)
            if self.steps + notice > step:
                self._set(_State.IDLE, _NEVER)
                return False
            return True

    def agree(self) -> None:
        """All ranks have promised."""
        with self._changed:
            self._set(_State.AGREED, self._due)

    def drop(self) -> None:
        """Some rank has not promised, or the swap is given up before anybody promised."""
        with self._changed:
            if self._state is not _State.FAILED:
                self._set(_State.IDLE, _NEVER)

    def fail(self, error: Exception) -> None:
        """Raise in this and every later forward pass, since nobody knows what the other ranks do; until `clear`.

        Args:
            error: what happened.
        """
        with self._changed:
            self._error = error
            self._set(_State.FAILED, 0)

    def clear(self) -> None:
        """Forget a failure. A swap that all have agreed on stays agreed on."""
        with self._changed:
            if self._state is _State.FAILED:
                self._error = None
                self._set(_State.IDLE, _NEVER)

    def _set(self, state: _State, due: int) -> None:
        self._state, self._due = state, due
        self._changed.notify_all()


def agreement(points: Sequence[SwapPoint], ahead: int) -> Generator[list[int], list[list[int]], list[bool]]:
    """Agree with the other ranks on when to swap the layers of some points; one gather for each value yielded.

    A generator, so that whoever runs it decides how rows travel: it yields this rank's row, and is sent every rank's,
    in the order of ranks.

    Args:
        points: of the layers, in the same order on every rank.
        ahead: how many steps lie between the furthest rank and the swap, 2 or more; the same on every rank.

    Returns:
        For each layer whether it is agreed on: the same on every rank.
    """
    begun = yield [point.steps for point in points]
    steps = [max(column) + ahead for column in zip(*begun, strict=True)]
    # Ranks are at most one step apart. Half of the way is for the first gather's result, half for the second's.
    promised = [point.promise(step, 1 + ahead // 2) for point, step in zip(points, steps, strict=True)]
    told = yield [int(value) for value in promised]
    agreed = [all(column) for column in zip(*told, strict=True)]
    for point, mine, all_of_them in zip(points, promised, agreed, strict=True):
        if all_of_them:
            point.agree()
        elif mine:
            point.drop()
    return agreed
