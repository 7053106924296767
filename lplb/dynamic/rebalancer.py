"""Loads watched, placements renewed, weights moved: all that goes on beside the forward passes."""

from __future__ import annotations

import atexit
import logging
import threading
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
from lplb.dynamic.collector import LoadCollector
from lplb.dynamic.control import Control, SkippedError, Stage
from lplb.dynamic.cycle import Cycle, Layer, MakePlan, Pace, Wishes
from lplb.dynamic.dispatcher import Dispatcher
from lplb.dynamic.planning import Problem, Settings, plan
from lplb.dynamic.sources import Callback, Peers, Source
from lplb.dynamic.stats import Progress, Stats, Tally
from lplb.placement import Placement
from lplb.weights.links import checked_ranks

__all__ = ["Rebalancer", "find_layers"]

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
    what the other ranks do. The placement that is live then is complete.

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
        watchdog: seconds after which the log warns of a cycle that has not ended, with how far it is.
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

        def check() -> tuple[tuple[Layer, ...], Settings, Pace]:
            layers = find_layers(module)
            _check_layers(layers, ranks.rank, ranks.size, phases)
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
            pace = Pace(
                window=whole_number("window", window, 1, min(layer.collector.window for layer in layers)),
                layers_at_once=whole_number("layers_at_once", layers_at_once, 1),
                bytes_per_second=None if bytes_per_second is None else _above_0("bytes_per_second", bytes_per_second),
                ahead=whole_number("ahead", ahead, 4, 4096),
                poll=_above_0("poll", poll),
            )
            return layers, settings, pace

        def same(found: tuple[tuple[Layer, ...], Settings, Pace]) -> tuple[int, int]:
            layers, settings, pace = found
            what = [(name, d.placement.phy2log.tolist(), d.fields.layout) for name, d, _ in layers]
            return exchange.fingerprint("rebalancer", what, settings, pace, self.interval, phases, type(source))

        has = "other layers, placements or settings than rank 0; allowed are the same on every rank"
        layers, settings, pace = exchange.together(ranks, check, same, has)
        self.layers = layers
        self.settings = settings
        self._pace = pace
        self._rest = pace.poll
        self._wishes = Wishes()
        self._tally = Tally([layer.name for layer in layers])
        self._groups: list[exchange.Apart] = []
        self._device = layers[0].dispatcher.fields.device
        control = Control(self._another(ranks, "gloo"), len(layers) + 8)
        self._control = control
        self._service: Any = self._service_of(service, ranks.rank, ranks.size)
        self._cycle = Cycle(
            layers,
            control,
            self._planner(),
            self._source_of(source, ranks),
            settings,
            phases,
            pace,
            self._wishes,
            self._tally,
        )
        self._thread: threading.Thread | None = None
        _open.add(self)
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
            carrier: Any = self._control.ranks if self._device.type == "cpu" else self._another(ranks)
            group = carrier.group if isinstance(carrier, exchange.Distributed) else None
            return Peers([layer.dispatcher for layer in self.layers], group)
        if hasattr(source, "bring"):
            found: Source = source
            return found
        return Callback(source, ranks.rank)

    def _service_of(self, service: Any, rank: int, size: int) -> Any:
        """A client, or what is given in its place."""
        if service is None or hasattr(service, "plan"):
            return service
        address, key = (service, None) if isinstance(service, str) else service
        return Client(address, rank=rank, size=size, model=self.model, auth_key=key)

    def _planner(self) -> MakePlan:
        if self._service is None:
            return lambda problem, _: plan(problem)
        return lambda problem, epoch: self._service.plan(problem, epoch, self._service_timeout)

    @property
    def model(self) -> str:
        """What tells this model's layers from another's: the same on all ranks and in every run."""
        what = [(name, d.n_logical, d.placement.n_physical, d.fields.layout.nbytes) for name, d, _ in self.layers]
        first, second = exchange.fingerprint(what)
        return f"{len(self.layers)} layers of {self.layers[0].dispatcher.n_logical} experts, {first:08x}{second:08x}"

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
        """Take a cycle as soon as every rank has asked for one, whatever the interval."""
        self._wish(now=True)

    def move_to(self, placements: Sequence[Placement]) -> None:
        """Move to given placements in the next cycle, once every rank has asked for the same.

        Args:
            placements: one per layer, of the present sizes.

        Raises:
            TypeError, ValueError: they are not; on this rank only.
        """
        if not isinstance(placements, Sequence) or len(placements) != len(self.layers):
            raise ValueError(f"placements is {seen(placements)}, allowed are {len(self.layers)}, one per layer")
        for i, (placement, layer) in enumerate(zip(placements, self.layers, strict=True)):
            now = layer.dispatcher.placement
            if not isinstance(placement, Placement):
                raise TypeError(f"placements[{i}] is {seen(placement)}, allowed is an lplb.Placement")
            if _sizes(placement) != _sizes(now):
                raise ValueError(f"placements[{i}] is {placement!r}, allowed are the sizes of {now!r}")
            placement.check_groups(self.settings.group_size or placement.n_ranks)
        self._wish(target=tuple(placements))

    def close(self, timeout: float = 30.0) -> None:
        """End rebalancing, on all ranks. Swaps that all have agreed on are still made. May be called twice.

        Args:
            timeout: seconds to wait for the background thread, whose last call needs the other ranks.
        """
        self._wish(closing=True)
        if hasattr(self._service, "close"):
            self._service.close()  # what is asked of it ends at once
        if self._thread is not None:
            self._thread.join(timeout)
        for layer in self.layers:
            layer.dispatcher.point.clear()
            if not layer.dispatcher.point.pending and not self._runs():
                layer.dispatcher.unstage()
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
        """
        if not isinstance(state, Mapping) or state.get("format") != _STATE or state.get("version") != _VERSION:
            raise ValueError(f"state is {seen(state)}, allowed is what state_dict() of this version returns")
        names = [layer.name for layer in self.layers]
        if state["layers"] != names:
            raise ValueError(f"state has layers {state['layers']}, allowed are {names}")
        history, n_logical = state["history"], self.layers[0].dispatcher.n_logical
        if history.dtype != torch.int64 or (history.shape[0], history.shape[-1]) != (len(names), n_logical):
            raise ValueError(
                f"history has shape {list(history.shape)}, {history.dtype}, allowed is int64 "
                f"[{len(names)}, rows, {n_logical}]"
            )
        self.move_to([Placement(row, state["n_ranks"], n_logical) for row in state["phy2log"]])
        self._cycle.history = history.clone()

    def _runs(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wish(self, **wishes: Any) -> None:
        with self._wishes.changed:
            for name, value in wishes.items():
                setattr(self._wishes, name, value)
            self._wishes.changed.notify_all()

    # ---- the background thread

    def _serve(self) -> None:
        end = "closed"
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            while self._tick():
                pass
            for apart in self._groups:
                apart.give_back()
        except BaseException as error:
            end = "failed"
            self._lost(error)
        self._tally.at(Progress(end))

    def _tick(self) -> bool:
        """Look at what all ranks are at; take a cycle if it is time. False to end."""
        wishes = self._wishes
        target = wishes.target
        asked = (0, 0) if target is None else exchange.fingerprint([p.phy2log.tolist() for p in target])
        own = [int(wishes.closing), int(wishes.now), self._cycle.own_clock(), self._cycle.swaps_pending(), *asked]
        told = self._control.gather(Stage.IDLE, own)
        if any(row[0] for row in told):
            return False
        clock = min(row[2] for row in told)
        all_ask = target is not None and all(row[4:] == told[0][4:] for row in told)
        due = all(row[1] for row in told) or clock - self._cycle.clock >= self.interval
        if not (all_ask or due) or any(row[3] for row in told):
            wishes.wait(self._rest)
            self._rest = min(2 * self._rest, _MOST_REST * self._pace.poll)
            return True
        self._rest = self._pace.poll
        with wishes.changed:
            if all(row[1] for row in told):
                wishes.now = False
            if all_ask and wishes.target is target:
                wishes.target = None
        self._take_cycle(clock, target if all_ask else None)
        return True

    def _take_cycle(self, clock: int, target: tuple[Placement, ...] | None) -> None:
        alarm = threading.Timer(self._watchdog, self._warn)
        alarm.daemon = True
        alarm.start()
        try:
            self._cycle.run(clock, target)
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
            alarm.cancel()
        self._tally.at(Progress())

    def _warn(self) -> None:
        _log.warning("a cycle of rebalancing takes more than %g s and goes on: %s", self._watchdog, self.progress)

    def _lost(self, error: BaseException) -> None:
        """Nobody knows what the other ranks do: forward passes are told."""
        if self._wishes.closing:
            return
        _log.error("rebalancing has ended, the placement stays: %s", error)
        reason = error if isinstance(error, Exception) else RuntimeError(repr(error))
        for layer in self.layers:
            layer.dispatcher.point.fail(reason)


_open: weakref.WeakSet[Rebalancer] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for rebalancer in list(_open):
        rebalancer.close(_AT_EXIT)


def find_layers(module: nn.Module) -> tuple[Layer, ...]:
    """Return the layers of a model that carry a dispatcher and a collector, in the order of ``named_modules``.

    Raises:
        TypeError: ``module`` is no module, or an attribute of these names is something else.
        ValueError: there is none, or two layers share one dispatcher or collector.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {seen(module)}, allowed is a torch.nn.Module")
    found = []
    for name, child in module.named_modules():
        dispatcher = getattr(child, "dispatcher", None)
        collector = getattr(child, "collector", getattr(child, "expert_load_collector", None))
        if dispatcher is None or collector is None:
            continue
        if not isinstance(dispatcher, Dispatcher):
            raise TypeError(f"{name}.dispatcher is {seen(dispatcher)}, allowed is an lplb.dynamic.Dispatcher")
        if not isinstance(collector, LoadCollector):
            raise TypeError(f"the collector of {name} is {seen(collector)}, allowed is an lplb.dynamic.LoadCollector")
        found.append(Layer(name, dispatcher, collector))
    if not found:
        raise ValueError("module has no layer with the attributes dispatcher and collector, allowed is one or more")
    for part in ("dispatcher", "collector"):
        owners: dict[int, str] = {}
        for layer in found:
            first = owners.setdefault(id(getattr(layer, part)), layer.name)
            if first != layer.name:
                raise ValueError(f"{layer.name} and {first} have one {part}, allowed is one for each layer")
    return tuple(found)


