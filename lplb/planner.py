"""How a batch is shared: count, exchange, solve, assign."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, overload

import torch
import torch.distributed as dist

from lplb import deep_ep, devices, exchange, ops, topology
from lplb.arguments import (
    MOST_TOKENS,
    check_counter,
    check_device,
    check_indices,
    checked_group_size,
    checked_loads,
    checked_speeds,
    checked_traffic_weight,
    whole_number,
)
from lplb.exchange import Exchange
from lplb.layout import checked_layout
from lplb.lplb_stages import Compiled, LplbStages
from lplb.placement import Placement
from lplb.plan import Plan, checked_solver, checked_split

__all__ = ["Planner"]


class Planner(LplbStages):
    """Maps logical expert indices to physical ones so that the busiest rank has as little as can be.

    The drop-in for DeepSeek's LPLB: experts have at most two copies, on a fixed topology. `from_placement` makes the
    same planner for any placement.

    Per rank the layout is: first the rank's own logical experts, then its redundant slots; redundant slot
    ``c * n_redundants + k`` of rank ``r`` copies own slot ``c * n_redundants + k`` of rank ``r2o[r, k]``.

    Under a ``group`` the constructor, `update_redundancy_mapping`, `init_from_deep_ep`, `solve_probs` and `run` are
    collective: every rank calls them, in the same order, with no tokens too (`run_idle`), and an error on one rank is
    raised on all; in `run` on CUDA later than on that rank, see below. A rank that is lost makes the others raise
    RuntimeError within the group's timeout.

    A planner may be used from several threads; they take turns. Every method waits for what a call with ``lag=1`` has
    left in the background. Calls of two planners of one group must come in one
    order on all ranks: threads that race are refused on all of them (ValueError). Give each thread a group of its own.

    On CUDA all work goes to the caller's current stream, and `run` and `count_workload` never wait for the device:

    - Indices outside ``[-1, n_logical)`` are mapped to -1 and counted in `indices_outside`. With LPLB_CHECK=1 in the
      environment when the planner is made, the next call that sees a higher count raises ValueError.
    - Under a group, an error in the arguments of `run` on one rank is raised there at once. The other ranks get -1
      for all of that call, and raise ValueError at the first call that sees the device's report: ranks that go on to
      a collective of their own agree before it.
    - The planner's memory serves one call at a time: a call on another stream first waits for the last one's, which
      must still exist. What is captured waits for other streams of the same capture only: synchronise before it, and
      let no replay overlap with another replay or call of the same planner.
    - A captured graph uses the planner's memory. Keep the planner as long as the graph, and capture anew after
      `update_redundancy_mapping` and `replace_placement`. Replays follow new indices, raise the counter and renew
      `last_plan`, but only calls of the planner raise what went wrong in them.
    - `solve`, `solve_probs`, `weighted_select_target` and `update_redundancy_mapping` check the values of their
      arguments, and wait for the device; so does every call with ``verbose``.

    Args:
        redundant_to_original: ``r2o``, integer ``[group_size, n_redundants]``: entry ``[r, k]`` is the rank of the
            group whose k-th expert class rank ``r`` copies. Every column is a permutation of the group's ranks
            without fixed points. `lplb.topology` has some.
        n_routed_experts: number of physical experts on all ranks.
        n_logical_routed_experts: number of logical experts.
        ep_size: number of ranks; by default the size of ``group``.
        group: the ranks that share a batch, a torch.distributed process group (or an `lplb.exchange.Exchange`). With
            ``None`` the indices given to `run` are the whole batch.
        device: where the planner works, the CPU or a CUDA device; by default where ``redundant_to_original`` is.
            "cuda" is the current CUDA device.
        ranks_per_node: ranks of one server, for the node hierarchy of EPLB; by default the number of CUDA devices,
            without any ``min(8, ep_size)``.
        solver: ``"ipm"`` (interior point) or ``"flow"`` (exact, by augmenting paths).
        split: how source ranks share out the quotas, which are met exactly either way. ``"local_first"``, the default
            under a ``group``: a copy takes tokens of its own rank first, then of its node (``ranks_per_node``
            consecutive ranks), then the rest. ``"plain"``: all sources share alike; without a group it makes no
            difference.
        min_tokens: a balance group with fewer tokens than this, of all ranks together, is not solved: its tokens take
            the fixed split (own rank first, then own node, then all copies alike), and its status is
            `SolveStatus.SKIPPED`. A token counts once for each of its experts. All ranks decide alike, from the counts
            just exchanged. It spares the interior point; the flow solver is quicker than the fixed split.
        traffic_weight: above 0, `run` weighs balance against traffic knowingly. It minimises the busiest rank's tokens
            (by its speed) + ``traffic_weight`` · (tokens of replicated experts that cross nodes + 1/8 · those that
            cross ranks of a node) / Σ speeds: with weight 0.1, ten tokens less that cross nodes per rank are worth one
            token more on the busiest. Certificate, gap and ``"solved"`` are then of the whole sum, and `max_load` may
            be above the LP's least. For the CPU, the interior point and planners with a group; `solve` does not know
            sources and leaves it out. Tested with rank speeds from 0.5 to 2; far beyond, some groups end unsolved, and
            say so.
        verbose: print problem, settings and the iteration table of every solve.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message has the value seen and the value allowed.
        RuntimeError: this build, torch or machine cannot run on ``device``; the message says what is missing.
    """

    def __init__(
        self,
        redundant_to_original: torch.Tensor,
        n_routed_experts: int,
        n_logical_routed_experts: int,
        ep_size: int | None = None,
        group: dist.ProcessGroup | Exchange | None = None,
        *,
        device: torch.device | str | None = None,
        ranks_per_node: int | None = None,
        solver: str = "ipm",
        split: str | None = None,
        min_tokens: int = 0,
        traffic_weight: float = 0.0,
        verbose: bool = False,
    ) -> None:
        """See the class."""

        def build() -> None:
            if isinstance(redundant_to_original, torch.Tensor):
                self._set_device(redundant_to_original.device if device is None else device)
            topology.check(redundant_to_original)
            self._set_ranks(ep_size, ranks_per_node)
            self._set_topology(redundant_to_original, n_routed_experts, n_logical_routed_experts)
            self._set_solver(solver, split, min_tokens, traffic_weight, verbose)
            self._compile(self._identity_order(), [1.0] * self.ep_size)

        self._set_group(group)
        where = getattr(redundant_to_original, "device", None) if device is None else device
        with devices.made_current(where):
            self._agree_on(build)
        self._handle = ops.handle_of(self, self._fingerprint)

    @classmethod
    def from_placement(
        cls,
        placement: Placement,
        *,
        group_size: int | None = None,
        group: dist.ProcessGroup | Exchange | None = None,
        device: torch.device | str | None = None,
        ranks_per_node: int | None = None,
        rank_speed: Sequence[float] | torch.Tensor | None = None,
        solver: str = "ipm",
        split: str | None = None,
        min_tokens: int = 0,
        traffic_weight: float = 0.0,
        verbose: bool = False,
    ) -> "Planner":
        """Return a planner for any placement, with any number of copies per expert, every copy planned separately.

        Args:
            placement: where the experts are. Group-closed: no expert has slots in two groups. Make it outside of any
                collective: `Placement` refuses what is wrong on its own rank only.
            group_size: consecutive ranks that balance among themselves, 1 to 128; by default all ranks.
            group: as for `Planner`; its size must be ``placement.n_ranks``.
            device: as for `Planner`; by default the CPU.
            ranks_per_node: as for `Planner`.
            rank_speed: ``[n_ranks]``, 1e-6 to 1e6, how fast each rank is; by default all the same. The plan minimises
                the largest load / speed. Tested from 0.5 to 2; over several decades the interior point may need more
                than eight steps.
            solver: as for `Planner`.
            split: as for `Planner`.
            min_tokens: as for `Planner`.
            traffic_weight: as for `Planner`.
            verbose: as for `Planner`.

        Raises:
            TypeError, ValueError, RuntimeError: as for `Planner`.
        """
        self = cls.__new__(cls)

        def build() -> None:
            if not isinstance(placement, Placement):
                raise TypeError(f"placement is a {type(placement).__name__}, allowed is an lplb.Placement")
            self._set_device("cpu" if device is None else device)
            self._set_ranks(placement.n_ranks, ranks_per_node)
            size = checked_group_size(placement.n_ranks, group_size)
            self._set_sizes(placement.n_physical, placement.n_logical, size)
            self._slots = None
            self.r2o = self.o2r = None
            self.num_redundants = self.combined_redundant_experts = 0
            self._set_solver(solver, split, min_tokens, traffic_weight, verbose)
            self._compile(placement, checked_speeds(rank_speed, self.ep_size))

        self._set_group(group)
        with devices.made_current(device):
            self._agree_on(build)
        self._handle = ops.handle_of(self, self._fingerprint)
        return self

    # ---- construction

    def _set_group(self, group: dist.ProcessGroup | Exchange | None) -> None:
        self._set_exchange(group)
        self._lock = threading.Lock()
        self._buffer_ranks: deep_ep.BufferRanks | None = None
        self.deep_ep_initialized = False

    def _set_exchange(self, group: dist.ProcessGroup | Exchange | None) -> None:
        self.ep_group = group
        self._exchange = exchange.exchange_for(group)
        self._is_apart = False
        self._alone = isinstance(self._exchange, exchange.Local)
        self._raised: Exception | None = None
        self._number = exchange.number_planner(self._exchange)

    def _agree_on(self, build: Callable[[], None]) -> None:
        """Build on every rank or raise on every rank. Collective."""
        with exchange.turn(self._exchange):
            exchange.drain(self._exchange)
            exchange.together(self._exchange, build, lambda _: self._fingerprint)
            exchange.widen(self._exchange, self.n_logical_routed_experts)

    def _set_device(self, device: torch.device | str) -> None:
        devices.check_backend("device", torch.device(device))
        self.device = torch.empty(0, device=device).device  # as tensors name it: "cpu" for "cpu:0", "cuda:0" for "cuda"

    def _set_ranks(self, ep_size: int | None, ranks_per_node: int | None) -> None:
        size = None if self.ep_group is None else self._exchange.size
        if ep_size is None:
            if size is None:
                raise ValueError("ep_size is None, allowed without a group is the number of ranks")
            ep_size = size
        self.ep_size = whole_number("ep_size", ep_size, 1)
        if size is not None and size != self.ep_size:
            raise ValueError(f"ep_size is {self.ep_size}, allowed is the size of the group, {size}")
        if ranks_per_node is None:
            ranks_per_node = torch.cuda.device_count() or min(8, self.ep_size)
        self.ranks_per_node = whole_number("ranks_per_node", ranks_per_node, 1)

    def _set_sizes(self, n_physical: int, n_logical: int, group_size: int) -> None:
        self.n_routed_experts = n_physical
        self.n_logical_routed_experts = n_logical
        self.group_size = group_size
        self.n_group = self.ep_size // group_size

    def _set_topology(self, r2o: torch.Tensor, n_physical: int, n_logical: int) -> None:
        rows, classes = r2o.shape
        layout = checked_layout((rows, classes), n_physical, n_logical, self.ep_size)
        self._set_sizes(layout.n_physical, layout.n_logical, layout.group_size)
        self._slots = layout
        self.r2o = r2o.to(self.device, torch.int32, copy=True).contiguous()
        self.o2r = self.r2o.argsort(dim=0).int()
        self.num_redundants, self.combined_redundant_experts = classes, layout.combined

    def _set_solver(
        self, solver: str, split: str | None, min_tokens: int, traffic_weight: float, verbose: bool
    ) -> None:
        self.solver = checked_solver(solver)
        self._split = checked_split(split)
        self.min_tokens = whole_number("min_tokens", min_tokens, 0, MOST_TOKENS)
        self.traffic_weight = checked_traffic_weight(traffic_weight, self.solver, self._alone)
        self.verbose = bool(verbose)

    def __getstate__(self) -> dict[str, Any]:
        """Copy or pickle all but what is made anew; a planner under a process group cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_backend", "_handle")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the backend again; the last plan is not kept."""
        devices.check_backend("device", state["device"])
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._compile(self.placement, self._speed)
        self._handle = ops.handle_of(self, self._fingerprint)

    # ---- what a user reads

    @property
    def workspace_bytes(self) -> int:
        """Bytes that the planner keeps where it works; on the CPU most are untouched while few threads run.

        Without a group and for contiguous indices, `run` allocates nothing but its result.
        """
        return self._backend.workspace_bytes

    @property
    def indices_outside(self) -> int:
        """Indices outside ``[-1, n_logical)`` that CUDA calls mapped to -1, as far as the device has got.

        0 on the CPU, which refuses them.
        """
        return self._backend.indices_outside

    @property
    def last_plan(self) -> Plan | None:
        """The plan of the last `run` (a copy), or ``None`` before the first. Waits for a lagged exchange on the CPU.

        On CUDA the copy is made in the order of the current stream, and nothing waits until you read it.

        Raises:
            ValueError: a CUDA device has reported that an earlier call went wrong.
        """
        with self._turn():
            return self._backend.last_plan()

    def init_from_deep_ep(self, buffer: Any) -> None:
        """Take group and node structure from a DeepEP buffer: counts travel over its group from now on. Collective.

        With a buffer that says the same as the one before it changes nothing. With one that says something else it
        starts anew, as the first time; all ranks have one like the one before, or none has. Planner and buffer must
        have the same ranks in the same order. A planner without a group asks the other ranks over the buffer's.

        `last_plan` is ``None`` afterwards, and captured graphs must be captured anew; the placement stays.
        ``ranks_per_node`` is the buffer's: for the split at once, for EPLB with the next `update_redundancy_mapping`.

        Args:
            buffer: a ``deep_ep.Buffer`` or ``deep_ep.ElasticBuffer``, or what has its interface: see `lplb.deep_ep`.

        Raises:
            TypeError: it is something else. On this rank only where neither planner nor buffer has a process group.
            ValueError: it was destroyed, contradicts itself, or has other ranks than the planner, on any rank.
            RuntimeError: a CUDA graph is being captured; see also `Planner`.
        """
        with self._turn():
            devices.refuse_capture(self.device, "init_from_deep_ep")
            asked = exchange.Distributed(deep_ep.group_of(buffer)) if self._alone else self._exchange

            late = self._late_error()

            def read() -> deep_ep.BufferRanks:
                if late is not None:
                    raise late
                found = deep_ep.read(buffer)
                deep_ep.check_ranks(found, self.ep_size, asked)
                return found

            before = dict(self.__dict__)
            try:
                found = exchange.together(
                    asked, read, lambda f: exchange.fingerprint(f.ranks_per_node, f == self._buffer_ranks)
                )
                if found == self._buffer_ranks:
                    return
                self._set_exchange(found.group)
                self.ranks_per_node = found.ranks_per_node
                self._agree_on(lambda: self._compile(self.placement, self._speed))
                self._buffer_ranks, self.deep_ep_initialized = found, True
            except BaseException:
                self.__dict__.update(before)
                raise

    def compiled_for(self, placement: Placement) -> Compiled:
        """Make another placement ready, for `replace_placement`. Local, for any thread; nothing of the planner changes.

        It takes the time that a constructor takes, and on CUDA works on a stream of its own, which it waits for. What
        it returns serves once, and until the planner's placement changes otherwise.

        Args:
            placement: of as many ranks, physical and logical experts as the planner's, and group-closed.

        Raises:
            TypeError, ValueError: it is none.
            RuntimeError: the planner was made for a topology, not by `from_placement`; or memory is missing.
        """
        self._check_replacing(placement)
        if self.device.type != "cuda":
            return self._compiled(placement, self._speed)
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call, unused-ignore]
            with torch.cuda.stream(stream):
                compiled = self._compiled(placement, self._speed)
            stream.synchronize()
        return compiled

    def replace_placement(self, placement: Placement | Compiled) -> None:
        """Plan for another placement from the next call on. Local: no communication.

        Every rank calls it between the same two collective calls. If one has not, the next one finds that out by the
        fingerprint, and all raise ValueError; on CUDA as other errors of ranks, see the class.

        `last_plan` is ``None`` afterwards; with ``lag=1`` the next batch takes the fixed split, and what went wrong
        in an exchange before is raised by the next call all the same. Earlier plans serve no more. What a CUDA graph
        has captured of the planner still plans for the old placement, in memory that is gone: capture anew.

        Args:
            placement: as for `compiled_for`, or what that returned: then there is next to nothing to do here.

        Raises:
            TypeError, ValueError, RuntimeError: as `compiled_for`; or a CUDA graph is being captured.
        """
        with self._turn():
            devices.refuse_capture(self.device, "replace_placement")
            if isinstance(placement, Compiled) and placement.made_for == self._as_it_is():
                compiled = placement
            else:  # from the beginning, also where the planner is not as it was then
                other = placement.placement if isinstance(placement, Compiled) else placement
                self._check_replacing(other)
                compiled = self._compiled(other, self._speed)
            compiled.backend.overlap = self._backend.overlap  # what it has to report is not lost
            self._install(compiled)

    def _check_replacing(self, placement: Placement) -> None:
        if self.r2o is not None:
            raise RuntimeError(
                "replace_placement is for planners made by from_placement; this one was made for a topology (r2o): use "
                "update_redundancy_mapping"
            )
        if not isinstance(placement, Placement):
            raise TypeError(f"placement is a {type(placement).__name__}, allowed is an lplb.Placement")
        for name, allowed in (
            ("n_ranks", self.ep_size),
            ("n_physical", self.n_routed_experts),
            ("n_logical", self.n_logical_routed_experts),
        ):
            if getattr(placement, name) != allowed:
                raise ValueError(
                    f"placement has {name} {getattr(placement, name)}, allowed is the planner's, {allowed}"
                )

    # ---- the stages

    def solve(self, workload: torch.Tensor, *, solver: str | None = None) -> Plan:
        """Plan given loads. Local: no communication; what `run` does between exchange and assignment.

        Args:
            workload: whole tokens per logical expert over all ranks, ``[n_logical]`` or a batch ``[n, n_logical]``,
                at most 2**31 - 1 each; int32, int64, or floating with whole values.
            solver: ``"ipm"`` or ``"flow"``; by default the planner's.

        Returns:
            The plan, with a certificate for every group. A batch is shared out over torch's threads; on CUDA it is one
            launch.

        Raises:
            TypeError, ValueError: an argument is not allowed.
        """
        devices.refuse_capture(self.device, "solve")
        chosen = self.solver if solver is None else checked_solver(solver)
        loads = checked_loads(workload, self.n_logical_routed_experts, self.device)
        n_loads = loads.numel() // self.n_logical_routed_experts
        with self._turn():
            self._backend.check_earlier()
            plan = self._empty_plan(loads.shape[:-1], chosen)
            log = self._backend.new_log() if self.verbose else None
            self._backend.solve(loads, plan, log if n_loads == 1 else None)
            if self.verbose:
                self._print(loads, plan, log if loads.dim() == 1 else None)
        return plan

    @overload
    def run(
        self,
        idx: torch.Tensor,
        avail_counter: torch.Tensor | None,
        n_sms: int | None = None,
        *,
        lag: int = 0,
        return_plan: Literal[False] = False,
    ) -> torch.Tensor: ...

    @overload
    def run(
        self,
        idx: torch.Tensor,
        avail_counter: torch.Tensor | None,
        n_sms: int | None = None,
        *,
        lag: int = 0,
        return_plan: Literal[True],
    ) -> tuple[torch.Tensor, Plan]: ...

    def run(
        self,
        idx: torch.Tensor,
        avail_counter: torch.Tensor | None,
        n_sms: int | None = None,
        *,
        lag: int = 0,
        return_plan: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, Plan]:
        """Map a batch's logical expert indices to physical ones; collective under a group.

        With ``lag=1`` nothing waits for an exchange: the batch is mapped by the shares of the batch before, scaled to
        its own counts, while its own exchange and plan, for the next batch, go on beside what the caller does next: on
        a thread, or on a stream of its own. Before the first plan there is the fixed split. The first such call under a
        process group is not overlapped; from then on counts travel over a second group, which the planners of one group
        share: their calls come in the same order on all ranks.
        What goes wrong in an exchange is raised by the next collective call of each rank, which then takes part without
        tokens; a rank whose own arguments are wrong raises at once instead.

        Args:
            idx: logical expert indices of this rank's tokens, int32 or int64, any shape and strides, in
                ``[-1, n_logical)``; -1 is masked: it stays -1 and counts nowhere. May be empty.
            avail_counter: one element, int32 or int64; raised by the number of groups solved. May be ``None``.
                With ``lag=1`` it is raised later, but before the planner's next call returns.
            n_sms: bounds the threads, on CUDA the multiprocessors that count and assign use; by default torch's number
                of threads, or all. The result does not depend on it.
            lag: 0, or 1 to map by the plan of the batch before.
            return_plan: return the plan that the batch was mapped by as well. It belongs to the caller; `assign` maps
                the batch, or another, by it again.

        Returns:
            Physical expert indices, shape and dtype of ``idx``, contiguous. With ``lag=0``, over all ranks each
            physical expert gets exactly its quota in `last_plan`. With ``return_plan`` these and the `Plan`.

        Raises:
            TypeError, ValueError: an argument is not allowed, on any rank; the counter is then unchanged. On CUDA
                other ranks raise at a later call, see the class.

        A compiler may drop a call whose result nobody uses, and with it its plan and its exchange.
        """
        if torch.compiler.is_compiling() or ops.is_traced(idx):
            if lag and avail_counter is not None:
                raise RuntimeError(
                    "avail_counter is given with lag=1, allowed in compiled code is None: it is raised too late for it"
                )
            if return_plan:
                raise RuntimeError("return_plan is True, allowed in compiled code is False: a graph holds tensors only")
            return ops.run(idx, avail_counter, self._handle, n_sms, lag)
        if return_plan:
            physical, plan = self._run(idx, avail_counter, n_sms, lag, True)
            assert plan is not None
            return physical, plan
        return self._run(idx, avail_counter, n_sms, lag, False)[0]

    def run_idle(self, avail_counter: torch.Tensor | None = None, *, lag: int = 0) -> None:
        """Take part, without tokens, in a `run` of the other ranks; collective under a group.

        For data-parallel ranks that have nothing to do: every rank takes part in every batch and layer, and a rank
        that skips a layer calls this in the place of `run`. The others' batches are planned as if this rank had called
        `run` with no index. Its weights still serve their tokens: it goes on to dispatch like any other.

        Args:
            avail_counter: as for `run`.
            lag: as for `run`, and the same on all ranks.

        Raises:
            TypeError, ValueError: as `run`.
            RuntimeError: it is being compiled. Nothing would depend on it, and a compiler would drop it.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("run_idle is called in a compiled function, allowed is outside of torch.compile")
        self.run(torch.empty(0, dtype=torch.int64, device=self.device), avail_counter, lag=lag)

    def refuse(self, error: Exception, *, lag: int = 0) -> NoReturn:
        """Take part in a `run` of the other ranks and raise an error on all of them; collective under a group.

        For code around the planner that finds its own arguments wrong: were it to raise before `run`, the other ranks
        would wait. On CUDA they raise at a later call, see the class.

        Args:
            error: what this rank raises; the others raise its message, as ValueError, TypeError or RuntimeError.
            lag: as for `run`, and the same on all ranks.
        """
        self._run(error, None, None, lag, False)
        raise error

    def _run(
        self,
        idx: torch.Tensor | Exception,
        avail_counter: torch.Tensor | None,
        n_sms: int | None,
        lag: int,
        return_plan: bool,
    ) -> tuple[torch.Tensor, Plan | None]:
        with self._turn():
            backend, method = self._backend, exchange.RUN
            log, counted = None, None
            error = late = self._late_error()
            try:
                method = exchange.RUN_LAGGED if whole_number("lag", lag, 0, 1) else exchange.RUN
                if isinstance(idx, Exception):
                    raise idx
                check_indices(idx, self.device)
                check_counter(avail_counter, self.device)
                if n_sms is not None:
                    n_sms = whole_number("n_sms", n_sms, 1)
                backend.check_earlier()
                if late is None:
                    if self._alone and method == exchange.RUN and not self.verbose:
                        return backend.run(idx, avail_counter, n_sms), backend.last_plan() if return_plan else None
                    log = backend.new_log() if self.verbose else None
                    counted = backend.count_own(idx, n_sms, method)
            except Exception as problem:
                error = problem

            def exchange_and_solve() -> None:
                backend.gather(method, error, blamed=error is not late)
                self._solve_gathered(avail_counter, log)

            if method == exchange.RUN:
                self._exchanging(exchange_and_solve)
            physical = None if counted is None else backend.assign_gathered(counted)
            used = backend.plan_in_use() if return_plan else None
            if method == exchange.RUN_LAGGED:
                self._overlap(exchange_and_solve)
            if error is not None:
                self._raised = error
                raise error
            assert physical is not None
            return physical, used

    def _overlap(self, work: Callable[[], None]) -> None:
        """Let an exchange go on beside what the caller does; the first of a process group is not overlapped."""
        if self._is_apart or not isinstance(self._exchange, exchange.Distributed):
            self._backend.overlap.start(work)
            return
        work()
        self._backend.use(exchange.background(self._exchange))
        self._is_apart = True

    def assign(self, idx: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Map indices by a plan made before. Local: no communication.

        With the indices that the plan came from the result is that of `run`, bit for bit, so a forward pass that is
        done again (activation checkpointing) repeats no collective. Other indices are shared out in the plan's
        proportions, scaled to their own counts; tokens that the plan does not speak of take the fixed split.

        Args:
            idx: as for `run`.
            plan: from ``run(..., return_plan=True)``, `last_plan` or `solve`, of a single load and of the placement
                that the planner has now.

        Returns:
            Physical expert indices, shape and dtype of ``idx``, contiguous.

        Raises:
            TypeError, ValueError: an argument is not allowed.
        """
        check_indices(idx, self.device)
        if not isinstance(plan, Plan):
            raise TypeError(f"plan is a {type(plan).__name__}, allowed is an lplb.Plan")
        check_device("plan.quota", plan.quota, self.device)
        if plan.quota.dim() != 1:
            raise ValueError(
                f"plan is for loads of shape {list(plan.quota.shape[:-1])}, allowed is the plan of one load"
            )
        if plan.rules != self._rules:
            raise ValueError(
                "plan was made for another placement, other groups or another split than this planner has now; allowed "
                "is a plan of this planner, made after its last re-mapping"
            )
        with self._turn():
            self._backend.check_earlier()
            return self._backend.assign(idx, plan)
