"""One cycle of a rebalancer: collect, plan, transfer, commit. Runs on the background threads, alike on all ranks."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lplb.arguments import seen
from lplb.dynamic.commit import agreement
from lplb.dynamic.control import Control, SkippedError, Stage
from lplb.dynamic.dispatcher import check_sizes
from lplb.dynamic.layers import Layer
from lplb.dynamic.planning import LayerPlan, Problem, Settings
from lplb.dynamic.sources import Source
from lplb.dynamic.staging import Arrivals, Staging, arrivals
from lplb.dynamic.stats import Progress, Tally
from lplb.exchange import LostRankError
from lplb.placement import Placement
from lplb.weights import Moved

__all__ = ["Cycle", "Pace", "Request", "Wishes"]

_log = logging.getLogger("lplb.dynamic")
_ATTEMPTS = 8  # to agree on a step, each time twice as far ahead
_MOST_AHEAD = 4096

MakePlan = Callable[[Problem, int], Sequence[LayerPlan]]


@dataclass(frozen=True)
class Pace:
    """How fast, and how much at once."""

    window: int
    """Rows that are planned from."""
    layers_at_once: int
    """Layers whose incoming experts have memory at one time."""
    bytes_per_second: float | None
    """That a rank sends or receives at most while it moves weights."""
    ahead: int
    """Steps between an agreement and its swap, to begin with."""
    poll: float
    """Seconds between two looks at what other ranks are at."""


class Request(NamedTuple):
    """Placements that are asked for, and what becomes the history with them."""

    placements: tuple[Placement, ...]
    """One per layer."""
    history: torch.Tensor | None
    """int64 ``[layers, rows, n_logical]``, or ``None`` to keep what there is."""
    print: tuple[int, int]
    """The same on ranks that ask for the same; never two zeros."""


class Wishes:
    """What the user of this rank wants. Written by any thread, read by the background thread."""

    def __init__(self) -> None:
        """Nothing."""
        self.changed = threading.Condition()
        self.closing = self.held = False
        self.now = 0
        """How many cycles are asked for at once."""
        self.request: Request | None = None

    def wait(self, seconds: float) -> None:
        """Wait, not so long if something changes."""
        with self.changed:
            self.changed.wait(seconds)


class Cycle:
    """Takes cycles one after another; every method is collective.

    Args:
        layers: in the same order on every rank.
        control: what background threads tell each other.
        make_plan: from a problem and the number of its cycle to the plans of all layers; local.
        source: where weights come from.
        settings: how to plan.
        phases: whose loads count; ``None`` for all.
        pace: how fast.
        wishes: what the user of this rank wants.
        tally: what is kept of it all.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        control: Control,
        make_plan: MakePlan,
        source: Source,
        settings: Settings,
        phases: Sequence[str] | None,
        pace: Pace,
        wishes: Wishes,
        tally: Tally,
    ) -> None:
        """See the class."""
        self._layers, self._control, self._make_plan, self._source = layers, control, make_plan, source
        self._settings, self._phases, self._pace, self._wishes, self._tally = settings, phases, pace, wishes, tally
        n = layers[0].collector.n_logical
        self.history = torch.zeros(len(layers), pace.window, n, dtype=torch.int64, device="cpu")
        """Rows of all ranks together, the newest last; rows of zeros where there are none, int64 ``[layers, window,
        n_logical]``."""
        self.clocks = [0] * len(layers)
        """How many rows of each layer have been asked for."""
        self._before: list[Placement] = []  # what the cycle starts from
        self._ahead = pace.ahead
        self._stagings: list[Staging] = []
        self._batch_stagings: dict[int, Staging] = {}  # of the layers that are under way

    def own_clocks(self) -> list[int]:
        """Rows that this rank has of each layer."""
        return [layer.collector.clock for layer in self._layers]

    def swaps_pending(self) -> bool:
        """Whether a swap is to come on this rank that was agreed on before this began."""
        return any(layer.dispatcher.point.pending or layer.dispatcher.staged for layer in self._layers)

    def run(self, clocks: Sequence[int], request: Request | None) -> None:
        """Take one cycle.

        Args:
            clocks: rows of each layer that every rank has; the same on every rank.
            request: what is asked for, the same on every rank; ``None`` to plan.

        Raises:
            SkippedError: on every rank; it went no further.
            LostRankError: a rank is lost, or this one is.
        """
        epoch = self._tally.begin()
        self._tally.at(Progress("collect"))
        self._before = [layer.dispatcher.placement for layer in self._layers]
        if request is not None and request.history is not None:
            self.history = _last_rows(request.history, self._pace.window)
        sources = self._collect(clocks)
        plans = self._plan(epoch, sources, request)
        todo = [i for i, p in enumerate(plans) if p.worth and p.placement != self._before[i]]
        if not todo:
            raise SkippedError("no gain", "no layer's change is worth its moves: " + _reasons(self._layers, plans))
        size = self._pace.layers_at_once
        for first in range(0, len(todo), size):
            batch = {i: plans[i] for i in todo[first : first + size]}
            at = Progress("transfer", "", first, len(todo))
            self._transfer(batch, at)
            self._commit(batch, epoch, at)

    # ---- collect

    def _collect(self, clocks: Sequence[int]) -> torch.Tensor | None:
        """Append what is new to the history; return who sent it, ``[layers, ranks, n_logical]``, where that counts."""
        window = self._pace.window
        new = [min(max(clock - last, 0), window) for clock, last in zip(clocks, self.clocks, strict=True)]
        most = max(new)
        self.clocks = list(clocks)  # whatever becomes of it: it is not asked for again

        def read() -> torch.Tensor:
            rows = torch.zeros(len(new), most, self.history.shape[-1], dtype=torch.int64, device="cpu")
            for own, layer, clock, n in zip(rows, self._layers, clocks, new, strict=True):
                if n:
                    own[most - n :] = layer.collector.rows_until(clock, n, self._phases).sum(dim=1)
            return rows

        everyone_sees = self._settings.mode == "AG"
        rows = self._control.together(
            Stage.COLLECT, "loads", read, (lambda found: found.numpy().tobytes()) if everyone_sees else None
        )
        sources = None
        if not everyone_sees:
            if self._settings.n_nodes > 1:
                sources = self._control.by_rank(rows.sum(dim=1)).transpose(0, 1)
            rows = self._control.total(rows)
        for i, n in enumerate(new):
            if n:
                self.history[i] = torch.cat((self.history[i], rows[i, most - n :]))[-window:]
        return sources

    # ---- plan

    def _plan(self, epoch: int, sources: torch.Tensor | None, request: Request | None) -> Sequence[LayerPlan]:
        self._tally.at(Progress("plan"))
        if request is None and not self.history.any():
            raise SkippedError("no loads", "no tokens have been collected")

        def make() -> Sequence[LayerPlan]:
            if request is not None:
                return [LayerPlan(p, True, "asked for", math.nan, math.nan, 0) for p in request.placements]
            filled = int(
                self.history.any(dim=2).any(dim=0).to(torch.uint8).argmax()
            )  # the first row that any layer has
            history = np.ascontiguousarray(self.history[:, filled:].numpy())
            sent = None if sources is None else np.ascontiguousarray(sources.numpy())
            problem = Problem(tuple(self._before), history, sent, self._settings)
            return _checked_plans(self._make_plan(problem, epoch), self._before)

        with self._tally.timed("plan_seconds"):
            plans = self._control.together(
                Stage.PLAN, "plan", make, lambda found: [(p.worth, p.placement.phy2log.tolist()) for p in found]
            )
        for i, plan in enumerate(plans):
            self._tally.balanced(i, plan.imbalance_before)
        return plans

    # ---- transfer

    def _transfer(self, batch: dict[int, LayerPlan], at: Progress) -> None:
        come = {i: arrivals(self._before[i], plan.placement, self._rank(i)) for i, plan in batch.items()}
        self._batch_stagings = self._control.together(Stage.TRANSFER, "memory", lambda: self._memory(come))
        self._tally.add(staging_bytes=self.staging_bytes - self._tally.read().staging_bytes)
        with self._tally.timed("transfer_seconds"):
            for i in batch:
                self._bring(i, come[i], at._replace(layer=self._layers[i].name, rounds_done=0))
                rank = self._rank(i)
                new = sum(move.target_rank == rank != move.source_rank for move in come[i].moves)
                self._tally.add(bytes_lower_bound=new * self._layers[i].dispatcher.expert_bytes)

    def _rank(self, layer: int) -> int:
        return self._layers[layer].dispatcher.rank

    @property
    def staging_bytes(self) -> int:
        """Of all buffers, those of the source included."""
        own: int = getattr(self._source, "buffer_bytes", 0)
        return own + sum(staging.nbytes for staging in self._stagings)

    def _memory(self, come: dict[int, Arrivals]) -> dict[int, Staging]:
        """A buffer for each layer, kept from cycle to cycle while it is large enough, and the budget allows it."""
        budget = self._settings.budget()
        free = [staging for staging in self._stagings if staging.released()]
        found: dict[int, Staging] = {}
        for i in sorted(come, key=lambda i: -len(come[i].slots)):
            fields, needed = self._layers[i].dispatcher.fields, len(come[i].slots)
            like = [s for s in free if (s.layout, s.device) == (fields.layout, fields.device)]
            fit = next((s for s in like if s.capacity >= needed), None)
            if fit is None:
                for small in like[:1]:  # it makes room
                    free.remove(small)
                    self._stagings.remove(small)
                usual = fields.n_slots if budget is None else budget if self._pace.layers_at_once == 1 else 0
                fit = Staging(fields, max(min(usual, fields.n_slots), needed, 1))
                self._stagings.append(fit)
            else:
                free.remove(fit)
            found[i] = fit
        if budget is not None and sum(s.capacity for s in self._stagings) > max(budget, 1):
            self._stagings = [s for s in self._stagings if s not in free]  # those that no layer has now
        return found

    def _bring(self, layer: int, come: Arrivals, at: Progress) -> None:
        """Let one layer's experts come into its buffer. Ranks meet before every step, whatever the source is."""
        fault: Exception | None = None
        steps: Iterator[Moved] | None = None
        done = False
        begin = not_before = time.monotonic()
        moved_bytes = 0
        while True:
            self._tally.at(at)
            left = not_before - time.monotonic()
            waits = self._wishes.held or left > 0
            wish = [int(self._wishes.closing), int(fault is not None), int(waits), int(done)]
            told = self._control.gather(Stage.TRANSFER, wish)
            closing, failed, held = (any(row[i] for row in told) for i in range(3))  # or at rest, for the rate
            if closing or failed or all(row[3] for row in told):
                break
            if done or (held if self._source.collective else waits):
                self._wishes.wait(min(left, self._pace.poll) if left > 0 else self._pace.poll)
                continue
            try:
                if steps is None:
                    steps = iter(self._source.bring(layer, come.moves, self._batch_stagings[layer]))
                moved = next(steps, None)
                if moved is None:
                    done = True
                    continue
                self._tally.add(bytes_moved=moved.bytes_received)
                moved_bytes += max(moved.bytes_sent, moved.bytes_received)
                at = at._replace(rounds_done=at.rounds_done + 1)
            except LostRankError:
                raise
            except Exception as problem:
                fault = problem
                continue
            if self._pace.bytes_per_second is not None:
                not_before = begin + moved_bytes / self._pace.bytes_per_second

        def end() -> None:
            if fault is not None:
                raise fault
            if closing:
                raise SkippedError("closed", "rebalancing has been closed")

        if isinstance(steps, Generator):
            steps.close()
        self._control.together(Stage.TRANSFER, "transfer", end)

    # ---- commit

    def _commit(self, batch: dict[int, LayerPlan], epoch: int, at: Progress) -> None:
        self._tally.at(at._replace(stage="commit"))

        def stage() -> None:
            for i, plan in batch.items():
                self._layers[i].dispatcher.stage(plan.placement, self._batch_stagings[i], epoch, self._before[i])

        try:
            self._control.together(Stage.COMMIT, "commit", stage, lambda _: epoch)
        except SkippedError:
            self._unstage(batch)
            raise
        left = list(batch)
        for _ in range(_ATTEMPTS):
            ahead = max(row[0] for row in self._control.gather(Stage.COMMIT, [self._ahead]))
            agreed = self._agree(left, ahead)
            for i in (i for i, yes in zip(left, agreed, strict=True) if yes):
                self._tally.swapped(epoch, 1)
                self._tally.balanced(i, batch[i].imbalance_after)
                if self._control.rank == 0:
                    _log.info("epoch %d, layer %r: %s", epoch, self._layers[i].name, batch[i].reason)
            left = [i for i, yes in zip(left, agreed, strict=True) if not yes]
            if not left:
                break
            self._ahead = min(2 * ahead, _MOST_AHEAD)
        self._unstage(left)
        self._wait([i for i in batch if i not in left], at)
        if left:
            raise SkippedError("commit", f"no step could be agreed on, the last {ahead} steps ahead")

    def _unstage(self, layers: Iterable[int]) -> None:
        for i in layers:
            self._layers[i].dispatcher.unstage()

    def _agree(self, layers: Sequence[int], ahead: int) -> list[bool]:
        steps = agreement([self._layers[i].dispatcher.point for i in layers], ahead)
        row = next(steps)
        while True:
            try:
                row = steps.send(self._control.gather(Stage.COMMIT, row))
            except StopIteration as end:
                agreed: list[bool] = end.value
                return agreed

    def _wait(self, layers: Sequence[int], at: Progress) -> None:
        """Until every rank has swapped, and its buffers can be written again; swaps that are agreed on need no help."""
        self._tally.at(at._replace(stage="wait"))
        stalls = self._stalls()
        while True:
            points = (self._layers[i].dispatcher.point for i in layers)
            busy = any(
                point.pending or not self._batch_stagings[i].released() for point, i in zip(points, layers, strict=True)
            )
            told = self._control.gather(Stage.WAIT, [int(busy), int(self._wishes.closing)])
            if any(closing for _, closing in told):
                raise SkippedError("closed", "rebalancing has been closed")
            if not any(pending for pending, _ in told):
                break
            self._wishes.wait(self._pace.poll)
        stalled = self._stalls() > stalls
        self._ahead = min(2 * self._ahead, _MOST_AHEAD) if stalled else max(self._pace.ahead, self._ahead // 2)

    def _stalls(self) -> int:
        return sum(layer.dispatcher.point.stalls for layer in self._layers)


def _checked_plans(plans: Sequence[LayerPlan], before: Sequence[Placement]) -> Sequence[LayerPlan]:
    """Refuse what a service may have made up."""
    if len(plans) != len(before):
        raise ValueError(f"{len(plans)} plans have come, allowed is one for each layer, {len(before)}")
    for plan, now in zip(plans, before, strict=True):
        if not isinstance(plan, LayerPlan):
            raise TypeError(f"a plan is {seen(plan)}, allowed is an lplb.dynamic.planning.LayerPlan")
        check_sizes("a plan", plan.placement, now)
    return plans


def _last_rows(history: torch.Tensor, n: int) -> torch.Tensor:
    """The last n rows of each layer, behind rows of zeros where there are fewer; a copy."""
    layers, rows, n_logical = history.shape
    kept = min(rows, n)
    out = torch.zeros(layers, n, n_logical, dtype=torch.int64, device="cpu")
    out[:, n - kept :] = history[:, rows - kept :]
    return out


def _reasons(layers: Sequence[Layer], plans: Sequence[LayerPlan]) -> str:
    """The first layer's, and how many there are."""
    more = f", and {len(plans) - 1} layers more" if len(plans) > 1 else ""
    return f"{layers[0].name}: {plans[0].reason}{more}"
