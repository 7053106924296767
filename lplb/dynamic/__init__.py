"""Loads watched, placements renewed, weights moved, while the model runs.

A layer has a `Dispatcher`, its live placement and weights, and a `LoadCollector`; a `Rebalancer` does the rest.
"""

from lplb.dynamic.collector import LoadCollector
from lplb.dynamic.dispatcher import Dispatcher, Update
from lplb.dynamic.rebalancer import Rebalancer
from lplb.dynamic.stats import Progress, Stats

__all__ = ["Dispatcher", "LoadCollector", "Progress", "Rebalancer", "Stats", "Update"]
