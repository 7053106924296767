"""Plans in which weights travel for one batch: `TransferPlanner` makes them, `TransferPlan` says what travels where."""

from lplb.transfers.plan import ParetoFront, ParetoPoint, TransferPlan
from lplb.transfers.planner import TransferPlanner
from lplb.transfers.residents import Residents

__all__ = ["ParetoFront", "ParetoPoint", "Residents", "TransferPlan", "TransferPlanner"]
