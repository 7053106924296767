"""One cycle of a rebalancer: collect, plan, transfer, commit. Runs on the background threads, alike on all ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from lplb.dynamic.collector import LoadCollector
from lplb.dynamic.commit import agreement
from lplb.dynamic.control import Control, SkippedError, Stage
from lplb.dynamic.dispatcher import Dispatcher
from lplb.dynamic.planning import LayerPlan, Problem, Settings, plans_digest
from lplb.dynamic.sources import Source
from lplb.dynamic.staging import Staging, arrivals
from lplb.dynamic.stats import Progress, Tally
from lplb.placement import Placement

__all__ = ["Cycle", "Layer", "Pace", "Wishes"]

_ATTEMPTS = 8  # to agree on a step, each time twice as far ahead
_MOST_AHEAD = 4096

MakePlan = Callable[[Problem, int], Sequence[LayerPlan]]


class Layer(NamedTuple):
    """A layer whose experts are to move."""

    name: str
    """Of the module that has both."""
    dispatcher: Dispatcher
    collector: LoadCollector


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


class Wishes:
    """What the user of this rank wants. Written by any thread, read by the background thread."""

    def __init__(self) -> None:
        """Nothing."""
        self.changed = threading.Condition()
        self.closing = self.held = self.now = False
        self.target: tuple[Placement, ...] | None = None
        """Placements that are asked for, one per layer."""

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
        self.history = torch.zeros(len(layers), 0, layers[0].collector.n_logical, dtype=torch.int64)
        self.clock = 0
        self._ahead = pace.ahead
        self._stagings: dict[object, list[Staging]] = {}
        self._batch_stagings: dict[int, Staging] = {}  # of the layers that are under way

    def own_clock(self) -> int:
        """Rows that this rank has of every layer."""
        return min(layer.collector.clock for layer in self._layers)

    def swaps_pending(self) -> bool:
        """Whether a swap is to come on this rank that was agreed on before this began."""
        return any(layer.dispatcher.point.pending for layer in self._layers)

    def run(self, clock: int, target: tuple[Placement, ...] | None) -> None:
        """Take one cycle.

        Args:
            clock: rows that every rank has of every layer; the same on every rank.
            target: placements that are asked for, the same on every rank; ``None`` to plan.

        Raises:
            SkippedError: on every rank; it went no further.
            LostRankError: a rank is lost, or this one is.
        """
        epoch = self._tally.begin()
        self._tally.at(Progress("collect"))
        sources = self._collect(clock)
        plans = self._plan(epoch, sources, target)
        todo = [i for i, p in enumerate(plans) if p.worth and p.placement != self._layers[i].dispatcher.placement]
        if not todo:
            raise SkippedError("no gain", "no layer's change is worth its moves: " + _reasons(self._layers, plans))
        size = self._pace.layers_at_once
        for first in range(0, len(todo), size):
            batch = {i: plans[i] for i in todo[first : first + size]}
            at = Progress("transfer", "", first, len(todo))
            self._transfer(batch, at)
            self._commit(batch, epoch, at)
            self._wait(batch, at)

    # ---- collect

    def _collect(self, clock: int) -> torch.Tensor | None:
        """Append what is new to the history; return who sent it, ``[layers, ranks, n_logical]``, where that counts."""
        n = min(clock - self.clock, self._pace.window)
        self.clock = clock  # whatever becomes of it: it is not asked for again

        def read() -> torch.Tensor:
            if n == 0:
                return self.history[:, :0]
            rows = [layer.collector.rows_until(clock, n, self._phases).sum(dim=1) for layer in self._layers]
            return torch.stack(rows)

        everyone_sees = self._settings.mode == "AG"
        rows = self._control.together(
            Stage.COLLECT, "loads", read, (lambda found: found.numpy().tobytes()) if everyone_sees else None
        )
        sources = None
        if not everyone_sees:
            if self._settings.n_nodes > 1:
                sources = self._control.by_rank(rows.sum(dim=1)).transpose(0, 1)
            rows = self._control.total(rows)
        self.history = torch.cat((self.history, rows), dim=1)[:, -self._pace.window :]
        return sources

    # ---- plan

    def _plan(
        self, epoch: int, sources: torch.Tensor | None, target: tuple[Placement, ...] | None
    ) -> Sequence[LayerPlan]:
        self._tally.at(Progress("plan"))
        if target is None and not self.history.any():
            raise SkippedError("no loads", "no tokens have been collected")

        def make() -> Sequence[LayerPlan]:
            if target is not None:
                return [LayerPlan(t, True, "asked for", float("nan"), float("nan"), 0) for t in target]
            placements = tuple(layer.dispatcher.placement for layer in self._layers)
            history = np.ascontiguousarray(self.history.numpy())
            sent = None if sources is None else np.ascontiguousarray(sources.numpy())
            return self._make_plan(Problem(placements, history, sent, self._settings), epoch)

        with self._tally.timed("plan_seconds"):
            plans = self._control.together(Stage.PLAN, "plan", make, plans_digest)
        for i, plan in enumerate(plans):
            self._tally.balanced(i, plan.imbalance_before)
        return plans

    # ---- transfer

    def _transfer(self, batch: dict[int, LayerPlan], at: Progress) -> None:
        stagings = self._control.together(Stage.TRANSFER, "memory", lambda: self._memory(batch))
        self._tally.add(staging_bytes=self.staging_bytes - self._tally.read().staging_bytes)
        self._batch_stagings = stagings
        with self._tally.timed("transfer_seconds"):
            for i, staging in stagings.items():
                at = at._replace(layer=self._layers[i].name, rounds_done=0)
                bring = partial(self._bring, i, batch[i], staging, at)
                self._control.together(Stage.TRANSFER, "transfer", bring)

    @property
    def staging_bytes(self) -> int:
        """Of all buffers."""
        return sum(staging.nbytes for pool in self._stagings.values() for staging in pool)

    def _memory(self, batch: dict[int, LayerPlan]) -> dict[int, Staging]:
        """A buffer for each layer, made when it is first needed and kept."""
        found: dict[int, Staging] = {}
        used: dict[object, int] = {}
        budget = self._settings.budget()
        for i, plan in batch.items():
            dispatcher = self._layers[i].dispatcher
            fields = dispatcher.fields
            like = (fields.layout, fields.device, fields.n_slots)
            pool = self._stagings.setdefault(like, [])
            number = used.setdefault(like, 0)
            needed = len(arrivals(dispatcher.placement, plan.placement, dispatcher.rank).slots)
            if number < len(pool) and pool[number].capacity < needed:  # asked for, beyond the budget
                del pool[number]
            if number == len(pool):
                usual = fields.n_slots if budget is None else min(fields.n_slots, budget)
                pool.append(Staging(fields, max(usual, needed, 1)))
            found[i] = pool[number]
            used[like] += 1
        return found

    def _bring(self, layer: int, plan: LayerPlan, staging: Staging, at: Progress) -> None:
        """Let one layer's experts come into a buffer."""
        dispatcher = self._layers[layer].dispatcher
        come = arrivals(dispatcher.placement, plan.placement, dispatcher.rank)
        held, wanted = (_experts_of(p, dispatcher.rank) for p in (dispatcher.placement, plan.placement))
        self._tally.add(bytes_lower_bound=len(wanted - held) * dispatcher.fields.layout.nbytes)
        begin, moved_bytes = time.monotonic(), 0
        self._pause(at)
        for done, moved in enumerate(self._source.bring(layer, come.moves, staging)):
            self._tally.add(bytes_moved=moved.bytes_received)
            moved_bytes += max(moved.bytes_sent, moved.bytes_received)
            at = at._replace(rounds_done=done + 1)
            if self._pace.bytes_per_second is not None:
                time.sleep(max(0.0, begin + moved_bytes / self._pace.bytes_per_second - time.monotonic()))
            self._pause(at)

    def _pause(self, at: Progress) -> None:
        """Wait while transfers are held back: on any rank, where all take every round together."""
        self._tally.at(at)
        while True:
            wish = [int(self._wishes.held), int(self._wishes.closing)]
            told = self._control.gather(Stage.TRANSFER, wish) if self._source.collective else [wish]
            if any(closing for _, closing in told):
                raise SkippedError("closed", "rebalancing has been closed")
            if not any(held for held, _ in told):
                return
            self._wishes.wait(self._pace.poll)

    # ---- commit

    def _commit(self, batch: dict[int, LayerPlan], epoch: int, at: Progress) -> None:
        self._tally.at(at._replace(stage="commit"))

        def stage() -> None:
            for i, plan in batch.items():
                self._layers[i].dispatcher.stage(plan.placement, self._batch_stagings[i], epoch)

        with self._unstaged(batch):
            plans = list(batch.values())
            self._control.together(Stage.COMMIT, "commit", stage, lambda _: (epoch, plans_digest(plans)))
            left = list(batch)
            for _ in range(_ATTEMPTS):
                ahead = max(row[0] for row in self._control.gather(Stage.COMMIT, [self._ahead]))
                agreed = self._agree(left, ahead)
                for i in (i for i, yes in zip(left, agreed, strict=True) if yes):
                    self._tally.swapped(epoch, 1)
                    self._tally.balanced(i, batch[i].imbalance_after)
                left = [i for i, yes in zip(left, agreed, strict=True) if not yes]
                if not left:
                    return
                self._ahead = min(2 * ahead, _MOST_AHEAD)
            raise SkippedError("commit", f"no step could be agreed on, the last {ahead} steps ahead")

    def _agree(self, layers: Sequence[int], ahead: int) -> list[bool]:
        steps = agreement([self._layers[i].dispatcher.point for i in layers], ahead)
        row = next(steps)
        while True:
            try:
                row = steps.send(self._control.gather(Stage.COMMIT, row))
            except StopIteration as end:
                agreed: list[bool] = end.value
                return agreed

    @contextmanager
    def _unstaged(self, layers: Sequence[int] | dict[int, LayerPlan]) -> Iterator[None]:
        """Forget what is staged and not agreed on, if a cycle goes no further."""
        try:
            yield
        except SkippedError:
            for i in layers:
                if not self._layers[i].dispatcher.point.pending:
                    self._layers[i].dispatcher.unstage()
            raise

    def _wait(self, batch: dict[int, LayerPlan], at: Progress) -> None:
        """Until every rank has swapped, and its buffers can be written again; swaps that are agreed on need no help."""
        self._tally.at(at._replace(stage="wait"))
        stalls = self._stalls()
        while True:
            busy = sum(
                self._layers[i].dispatcher.point.pending or not self._batch_stagings[i].released() for i in batch
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


def _experts_of(placement: Placement, rank: int) -> set[int]:
    n = placement.slots_per_rank
    return set(placement.phy2log[rank * n : (rank + 1) * n].tolist())


def _reasons(layers: Sequence[Layer], plans: Sequence[LayerPlan]) -> str:
    """The first layer's, and how many there are."""
    more = f", and {len(plans) - 1} layers more" if len(plans) > 1 else ""
    return f"{layers[0].name}: {plans[0].reason}{more}"
