"""The compiled backends. They take addresses and sizes and check nothing: `lplb.planner` does, before it calls.

Addresses are those of contiguous arrays, 0 for none. A ``table`` is ``(address, stride, ranks, ranks_per_node)``:
int32 counts per logical expert, a row per source rank, ``stride`` apart; ``ranks_per_node`` 0 for one row of tokens of
no rank in particular. ``split`` is 0 for plain, 1 for local first. ``chunks`` is ``(n, count, length)``: chunk ``i`` of
``n`` tokens is ``[i * length, (i + 1) * length)``, clipped. Methods let other Python threads run; a planner serves one
caller at a time. Nothing is allocated after construction.
"""

from collections.abc import Sequence

max_group_size: int
max_iterations: int
gap_tolerance: float
node_cost: float
"""What a token costs that crosses ranks within a node, against one that crosses nodes."""
log_fields: tuple[str, ...]
instruction_set: str
cuda: bool
cuda_targets: tuple[str, ...]
"""What the kernels are compiled for: machine code ("sm_90") and last PTX ("compute_120"); empty without CUDA."""
cuda_version: str
"""Of nvcc, "13.0"; "" without CUDA."""
linalgs: tuple[str, ...]
"""("builtin",) or ("builtin", "cusolverdx")."""
mathdx_version: str
""""" where MathDx is not in."""
cusolverdx_targets: tuple[str, ...]
"""What the kernels with cuSolverDx are compiled for, machine code only; empty where MathDx is not in."""

_Table = tuple[int, int, int, int]

def total(table: _Table, n_logical: int, loads: int) -> int:
    """Sum the table's rows into int64 ``loads``; return the largest sum."""

def add(counter: int, bytes: int, value: int) -> None:
    """Add to one int32 or int64."""

def eplb_place(
    sizes: tuple[int, int, int, int, int], layers: int, arrays: Sequence[int], rule: int, threads: int
) -> int:
    """EPLB and its kin; returns the most copies of any expert.

    ``rule``: 0 as published; 1 the same with at most as many copies of an expert as its node has GPUs; 2 no expert
    twice on a GPU. ``sizes``: n_logical, n_slots, n_groups, n_nodes, n_gpus, as ``csrc/core/eplb.h`` allows them.
    ``arrays``: read are float32 loads ``[layers, n_logical]`` and group loads ``[layers, n_groups]``, 0 where there are
    none or as many groups as nodes; written are phy2log int64 ``[layers, n_slots]``, which of its expert's copies a
    slot is int32 ``[layers, n_slots]``, logcnt int64 ``[layers, n_logical]``.
    """

def eplb_log2phy(
    sizes: tuple[int, int, int, int, int],
    layers: int,
    arrays: Sequence[int],
    most_copies: int,
    log2phy: int,
    threads: int,
) -> None:
    """Write log2phy int64 ``[layers, n_logical, most_copies]`` from what `eplb_place` left, padded with -1."""

def bottleneck_ranks(phy2log: Sequence[int], n_logical: int, n_ranks: int, group_size: int, loads: int) -> list[bool]:
    """Whether each rank is in the largest set of its group's ranks that sets the optimum of the LP.

    That is the set A with the most ranks among those with the largest load(A) / size(A), where load(A) are the tokens
    that only ranks in A can take; none without tokens. ``loads``: int64 ``[n_logical]``, below 2^52 in all.
    """

scenarios: int
"""How many `likely_loads` draws."""

def placement_optima(
    phy2log: int,
    n_physical: int,
    n_logical: int,
    n_ranks: int,
    group_size: int,
    loads: int,
    batch: int,
    out: int,
    threads: int,
) -> None:
    """Find the LP's optimum t* of float64 ``loads [batch, n_logical]`` on int32 ``phy2log [n_physical]``, per group.

    ``out``: float64 ``[batch, n_ranks // group_size]``. Other Python threads run meanwhile.
    """