def _check_layers(layers: Sequence[Layer], rank: int, size: int, phases: Sequence[str] | None) -> None:
    first = layers[0].dispatcher.placement
    for name, dispatcher, collector in layers:
        placement = dispatcher.placement
        if placement.n_ranks != size:
            raise ValueError(
                f"{name} has a placement on {placement.n_ranks} ranks, allowed is the group's size, {size}"
            )
        if dispatcher.rank != rank:
            raise ValueError(f"{name} has a dispatcher of rank {dispatcher.rank}, allowed is this rank, {rank}")
        if _sizes(placement) != _sizes(first):
            raise ValueError(f"{name} has {placement!r}, allowed are the sizes of {layers[0].name}, {first!r}")
        if dispatcher.fields.layout.nbytes != layers[0].dispatcher.fields.layout.nbytes:
            raise ValueError(
                f"{name} has experts of {dispatcher.fields.layout.nbytes} bytes, allowed are those of "
                f"{layers[0].name}, {layers[0].dispatcher.fields.layout.nbytes}"
            )
        if collector.n_logical != placement.n_logical:
            raise ValueError(
                f"{name} collects loads of {collector.n_logical} experts, allowed is its placement's number, "
                f"{placement.n_logical}"
            )
        unknown = [phase for phase in phases or () if phase not in collector.phases]
        if unknown:
            raise ValueError(f"phases has {unknown[0]!r}, allowed for {name} are {', '.join(collector.phases)}")


def _sizes(placement: Placement) -> tuple[int, int, int]:
    return placement.n_ranks, placement.n_physical, placement.n_logical


def _above_0(name: str, value: object) -> float:
    number = real_number(name, value)
    if not 0.0 < number < float("inf"):
        raise ValueError(f"{name} is {number}, allowed is above 0 and finite")
    return number
