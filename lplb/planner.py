"""How a batch is shared: count, exchange, solve, assign."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from lplb import _C, exchange, topology
from lplb.arguments import (
    MAX_GROUP_SIZE,
    MOST_TOKENS,
    check_backend,
    check_counter,
    check_device,
    check_divides,
    check_history,
    check_indices,
    checked_group_size,
    checked_loads,
    checked_share,
    checked_speeds,
    seen,
    whole_number,
)
from lplb.eplb import rebalance_experts
from lplb.exchange import Exchange
from lplb.placement import Placement
from lplb.plan import SOLVERS, Plan, checked_solver, empty_plan, report

__all__ = ["Planner"]

_TOKENS_PER_THREAD = 1 << 16  # below this a thread costs more than it saves
_WARP_TOKENS = 256  # chunks of count_workload are multiples of this, as LPLB has them
_RUN, _SOLVE_PROBS = 0, 1  # collective methods, so that ranks that call different ones find out


class Planner:
    """Maps logical expert indices to physical ones so that the busiest rank has as little as can be.

    The drop-in for DeepSeek's LPLB: experts have at most two copies, on a fixed topology. `from_placement` makes the
    same planner for any placement.

    Per rank the layout is: first the rank's own logical experts, then its redundant slots; redundant slot
    ``c * n_redundants + k`` of rank ``r`` copies own slot ``c * n_redundants + k`` of rank ``r2o[r, k]``.

    Under a ``group`` the constructor, `update_redundancy_mapping`, `solve_probs` and `run` are collective: every rank
    calls them, in the same order, and an error on one rank is raised on all. A planner may be used from several
    threads; they take turns.

    Args:
        redundant_to_original: ``r2o``, integer ``[group_size, n_redundants]``: entry ``[r, k]`` is the rank of the
            group whose k-th expert class rank ``r`` copies. Every column is a permutation of the group's ranks
            without fixed points. `lplb.topology` has some.
        n_routed_experts: number of physical experts on all ranks.
        n_logical_routed_experts: number of logical experts.
        ep_size: number of ranks; by default the size of ``group``.
        group: the ranks that share a batch, a torch.distributed process group (or an `lplb.exchange.Exchange`). With
            ``None`` the indices given to `run` are the whole batch.
        device: where the planner works; by default where ``redundant_to_original`` is. This build has the CPU.
        ranks_per_node: ranks of one server, for the node hierarchy of EPLB; by default the number of CUDA devices,
            without any ``min(8, ep_size)``.
        solver: ``"ipm"`` (interior point) or ``"flow"`` (exact, by augmenting paths).
        verbose: print problem, settings and the iteration table of every solve.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message has the value seen and the value allowed.
        RuntimeError: ``device`` needs a backend that this build lacks.
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
        verbose: bool = False,
    ) -> None:
        """See the class."""

        def build() -> None:
            if isinstance(redundant_to_original, torch.Tensor):
                self._set_device(redundant_to_original.device if device is None else device)
            topology.check(redundant_to_original)
            self._set_ranks(ep_size, ranks_per_node)
            self._set_layout(redundant_to_original, n_routed_experts, n_logical_routed_experts)
            self._set_solver(solver, verbose)
            self._compile(self._identity_order(), [1.0] * self.ep_size)

        self._set_group(group)
        exchange.together(self._exchange, build, lambda _: self._fingerprint)

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
            self.group_size = checked_group_size(placement.n_ranks, group_size)
            self.n_group = self.ep_size // self.group_size
            self.n_routed_experts = placement.n_physical
            self.n_logical_routed_experts = placement.n_logical
            self.r2o = self.o2r = None
            self.num_redundants = self.combined_redundant_experts = 0
            self._set_solver(solver, verbose)
            self._compile(placement, checked_speeds(rank_speed, self.ep_size))

        self._set_group(group)
        exchange.together(self._exchange, build, lambda _: self._fingerprint)
        return self

    # ---- construction

    def _set_group(self, group: dist.ProcessGroup | Exchange | None) -> None:
        self.ep_group = group
        self._exchange = exchange.exchange_for(group)
        self._lock = threading.Lock()
        self.deep_ep_initialized = False
        self._has_plan = False

    def _set_device(self, device: torch.device | str) -> None:
        check_backend("device", torch.device(device))
        self.device = torch.empty(0, device=device).device  # as tensors name it: "cpu" for "cpu:0"

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

    def _set_layout(self, r2o: torch.Tensor, n_physical: int, n_logical: int) -> None:
        self.r2o = r2o.to(self.device, torch.int32, copy=True).contiguous()
        self.o2r = self.r2o.argsort(dim=0).int()
        self.group_size, self.num_redundants = self.r2o.shape
        self.n_routed_experts = whole_number("n_routed_experts", n_physical, 1)
        self.n_logical_routed_experts = whole_number("n_logical_routed_experts", n_logical, 1)
        whole_number("group_size (rows of redundant_to_original)", self.group_size, 1, MAX_GROUP_SIZE)
        check_divides("ep_size", self.ep_size, "group_size", self.group_size)
        check_divides("n_routed_experts", n_physical, "ep_size", self.ep_size)
        check_divides("n_logical_routed_experts", n_logical, "ep_size", self.ep_size)
        self.n_group = self.ep_size // self.group_size
        redundant = self.n_local_routed_experts - self.n_local_logical_routed_experts
        classes = self.num_redundants
        if redundant < 0 or (redundant > 0 and classes == 0) or (classes > 0 and redundant % classes):
            raise ValueError(
                f"n_routed_experts is {n_physical}: {redundant} redundant slots on each of {self.ep_size} ranks, "
                f"allowed is a multiple of the {classes} columns of redundant_to_original"
            )
        if redundant > self.n_local_logical_routed_experts:
            raise ValueError(
                f"n_routed_experts is {n_physical}: {redundant} redundant slots on each rank copy as many own experts "
                f"of another, allowed are at most the {self.n_local_logical_routed_experts} own experts of a rank"
            )
        if classes > self.n_local_logical_routed_experts:
            raise ValueError(
                f"redundant_to_original has {classes} columns, allowed are at most the "
                f"{self.n_local_logical_routed_experts} own experts of a rank"
            )
        self.combined_redundant_experts = redundant // classes if classes else 0

    def _set_solver(self, solver: str, verbose: bool) -> None:
        self.solver = checked_solver(solver)
        self.verbose = bool(verbose)

    def _identity_order(self) -> Placement:
        return self._layout(torch.arange(self.n_logical_routed_experts, device="cpu"))

    def _layout(self, order: torch.Tensor) -> Placement:
        assert self.r2o is not None
        phy2log = topology.lay_out(self.r2o, order, self.n_group, self.combined_redundant_experts)
        return Placement(phy2log, self.ep_size, self.n_logical_routed_experts)

    def _compile(self, placement: Placement, speed: list[float]) -> None:
        """Build the backend for a placement; nothing of the planner changes before all of it is ready."""
        placement.check_groups(self.group_size)
        max_threads = max(1, torch.get_num_threads())
        backend = _C.CpuPlanner(
            placement.phy2log.tolist(), placement.n_logical, self.ep_size, self.group_size, speed, max_threads
        )
        self.placement = placement
        self.phy2log = placement.phy2log.clone()
        self._speed = speed
        self._backend = backend
        self._max_threads = max_threads
        self._fingerprint = exchange.fingerprint(
            placement.phy2log.tolist(), placement.n_logical, self.ep_size, self.group_size, speed, self.solver
        )
        with torch.inference_mode(False), torch.device("cpu"):  # whatever mode and device the caller builds models in
            self._make_buffers(placement.n_logical)
        self._has_plan = False

    def _make_buffers(self, n_logical: int) -> None:
        self._prefix = torch.zeros(self._max_threads, n_logical, dtype=torch.int32)
        # what this rank sends, with the words that say all is well, and what all ranks send
        self._row = torch.zeros(n_logical + exchange.WORDS, dtype=torch.int32)
        self._all_well = {}
        for method in (_RUN, _SOLVE_PROBS):
            words = torch.tensor([0, method, *self._fingerprint], dtype=torch.int32)
            self._all_well[method] = words.repeat(self._exchange.size, 1)
        self._row[n_logical:] = self._all_well[_RUN][0]
        alone = isinstance(self._exchange, exchange.Local)
        self._table = self._row.view(1, -1) if alone else self._row.repeat(self._exchange.size, 1)
        self._loads = torch.zeros(n_logical, dtype=torch.int64)
        self._plan = self._new_plan((), self.solver)
        self._plan_addresses = self._plan.addresses()

    def __getstate__(self) -> dict[str, Any]:
        """Copy or pickle all but what is made anew; a planner under a process group cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_backend")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the backend again; the last plan is not kept."""
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._compile(self.placement, self._speed)

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
    def workspace_bytes(self) -> int:
        """Bytes that the planner keeps, most of them untouched where few threads run.

        Without a group and for contiguous indices, `run` allocates nothing but its result.
        """
        tensors = [self._prefix, self._row, *self._all_well.values(), self._table, self._loads, *self._plan.tensors()]
        return self._backend.workspace_bytes + sum(t.numel() * t.element_size() for t in tensors)

    @property
    def last_plan(self) -> Plan | None:
        """The plan of the last `run` (a copy), or ``None`` before the first."""
        with self._lock:
            if not self._has_plan:
                return None
            return self._plan.copy()

    def init_from_deep_ep(self, buffer: Any) -> None:
        """Take group and node structure from a DeepEP buffer. Idempotent.

        Args:
            buffer: a ``deep_ep.Buffer``.

        Raises:
            RuntimeError: always in this version, which has no CUDA backend; the message lists what is missing.
        """
        missing = []
        try:
            import deep_ep  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
        except ImportError:
            missing.append("the package deep_ep (https://github.com/deepseek-ai/DeepEP)")
        if not torch.cuda.is_available():
            missing.append("a CUDA device and a torch with CUDA")
        if not _C.cuda:
            missing.append("an lplb with its CUDA backend (this version has the CPU backend only)")
        raise RuntimeError(
            f"init_from_deep_ep needs {', and '.join(missing)}. Without DeepEP give Planner a torch.distributed group."
        )

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
            self._need_topology("update_redundancy_mapping")
            if workload is None:
                self._compile(self._identity_order(), self._speed)
            else:
                self._compile(self._layout(self._packed_order(workload)), self._speed)

        with self._lock:
            before = dict(self.__dict__)
            try:
                exchange.together(self._exchange, renew, lambda _: self._fingerprint)
            except BaseException:
                self.__dict__.update(before)
                raise
        return self.phy2log.clone(), self._original_first().int(), self.placement.logcnt.clone()

    def _packed_order(self, workload: torch.Tensor) -> torch.Tensor:
        check_history(workload, self.n_logical_routed_experts, self.device)
        loads = workload.cpu()
        n_nodes = max(1, self.ep_size // self.ranks_per_node)
        order = rebalance_experts(loads[None], self.n_logical_routed_experts, self.n_group, n_nodes, self.ep_size)[
            0
        ].view(self.ep_size, -1)
        heaviest_first = loads[order].argsort(dim=1, descending=True, stable=True)
        return order.gather(1, heaviest_first).flatten()

    def _original_first(self) -> torch.Tensor:
        """int64 ``[n_logical, 2]``: the slot of the original and of its copy, or -1."""
        slot = torch.arange(self.n_routed_experts, device="cpu").view(self.ep_size, -1)
        n_own = self.n_local_logical_routed_experts
        own, copies = slot[:, :n_own].flatten(), slot[:, n_own:].flatten()
        log2phy = torch.full((self.n_logical_routed_experts, 2), -1, device="cpu")
        log2phy[self.phy2log[own].long(), 0] = own
        log2phy[self.phy2log[copies].long(), 1] = copies
        return log2phy

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
            TypeError, ValueError: an argument is not allowed, or an index is outside ``[-1, n_logical)``.
        """
        check_indices(idx, self.device)
        n_sms = whole_number("n_sms", n_sms, 1)
        flat = idx.contiguous()
        prefix = torch.empty(n_sms, self.n_logical_routed_experts, dtype=torch.int32, device="cpu")
        with self._lock:
            self._count(flat, _sm_chunks(flat.numel(), n_sms), prefix, min(n_sms, self._max_threads))
        return prefix[-1].clone(), prefix

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
        with self._lock:
            error: Exception | None = None
            try:
                self._need_topology("solve_probs")
                check_counter(avail_counter, self.device)
                flat = workload.reshape(-1) if isinstance(workload, torch.Tensor) else workload
                loads = checked_loads(flat, self.n_logical_routed_experts, self.device)
                self._row[: loads.numel()] = loads
            except Exception as problem:
                error = problem
            self._gather(error, _SOLVE_PROBS)
            self._solve_gathered(avail_counter)
            original = self._original_first()[:, 0]
            own_slots = (self.n_group, self.group_size, -1)
            own = self.phy2log.view(*own_slots)[:, :, : self.n_local_logical_routed_experts].long()
            stays, load = self._plan.quota[original][own].double(), self._loads[own].double()
        n_copied = self.num_redundants * self.combined_redundant_experts
        by_class = (self.n_group, self.group_size, self.combined_redundant_experts, self.num_redundants)
        kept = stays[:, :, :n_copied].reshape(by_class).sum(2)
        whole = load[:, :, :n_copied].reshape(by_class).sum(2)
        share = torch.where(whole > 0, kept / whole.clamp_min(1), torch.ones_like(whole))
        return share.float(), (load / load.max().clamp_min(1)).float()

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
        self._need_topology("weighted_select_target")
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
        own = self.phy2log.view(self.n_group, self.group_size, -1).long()
        n_copied = self.num_redundants * self.combined_redundant_experts
        stays = torch.ones(self.n_logical_routed_experts, dtype=torch.float64, device="cpu")
        stays[own[:, :, :n_copied]] = share.repeat(1, 1, self.combined_redundant_experts)
        kept = (stays * count).floor().int()
        original, copy = self._original_first().unbind(1)
        quota = torch.zeros(self.n_routed_experts, dtype=torch.int32, device="cpu")
        quota[original] = kept
        quota[copy[copy >= 0]] = (count - kept)[copy >= 0]
        physical = torch.empty(idx.shape, dtype=idx.dtype, device="cpu")
        with self._lock:
            self._assign(
                idx.contiguous(), _sm_chunks(idx.numel(), n_sms), prefix, count, 0, quota, physical, self._max_threads
            )
        return physical

    def solve(self, workload: torch.Tensor, *, solver: str | None = None) -> Plan:
        """Plan given loads. Local: no communication; what `run` does between exchange and assignment.

        Args:
            workload: whole tokens per logical expert over all ranks, ``[n_logical]`` or a batch ``[n, n_logical]``,
                at most 2**31 - 1 each; int32, int64, or floating with whole values.
            solver: ``"ipm"`` or ``"flow"``; by default the planner's.

        Returns:
            The plan, with a certificate for every group. A batch is shared out over torch's threads.

        Raises:
            TypeError, ValueError: an argument is not allowed.
        """
        chosen = self.solver if solver is None else checked_solver(solver)
        loads = checked_loads(workload, self.n_logical_routed_experts, self.device)
        plan = self._new_plan(loads.shape[:-1], chosen)
        n_loads = loads.numel() // self.n_logical_routed_experts
        with self._lock:
            self._solve(loads, n_loads, chosen, plan.addresses(), plan)
        return plan

    def run(self, idx: torch.Tensor, avail_counter: torch.Tensor | None, n_sms: int | None = None) -> torch.Tensor:
        """Map a batch's logical expert indices to physical ones; collective under a group.

        Args:
            idx: logical expert indices of this rank's tokens, int32 or int64, any shape and strides, in
                ``[-1, n_logical)``; -1 is masked: it stays -1 and counts nowhere. May be empty.
            avail_counter: one element, int32 or int64; raised by the number of groups solved. May be ``None``.
            n_sms: bounds the threads; by default torch's number of threads. The result does not depend on it.

        Returns:
            Physical expert indices, shape and dtype of ``idx``, contiguous. Over all ranks each physical expert gets
            exactly its quota in `last_plan`.

        Raises:
            TypeError, ValueError: an argument is not allowed, on any rank; the counter is then unchanged.
        """
        with self._lock:
            error: Exception | None = None
            try:
                check_indices(idx, self.device)
                check_counter(avail_counter, self.device)
                threads = self._threads(idx.numel(), n_sms)
                chunks = (idx.numel(), threads, max(1, -(-idx.numel() // threads)))
                physical = torch.empty(idx.shape, dtype=idx.dtype, device="cpu")
                source = idx if idx.is_contiguous() else physical.copy_(idx)
                self._count(source, chunks, self._prefix, threads)
                self._row[: self.n_logical_routed_experts] = self._prefix[threads - 1]
            except Exception as problem:
                error = problem
            self._gather(error, _RUN)
            self._solve_gathered(avail_counter)
            self._assign(
                source, chunks, self._prefix, self._table, self._exchange.rank, self._plan.quota, physical, threads
            )
            return physical

    def _gather(self, error: Exception | None, method: int) -> None:
        """Exchange this rank's row of the table, or its error."""
        table, n_logical = self._table, self.n_logical_routed_experts
        if isinstance(self._exchange, exchange.Local):
            if error is not None:
                raise error
        else:
            if error is not None:
                self._row[:n_logical] = 0
            self._row[n_logical] = exchange.error_word(error)
            self._row[n_logical + 1] = method
            self._exchange.gather(self._row, table)
            if not torch.equal(table[:, n_logical:], self._all_well[method]):
                exchange.raise_together(self._exchange, table[:, n_logical:].tolist(), error)
        most = _C.total(table.data_ptr(), table.shape[1], self._exchange.size, n_logical, self._loads.data_ptr())
        if most > MOST_TOKENS:
            raise ValueError(f"an expert has {most} tokens over all ranks, allowed are {MOST_TOKENS}")

    def _solve_gathered(self, avail_counter: torch.Tensor | None) -> None:
        """Plan the exchanged loads into the planner's own buffers."""
        solved = self._solve(self._loads, 1, self.solver, self._plan_addresses, self._plan)
        self._has_plan = True
        if avail_counter is not None:
            _C.add(avail_counter.data_ptr(), avail_counter.element_size(), solved)

    def _threads(self, n_tokens: int, n_sms: int | None) -> int:
        most = self._max_threads if n_sms is None else min(self._max_threads, whole_number("n_sms", n_sms, 1))
        return max(1, min(most, n_tokens // _TOKENS_PER_THREAD))

    # ---- the backend

    def _count(self, flat: torch.Tensor, chunks: tuple[int, int, int], prefix: torch.Tensor, threads: int) -> None:
        bad = self._backend.count(flat.data_ptr(), flat.element_size(), chunks, prefix.data_ptr(), threads)
        if bad >= 0:
            raise ValueError(
                f"idx has {int(flat.view(-1)[bad])} at flat position {bad}, allowed is -1 (masked) or 0 to "
                f"n_logical - 1 = {self.n_logical_routed_experts - 1}"
            )

    def _solve(self, loads: torch.Tensor, n_loads: int, solver: str, addresses: list[int], plan: Plan) -> int:
        if not self.verbose:
            threads = min(self._max_threads, n_loads * self.n_group) if n_loads > 1 else 1
            return self._backend.solve(loads.data_ptr(), n_loads, SOLVERS[solver], addresses, 0, threads)
        log = torch.zeros(self.n_group, _C.max_iterations + 1, len(_C.log_fields), dtype=torch.float64, device="cpu")
        address = log.data_ptr() if n_loads == 1 else 0
        solved = self._backend.solve(loads.data_ptr(), n_loads, SOLVERS[solver], addresses, address, 1)
        size = f"{self.ep_size} ranks in {self.n_group} groups of {self.group_size}, {self.placement}"
        print(report(size, int(loads.sum()), plan, log if loads.dim() == 1 else None))
        return solved

    def _assign(
        self,
        flat: torch.Tensor,
        chunks: tuple[int, int, int],
        prefix: torch.Tensor,
        counts: torch.Tensor,
        source: int,
        quota: torch.Tensor,
        physical: torch.Tensor,
        threads: int,
    ) -> None:
        self._backend.assign(
            flat.data_ptr(),
            flat.element_size(),
            chunks,
            prefix.data_ptr(),
            counts.data_ptr(),
            counts.stride(0),
            source,
            quota.data_ptr(),
            physical.data_ptr(),
            threads,
        )

    def _new_plan(self, batch: Sequence[int], solver: str) -> Plan:
        return empty_plan(batch, self.n_routed_experts, self.ep_size, self.n_group, solver)

    def _need_topology(self, name: str) -> None:
        if self.r2o is None:
            raise RuntimeError(
                f"{name} needs the redundancy topology (r2o) of LPLB; this planner was made by from_placement: "
                "use solve and run"
            )


def _sm_chunks(n: int, n_sms: int) -> tuple[int, int, int]:
    per_sm = -(-n // n_sms)
    return n, n_sms, max(1, -(-per_sm // _WARP_TOKENS)) * _WARP_TOKENS
