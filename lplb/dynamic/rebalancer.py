"""Loads watched, placements renewed, weights moved: all that goes on beside the forward passes."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lplb import exchange
from lplb.arguments import real_number, seen, whole_number
from lplb.dynamic.client import Client
from lplb.dynamic.control import Control, SkippedError, Stage
from lplb.dynamic.cycle import Cycle, MakePlan, Pace, Request, Wishes
from lplb.dynamic.dispatcher import check_sizes
from lplb.dynamic.layers import Layer, check_layers, find_layers
from lplb.dynamic.planning import Problem, Settings, plan
from lplb.dynamic.sources import Callback, Peers, Source
from lplb.dynamic.stats import Progress, Stats, Tally
from lplb.placement import Placement
from lplb.weights.links import checked_ranks

__all__ = ["Rebalancer"]

_log = logging.getLogger("lplb.dynamic")
_STATE, _VERSION = "lplb.rebalancer", 1
_AT_EXIT = 5.0  # seconds
_MOST_REST = 10  # polls between two looks, while nothing happens


class Rebalancer:
    """Renews the placements of a model's layers while it runs.

    A background thread on every rank gathers the loads that collectors have seen, plans, lets the weights come into
    buffers, and agrees with the other ranks on the step at which all swap; then dispatchers say so to the forward
    passes (`Dispatcher.check_consistency`). It talks over process groups of its own, never waits for a forward pass,
    and no forward pass waits for it but for the rare stall that `lplb.dynamic.commit` explains, which `stats` counts.

    What goes wrong on one rank (no memory, no plan, an error of the weights' source) ends that cycle on all ranks: the
    old placement serves on, `stats` counts it, and the log says it once. If a rank is lost, or the side group broken,
    rebalancing ends; forward passes then raise RuntimeError in `check_consistency` until `close`, since nobody knows
    what the other ranks do. The placement that is live then is complete. A pass that raises there has not begun;
    one that fails later is repeated on all ranks or on none, as passes are what ranks count.

    The constructor, and `close` in the sense that closing on one rank ends rebalancing on all, are collective. Close
    before ``torch.distributed.destroy_process_group``.

    Args:
        module: the model. Its layers are the submodules with an attribute ``dispatcher``, a `Dispatcher`, and one
            ``collector`` or ``expert_load_collector``, a `LoadCollector`; in the order of ``named_modules``.
        group: the ranks that share the experts, a torch.distributed process group; ``None`` is one rank.
        mode: see `lplb.dynamic.planning.Settings`, as for all arguments up to ``byte_cost``.
        policy: ``"change"``, ``"lp"``, ``"eplb"`` or ``"eplb-distinct"``.
        gain: share of what can be gained that is enough.
        min_gain: mean imbalance that a layer's change has to take away at least.
        max_moves: most experts that are written in a cycle, in all layers together.
        max_bytes: most bytes of them.
        group_size: how many consecutive ranks balance among themselves.
        n_nodes: number of nodes, consecutive ranks each.
        steady: fewer than 16 rows are taken as what loads will be.
        horizon: rows that a change is to serve.
        token_cost: seconds per token of the busiest rank.
        byte_cost: seconds per byte that a rank sends or receives.
        phases: whose loads count; all by default.
        interval: rows of the collectors from cycle to cycle.
        window: rows that are planned from, at most the collectors' window.
        source: where weights come from: ``"peers"``, the ranks that have them; a `lplb.dynamic.sources.Source`; or a
            function ``(layer, expert, into)`` that fills the tensors ``into`` of an expert.
        service: where plans come from: ``None``, this process; the address ``"tcp://host:port"`` of an
            ``lplb.eplb_scheduler``, whose key is in EPLB_AUTH_KEY; address and key; or what has the `plan` of a
            `lplb.dynamic.client.Client`.
        service_timeout: seconds that a service may take.
        layers_at_once: layers whose incoming experts have memory at one time.
        bytes_per_second: that a rank sends or receives at most while it moves weights; ``None`` for no limit.
        ahead: steps between an agreement and its swap, to begin with; 4 or more.
        poll: seconds between two looks at what other ranks are at; up to ten times as long while nothing happens.
        watchdog: seconds after which the log warns of a cycle that has not ended, with how far it is. Waiting for
            forward passes does not count, nor what this rank holds back.
        start: ``False`` to start later, with `start`.

    Raises:
        TypeError, ValueError: an argument is not allowed, on any rank, or another on another rank.
        RuntimeError: a rank is lost.
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup | None = None,
        *,
        mode: str = "A2A",
        policy: str = "change",
        gain: float = 0.98,
        min_gain: float = 0.01,
        max_moves: int | None = None,
        max_bytes: int | None = None,
        group_size: int | None = None,
        n_nodes: int = 1,
        steady: bool = False,
        horizon: float | None = None,
        token_cost: float | None = None,
        byte_cost: float | None = None,
        phases: Sequence[str] | None = None,
        interval: int = 32,
        window: int = 64,
        source: str | Source | Callable[[int, int, list[torch.Tensor]], None] = "peers",
        service: str | tuple[str, str] | Any | None = None,
        service_timeout: float = 10.0,
        layers_at_once: int = 1,
        bytes_per_second: float | None = None,
        ahead: int = 8,
        poll: float = 0.02,
        watchdog: float = 60.0,
        start: bool = True,
    ) -> None:
        """See the class."""
        ranks = checked_ranks("group", group)
        clients: list[Any] = []  # to be closed if another rank refuses its input

        def check() -> tuple[tuple[Layer, ...], Settings, Pace, Any]:
            layers = find_layers(module)
            check_layers(layers, ranks.rank, ranks.size, phases)
            settings = Settings(
                mode=mode,
                policy=policy,
                gain=gain,
                min_gain=min_gain,
                max_moves=max_moves,
                max_bytes=max_bytes,
                expert_bytes=layers[0].dispatcher.fields.layout.nbytes,
                group_size=group_size,
                n_nodes=n_nodes,
                steady=steady,
                horizon=horizon,
                token_cost=token_cost,
                byte_cost=byte_cost,
            )
            empty = torch.zeros(len(layers), 1, layers[0].collector.n_logical, dtype=torch.int64).numpy()
            Problem(tuple(layer.dispatcher.placement for layer in layers), empty, None, settings)
            self.interval = whole_number("interval", interval, 1)
            self._watchdog = _above_0("watchdog", watchdog)
            self._service_timeout = _above_0("service_timeout", service_timeout)
            if not (source == "peers" or callable(source) or hasattr(source, "bring")):
                raise ValueError(f"source is {source!r}, allowed are 'peers', a Source and a function")
            kept = min(layer.collector.window for layer in layers)
            if whole_number("window", window, 1) > kept:
                raise ValueError(f"window is {window}, allowed is 1 to the collectors' own, {kept}")
            pace = Pace(
                window=int(window),
                layers_at_once=whole_number("layers_at_once", layers_at_once, 1),
                bytes_per_second=None if bytes_per_second is None else _above_0("bytes_per_second", bytes_per_second),
                ahead=whole_number("ahead", ahead, 4, 4096),
                poll=_above_0("poll", poll),
            )
            if settings.max_bytes and settings.budget() == 0:
                raise ValueError(
                    f"max_bytes is {max_bytes}, allowed is an expert's weight or more, {settings.expert_bytes}, or 0"
                )
            clients.append(_service_of(service, layers, ranks.rank, ranks.size))
            return layers, settings, pace, clients[0]

        def same(found: tuple[tuple[Layer, ...], Settings, Pace, Any]) -> tuple[int, int]:
            layers, settings, pace, planning = found
            what = [(name, d.placement.phy2log.tolist(), d.fields.layout) for name, d, _ in layers]
            address = service if isinstance(service, str) else service[0] if isinstance(service, tuple) else None
            alike = type(source), type(planning), address, self._service_timeout, self._watchdog
            return exchange.fingerprint("rebalancer", what, settings, pace, self.interval, phases, alike)

        has = "other layers, placements or settings than rank 0; allowed are the same on every rank"
        try:
            layers, settings, pace, self._service = exchange.together(ranks, check, same, has)
        except Exception:
            if clients and isinstance(clients[0], Client):
                clients[0].close()
            raise
        self.layers = layers
        self.settings = settings
        self._pace = pace
        self._rest = pace.poll
        self._wishes = Wishes()
        self._tally = Tally([layer.name for layer in layers])
        self._groups: list[exchange.Apart] = []
        self._cuda = layers[0].dispatcher.cuda_device
        try:
            self._control = Control(self._another(ranks, "gloo"), 2 * len(layers) + 8)
            brings = self._source_of(source, ranks)
        except Exception:  # on every rank
            self._give_back()
            raise
        self._cycle = Cycle(
            layers, self._control, self._planner(), brings, settings, phases, pace, self._wishes, self._tally
        )
        for layer in layers:
            layer.dispatcher.owner = self
        self._thread: threading.Thread | None = None
        self._asked_at: float | None = None  # when something was asked for that other ranks have not asked for
        _open.add(self)
        if ranks.rank == 0:
            _log.info("rebalancing %s on %d ranks, every %d rows", self.model, ranks.size, self.interval)
        if start:
            self.start()

    # ---- construction

    def _another(self, ranks: exchange.Local | exchange.Distributed, backend: str | None = None) -> Any:
        """Ranks over a group of their own. Collective."""
        if not isinstance(ranks, exchange.Distributed):
            return ranks
        self._groups.append(exchange.Apart(ranks, backend))
        return exchange.Distributed(self._groups[-1].group)

    def _source_of(self, source: Any, ranks: exchange.Local | exchange.Distributed) -> Source:
        if source == "peers":
            on_cpu = self.layers[0].dispatcher.fields.device.type == "cpu"
            carrier: Any = self._control.ranks if on_cpu else self._another(ranks)
            group = carrier.group if isinstance(carrier, exchange.Distributed) else None
            return Peers([layer.dispatcher for layer in self.layers], group)
        if hasattr(source, "bring"):
            found: Source = source
            return found
        return Callback(source, ranks.rank)

    def _planner(self) -> MakePlan:
        if self._service is None:
            return lambda problem, _: plan(problem)
        return lambda problem, epoch: self._service.plan(problem, epoch, self._service_timeout)

    @property
    def model(self) -> str:
        """What tells this model's layers from another's: the same on all ranks and in every run."""
        return _model_of(self.layers)

    # ---- what a user does

    def start(self) -> None:
        """Start the background thread, which a collective constructor has made ready; nothing if it runs."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="lplb-rebalancer", daemon=True)
            self._thread.start()

    def hold(self) -> None:
        """Keep weights from moving until `resume`: on all ranks where they come from peers, on this one otherwise.

        The expert that is on its way arrives. Use it around other traffic between host and device.
        """
        self._wish(held=True)

    def resume(self) -> None:
        """Let weights move again."""
        self._wish(held=False)

    def trigger(self) -> None:
        """Take a cycle as soon as every rank has asked for one, whatever the interval.

        Raises:
            RuntimeError: rebalancing has ended.
        """
        self._refuse_closed()
        with self._wishes.changed:
            self._wishes.now += 1
            self._wishes.changed.notify_all()

    def move_to(self, placements: Sequence[Placement]) -> None:
        """Move to given placements in the next cycle, once every rank has asked for the same.

        Args:
            placements: one per layer, of the present sizes.

        Raises:
            TypeError, ValueError: they are not; on this rank only.
            RuntimeError: rebalancing has ended.
        """
        self._ask(placements, None)

    def _refuse_closed(self) -> None:
        if self._wishes.closing or self.progress.stage in ("closed", "failed"):
            raise RuntimeError(f"the rebalancer has {'failed' if self.progress.stage == 'failed' else 'been closed'}")

    def _ask(self, placements: Sequence[Placement], history: torch.Tensor | None) -> None:
        self._refuse_closed()
        if not isinstance(placements, Sequence) or len(placements) != len(self.layers):
            raise ValueError(f"placements is {seen(placements)}, allowed are {len(self.layers)}, one per layer")
        for i, (placement, layer) in enumerate(zip(placements, self.layers, strict=True)):
            if not isinstance(placement, Placement):
                raise TypeError(f"placements[{i}] is {seen(placement)}, allowed is an lplb.Placement")
            check_sizes(f"placements[{i}]", placement, layer.dispatcher.placement)
            placement.check_groups(self.settings.group_size or placement.n_ranks)
        rows = None if history is None else history.numpy().tobytes()
        what = exchange.fingerprint([placement.phy2log.tolist() for placement in placements], rows)
        self._wish(request=Request(tuple(placements), history, (what[0] | 1, what[1])))

    def close(self, timeout: float = 30.0) -> None:
        """End rebalancing, on all ranks. Swaps that all have agreed on are still made. May be called twice.

        Where a rank was lost after this one had promised a swap, forward passes go on raising: the others may have made
        it. Make dispatchers anew then.

        Args:
            timeout: seconds to wait for the background thread, whose last call needs the other ranks. If it has not
                ended by then, the log says so, and the dispatchers stay taken.
        """
        self._wish(closing=True)
        if hasattr(self._service, "close"):
            self._service.close()  # what is asked of it ends at once
        self.start()  # if it never was: the other ranks are to hear of it
        assert self._thread is not None
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning("the background thread has not ended in %g s: another rank is late, or lost", timeout)
            return
        for layer in self.layers:
            dispatcher = layer.dispatcher
            if dispatcher.owner is not self:
                continue
            dispatcher.owner = None
            if dispatcher.point.clear() and not dispatcher.point.pending:
                dispatcher.unstage()
        _open.discard(self)

    def __enter__(self) -> Rebalancer:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def stats(self) -> Stats:
        """A consistent copy of what has been done."""
        stats = self._tally.read()
        points = [layer.dispatcher.point for layer in self.layers]
        return replace(
            stats,
            stalls=sum(point.stalls for point in points),
            stall_seconds=sum(point.stall_seconds for point in points),
            held=self._wishes.held,
        )

    @property
    def progress(self) -> Progress:
        """How far the cycle is that is under way."""
        return self._tally.progress

    def state_dict(self) -> dict[str, Any]:
        """Placements and load history, as `torch.save` keeps them; the weights are the model's business."""
        placements = [layer.dispatcher.placement for layer in self.layers]
        return {
            "format": _STATE,
            "version": _VERSION,
            "layers": [layer.name for layer in self.layers],
            "n_ranks": placements[0].n_ranks,
            "phy2log": torch.stack([placement.phy2log for placement in placements]),
            "history": self._cycle.history.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over history, and move to the placements as `move_to` does, while the model runs.

        Args:
            state: of `state_dict`, the same on every rank; of a model of the same layers and sizes.

        Raises:
            TypeError, ValueError: it is not; on this rank only, and nothing has changed.
            RuntimeError: rebalancing has ended.
        """
        if not isinstance(state, Mapping) or state.get("format") != _STATE or state.get("version") != _VERSION:
            raise ValueError(f"state is {seen(state)}, allowed is what state_dict() of this version returns")
        lacking = [key for key in ("layers", "n_ranks", "phy2log", "history") if key not in state]
        if lacking:
            raise ValueError(f"state lacks {', '.join(lacking)}, allowed is what state_dict() returns")
        names = [layer.name for layer in self.layers]
        if state["layers"] != names:
            raise ValueError(f"state has layers {state['layers']}, allowed are {names}")
        history, n_logical = state["history"], self.layers[0].dispatcher.n_logical
        if not isinstance(history, torch.Tensor) or history.dtype != torch.int64 or history.dim() != 3:
            raise ValueError(f"history is {seen(history)}, allowed is an int64 tensor [layers, rows, n_logical]")
        if (history.shape[0], history.shape[2]) != (len(names), n_logical) or bool((history < 0).any()):
            raise ValueError(
                f"history has shape {list(history.shape)}, allowed is [{len(names)}, rows, {n_logical}], with counts "
                "of 0 or more"
            )
        if not isinstance(state["phy2log"], torch.Tensor) or state["phy2log"].dim() != 2:
            raise ValueError(f"phy2log is {seen(state['phy2log'])}, allowed is a tensor [layers, n_physical]")
        self._ask([Placement(row, state["n_ranks"], n_logical) for row in state["phy2log"]], history.cpu().clone())

    def _wish(self, **wishes: Any) -> None:
        with self._wishes.changed:
            for name, value in wishes.items():
                setattr(self._wishes, name, value)
            self._wishes.changed.notify_all()

    # ---- the background thread

    def _serve(self) -> None:
        end = "closed"
        try:
            if self._cuda is not None:
                torch.cuda.set_device(self._cuda)
            while self._tick():
                pass
            self._give_back()
        except BaseException as error:
            end = "failed"
            self._lost(error)
        self._tally.at(Progress(end))

    def _give_back(self) -> None:
        for apart in self._groups:
            apart.give_back()
        self._groups.clear()

    def _tick(self) -> bool:
        """Look at what all ranks are at; take a cycle if it is time. False to end."""
        wishes, cycle = self._wishes, self._cycle
        request, n = wishes.request, len(self.layers)
        asked = (0, 0) if request is None else request.print
        told = self._control.gather(
            Stage.IDLE, [*cycle.own_clocks(), *asked, wishes.now, int(wishes.closing), int(cycle.swaps_pending())]
        )
        if any(row[-2] for row in told):
            return False
        clocks = [min(column) for column in zip(*(row[:n] for row in told), strict=True)]
        cycle.clocks = [min(pair) for pair in zip(cycle.clocks, clocks, strict=True)]  # a collector was reset
        all_ask = request is not None and all(row[n : n + 2] == told[0][n : n + 2] for row in told)
        now = min(row[-3] for row in told)
        due = max(new - last for new, last in zip(clocks, cycle.clocks, strict=True)) >= self.interval
        if not (all_ask or now or due) or any(row[-1] for row in told):
            self._tell_of_a_lone_wish(bool(request or wishes.now) and not (all_ask or now))
            wishes.wait(self._rest)
            self._rest = min(2 * self._rest, _MOST_REST * self._pace.poll)
            return True
        self._rest = self._pace.poll
        with wishes.changed:
            wishes.now -= now
            if all_ask and wishes.request is request:
                wishes.request = None
        self._take_cycle(clocks, request if all_ask else None)
        return True

    def _tell_of_a_lone_wish(self, is_alone: bool) -> None:
        """Once, if other ranks do not ask for what this one asks for."""
        if not is_alone:
            self._asked_at = None
        elif self._asked_at is None:
            self._asked_at = time.monotonic()
        elif time.monotonic() - self._asked_at > self._watchdog:
            self._asked_at = math.inf
            _log.warning("this rank has asked for a cycle or placements, other ranks have not asked for the same")

    def _take_cycle(self, clocks: Sequence[int], request: Request | None) -> None:
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(ended,), name="lplb-watchdog", daemon=True).start()
        try:
            self._cycle.run(clocks, request)
        except SkippedError as skipped:
            if self._tally.skip(skipped.kind, str(skipped)):
                quiet = skipped.kind in ("no gain", "no loads", "closed")
                _log.log(
                    logging.DEBUG if quiet else logging.WARNING,
                    "rebalancing skipped (%s), the placement stays: %s",
                    skipped.kind,
                    skipped,
                )
        finally:
            ended.set()
        self._tally.at(Progress())

    def _watch(self, ended: threading.Event) -> None:
        """Warn once of a cycle that takes long, but not while it waits for forward passes or is held."""
        spent = 0.0
        while not ended.wait(self._watchdog / 8):
            if self.progress.stage != "wait" and not self._wishes.held:
                spent += self._watchdog / 8
            if spent >= self._watchdog:
                _log.warning("a cycle of rebalancing takes more than %g s: %s", self._watchdog, self.progress)
                return

    def _lost(self, error: BaseException) -> None:
        """Nobody knows what the other ranks do: forward passes are told, before anything else can go wrong."""
        reason = error if isinstance(error, Exception) else RuntimeError(repr(error))
        for layer in self.layers:
            layer.dispatcher.point.fail(reason)
        if not self._wishes.closing:
            with contextlib.suppress(Exception):
                _log.error("rebalancing has ended, the placement stays: %s", error)


_open: weakref.WeakSet[Rebalancer] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for rebalancer in list(_open):
        rebalancer.close(_AT_EXIT)


def _service_of(service: Any, layers: Sequence[Layer], rank: int, size: int) -> Any:
    """A client, or what is given in its place."""
    if service is None or hasattr(service, "plan"):
        return service
    if not isinstance(service, str) and not (isinstance(service, Sequence) and len(service) == 2):
        raise TypeError(f"service is {seen(service)}, allowed are an address, address and key, a Client and None")
    address, key = (service, None) if isinstance(service, str) else service
    return Client(address, rank=rank, size=size, model=_model_of(layers), auth_key=key)


def _model_of(layers: Sequence[Layer]) -> str:
    what = [(name, d.n_logical, d.placement.n_physical, d.fields.layout.nbytes) for name, d, _ in layers]
    first, second = exchange.fingerprint(what)
    return f"{len(layers)} layers of {layers[0].dispatcher.n_logical} experts, {first:08x}{second:08x}"


def _above_0(name: str, value: object) -> float:
    number = real_number(name, value)
    if not 0.0 < number < float("inf"):
        raise ValueError(f"{name} is {number}, allowed is above 0 and finite")
    return number