def place_for_lp(
    geometry: tuple[int, int, int, int, int],
    even: bool,
    history: int,
    layers: int,
    batches: int,
    sent: int,
    also: int,
    phy2log: int,
    threads: int,
) -> None:
    """Better int32 ``phy2log [layers, n_physical]`` for the LP over loads that are likely after ``history``.

    ``also`` is another such placement, with the same experts in every part: the result is no worse than both.

    ``geometry``: n_logical, n_ranks, n_physical, n_parts, ranks per node; no expert has copies in two parts, which are
    equal runs of ranks, before and after. ``history``: float64 ``[layers, batches, n_logical]``; ``sent``, by each
    node: ``[layers, n_nodes, n_logical]``. ``even``: even splits count as much as the LP's, and there are no hubs.
    Other Python threads run meanwhile.
    """

def likely_loads(history: int, batches: int, n_logical: int, out: int) -> None:
    """Draw ``out``, float64 ``[scenarios, n_logical]``, each adding up to 1, for one layer's history."""

def find_changes(
    phy2log: int,
    n_physical: int,
    n_logical: int,
    n_ranks: int,
    group_size: int,
    ranks_per_node: int,
    loads: int,
    batches: int,
    cost: int,
    most_writes: int,
    most_cost: float,
    wanted: float,
) -> tuple[list[int], list[int], list[int]]:
    """Steps that lower the LP's optimum of int64 ``loads [batches, n_logical]``, most for their cost first.

    ``cost``: float64 ``[n_logical]`` of writing an expert. The search ends after ``most_writes``, or at a mean
    imbalance of ``wanted``. Returns, for each step, how many writes there are with it; and of all writes the slots and
    the experts. Other Python threads run meanwhile.
    """

def look_for_changes(
    layers: Sequence[tuple[int, int, int, int, int]],
    n_physical: int,
    n_logical: int,
    n_ranks: int,
    group_size: int,
    ranks_per_node: int,
    cost: int,
    most_writes: int,
    most_cost: float,
    aims: tuple[float, float, float, float],
) -> list[tuple[bytes, list[int], list[int], list[int], list[tuple[int, bytes]]]]:
    """Of every layer the imbalances before, `find_changes`' steps if there is something to gain, and some rated.

    A layer: ``phy2log``, loads to search on and their number (none: no search), loads kept back and their number. Aims:
    the gain that is enough, the least gain, which part of what may be left over is wanted, which part of what the
    search found is enough. Imbalances are float64 on the loads kept back: of the layer's own placement, and of those
    after so many steps. Other Python threads run meanwhile, from the first layer to the last.
    """

class CpuRanges:
    """Tokens to virtual slots by range (``csrc/core/ranges.h``); any number of callers at a time.

    ``plan``: addresses of int64 quota ``[n_logical, n_ranks]`` and int32 guests ``[n_ranks, slots]``. ``counts``:
    address, bytes of a count (4 or 8), rows (source ranks), and how many counts apart they begin. ``ranks_per_node``: 0
    where the one row is a source of no rank in particular.
    """

    def __init__(
        self,
        resident_rank: Sequence[int],
        resident_expert: Sequence[int],
        n_logical: int,
        n_ranks: int,
        slots: int,
    ) -> None:
        """Take residents in rank order, then slot order."""

    @property
    def width(self) -> int:
        """Virtual slots per rank."""

    def route(
        self,
        plan: tuple[int, int],
        counts: tuple[int, int, int, int],
        ranks_per_node: int,
        source: int,
        indices: tuple[int, int, int],
        slots: int,
        send: int,
        threads: int,
    ) -> tuple[int, int]:
        """Map ``indices`` (address, bytes of an element, number) to ``slots``, which may be the same memory.

        ``send``: int64 ``[n_ranks * width]``, how many go to each, or 0. Returns the position of the first index
        outside ``[-1, n_logical)``, and the first expert with another number of tokens than the source has counted; -1
        for none. Nothing is written where one is found.
        """

    def send_all(
        self, plan: tuple[int, int], counts: tuple[int, int, int, int], ranks_per_node: int, tokens: int
    ) -> None:
        """What every source sends to every virtual slot, int64 ``[rows of counts, n_ranks * width]``."""

