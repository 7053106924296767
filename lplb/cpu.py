"""The stages on the CPU: buffers, chunks and threads around `lplb._C.CpuPlanner`."""

import contextlib

import torch

from lplb import _C, exchange
from lplb.arguments import MOST_TOKENS
from lplb.backend import Counted
from lplb.exchange import Exchange
from lplb.placement import Placement
from lplb.plan import SOLVERS, Plan, empty_plan

_TOKENS_PER_THREAD = 1 << 16  # below this a thread costs more than it saves


class Backend:
    """An `lplb.backend.Backend` for the CPU.

    Args:
        placement: where the experts are.
        group_size: ranks that balance among themselves.
        speed: how fast each rank is.
        solver: of the plans that `solve_gathered` makes.
        ranks: how ranks learn each other's counts.
        fingerprint: of placement and settings, the same on every rank.
        device: the CPU.
    """

    guard: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    indices_outside = 0  # they are refused
    name = f"CPU ({_C.instruction_set})"

    def __init__(
        self,
        placement: Placement,
        group_size: int,
        speed: list[float],
        solver: str,
        ranks: Exchange,
        fingerprint: tuple[int, int],
        device: torch.device,
    ) -> None:
        """See the class."""
        self._n_logical = n_logical = placement.n_logical
        self._n_groups = placement.n_ranks // group_size
        self._max_threads = max(1, torch.get_num_threads())
        self._planner = _C.CpuPlanner(
            placement.phy2log.tolist(), n_logical, placement.n_ranks, group_size, speed, self._max_threads
        )
        self._ranks = ranks
        self._solver = solver
        self._alone = isinstance(ranks, exchange.Local)
        self._prefix = torch.zeros(self._max_threads, n_logical, dtype=torch.int32, device=device)
        self._totals = self._prefix.unbind()  # of batches in 1, 2, … parts
        # what this rank sends, with the words that say all is well, and what all ranks send
        self._row = torch.zeros(n_logical + exchange.WORDS, dtype=torch.int32, device=device)
        self._all_well = {}
        for method in exchange.METHODS:
            words = torch.tensor([0, method, *fingerprint], dtype=torch.int32, device=device)
            self._all_well[method] = words.repeat(ranks.size, 1)
        self._own_counts = self._row[:n_logical]
        self._table = self._row.view(1, -1) if self._alone else self._row.repeat(ranks.size, 1)
        self.loads = torch.zeros(n_logical, dtype=torch.int64, device=device)
        self.plan = empty_plan((), placement.n_physical, placement.n_ranks, self._n_groups, solver, device)
        self._plan_addresses = self.plan.addresses()
        self._planned = False

    @property
    def workspace_bytes(self) -> int:
        """Bytes kept, most of them untouched where few threads run."""
        tensors = [self._prefix, self._row, *self._all_well.values(), self._table, self.loads, *self.plan.tensors()]
        return self._planner.workspace_bytes + sum(t.numel() * t.element_size() for t in tensors)

    def last_plan(self) -> Plan | None:
        """A copy of the last plan, if there is one."""
        return self.plan.copy() if self._planned else None

    def check_earlier(self) -> None:
        """Nothing: here errors are raised at once."""

    def wait(self) -> None:
        """Nothing: here calls return when their work is done."""

    # ---- the stages, one after the other

    def run(self, idx: torch.Tensor, counter: torch.Tensor | None, n_sms: int | None) -> torch.Tensor:
        """All stages of a planner without a group."""
        counted = self.count_own(idx, n_sms)
        self.gather(exchange.RUN, None)
        self.solve_gathered(counter, None)
        return self.assign_gathered(counted)

    def count_own(self, idx: torch.Tensor, n_sms: int | None) -> Counted:
        """Count this rank's batch into its row of the table."""
        counted = self._counted(idx, n_sms)
        self._own_counts.copy_(self._totals[counted.blocks - 1])
        return counted

    def put_own(self, counts: torch.Tensor) -> None:
        """Take given counts for this rank's row."""
        self._own_counts.copy_(counts)

    def gather(self, method: int, error: Exception | None) -> None:
        """Exchange this rank's row or its error for the table of all ranks, and sum the table to loads. Collective."""
        table, n_logical = self._table, self._n_logical
        if self._alone:
            if error is not None:
                raise error
        else:
            if error is not None:
                self._own_counts.zero_()
            self._row[n_logical:] = self._all_well[method][0]
            self._row[n_logical] = exchange.error_word(error)
            with exchange.turn(self._ranks):
                exchange.gather(self._ranks, method, self._row, table)
                if not torch.equal(table[:, n_logical:], self._all_well[method]):
                    exchange.raise_together(self._ranks, table[:, n_logical:].tolist(), error)
        most = _C.total(table.data_ptr(), table.shape[1], self._ranks.size, n_logical, self.loads.data_ptr())
        if most > MOST_TOKENS:
            raise ValueError(f"an expert has {most} tokens over all ranks, allowed are {MOST_TOKENS}")

    def solve_gathered(self, counter: torch.Tensor | None, log: torch.Tensor | None) -> None:
        """Plan the gathered loads into ``plan``, and raise the counter by the groups solved."""
        log_address = 0 if log is None else log.data_ptr()
        solved = self._planner.solve(
            self.loads.data_ptr(), 1, SOLVERS[self._solver], self._plan_addresses, log_address, 1
        )
        self._planned = True
        if counter is not None:
            _C.add(counter.data_ptr(), counter.element_size(), solved)

    def assign_gathered(self, counted: Counted) -> torch.Tensor:
        """Map the counted batch by the plan of the gathered loads."""
        return self._assign(counted, self._table, self._ranks.rank, self.plan.quota)

    # ---- each by itself

    def count(self, idx: torch.Tensor, n_chunks: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts of a batch, and of its chunks up to and with each."""
        prefix = torch.empty(n_chunks, self._n_logical, dtype=torch.int32, device=idx.device)
        self._count(idx.contiguous(), n_chunks, length, prefix, min(n_chunks, self._max_threads))
        return prefix[-1].clone(), prefix

    def solve(self, loads: torch.Tensor, plan: Plan, log: torch.Tensor | None) -> None:
        """Plan one load, or a batch of them on several threads, into an empty plan."""
        n_loads = loads.numel() // self._n_logical
        threads = min(self._max_threads, n_loads * self._n_groups) if n_loads > 1 else 1
        log_address = 0 if log is None else log.data_ptr()
        self._planner.solve(loads.data_ptr(), n_loads, SOLVERS[plan.solver], plan.addresses(), log_address, threads)

    def assign(self, idx: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        """Map a batch by quotas of this rank alone."""
        counted = self._counted(idx, None)
        return self._assign(counted, self._prefix[counted.blocks - 1 :], 0, quota)

    def new_log(self) -> torch.Tensor:
        """Memory for the iterations of one load's solve."""
        shape = self._n_groups, _C.max_iterations + 1, len(_C.log_fields)
        return torch.zeros(shape, dtype=torch.float64, device=self.loads.device)

    # ---- addresses

    def _counted(self, idx: torch.Tensor, n_sms: int | None) -> Counted:
        n = idx.numel()
        most = self._max_threads if n_sms is None else min(self._max_threads, n_sms)
        threads = max(1, min(most, n // _TOKENS_PER_THREAD))
        length = max(1, -(-n // threads))
        physical = torch.empty(idx.shape, dtype=idx.dtype, device=self.loads.device)
        source = idx if idx.is_contiguous() else physical.copy_(idx)
        self._count(source, threads, length, self._prefix, threads)
        return Counted(source, physical, threads, length)

    def _count(self, source: torch.Tensor, n_chunks: int, length: int, prefix: torch.Tensor, threads: int) -> None:
        chunks = source.numel(), n_chunks, length
        bad = self._planner.count(source.data_ptr(), source.element_size(), chunks, prefix.data_ptr(), threads)
        if bad >= 0:
            raise ValueError(
                f"idx has {int(source.view(-1)[bad])} at flat position {bad}, allowed is -1 (masked) or 0 to "
                f"n_logical - 1 = {self._n_logical - 1}"
            )

    def _assign(self, counted: Counted, counts: torch.Tensor, rank: int, quota: torch.Tensor) -> torch.Tensor:
        source, physical, blocks, length = counted
        self._planner.assign(
            source.data_ptr(),
            source.element_size(),
            (source.numel(), blocks, length),
            self._prefix.data_ptr(),
            counts.data_ptr(),
            counts.stride(0),
            rank,
            quota.data_ptr(),
            physical.data_ptr(),
            blocks,
        )
        return physical
