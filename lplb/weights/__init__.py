"""Moving expert weights: one mover for everything that moves experts, and the replicas of a training run on it.

`WeightMover` carries experts from slot to slot in rounds of point-to-point transfers; `moves_between` says which moves
lead from one placement to another. `ReplicaSync` copies originals to their replicas and brings gradients back.
"""

from lplb.weights.mover import Moved, WeightMover
from lplb.weights.moves import Move, moves_between
from lplb.weights.packing import Field
from lplb.weights.replicas import ReplicaSync

__all__ = ["Field", "Move", "Moved", "ReplicaSync", "WeightMover", "moves_between"]