class PlacementRating:
    """Placements of one layer, rated one after another on the same int64 ``loads [batches, n_logical]``."""

    def __init__(
        self,
        phy2log: int,
        n_physical: int,
        n_logical: int,
        n_ranks: int,
        group_size: int,
        loads: int,
        batches: int,
    ) -> None:
        """``phy2log`` is any placement of these sizes; a batch sums to 1 up to 2**52. Nothing is kept of the arrays."""

    def rate(self, phy2log: int, imbalance: int) -> None:
        """Write float64 ``imbalance [batches]`` of a placement int32 ``[n_physical]``; other threads run meanwhile."""

def relabel(
    current: int,
    target: int,
    n_physical: int,
    n_logical: int,
    n_ranks: int,
    kind: int,
    blocks: Sequence[int],
    out: int,
) -> None:
    """Fill int32 ``out [n_physical]`` with ``target`` under the ranks and slots that keep most of ``current``."""

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

    def solve(
        self,
        loads: int,
        batch: int,
        table: _Table,
        fewest: int,
        solver: int,
        out: Sequence[int],
        log: int,
        threads: int,
    ) -> int:
        """Solve int64 ``loads [batch, n_logical]``; returns how many groups were solved.

        Groups with fewer tokens than ``fewest`` take the fixed split instead: for a batch of one, the table's sum.

        ``out``: quota int32 ``[batch, n_physical]``, rank_load int64 ``[batch, n_ranks]``, and ``[batch, n_groups]``
        each max_load int64, lower_bound float64, gap float64, iterations int32, status int32. ``log``: float64
        ``[n_groups, max_iterations + 1, len(log_fields)]`` for a batch of one.
        """

    def solve_traffic(self, loads: int, table: _Table, fewest: int, weight: float, out: Sequence[int], log: int) -> int:
        """`solve` of one load, the table's sums, with a cost on traffic: in each group this minimises

            max_load + weight * (tokens across nodes + node_cost * tokens across ranks of a node) / sum of speeds

        over splits, whose traffic is the least they allow: own rank's tokens first, then the node's. Experts with one
        slot have no choice and do not enter. ``lower_bound`` and ``gap`` are of the whole sum, and a group is solved
        when its gap is at most ``gap_tolerance``, so a weight below that buys nothing. With speeds 1 ``max_load`` is
        at most the fractional solution's, rounded up. Returns how many groups were solved. Runs on one thread.
        """

    def shares(
        self, table: _Table, source: int, split: int, quota: int, status: int, weights: int, starts: int
    ) -> None:
        """How rank ``source`` shares out a plan made for ``table``: int32 ``[n_physical]`` and ``[n_logical]``.

        Entries of experts with one slot are left as they are.
        """

    def tokens_by_source(self, table: _Table, split: int, quota: int, status: int, tokens: int) -> None:
        """The tokens that every source sends to every physical expert: int32 ``[ranks, n_physical]``."""

    def assign(
        self,
        indices: int,
        index_bytes: int,
        chunks: tuple[int, int, int],
        prefix: int,
        weights: int,
        starts: int,
        physical: int,
        threads: int,
    ) -> None:
        """Map tokens by `shares`; after their `count`, with the same chunks. In place if asked."""

