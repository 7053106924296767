"""What a scrape shows of a rebalancer, read with prometheus-client's own parser."""

import gc
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lplb import Placement
from lplb.dynamic import Dispatcher, LoadCollector, Rebalancer, Stats, metrics

prometheus_client = pytest.importorskip("prometheus_client", reason="needs prometheus-client, which is not installed")
openmetrics = pytest.importorskip("prometheus_client.openmetrics.exposition")
from prometheus_client.openmetrics import parser as openmetrics_parser  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


VALUES = {  # another one for every number
    "layers": ("blocks.0.moe", "blocks.1.moe", 'odd "name"\n\\'),
    "balancedness": (0.75, math.nan, 1.0),
    "epoch": 7,
    "cycles": 11,
    "swaps": 5,
    "plan_seconds": 0.125,
    "transfer_seconds": 2.5,
    "bytes_moved": 2**40 + 1,
    "bytes_lower_bound": 2**40,
    "placement_age": 12.25,
    "stalls": 3,
    "stall_seconds": 0.0625,
    "staging_bytes": 4096,
    "stage": "transfer",
    "held": True,
}


class Asked:
    """In the place of a rebalancer: has statistics, and counts how often it is asked for them."""

    def __init__(self, **values):
        self.values, self.asked = values, 0

    def stats(self):
        self.asked += 1
        return Stats(**{**VALUES, **self.values})


def scraped(registry):
    """{metric: (type, {(sample, labels): value})} of the exposition."""
    text = prometheus_client.generate_latest(registry).decode()
    return {
        family.name: (
            family.type,
            {(sample.name, *sorted(sample.labels.items())): sample.value for sample in family.samples},
        )
        for family in text_string_to_metric_families(text)
    }


def exported(**values):
    rebalancer, registry = Asked(**values), prometheus_client.CollectorRegistry()
    metrics.export(rebalancer, registry)
    return rebalancer, registry


def family(name, **values):
    rebalancer, registry = exported(**values)
    found = scraped(registry)[name]
    assert rebalancer.asked == 1
    return found


def test_every_statistic_is_shown_with_its_kind_and_unit():
    _rebalancer, registry = exported()
    found = scraped(registry)
    single = {
        "lplb_epoch": ("gauge", 7),
        "lplb_cycles_total": ("counter", 11),
        "lplb_swaps_total": ("counter", 5),
        "lplb_plan_seconds_total": ("counter", 0.125),
        "lplb_transfer_seconds_total": ("counter", 2.5),
        "lplb_moved_bytes_total": ("counter", 2**40 + 1),
        "lplb_moved_lower_bound_bytes_total": ("counter", 2**40),
        "lplb_placement_age_seconds": ("gauge", 12.25),
        "lplb_stalls_total": ("counter", 3),
        "lplb_stall_seconds_total": ("counter", 0.0625),
        "lplb_staging_bytes": ("gauge", 4096),
        "lplb_held": ("gauge", 1),
    }
    for name, (kind, value) in single.items():
        seen_kind, samples = found.pop(name.removesuffix("_total"))
        assert seen_kind == kind
        assert samples == {(name,): value}
    assert set(found) == {"lplb_balancedness_ratio", "lplb_skipped_rebalances", "lplb_stage"}


def test_layers_without_loads_are_left_out_and_names_are_escaped():
    found = family("lplb_balancedness_ratio")
    assert found == (
        "gauge",
        {
            ("lplb_balancedness_ratio", ("layer", "blocks.0.moe")): 0.75,
            ("lplb_balancedness_ratio", ("layer", 'odd "name"\n\\')): 1.0,
        },
    )


@pytest.mark.parametrize("stage", metrics.STAGES)
def test_one_stage_is_on(stage):
    _, samples = family("lplb_stage", stage=stage)
    on = {dict(labels)["lplb_stage"] for (_, *labels), value in samples.items() if value == 1}
    assert on == {stage}
    assert len(samples) == len(metrics.STAGES)


def test_reasons_are_counted_by_word():
    skipped = {"no gain": 2, "plan": 3, "something that nobody thought of 0x7f21": 5, "and another": 7}
    kind, samples = family("lplb_skipped_rebalances", skipped=skipped)
    by_word = {dict(labels)["reason"]: value for (_, *labels), value in samples.items()}
    assert kind == "counter"
    assert set(by_word) == set(metrics.REASONS)
    assert {word: n for word, n in by_word.items() if n} == {"no_gain": 2, "plan": 3, "other": 12}


def test_a_scrape_asks_once_and_registering_does_not():
    rebalancer, registry = exported()
    assert rebalancer.asked == 0
    scraped(registry)
    scraped(registry)
    assert rebalancer.asked == 2


def test_it_is_openmetrics_too():
    _rebalancer, registry = exported()
    text = openmetrics.generate_latest(registry).decode()
    families = {f.name: f for f in openmetrics_parser.text_string_to_metric_families(text)}
    assert families["lplb_stage"].type == "stateset"
    assert families["lplb_moved_bytes"].unit == "bytes"
    assert families["lplb_placement_age_seconds"].unit == "seconds"


def test_the_global_registry_is_the_default(monkeypatch):
    registry, rebalancer = prometheus_client.CollectorRegistry(), Asked()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    collector = metrics.export(rebalancer)
    assert "lplb_epoch" in scraped(registry)
    registry.unregister(collector)
    assert not scraped(registry)


def test_a_second_rebalancer_in_a_registry_is_refused():
    first, registry = exported()
    with pytest.raises(ValueError, match="lplb_epoch"):
        metrics.export(Asked(), registry)
    scraped(registry)
    assert first.asked == 1


def test_metrics_go_with_their_rebalancer():
    rebalancer, registry = exported()
    assert scraped(registry)
    del rebalancer
    gc.collect()
    assert not scraped(registry)


def test_a_rebalancer_is_exported():
    model = nn.Module()
    model.moe = nn.Module()
    model.moe.dispatcher = Dispatcher(Placement(range(4), 1), [torch.zeros(4, 2)], 0)
    model.moe.collector = LoadCollector(4)
    registry = prometheus_client.CollectorRegistry()
    with Rebalancer(model, interval=1, window=2) as rebalancer:
        metrics.export(rebalancer, registry)
        model.moe.collector.collect(torch.tensor([0, 1, 1, 3]))
        rebalancer.hold()
        for _ in range(1000):
            found = scraped(registry)
            if found["lplb_balancedness_ratio"][1]:
                break
            time.sleep(0.01)
        assert found["lplb_balancedness_ratio"][1] == {("lplb_balancedness_ratio", ("layer", "moe")): 1.0}
        assert found["lplb_cycles"][1] == {("lplb_cycles_total",): 1}
        assert found["lplb_held"][1] == {("lplb_held",): 1}
    assert scraped(registry)["lplb_stage"][1]["lplb_stage", ("lplb_stage", "closed")] == 1


def test_what_has_no_stats_is_refused():
    with pytest.raises(TypeError, match=r"rebalancer is a int, allowed is a Rebalancer"):
        metrics.export(3, prometheus_client.CollectorRegistry())


def test_without_the_package_the_error_says_how_to_get_it():
    code = """
import sys
import time
sys.modules["prometheus_client"] = None
import torch
from torch import nn

from lplb import Placement
from lplb.dynamic import Dispatcher, LoadCollector, Rebalancer, Stats, metrics
try:
    metrics.export(object())
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert 'pip install "lplb[metrics]"' in done.stdout
