"""What LPLB offers besides `run`: one stage at a time, on a redundancy topology."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from lplb import cpu, cuda, devices, exchange, topology
from lplb.arguments import (
    check_counter,
    check_device,
    check_history,
    check_indices,
    checked_loads,
    checked_share,
    seen,
    whole_number,
)
from lplb.backend import Backend
from lplb.eplb import rebalance_experts
from lplb.exchange import Exchange
from lplb.layout import Layout
from lplb.placement import Placement
from lplb.plan import Plan, Rules, empty_plan, report

_WARP_TOKENS = 256  # chunks of count_workload are multiples of this, as LPLB has them


class Compiled(NamedTuple):
    """A placement made ready for a planner; see `lplb.Planner.compiled_for`."""

    placement: Placement
    """Where the experts are."""
    phy2log: torch.Tensor
    """As `LplbStages.phy2log`."""
    rules: Rules
    """What its plans are made by."""
    speed: list[float]
    """How fast each rank is."""
    backend: Backend
    """What serves its calls."""
    fingerprint: tuple[int, int]
    """Of placement and settings."""
    made_for: tuple[object, ...]
    """The planner as it was then."""


class LplbStages:
    """A planner's state, and the methods that LPLB has for single stages; `lplb.Planner` makes it and runs it."""

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
    _is_apart: bool  # whether counts travel in the background of the process group, as they do once a call has lagged
    n_routed_experts: int
    """Physical experts on all ranks."""
    n_logical_routed_experts: int
    """Logical experts."""
    ep_size: int
    """Ranks."""
    ranks_per_node: int
    """Ranks of a node."""
    device: torch.device
    """Where the planner works."""
    solver: str
    """``"ipm"`` or ``"flow"``."""
    min_tokens: int
    """A group with fewer tokens is not solved."""
    traffic_weight: float
    """What a token costs that crosses nodes."""
    verbose: bool
    """Whether every solve is printed."""
    _split: str | None
    _alone: bool
    _exchange: Exchange
    _number: int  # of the planner, among those of its process group
    _raised: Exception | None  # by this rank, of its own overlapped call
    _lock: threading.Lock
    _backend: Backend
    _rules: Rules
    _speed: list[float]
    _fingerprint: tuple[int, int]
    _handle: int = -1  # what `ops` finds the planner by; none yet
    _installed: int = 0  # placements so far

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

    def _identity_order(self) -> Placement:
        return self._in_order(torch.arange(self.n_logical_routed_experts, device="cpu"))

    def _in_order(self, order: torch.Tensor) -> Placement:
        assert self.r2o is not None
        phy2log = topology.lay_out(self.r2o.cpu(), order, self.n_group, self.combined_redundant_experts)
        return Placement(phy2log, self.ep_size, self.n_logical_routed_experts)

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
            self._exchanging(lambda: self._backend.gather(exchange.SOLVE_PROBS, error, blamed=error is not late))
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

    # ---- how a call is served

    def _compile(self, placement: Placement, speed: list[float]) -> None:
        """Build the backend for a placement; nothing of the planner changes before all of it is ready."""
        self._install(self._compiled(placement, speed))

    def _compiled(self, placement: Placement, speed: list[float]) -> Compiled:
        as_it_is = self._as_it_is()
        placement.check_groups(self.group_size)
        rules = Rules(
            phy2log=tuple(placement.phy2log.tolist()),
            n_ranks=self.ep_size,
            group_size=self.group_size,
            ranks_per_node=0 if self._alone else self.ranks_per_node,
            split=self.split,
        )
        settings = rules, speed, self.solver, self.min_tokens, self.traffic_weight
        name = exchange.group_name(self._exchange), self._number
        fingerprint = exchange.fingerprint(*settings, self.device.type, devices.arithmetic(self.device), *name)
        ranks = exchange.background(self._exchange) if self._is_apart else self._exchange
        backend: Backend
        with torch.inference_mode(False):  # whatever mode the caller builds models in
            if self.device.type == "cuda":
                before = self.__dict__.get("_backend")
                backend = cuda.Backend(*settings, ranks, fingerprint, self.device, before=before)
            else:
                backend = cpu.Backend(*settings, ranks, fingerprint, self.device)
            phy2log = placement.phy2log.to(self.device, copy=True)
        return Compiled(placement, phy2log, rules, speed, backend, fingerprint, as_it_is)

    def _as_it_is(self) -> tuple[object, ...]:
        return self._handle, self._installed, self._exchange, self._is_apart, self.ranks_per_node

    def _install(self, compiled: Compiled) -> None:
        self._installed += 1
        self.placement = compiled.placement
        self.phy2log = compiled.phy2log
        self._rules = compiled.rules
        self._speed = compiled.speed
        self._backend = compiled.backend
        self._fingerprint = compiled.fingerprint

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One caller at a time, behind what still overlaps."""
        with self._lock, self._backend.guard:
            self._backend.overlap.wait()
            yield

    def _exchanging(self, work: Callable[[], None]) -> None:
        """Do work that exchanges counts, behind what other planners of the group have in the background."""
        if not self._is_apart:
            work()
            return
        overlap = self._backend.overlap
        overlap.start(work)
        overlap.wait()
        error = overlap.take_error()
        if error is not None:
            raise error

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
