"""Certified load balancing for Mixture-of-Experts expert parallelism.

`Planner` maps the router's logical expert indices to physical ones so that the busiest rank of a batch has as little
to do as its replicas allow; `Placement` says where experts live; `place` makes one from load history and `plan_change`
the next; `rebalance_experts` is EPLB. `TransferPlanner` lets weights travel for one batch where replicas do not
suffice.
"""

from lplb import formats, history, nn, topology
from lplb.change import plan_change
from lplb.eplb import rebalance_experts
from lplb.placement import Placement
from lplb.plan import Plan, SolveStatus
from lplb.planner import Planner
from lplb.policies import place
from lplb.transfers import TransferPlan, TransferPlanner

__version__ = "0.1.0"

__all__ = [
    "Placement",
    "Plan",
    "Planner",
    "SolveStatus",
    "TransferPlan",
    "TransferPlanner",
    "__version__",
    "formats",
    "history",
    "nn",
    "place",
    "plan_change",
    "rebalance_experts",
    "topology",
]
