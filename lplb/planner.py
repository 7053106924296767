"""How a batch is shared: count, exchange, solve, assign."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

import torch
import torch.distributed as dist

from lplb import cpu, cuda, deep_ep, devices, exchange, ops, topology
from lplb.arguments import (
    MOST_TOKENS,
    check_counter,
    check_device,
    check_history,
    check_indices,
    checked_group_size,
    checked_loads,
    checked_share,
    checked_speeds,
    seen,
    whole_number,
)
from lplb.backend import Backend
from lplb.eplb import rebalance_experts
from lplb.exchange import Exchange
from lplb.layout import Layout, checked_layout
from lplb.placement import Placement
from lplb.plan import Plan, Rules, checked_solver, checked_split, empty_plan, report

__all__ = ["Planner"]

_WARP_TOKENS = 256  # chunks of count_workload are multiples of this, as LPLB has them


class Planner:
    """Maps logical expert indices to physical ones so that the busiest rank has as little as can be.

    The drop-in for DeepSeek's LPLB: experts have at most two copies, on a fixed topology. `from_placement` makes the
    same planner for any placement.

    Per rank the layout is: first the rank's own logical experts, then its redundant slots; redundant slot
    ``c * n_redundants + k`` of rank ``r`` copies own slot ``c * n_redundants + k`` of rank ``r2o[r, k]``.

    Under a ``group`` the constructor, `update_redundancy_mapping`, `init_from_deep_ep`, `solve_probs` and `run` are
    collective: every rank calls them, in the same order, with no tokens too (`run_idle`), and an error on one rank is
    raised on all; in `run` on CUDA later than on that rank, see below. A rank that is lost makes the others raise
    RuntimeError within the group's timeout.

    A planner may be used from several threads; they take turns. Calls of two planners of one group must come in one
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
      `update_redundancy_mapping`. Replays follow new indices, raise the counter and renew `last_plan`, but only calls
      of the planner raise what went wrong in them.
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
            `SolveStatus.SKIPPED`. All ranks decide alike, from the counts just exchanged.
        verbose: print problem, settings and the iteration table of every solve.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message has the value seen and the value allowed.
        RuntimeError: this build, torch or machine cannot run on ``device``; the message says what is missing.
    """

    r2o: torch.Tensor | None
    """``redundant_to_original`` as int32, or ``None`` for a planner made by `from_placement`."""
    o2r: torch.Tensor | None
    """Its inverse, int32: ``o2r[o, k]`` is the rank that copies class ``k`` of rank ``o``."""
    placement: Placement
    """Where the experts are now."""
    phy2log: torch.Tensor
    """Logical expert of every physical one, int32 ``[n_routed_experts]``, on the planner's device."""
    n_group: int
    """Number of balance groups."""
    group_size: int
    """Ranks per balance group."""
    num_redundants: int
    """Expert classes that a rank copies (columns of ``r2o``)."""
    combined_redundant_experts: int
    """Redundant slots per rank and class."""
    _slots: Layout | None
    _exchange_apart: Exchange | None  # where lagged exchanges meet no others; made by the first of them

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
        verbose: bool = False,
    ) -> None:
        """See the class."""

        def build() -> None:
            if isinstance(redundant_to_original, torch.Tensor):
                self._set_device(redundant_to_original.device if device is None else device)
            topology.check(redundant_to_original)
            self._set_ranks(ep_size, ranks_per_node)
            self._set_topology(redundant_to_original, n_routed_experts, n_logical_routed_experts)
            self._set_solver(solver, split, min_tokens, verbose)
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
            self._set_solver(solver, split, min_tokens, verbose)
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
        self._exchange_apart = None if isinstance(self._exchange, exchange.Distributed) else self._exchange
        self._alone = isinstance(self._exchange, exchange.Local)
        self._raised: Exception | None = None
        self._number = exchange.number_planner(self._exchange)

    def _agree_on(self, build: Callable[[], None]) -> None:
        """Build on every rank or raise on every rank. Collective."""
        with exchange.turn(self._exchange):
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

    def _set_solver(self, solver: str, split: str | None, min_tokens: int, verbose: bool) -> None:
        self.solver = checked_solver(solver)
        self._split = checked_split(split)
        self.min_tokens = whole_number("min_tokens", min_tokens, 0, MOST_TOKENS)
        self.verbose = bool(verbose)

    def _identity_order(self) -> Placement:
        return self._in_order(torch.arange(self.n_logical_routed_experts, device="cpu"))

    def _in_order(self, order: torch.Tensor) -> Placement:
        assert self.r2o is not None
        phy2log = topology.lay_out(self.r2o.cpu(), order, self.n_group, self.combined_redundant_experts)
        return Placement(phy2log, self.ep_size, self.n_logical_routed_experts)

    def _compile(self, placement: Placement, speed: list[float]) -> None:
        """Build the backend for a placement; nothing of the planner changes before all of it is ready."""
        placement.check_groups(self.group_size)
        rules = Rules(
            phy2log=tuple(placement.phy2log.tolist()),
            n_ranks=self.ep_size,
            group_size=self.group_size,
            ranks_per_node=0 if self._alone else self.ranks_per_node,
            split=self.split,
        )
        settings = rules, speed, self.solver, self.min_tokens
        fingerprint = exchange.fingerprint(*settings, self.device.type, devices.arithmetic(self.device), self._number)
        backend: Backend
        with torch.inference_mode(False):  # whatever mode the caller builds models in
            if self.device.type == "cuda":
                before = self.__dict__.get("_backend")
                backend = cuda.Backend(*settings, self._exchange, fingerprint, self.device, before=before)
            else:
                backend = cpu.Backend(*settings, self._exchange, fingerprint, self.device)
            phy2log = placement.phy2log.to(self.device, copy=True)
        self.placement = placement
        self.phy2log = phy2log
        self._rules = rules
        self._speed = speed
        self._backend = backend
        self._fingerprint = fingerprint

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

    # ---- what a user of LPLB reads

    @property
    def n_local_routed_experts(self) -> int:
        """Physical experts per rank."""
        return self.n_routed_experts // self.ep_size

    @property
    def n_local_logical_routed_experts(self) -> int:
        """Logical experts per rank, copies not counted."""
        return self.n_logical_routed_experts // self.ep_size

    @property
    def split(self) -> str:
        """How source ranks share out the quotas: ``"local_first"`` or ``"plain"``."""
        return self._split or ("plain" if self._alone else "local_first")

    @property
    def home(self) -> torch.Tensor:
        """The slot of each expert's original, int32 ``[n_logical]``: the owner's on a topology, else the lowest."""
        if self._slots is None:
            return self.placement.log2phy[:, 0].to(self.device, copy=True)
        return self._slots.original_first(self.phy2log)[:, 0].int()

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

        With a buffer that says the same as the one before it does nothing, and sends nothing: call it as often as you
        like. With one that says something else it starts anew, as the first time. Planner and buffer must have the
        same ranks in the same order. A planner without a group asks the other ranks over the buffer's.

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
            if self._has_ranks_of(buffer):
                return
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
                found = exchange.together(asked, read, lambda f: exchange.fingerprint(f.ranks_per_node))
                self._set_exchange(found.group)
                self.ranks_per_node = found.ranks_per_node
                self._agree_on(lambda: self._compile(self.placement, self._speed))
                self._buffer_ranks, self.deep_ep_initialized = found, True
            except BaseException:
                self.__dict__.update(before)
                raise

    def _has_ranks_of(self, buffer: Any) -> bool:
        try:
            return self._buffer_ranks is not None and deep_ep.read(buffer) == self._buffer_ranks
        except Exception:  # raised again where all ranks hear of it
            return False

    # ---- placement

    def update_redundancy_mapping(
        self, workload: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Re-order the logical experts over ranks and make the mapping current; collective under a group.

        With a load history, EPLB without replicas packs experts to ranks, and each rank sorts its experts by load, so
        that the heaviest are the ones that get copies. Weights are the caller's to move.

        Args:
            workload: load history, ``[n_logical]``, non-negative; the same on every rank. ``None``: identity order.

        Returns:
            phy2log int32 ``[n_physical]``, log2phy int32 ``[n_logical, 2]`` (original first, padded with -1) and
            logcnt int32 ``[n_logical]``.

        Raises:
            TypeError, ValueError: ``workload`` is not allowed.
            RuntimeError: the planner was made by `from_placement`.
        """

        def renew() -> None:
            late = self._late_error()
            if late is not None:
                raise late
            devices.refuse_capture(self.device, "update_redundancy_mapping")
            self._layout("update_redundancy_mapping")
            self._backend.check_earlier()
            if workload is None:
                self._compile(self._identity_order(), self._speed)
            else:
                self._compile(self._in_order(self._packed_order(workload)), self._speed)

        with self._turn():
            before = dict(self.__dict__)
            try:
                exchange.together(self._exchange, renew, lambda _: self._fingerprint)
            except BaseException:
                self.__dict__.update(before)
                raise
        logcnt = self.placement.logcnt.to(self.device, copy=True)
        log2phy = self._layout("update_redundancy_mapping").original_first(self.phy2log)
        return self.phy2log.clone(), log2phy.int(), logcnt

    def _packed_order(self, workload: torch.Tensor) -> torch.Tensor:
        check_history(workload, self.n_logical_routed_experts, self.device)
        loads = workload.cpu()
        n_nodes = max(1, self.ep_size // self.ranks_per_node)
        order = rebalance_experts(loads[None], self.n_logical_routed_experts, self.n_group, n_nodes, self.ep_size)[
            0
        ].view(self.ep_size, -1)
        heaviest_first = loads[order].argsort(dim=1, descending=True, stable=True)
        return order.gather(1, heaviest_first).flatten()

    # ---- the stages

    def count_workload(self, idx: torch.Tensor, n_sms: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Count tokens per logical expert. Local: no communication.

        Args:
            idx: logical expert indices, int32 or int64, any shape; -1 counts nowhere.
            n_sms: number of chunks; chunk ``i`` is the flat range ``[i * m, (i + 1) * m)``, clipped, with
                ``m = 256 * ceil(ceil(n / n_sms) / 256)``.

        Returns:
            Counts int32 ``[n_logical]``, and int32 ``[n_sms, n_logical]``: counts of the chunks up to and with each.

        Raises:
            TypeError, ValueError: an argument is not allowed; on the CPU, an index is outside ``[-1, n_logical)``.
        """
        check_indices(idx, self.device)
        n_sms = whole_number("n_sms", n_sms, 1)
        per_sm = -(-idx.numel() // n_sms)
        length = max(1, -(-per_sm // _WARP_TOKENS)) * _WARP_TOKENS
        with self._turn():
            self._backend.check_earlier()
            return self._backend.count(idx, n_sms, length)

    def solve_probs(
        self, workload: torch.Tensor, avail_counter: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve for the share of each expert class that stays with its owner; collective under a group.

        Args:
            workload: this rank's counts, int32 or int64, ``n_logical`` elements; summed over the group.
            avail_counter: one element, int32 or int64; raised by the number of groups solved. May be ``None``.

        Returns:
            ``share`` float32 ``[n_group, group_size, n_redundants]``: ``share[g, o, k]`` is the part of class ``k``
            owned by rank ``o`` that stays on it, 1 for an empty class. ``global_workload`` float32 ``[n_group,
            group_size, n_local_logical]``: load of the expert in each own slot, divided by the largest (all zeros
            without tokens).

        Raises:
            TypeError, ValueError: an argument is not allowed, on any rank.
            RuntimeError: the planner was made by `from_placement`.
        """
        with self._turn():
            error = late = self._late_error()
            try:
                devices.refuse_capture(self.device, "solve_probs")
                layout = self._layout("solve_probs")
                check_counter(avail_counter, self.device)
                flat = workload.reshape(-1) if isinstance(workload, torch.Tensor) else workload
                loads = checked_loads(flat, self.n_logical_routed_experts, self.device)
                self._backend.check_earlier()
                log = self._backend.new_log() if self.verbose else None
                self._backend.put_own(loads)
            except Exception as problem:
                error = problem
            self._backend.gather(exchange.SOLVE_PROBS, error, blamed=error is not late)
            self._solve_gathered(avail_counter, log)
            self._backend.wait()
            return layout.shares(self.phy2log, self._backend.plan.quota, self._backend.loads)

    def weighted_select_target(
        self, idx: torch.Tensor, o_weight: torch.Tensor, local_workload_by_sm: torch.Tensor, n_sms: int
    ) -> torch.Tensor:
        """Map indices by shares, as LPLB does. Local: each rank rounds by itself.

        `run` does better: it uses whole-token quotas from every rank's counts.

        Args:
            idx: logical expert indices, int32 or int64, any shape, -1 is kept.
            o_weight: shares in [0, 1] as from `solve_probs`, floating ``[n_group, group_size, n_redundants]``.
            local_workload_by_sm: the second result of ``count_workload(idx, n_sms)``.
            n_sms: as given to `count_workload`.

        Returns:
            Physical expert indices, shape and dtype of ``idx``; ``floor(share * count)`` tokens of each expert stay.

        Raises:
            TypeError, ValueError: an argument is not allowed or does not belong to ``idx``.
            RuntimeError: the planner was made by `from_placement`.
        """
        layout = self._layout("weighted_select_target")
        check_indices(idx, self.device)
        n_sms = whole_number("n_sms", n_sms, 1)
        count, prefix = self.count_workload(idx, n_sms)
        by_sm = local_workload_by_sm
        if isinstance(by_sm, torch.Tensor):
            check_device("local_workload_by_sm", by_sm, self.device)
        if not isinstance(by_sm, torch.Tensor) or by_sm.dtype != prefix.dtype or not torch.equal(by_sm, prefix):
            raise ValueError(
                f"local_workload_by_sm is not what count_workload(idx, {n_sms}) returns: "
                f"{seen(by_sm)}, allowed is int32 {list(prefix.shape)} with the counts of idx"
            )
        share = checked_share(o_weight, (self.n_group, self.group_size, self.num_redundants), self.device)
        plan = self._empty_plan((), self.solver)
        plan.quota.copy_(layout.quotas(self.phy2log, count, share))
        with self._turn():
            self._backend.check_earlier()
            return self._backend.assign(idx, plan)

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
        a thread, or on a stream of its own. The first such call exchanges before it returns and maps by the last plan,
        or, without one, by the fixed split; from then on the planner's exchanges have a process group of their own.
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

    def _run(
        self, idx: torch.Tensor, avail_counter: torch.Tensor | None, n_sms: int | None, lag: int, return_plan: bool
    ) -> tuple[torch.Tensor, Plan | None]:
        with self._turn():
            backend, method = self._backend, exchange.RUN
            log, counted = None, None
            error = late = self._late_error()
            try:
                method = exchange.RUN_LAGGED if whole_number("lag", lag, 0, 1) else exchange.RUN
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
                exchange_and_solve()
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
        """Let an exchange go on beside what the caller does; the first that has no group of its own makes one."""
        if self._exchange_apart is not None:
            self._backend.overlap.start(work)
            return
        work()
        self._exchange_apart = self._exchange = exchange.apart(self._exchange)
        self._backend.use(self._exchange)

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

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One caller at a time, behind what still overlaps."""
        with self._lock, self._backend.guard:
            self._backend.overlap.wait()
            yield

    def _late_error(self) -> Exception | None:
        """What went wrong in an overlapped exchange, once; not what this rank has raised of itself already."""
        late, raised = self._backend.overlap.take_error(), self._raised
        self._raised = None
        return None if late is raised else late

    def _empty_plan(self, batch: Sequence[int], solver: str) -> Plan:
        return empty_plan(batch, self._rules, solver, self.device)

    def _solve_gathered(self, avail_counter: torch.Tensor | None, log: torch.Tensor | None) -> None:
        self._backend.solve_gathered(avail_counter, log)
        if log is not None:
            self._print(self._backend.loads, self._backend.plan, log)

    def _print(self, loads: torch.Tensor, plan: Plan, log: torch.Tensor | None) -> None:
        size = f"{self.ep_size} ranks in {self.n_group} groups of {self.group_size}, {self.placement}"
        log = None if log is None else log.cpu()
        print(report(size, self._backend.name, int(loads.sum()), plan.cpu(), log))

    def _layout(self, name: str) -> Layout:
        if self._slots is None:
            raise RuntimeError(
                f"{name} needs the redundancy topology (r2o) of LPLB; this planner was made by from_placement: "
                "use solve and run"
            )
        return self._slots
