"""What a `Rebalancer` does, for Prometheus: its statistics as metrics, read when they are scraped.

Names and units follow Prometheus' conventions (https://prometheus.io/docs/practices/naming/): base units, and counters
that end in ``_total``. The number of series is bounded by the number of layers.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lplb.dynamic.control import KINDS

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

__all__ = ["REASONS", "STAGES", "Observed", "RebalancerMetrics", "export", "reason_word"]

STAGES = ("idle", "collect", "plan", "transfer", "commit", "wait", "closed", "failed")
"""What a rebalancer may be at: the states of ``lplb_stage``."""

REASONS = (*(kind.replace(" ", "_") for kind in KINDS), "other")
"""Where a cycle ended early: values of the label ``reason`` of ``lplb_skipped_rebalances_total``. The reason in words
is in the log, and in ``stats().last_reason``."""


class Observed(Protocol):
    """What is exported: a `Rebalancer`."""

    def stats(self) -> Any:
        """A consistent copy of the statistics, `lplb.dynamic.Stats`."""


class _Simple(NamedTuple):
    """A metric of one series."""

    kind: str
    name: str
    unit: str
    meaning: str
    read: Callable[[Any], float]


_SIMPLE = (
    _Simple("gauge", "lplb_epoch", "", "Number of the last cycle whose placements became live.", lambda s: s.epoch),
    _Simple("counter", "lplb_cycles", "", "Cycles that were begun.", lambda s: s.cycles),
    _Simple("counter", "lplb_swaps", "", "Placements of layers that became live.", lambda s: s.swaps),
    _Simple("counter", "lplb_plan_seconds", "seconds", "Time spent planning.", lambda s: s.plan_seconds),
    _Simple("counter", "lplb_transfer_seconds", "seconds", "Time spent moving weights.", lambda s: s.transfer_seconds),
    _Simple("counter", "lplb_moved_bytes", "bytes", "Bytes of weights moved.", lambda s: s.bytes_moved),
    _Simple(
        "counter",
        "lplb_moved_lower_bound_bytes",
        "bytes",
        "Bytes that had to be moved at least: experts that came to a rank which had them not.",
        lambda s: s.bytes_lower_bound,
    ),
    _Simple(
        "gauge",
        "lplb_placement_age_seconds",
        "seconds",
        "Time since a placement became live last.",
        lambda s: s.placement_age,
    ),
    _Simple("counter", "lplb_stalls", "", "Forward passes that had to wait for an agreement.", lambda s: s.stalls),
    _Simple("counter", "lplb_stall_seconds", "seconds", "Time that they waited.", lambda s: s.stall_seconds),
    _Simple("gauge", "lplb_staging_bytes", "bytes", "Memory of the staging buffers.", lambda s: s.staging_bytes),
    _Simple("gauge", "lplb_held", "", "1 while transfers are held, else 0.", lambda s: int(s.held)),
)


def reason_word(kind: str) -> str:
    """Return the one of `REASONS` for a kind of reason, as the rebalancer's statistics have them."""
    word = kind.replace(" ", "_")
    return word if word in REASONS else "other"


def export(rebalancer: Observed, registry: "CollectorRegistry | None" = None) -> "RebalancerMetrics":
    """Register the metrics of this rank's rebalancer; each scrape calls its ``stats()`` once, in the scrape's thread.

    The rebalancer is held weakly: when it is gone, so are its metrics.

    Args:
        rebalancer: whose statistics are shown.
        registry: a ``prometheus_client.CollectorRegistry``; by default the client's global one. It takes one
            rebalancer: for two models in one process make two.

    Returns:
        The collector, which ``registry.unregister`` takes out again.

    Raises:
        ImportError: prometheus-client is not installed.
        TypeError: ``rebalancer`` has no ``stats()``.
        ValueError: the registry has the metrics of a rebalancer.
    """
    try:
        from prometheus_client import REGISTRY
    except ImportError as error:
        raise ImportError('lplb.dynamic.metrics wants prometheus-client: pip install "lplb[metrics]"') from error
    if not callable(getattr(rebalancer, "stats", None)):
        raise TypeError(f"rebalancer is a {type(rebalancer).__name__}, allowed is a Rebalancer, which has stats()")
    metrics = RebalancerMetrics(rebalancer)
    (REGISTRY if registry is None else registry).register(metrics)
    return metrics


class RebalancerMetrics:
    """A custom collector of prometheus-client for one rebalancer; `export` makes and registers it."""

    def __init__(self, rebalancer: Observed) -> None:
        """Keep a weak reference."""
        self._rebalancer = weakref.ref(rebalancer)

    def describe(self) -> "Iterator[Metric]":
        """Yield the metrics without values: by their names a registry refuses a second rebalancer."""
        return _families(None)

    def collect(self) -> "Iterator[Metric]":
        """Read the statistics and yield the metrics; none when the rebalancer is gone."""
        rebalancer = self._rebalancer()
        return iter(()) if rebalancer is None else _families(rebalancer.stats())


def _families(stats: Any | None) -> "Iterator[Metric]":
    """Metrics with the values of some statistics, or without."""
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, StateSetMetricFamily

    balance = GaugeMetricFamily(
        "lplb_balancedness_ratio",
        "Mean load of ranks over the largest, of the newest loads on the live placement under the LP; 1 is perfect.",
        labels=["layer"],
        unit="ratio",
    )
    skipped = CounterMetricFamily("lplb_skipped_rebalances", "Rebalances that were not made.", labels=["reason"])
    stage = StateSetMetricFamily("lplb_stage", "What the rebalancer is at.", labels=[])
    if stats is not None:
        for layer, value in zip(stats.layers, stats.balancedness, strict=True):
            if not math.isnan(value):  # there are no loads yet
                balance.add_metric([layer], value)
        times = Counter[str]()
        for kind, n in stats.skipped.items():
            times[reason_word(kind)] += n
        for word in REASONS:  # all from the start, so that rates are of something
            skipped.add_metric([word], times[word])
        stage.add_metric([], {name: name == stats.stage for name in STAGES})
    yield from (balance, skipped, stage)
    for simple in _SIMPLE:
        family = CounterMetricFamily if simple.kind == "counter" else GaugeMetricFamily
        value = None if stats is None else simple.read(stats)
        yield family(simple.name, simple.meaning, value=value, unit=simple.unit)