class CudaPlanner:
    """A placement compiled for a CUDA device; only in builds with CUDA.

    ``stream`` is a cudaStream_t. Nothing is allocated and nothing waits for the device; kernels go to the current one.
    Failures raise RuntimeError with file, line and CUDA's words.
    """

    def __init__(
        self,
        phy2log: Sequence[int],
        n_logical: int,
        n_ranks: int,
        group_size: int,
        speed: Sequence[float],
        linalg: str,
        shared_bytes: int,
        sms: int,
    ) -> None:
        """Host only. ``shared_bytes``: what one block may have. ``sms``: most blocks of count and assign.

        ValueError names need and limit where shared memory does not suffice.
        """

    @property
    def tables(self) -> bytes:
        """To be copied to device memory, 16-byte aligned."""

    @property
    def scratch_bytes(self) -> int:
        """Device memory, zeros at the start."""

    @property
    def linalg(self) -> str: ...
    def launches(self, n: int, index_bytes: int, n_sms: int, batch: int) -> list[tuple[str, int, int, int]]:
        """(kernel, blocks, threads per block, dynamic shared bytes) of count, solve and assign. Host only."""

    def blocks(self, n: int, n_sms: int) -> tuple[int, int]:
        """How `run` cuts ``n`` tokens: blocks, and tokens per block. Host only."""

    def bind(self, tables: int, scratch: int, faults: int) -> None:
        """Take the memory. ``faults``: int64 ``[4]`` in pinned host memory that the device can write.

        ``faults``: indices outside ``[-1, n_logical)`` since the start; 1 + the first rank whose words differ; 1 if an
        expert had more than 2**31 - 1 tokens; nothing.
        """

    def count(
        self, indices: int, index_bytes: int, n: int, blocks: int, length: int, prefix: int, row: int, stream: int
    ) -> None:
        """Inclusive counts per block, int32 ``[blocks, n_logical]``, and totals, int32 ``[n_logical]``."""

    def solve(self, loads: int, batch: int, solver: int, out: Sequence[int], log: int, stream: int) -> None:
        """Solve int64 ``loads [batch, n_logical]``; ``out`` and ``log`` as for `CpuPlanner.solve`."""

    def solve_table(
        self,
        table: _Table,
        words: Sequence[int],
        fewest: int,
        loads: int,
        solver: int,
        out: Sequence[int],
        counter: int,
        counter_bytes: int,
        log: int,
        stream: int,
    ) -> None:
        """Sum the table to ``loads``, solve as `CpuPlanner.solve` does, and raise the counter by the groups solved.

        Where an expert has too many tokens, groups without it are counted all the same.

        ``words``: what columns ``n_logical + 1 ...`` of every row must hold, column ``n_logical`` being 0; none: no
        check. Otherwise a fault is noted and `assign` writes -1 everywhere.
        """

    def assign(
        self,
        indices: int,
        index_bytes: int,
        n: int,
        blocks: int,
        length: int,
        prefix: int,
        table: _Table,
        source: int,
        split: int,
        plan: Sequence[int],
        physical: int,
        stream: int,
    ) -> None:
        """Map the tokens of rank ``source`` by a plan made for ``table``, or for an earlier batch.

        After their `count`, with the same blocks and length. ``plan`` as ``out`` of `CpuPlanner.solve`.
        """

    def run(
        self,
        indices: int,
        index_bytes: int,
        n: int,
        n_sms: int,
        row: int,
        fewest: int,
        loads: int,
        solver: int,
        out: Sequence[int],
        counter: int,
        counter_bytes: int,
        physical: int,
        stream: int,
    ) -> None:
        """`count`, `solve_table` and `assign` of a planner without a group."""

most_transfer_tokens: int
"""A batch of `CpuTransfers` has fewer."""
transfer_numbers: int
"""Entries of a plan's ``numbers``."""

_Counts = tuple[int, int, int, int]
"""Address, bytes of a count (4 or 8), rows (source ranks), and how many counts apart they begin."""
_TransferArrays = tuple[int, int, int, int, int, int]
"""Of a plan with transfers: quota int64 ``[n_logical, n_ranks]``; rank_load int64 ``[n_ranks]``; transfers int32
``[rows, 3]``, an expert, from where, to where, -1 behind the last; guests int32 ``[n_ranks, slots]``, what each guest
slot holds after the transfers, -1 for nothing; numbers int64 ``[transfer_numbers]``: transfers, largest rank load,
tokens, the load that was asked for, whether it was reached, the least that any plan could, transfers out of a rank and
into one at most; bound float64 ``[1]``, of which the least is the next whole number."""

