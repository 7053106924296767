"""What a configuration would do with given loads: simulations, side by side, as tables, files and a page."""

from lplb.simulate.run import SPLITS, LayerSeconds, check_configuration, simulate
from lplb.simulate.simulation import PhaseMeans, Setting, Simulation, Summary

__all__ = [
    "SPLITS",
    "LayerSeconds",
    "PhaseMeans",
    "Setting",
    "Simulation",
    "Summary",
    "check_configuration",
    "simulate",
]
