"""The compiled backend. It takes addresses and sizes and checks nothing: `lplb.planner` does, before it calls.

Addresses are those of contiguous arrays, 0 for none. ``chunks`` is ``(n, count, length)``: chunk ``i`` of ``n``
tokens is ``[i * length, (i + 1) * length)``, clipped. Methods let other Python threads run; a planner
serves one caller at a time. Nothing is allocated after construction.
"""

from collections.abc import Sequence

max_group_size: int
max_iterations: int
gap_tolerance: float
log_fields: tuple[str, ...]
instruction_set: str
cuda: bool

def total(counts: int, stride: int, n_ranks: int, n_logical: int, loads: int) -> int:
    """Sum ``counts`` int32 (a row per rank, ``stride`` apart) into int64 ``loads``; return the largest sum."""

def add(counter: int, bytes: int, value: int) -> None:
    """Add to one int32 or int64."""

class CpuPlanner:
    """A placement compiled for the CPU backend."""

    def __init__(
        self,
        phy2log: Sequence[int],
        n_logical: int,
        n_ranks: int,
        group_size: int,
        speed: Sequence[float],
        max_threads: int,
    ) -> None: ...
    @property
    def workspace_bytes(self) -> int: ...
    def count(self, indices: int, index_bytes: int, chunks: tuple[int, int, int], prefix: int, threads: int) -> int:
        """Inclusive counts per chunk, int32 ``[count, n_logical]``; returns the first bad position, or -1."""

    def solve(self, loads: int, batch: int, solver: int, out: Sequence[int], log: int, threads: int) -> int:
        """Solve int64 ``loads [batch, n_logical]``; returns how many groups were solved.

        ``out``: quota int32 ``[batch, n_physical]``, rank_load int64 ``[batch, n_ranks]``, and ``[batch, n_groups]``
        each max_load int64, lower_bound float64, gap float64, iterations int32, status int32. ``log``: float64
        ``[n_groups, max_iterations + 1, len(log_fields)]`` for a batch of one.
        """

    def assign(
        self,
        indices: int,
        index_bytes: int,
        chunks: tuple[int, int, int],
        prefix: int,
        counts: int,
        stride: int,
        source: int,
        quota: int,
        physical: int,
        threads: int,
    ) -> None:
        """Map the tokens of rank ``source``; ``counts`` int32, a row per rank, ``stride`` apart. In place if asked."""