class CpuTransfers:
    """Plans with transfers; serves one caller at a time. csrc/core/joint.h says how they are made.

    What plans return is 0; else nothing was written: 1 + the place of the first negative count, in row-major order, or
    -1 where the batch has `most_transfer_tokens` or more.
    """

    def __init__(
        self,
        resident_rank: Sequence[int],
        resident_expert: Sequence[int],
        n_logical: int,
        n_ranks: int,
        slots: int,
        domain: int,
    ) -> None:
        """``resident_*``: every resident copy. ``slots``: guest slots of a rank. ``domain``: consecutive ranks within
        which weights travel, a divisor of ``n_ranks``."""

    @property
    def rows(self) -> int:
        """Rows of the table of transfers."""

    def joint(
        self,
        counts: _Counts,
        tolerance: float,
        max_tokens: int,
        max_transfers: int,
        min_tokens: int,
        held: int,
        out: _TransferArrays,
    ) -> int:
        """The fewest transfers with which no rank has more than (1 + ``tolerance``) × the bound, rounded down but to
        no less than the least, or more than ``max_tokens``; or the least maximum that slots and ``max_transfers``
        allow. -1 is no limit. ``min_tokens``: of a guest that a transfer brings. ``held``: int32 ``[n_ranks, slots]``,
        what guest slots hold from before."""

    def llep(
        self,
        counts: _Counts,
        alpha: float,
        m: int,
        lam: float,
        compat: bool,
        max_tokens: int,
        out: _TransferArrays,
    ) -> int:
        """Least-loaded assignment (csrc/core/llep.h): no rank has more than ``max(1, int(alpha * (tokens //
        n_ranks)))``, or all tokens where there are fewer than ranks, or ``max_tokens``, -1 for no limit, if that can
        be. Nothing travels where the busiest rank of plain expert parallelism has less than ``lam`` means, and no more
        than ``max_tokens``. ``m``: tokens that a guest has at least. ``compat``: as published, where the last chunk of
        an expert may be smaller."""

    def front(
        self,
        counts: _Counts,
        max_transfers: int,
        min_tokens: int,
        held: int,
        max_load: int,
        transfers: int,
        capacity: int,
    ) -> tuple[int, int]:
        """Write max_load int64 and transfers int32 ``[capacity]``: the largest rank load for every number of transfers
        that lowers it. Returns what plans do, and how many points there are."""

class CudaTransfers:
    """Plans with transfers, and tokens by range, on CUDA, in builds with it; see `CudaPlanner` for memory and streams.

    Arguments as for `CpuTransfers` and `CpuRanges`, with addresses of device memory. Results are the same, but that
    counts which are refused make a plan of no tokens.
    """

    def __init__(
        self,
        resident_rank: Sequence[int],
        resident_expert: Sequence[int],
        n_logical: int,
        n_ranks: int,
        slots: int,
        domain: int,
        shared_bytes: int,
        sms: int,
    ) -> None:
        """Host only. ValueError names need and limit where shared memory does not suffice."""

    @property
    def tables(self) -> bytes:
        """To be copied to device memory, 16-byte aligned."""

    @property
    def scratch_bytes(self) -> int:
        """Device memory, zeros at the start."""

    @property
    def rows(self) -> int:
        """Rows of the table of transfers."""

    @property
    def width(self) -> int:
        """Virtual slots per rank."""

    def launches(self, n: int, n_sms: int) -> list[tuple[str, int, int, int]]:
        """(kernel, blocks, threads per block, dynamic shared bytes) of a plan without and with ``held``, and of the
        three kernels that route ``n`` tokens. Host only."""

    def bind(self, tables: int, scratch: int, faults: int) -> None:
        """Take the memory. ``faults``: int64 ``[4]`` in pinned host memory that the device can write.

        ``faults``: indices outside ``[-1, n_logical)`` since the start; 1 + an expert of which a source had other
        tokens than its plan; 1 if a count was negative; 1 if a batch had `most_transfer_tokens` or more.
        """

    def joint(
        self,
        counts: _Counts,
        tolerance: float,
        max_tokens: int,
        max_transfers: int,
        min_tokens: int,
        held: int,
        out: _TransferArrays,
        stream: int,
    ) -> None:
        """As `CpuTransfers.joint`."""

    def llep(
        self,
        counts: _Counts,
        alpha: float,
        m: int,
        lam: float,
        compat: bool,
        max_tokens: int,
        out: _TransferArrays,
        stream: int,
    ) -> None:
        """As `CpuTransfers.llep`."""

    def route(
        self,
        plan: tuple[int, int],
        counts: _Counts,
        ranks_per_node: int,
        source: int,
        indices: tuple[int, int, int],
        n_sms: int,
        slots: int,
        send: int,
        stream: int,
    ) -> None:
        """As `CpuRanges.route`, but that indices outside go to -1 and tokens beyond the counted ones to their expert's
        last range."""
