"""The stages on the CPU: buffers, chunks and threads around `lplb._C.CpuPlanner`."""

import contextlib
from dataclasses import replace

import torch

from lplb import _C, exchange
from lplb.arguments import MOST_TOKENS
from lplb.backend import Counted
from lplb.exchange import Exchange
from lplb.overlap import Inline, OnThread, Overlap
from lplb.plan import SOLVERS, SPLITS, Plan, Rules, empty_plan

_TOKENS_PER_THREAD = 1 << 16  # below this a thread costs more than it saves
_NOBODY = 0, 0, 1, 0  # sources that are not known, with the address of a row of zeros where one is read


class Backend:
    """An `lplb.backend.Backend` for the CPU.

    Args:
        rules: where the experts are, which ranks balance among themselves, and how sources share out quotas.
        speed: how fast each rank is.
        solver: of the plans that `solve_gathered` makes.
        min_tokens: below it a group is not solved.
        traffic_weight: what traffic costs in plans of gathered loads.
        ranks: how ranks learn each other's counts.
        fingerprint: of placement and settings, the same on every rank.
        device: the CPU.
    """

    guard: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    indices_outside = 0  # they are refused
    name = f"CPU ({_C.instruction_set})"

    def __init__(
        self,
        rules: Rules,
        speed: list[float],
        solver: str,
        min_tokens: int,
        traffic_weight: float,
        ranks: Exchange,
        fingerprint: tuple[int, int],
        device: torch.device,
    ) -> None:
        """See the class."""
        self._n_logical = n_logical = max(rules.phy2log) + 1
        self._max_threads = max(1, torch.get_num_threads())
        self._planner = _C.CpuPlanner(
            rules.phy2log, n_logical, rules.n_ranks, rules.group_size, speed, self._max_threads
        )
        self._rules = rules
        self._min_tokens = min_tokens
        self._traffic_weight = traffic_weight
        self._solver = solver
        self._ranks = ranks
        self._alone = isinstance(ranks, exchange.Local)
        self.overlap: Overlap = OnThread(ranks.line.worker if isinstance(ranks, exchange.Distributed) else None)
        if isinstance(ranks, exchange.Known):
            self.overlap = Inline()
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
        # shares of this rank, and a row for plans whose quotas are its own
        self._weights = torch.zeros(len(rules.phy2log), dtype=torch.int32, device=device)
        self._starts = torch.zeros(2, n_logical, dtype=torch.int32, device=device)
        # gathered into beside the table of the last plan, which stays whole if something is wrong with the new one
        self._spare = self._table if self._alone else torch.zeros_like(self._table)
        plan = empty_plan((), rules, solver, device)
        self.plan, self._next_plan = (
            plan if self._alone else replace(plan, counts=table[:, :n_logical]) for table in (self._table, self._spare)
        )
        self._plan_addresses = plan.addresses()
        self._planned = False

    @property
    def workspace_bytes(self) -> int:
        """Bytes kept, most of them untouched where few threads run."""
        shares = [self._weights, self._starts]
        tensors = [
            self._prefix,
            self._row,
            *self._all_well.values(),
            self._table,
            self._spare,
            self.loads,
            *self.plan.tensors(),
        ]
        return self._planner.workspace_bytes + sum(t.numel() * t.element_size() for t in tensors + shares)

    def last_plan(self) -> Plan | None:
        """A copy of the last plan, if there is one."""
        return self.plan_in_use() if self._planned else None

    def plan_in_use(self) -> Plan:
        """A copy of the last plan; before the first, of one without tokens, by which all take the fixed split."""
        return self.plan.copy()

    def use(self, ranks: Exchange) -> None:
        """Exchange counts through another transport between the same ranks from now on."""
        self._ranks = ranks

    def check_earlier(self) -> None:
        """Nothing: here errors are raised at once."""

    def wait(self) -> None:
        """Nothing: here calls return when their work is done."""

    # ---- the stages, one after the other

    def run(self, idx: torch.Tensor, counter: torch.Tensor | None, n_sms: int | None) -> torch.Tensor:
        """All stages of a planner without a group."""
        counted = self.count_own(idx, n_sms, exchange.RUN)
        self.gather(exchange.RUN, None)
        self.solve_gathered(counter, None)
        return self.assign_gathered(counted)

    def count_own(self, idx: torch.Tensor, n_sms: int | None, method: int) -> Counted:
        """Count this rank's batch into the row that `gather` with the same method sends."""
        counted = self._counted(idx, n_sms)
        self._own_counts.copy_(self._totals[counted.blocks - 1])
        return counted

    def put_own(self, counts: torch.Tensor) -> None:
        """Take given counts for this rank's row."""
        self._own_counts.copy_(counts)

    def gather(self, method: int, error: Exception | None, *, blamed: bool = True) -> None:
        """Exchange this rank's row or its error for the table of all ranks, and sum the table to loads. Collective.

        An error that is not ``blamed`` is of an earlier call: this rank gives no tokens, and the others go on.
        """
        table, n_logical = self._spare, self._n_logical
        if not self._alone:
            if error is not None:
                self._own_counts.zero_()
            self._row[n_logical:] = self._all_well[method][0]
            self._row[n_logical] = exchange.error_word(error) if blamed else 0
            with exchange.turn(self._ranks):
                exchange.gather(self._ranks, method, self._row, table)
                if not torch.equal(table[:, n_logical:], self._all_well[method]):
                    exchange.raise_together(self._ranks, table[:, n_logical:].tolist(), error)
        if error is not None:
            raise error
        most = _C.total(self._sources(table), n_logical, self.loads.data_ptr())
        if most > MOST_TOKENS:
            raise ValueError(f"an expert has {most} tokens over all ranks, allowed are {MOST_TOKENS}")
        self._table, self._spare = table, self._table
        self.plan, self._next_plan = self._next_plan, self.plan

    def solve_gathered(self, counter: torch.Tensor | None, log: torch.Tensor | None) -> None:
        """Plan the gathered loads into ``plan``, and raise the counter by the groups solved."""
        log_address = 0 if log is None else log.data_ptr()
        loads, out = self.loads.data_ptr(), self._plan_addresses
        batch = self._sources(self._table), self._min_tokens
        if self._traffic_weight > 0:
            solved = self._planner.solve_traffic(loads, *batch, self._traffic_weight, out, log_address)
        else:
            solved = self._planner.solve(loads, 1, *batch, SOLVERS[self._solver], out, log_address, 1)
        self._planned = True
        if counter is not None:
            _C.add(counter.data_ptr(), counter.element_size(), solved)

    def assign_gathered(self, counted: Counted) -> torch.Tensor:
        """Map the counted batch by the last plan: of the gathered loads, or of an earlier batch's."""
        return self._assign(counted, self._sources(self._table), self.plan)

    # ---- each by itself

    def count(self, idx: torch.Tensor, n_chunks: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts of a batch, and of its chunks up to and with each."""
        prefix = torch.empty(n_chunks, self._n_logical, dtype=torch.int32, device=idx.device)
        self._count(idx.contiguous(), n_chunks, length, prefix, min(n_chunks, self._max_threads))
        return prefix[-1].clone(), prefix

    def solve(self, loads: torch.Tensor, plan: Plan, log: torch.Tensor | None) -> None:
        """Plan one load, or a batch of them on several threads, into an empty plan."""
        n_loads = loads.numel() // self._n_logical
        threads = min(self._max_threads, n_loads * plan.max_load.shape[-1]) if n_loads > 1 else 1
        log_address = 0 if log is None else log.data_ptr()
        solver = SOLVERS[plan.solver]
        self._planner.solve(loads.data_ptr(), n_loads, _NOBODY, 0, solver, plan.addresses(), log_address, threads)

    def assign(self, idx: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Map a batch by a plan. Where it has no counts its quotas are taken for this rank's alone."""
        counts = plan.counts
        sources = self._starts[1].data_ptr(), *_NOBODY[1:]
        if counts is not None:
            sources = counts.data_ptr(), counts.stride(0), len(counts), plan.rules.ranks_per_node
        return self._assign(self._counted(idx, None), sources, plan)

    def new_log(self) -> torch.Tensor:
        """Memory for the iterations of one load's solve."""
        shape = len(self.plan.max_load), _C.max_iterations + 1, len(_C.log_fields)
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

    def _sources(self, table: torch.Tensor) -> tuple[int, int, int, int]:
        return table.data_ptr(), table.shape[1], self._ranks.size, self._rules.ranks_per_node

    def _assign(self, counted: Counted, sources: tuple[int, int, int, int], plan: Plan) -> torch.Tensor:
        source, physical, blocks, length = counted
        weights, starts = self._weights.data_ptr(), self._starts.data_ptr()
        split, rank = SPLITS[self._rules.split], self._ranks.rank if sources[3] else 0
        self._planner.shares(sources, rank, split, plan.quota.data_ptr(), plan.status.data_ptr(), weights, starts)
        self._planner.assign(
            source.data_ptr(),
            source.element_size(),
            (source.numel(), blocks, length),
            self._prefix.data_ptr(),
            weights,
            starts,
            physical.data_ptr(),
            blocks,
        )
        return physical
