"""A plan for every batch in which weights may travel."""

import hashlib
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NoReturn, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from lplb import _C, cuda_transfers, devices, exchange
from lplb.arguments import check_device, refuse_without_memory, seen
from lplb.cost import Hardware
from lplb.exchange import Exchange
from lplb.models import ModelShape
from lplb.placement import Placement
from lplb.transfers.choice import quickest
from lplb.transfers.plan import Frame, ParetoFront, TransferPlan, points, version_of
from lplb.transfers.residents import residents_of
from lplb.transfers.settings import MOST_BATCH, Costs, checked_costs, checked_max_tokens, checked_settings

__all__ = ["TransferPlanner"]

_Table = tuple[int, int, int, int]
"""Counts as the core reads them: address, bytes of one, rows, and how many counts apart these begin."""

_BYTES = {torch.int32: 4, torch.int64: 8}
_OTHER_SETTINGS = (
    "another placement or other settings of its TransferPlanner than rank 0, or called something else; allowed is the "
    "same on every rank, in one order of calls"
)
_OTHER_BATCH = (
    "other counts, other held guests or another max_tokens than rank 0, or called something else than plan; allowed is "
    "the same on every rank: the counts of all ranks, as an all-gather leaves them"
)


class TransferPlanner:
    """Plans batches in which experts may travel: weights go to ranks that have room, for one batch.

    Under extreme imbalance no fixed placement balances: one expert may get most of the tokens. Then a copy of it, a
    *guest*, serves on further ranks, in one of their guest slots. Strategies:

    - ``"joint"``: what resident copies can balance they do, by the LP over them; what is left is removed with the
      fewest transfers that it finds, down to the ``tolerance``. With a ``model``, transfers that cost more than they
      gain are left out: of no transfer, and the fewest found for the tolerance and for caps further and further above
      it (by 1/64, 1/32, … of it), what is chosen has the least modelled time of the layer.
    - ``"llep"``: the least-loaded assignment of LLEP (Salesforce, arXiv, January 2026). Only here ``alpha``, ``lam``
      and ``compat`` say something; ``tolerance`` does not.
    - ``"auto"``, with a ``model``, on the CPU: the same with plain expert parallelism among the plans, from exact
      balance upwards; ``tolerance`` says nothing here. The model is that of `lplb.cost`, of a forward pass.

    The same arguments give the same plan, bit for bit, on every rank. Planning is local without a ``group``. Under a
    group the constructor and `plan` are collective: all ranks make and call planners in one order, and what one rank
    refuses, or has otherwise than rank 0, is raised on all of them.

    A planner may be used from several threads, which take turns; under a group each thread needs a group of its own.

    On CUDA `plan` goes to the current stream and does not wait for the device, and its outputs have fixed sizes: it can
    be captured. Wrong counts make a plan of no tokens there, and are raised by a later call; values of ``held`` are not
    checked. Under a group `plan` waits for the device, to compare the counts of ranks. ``"auto"``, a ``model`` for
    ``"joint"``, and `front` are for the CPU.

    Args:
        n_logical: number of experts, 1 to 65536.
        ep_size: number of ranks, 1 to 128.
        placement: where experts live: a `Placement`, replicas and all; or for each rank a sequence of its experts, of
            any length; by default one copy each, in blocks.
        strategy: ``"joint"``, ``"llep"`` or ``"auto"``.
        alpha: at least 1; with ``"llep"`` no rank is to have more than ``max(1, ⌊alpha · ⌊tokens / ranks⌋⌋)`` tokens,
            where there are as many tokens as ranks.
        m: fewest tokens that a guest serves, 0 or 1 for no minimum; by default 1024 with ``"llep"``, as published, and
            1 otherwise.
        lam: at least 1; with ``"llep"``, batches of less imbalance under plain expert parallelism take that.
        slots: guest slots of each rank, 1 to ``n_logical``; by default as many as there are experts.
        tolerance: 0 or more; the busiest rank may have ``(1 + tolerance)`` times the least that any plan could reach
            without regard to slots. 0 is exact balance.
        domain: weights travel within so many consecutive ranks (a node, an NVLink domain), a divisor of ``ep_size``;
            by default they may go anywhere.
        group: the ranks, a torch.distributed process group (or an `lplb.exchange.Exchange`); its size is ``ep_size``.
        device: where counts and plans are, the CPU by default.
        compat: with ``"llep"``, decide as the published code does: excess below ``m`` goes to a helper, and helpers are
            sorted once where the native rank has no room. Experts may then come twice, and caps may be broken.
        max_tokens: no rank may have more tokens, a matter of memory; a plan that cannot keep it is not `feasible`, and
            its ``excess`` says by how much. An attribute that may be set between batches.
        max_bytes: what the transfers of a batch may weigh together: the best balance found for the budget, `feasible`
            if it is what was asked for. 0, or at least the bytes of an expert. Not with ``"llep"``.
        expert_bytes: bytes of an expert's weights; by default the model's.
        model: the experts' shape, for the cost model: see ``strategy``.
        hardware: for the cost model, by default an H200.
        ranks_per_node: consecutive ranks that NVLink joins, for the cost model (there a divisor of ``ep_size``), and
            for routing, which keeps tokens within nodes; by default 8, or all ranks if fewer.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message has the value seen and the value allowed.
        RuntimeError: this build, torch or machine cannot run on ``device``; the message says what is missing.
    """

    def __init__(
        self,
        n_logical: SupportsIndex,
        ep_size: SupportsIndex,
        *,
        placement: Placement | Sequence[Sequence[int]] | None = None,
        strategy: str = "joint",
        alpha: float = 1.1,
        m: SupportsIndex | None = None,
        lam: float = 1.3,
        slots: SupportsIndex | None = None,
        tolerance: float = 0.0,
        domain: SupportsIndex | None = None,
        group: dist.ProcessGroup | Exchange | None = None,
        device: torch.device | str | None = None,
        compat: bool = False,
        max_tokens: SupportsIndex | None = None,
        max_bytes: SupportsIndex | None = None,
        expert_bytes: SupportsIndex | None = None,
        model: ModelShape | None = None,
        hardware: Hardware | None = None,
        ranks_per_node: SupportsIndex | None = None,
    ) -> None:
        """See the class."""
        self._exchange = exchange.exchange_for(group)
        self._alone = isinstance(self._exchange, exchange.Local)

        def build() -> None:
            self.residents = residents_of(placement, n_logical, ep_size)
            if not self._alone and self.n_ranks != self._exchange.size:
                raise ValueError(f"ep_size is {self.n_ranks}, allowed is the size of the group, {self._exchange.size}")
            self._settings = checked_settings(
                self.n_ranks,
                self.n_logical,
                self.residents.width,
                strategy=strategy,
                alpha=alpha,
                m=m,
                lam=lam,
                compat=compat,
                slots=slots,
                tolerance=tolerance,
                domain=domain,
                max_bytes=max_bytes,
                expert_bytes=expert_bytes,
                model=model,
                ranks_per_node=ranks_per_node,
            )
            self._costs = checked_costs(self._settings, self.n_ranks, model, hardware)
            self.max_tokens = max_tokens
            self._set_device("cpu" if device is None else device)
            self._compile()

        number = exchange.number_planner(self._exchange), exchange.group_name(self._exchange)

        def print_of(_: None) -> tuple[int, int]:
            settings = self.residents, self._settings, self._costs, self._max_tokens, self.device.type
            self._fingerprint = exchange.fingerprint("transfers", settings, number)
            return self._fingerprint

        exchange.together(self._exchange, build, print_of, _OTHER_SETTINGS)

    @property
    def is_collective(self) -> bool:
        """Whether the planner has a group, so that all its ranks plan together."""
        return not self._alone

    # ---- construction

    def _set_device(self, device: torch.device | str) -> None:
        devices.check_backend("device", torch.device(device))
        self.device = torch.empty(0, device=device).device
        if self.device.type == "cpu":
            return
        if self.strategy == "auto":
            raise ValueError(
                "strategy is 'auto', allowed on CUDA are 'joint' and 'llep': costs are reckoned on the CPU"
            )
        if self._costs is not None:
            raise ValueError(
                f"model is {self._costs.model.name!r}, allowed on CUDA with strategy 'joint' is None (for bytes, give "
                "expert_bytes): costs are reckoned on the CPU"
            )

    def _compile(self) -> None:
        self._lock = threading.Lock()  # the core has memory for one call at a time
        self._core, self._on_device = self._backends()
        settings = self._settings
        self._frame = Frame(self.n_logical, self.n_ranks, settings.slots, self._core.rows, settings.ranks_per_node)
        self._words = self._frame.ends[-1]
        self._offsets = self._frame.offsets
        self._shape = torch.Size((self.n_ranks, self.n_logical))

    def _backends(self) -> tuple[_C.CpuTransfers | cuda_transfers.Backend, cuda_transfers.Backend | None]:
        """What plans, and what is to find routes on a device."""
        residents, settings = self.residents, self._settings
        where = residents.ranks, residents.experts, self.n_logical, self.n_ranks, settings.slots, settings.domain
        if self.device.type == "cpu":
            return _C.CpuTransfers(*where), None
        backend = cuda_transfers.Backend(*where, settings.ranks_per_node, self.device)
        return backend, backend

    @property
    def _columns(self) -> npt.NDArray[np.int64]:
        """Where expert 0 of each rank is in `_most_held`, ``[ranks, 1]``."""
        return np.arange(self.n_ranks)[:, None] * (self.n_logical + 1) + 1

    @cached_property
    def _most_held(self) -> npt.NDArray[np.int64]:
        """How often a guest may be held, by rank and expert + 1: once where it is not resident, but in the domain."""
        n_ranks, domain = self.n_ranks, self._settings.domain
        most = np.zeros((n_ranks, self.n_logical + 1), dtype=np.int64)
        for rank, expert in zip(self.residents.ranks, self.residents.experts, strict=True):
            first = rank // domain * domain
            most[first : first + domain, expert + 1] = 1
        most[self.residents.ranks, np.array(self.residents.experts) + 1] = 0
        most[:, 0] = self._settings.slots  # empty slots
        return most.ravel()

    def __getstate__(self) -> dict[str, Any]:
        """Copy or pickle all but what is made anew; a planner under a process group cannot be copied."""
        anew = "_lock", "_core", "_on_device", "_most_held"
        return {name: value for name, value in self.__dict__.items() if name not in anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the core again."""
        devices.check_backend("device", state["device"])
        self.__dict__.update(state)
        self._compile()

    # ---- what a user reads

    @property
    def n_ranks(self) -> int:
        """Number of ranks."""
        return self.residents.n_ranks

    @property
    def n_logical(self) -> int:
        """Number of experts."""
        return self.residents.n_logical

    @property
    def strategy(self) -> str:
        """``"joint"``, ``"llep"`` or ``"auto"``."""
        return self._settings.strategy

    @property
    def m(self) -> int:
        """Fewest tokens that a guest serves; 0 or 1 for no minimum."""
        return self._settings.m

    @property
    def slots(self) -> int:
        """Guest slots of each rank."""
        return self._settings.slots

    @property
    def domain(self) -> int:
        """Consecutive ranks within which weights travel; all ranks where they may go anywhere."""
        return self._settings.domain

    @property
    def expert_bytes(self) -> int | None:
        """Bytes of an expert, if they are known."""
        return self._settings.expert_bytes

    @property
    def residents_per_rank(self) -> int:
        """Resident slots of the rank that has most of them: the first guest slot of every rank."""
        return self.residents.width

    @property
    def width(self) -> int:
        """Virtual slots of a rank: `residents_per_rank`, then `slots`. Slot ``rank * width + local`` is a rank's."""
        return self.residents.width + self._settings.slots

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that a rank can take, ``None`` for any number."""
        return self._max_tokens

    @max_tokens.setter
    def max_tokens(self, max_tokens: SupportsIndex | None) -> None:
        self._max_tokens = checked_max_tokens(max_tokens)
        self._cap = -1 if self._max_tokens is None else self._max_tokens

    # ---- planning

    def plan(self, counts: torch.Tensor, *, held: torch.Tensor | TransferPlan | None = None) -> TransferPlan:
        """Plan a batch. Collective under a group.

        Args:
            counts: tokens of each source rank for each expert, int32 or int64 ``[ranks, n_logical]``, any strides, at
                least 0 and below 2**52 together; all ranks give the counts of all ranks. Or ``[n_logical]``, of no rank
                in particular. A token counts once for each of its experts. Kept in the plan, not copied.
            held: what guest slots still hold from earlier batches, -1 for nothing: int32 ``[ranks, slots]``, such as
                the ``guests`` of the last plan; or that plan itself: one of this planner is only looked through for
                numbers that are no experts.
                These serve without a transfer, and give way where their slots are needed. Not with ``"llep"``.

        Returns:
            The plan. It is the best that was found if it is not `feasible`, which with few ``slots`` does not prove
            that there is none; nothing is raised for that.

        Raises:
            TypeError, ValueError: an argument is not allowed, or not the same on every rank.
        """
        if self._alone:
            return self._plan(counts, held)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("plan is captured under a group, where it waits for the device; allowed is no group")
        return exchange.together(
            self._exchange, lambda: self._plan(counts, held), lambda plan: self._print_of(plan, held), _OTHER_BATCH
        )

    def front(self, counts: torch.Tensor, *, held: torch.Tensor | TransferPlan | None = None) -> ParetoFront:
        """Return what balance the search finds for each number of transfers. Local, whatever the strategy.

        From no transfer up to the best balance that it finds within ``slots``; ``tolerance``, ``max_tokens`` and
        ``max_bytes`` do not enter. No point but the first is proven to be the best: that is NP-hard. The search for a
        number of transfers ends within 2**-12 of the least that it could find.

        Args:
            counts: as for `plan`.
            held: as for `plan`.

        Raises:
            TypeError, ValueError: as `plan`.
            RuntimeError: the planner is on CUDA; one on the CPU has the same front.
        """
        rows, table = self._checked_counts(counts)
        kept = None if held is None else self._checked_held(held)
        pairs = self._front(rows, table, 0 if kept is None else kept.data_ptr())
        return points(pairs, int(rows.sum(dtype=torch.int64)), self.n_ranks, self.expert_bytes)

    def _plan(self, counts: torch.Tensor, held: torch.Tensor | TransferPlan | None) -> TransferPlan:
        settings = self._settings
        rows, table = self._checked_counts(counts)
        if settings.strategy == "llep":
            if held is not None:
                raise ValueError(f"held is {seen(held)}, allowed with strategy 'llep' is None: LLA keeps no copies")
            return self._llep(rows, table)
        kept = None if held is None else self._checked_held(held)
        where = 0 if kept is None else kept.data_ptr()
        if self._costs is None:
            return self._joint(rows, table, where, settings.tolerance, settings.max_transfers, "joint")
        return self._by_cost(self._costs, rows, table, where)

    def _by_cost(self, costs: Costs, counts: torch.Tensor, table: _Table, held: int) -> TransferPlan:
        """The plan with the least modelled time."""
        settings = self._settings

        def solve(tolerance: float, max_transfers: int, name: str) -> TransferPlan:
            return self._joint(counts, table, held, tolerance, max_transfers, name)

        return quickest(
            costs,
            solve(settings.tolerance, 0, "replicas"),
            lambda tolerance: solve(tolerance, settings.max_transfers, "joint"),
            settings.tolerance,
            self._max_tokens,
            plain=settings.strategy == "auto",
        )

    def _joint(
        self, counts: torch.Tensor, table: _Table, held: int, tolerance: float, max_transfers: int, name: str
    ) -> TransferPlan:
        memory = torch.empty(self._words, dtype=torch.int64, device=self.device)
        at = self._addresses(memory.data_ptr())
        with self._lock:
            wrong = self._core.joint(table, tolerance, self._cap, max_transfers, self._settings.m, held, at)
        if wrong:
            _refuse(counts, wrong)
        return self._planned(memory, counts, name)

    def _llep(self, counts: torch.Tensor, table: _Table) -> TransferPlan:
        settings = self._settings
        memory = torch.empty(self._words, dtype=torch.int64, device=self.device)
        at = self._addresses(memory.data_ptr())
        with self._lock:
            wrong = self._core.llep(table, settings.alpha, settings.m, settings.lam, settings.compat, self._cap, at)
        if wrong:
            _refuse(counts, wrong)
        return self._planned(memory, counts, "llep")

    def _front(self, counts: torch.Tensor, table: _Table, held: int) -> list[tuple[int, int]]:
        """Transfers and largest loads."""
        capacity = self._frame.rows + 1
        most, transfers = np.empty(capacity, dtype=np.int64), np.empty(capacity, dtype=np.int32)
        arrays = most.ctypes.data, transfers.ctypes.data, capacity
        if not isinstance(self._core, _C.CpuTransfers):
            raise RuntimeError(f"front is asked of a planner on {str(self.device)!r}, allowed is one on the CPU")
        with self._lock:
            wrong, found = self._core.front(table, -1, self._settings.m, held, *arrays)
        if wrong:
            _refuse(counts, wrong)
        return list(zip(transfers[:found].tolist(), most[:found].tolist(), strict=True))

    def _addresses(self, at: int) -> tuple[int, int, int, int, int, int]:
        quota, load, transfers, guests, numbers, bound = self._offsets
        return at + quota, at + load, at + transfers, at + guests, at + numbers, at + bound

    def _planned(self, memory: torch.Tensor, counts: torch.Tensor, strategy: str) -> TransferPlan:
        plan = object.__new__(TransferPlan)  # to construct a frozen dataclass takes a microsecond, a fifth of the call
        plan.__dict__.update(
            memory=memory,
            frame=self._frame,
            counts=counts,
            residents=self.residents,
            strategy=strategy,
            expert_bytes=self._settings.expert_bytes,
            seconds=None,
            version=version_of(counts),
            on_device=self._on_device,
        )
        return plan

    # ---- checks

    def _checked_counts(self, counts: torch.Tensor) -> tuple[torch.Tensor, _Table]:
        """Counts whose rows are contiguous, and where they are; the core checks their values."""
        if type(counts) is not torch.Tensor:
            if not isinstance(counts, torch.Tensor):
                raise TypeError(f"counts is {seen(counts)}, allowed is a torch.Tensor")
            refuse_without_memory("counts", counts)
        size = _BYTES.get(counts.dtype)
        if size is None:
            raise TypeError(f"counts has dtype {counts.dtype}, allowed is torch.int32 or torch.int64")
        shape = counts.shape
        if shape != self._shape and shape != self._shape[1:]:
            raise ValueError(
                f"counts has shape {list(shape)}, allowed is [ranks, n_logical] = {list(self._shape)}, or "
                f"[n_logical] = [{self.n_logical}]"
            )
        if counts.layout != torch.strided:
            raise TypeError(f"counts has layout {counts.layout}, allowed is torch.strided")
        check_device("counts", counts, self.device)
        stride = counts.stride()
        if stride[-1] != 1:
            counts = counts.contiguous()
            stride = counts.stride()
        if counts.is_neg():  # memory is read as it is
            counts = counts.resolve_neg()
            stride = counts.stride()
        n_rows = 1 if len(stride) == 1 else shape[0]
        return counts, (counts.data_ptr(), size, n_rows, stride[0] if n_rows > 1 else 0)

    def _checked_held(self, given: torch.Tensor | TransferPlan) -> torch.Tensor:
        """What guest slots hold, contiguous: no expert where it cannot be, and none twice on a rank."""
        held = given
        if isinstance(held, TransferPlan):
            as_made = held.frame is self._frame and version_of(held.memory) == 0
            held = held.guests
            if as_made:
                self._check_range(held)  # NumPy's writes are not counted, and the core indexes with these
                return held
        if not isinstance(held, torch.Tensor) or held.dtype != torch.int32 or held.layout != torch.strided:
            raise TypeError(f"held is {seen(held)}, allowed is a torch.int32 tensor, an lplb.TransferPlan or None")
        refuse_without_memory("held", held)
        shape = self.n_ranks, self.slots
        if held.shape != shape:
            raise ValueError(f"held has shape {list(held.shape)}, allowed is [ranks, slots] = {list(shape)}")
        check_device("held", held, self.device)
        held = held.resolve_neg().contiguous()
        if self._on_device is not None:
            return held
        experts = self._check_range(held)
        times = np.bincount((experts + self._columns).ravel(), minlength=len(self._most_held))
        wrong = times > self._most_held
        if wrong.any():
            self._refuse_held(*divmod(int(wrong.argmax()), self.n_logical + 1))
        return held

    def _check_range(self, held: torch.Tensor) -> npt.NDArray[np.int32]:
        """The same as an array, of numbers that are experts or -1; on CUDA without a look at them."""
        if self._on_device is not None:
            return np.empty(0, dtype=np.int32)
        experts: npt.NDArray[np.int32] = held.numpy()
        if (experts + 1).view(np.uint32).max() > self.n_logical:  # below -1 is above all
            rank, slot = np.argwhere((experts < -1) | (experts >= self.n_logical))[0]
            raise ValueError(f"held[{rank}, {slot}] is {experts[rank, slot]}, allowed is -1 to {self.n_logical - 1}")
        return experts

    def _refuse_held(self, rank: int, column: int) -> NoReturn:
        expert = column - 1
        if (expert, rank) in self.residents.slot_of:
            raise ValueError(f"held has expert {expert} on rank {rank}, where it is resident, allowed are others")
        if self._most_held[rank * (self.n_logical + 1) + column] == 0:
            raise ValueError(
                f"held has expert {expert} on rank {rank}, allowed are experts that live in its domain of "
                f"{self.domain} ranks"
            )
        raise ValueError(f"held has expert {expert} more than once on rank {rank}, allowed is once")

    def _print_of(self, plan: TransferPlan, held: torch.Tensor | TransferPlan | None) -> tuple[int, int]:
        """Fingerprint of what a plan is made from."""
        digest = hashlib.blake2b(digest_size=16)
        guests = held.guests if isinstance(held, TransferPlan) else held
        for given in (plan.counts, guests):
            if given is not None:
                digest.update(given.cpu().to(torch.int64).contiguous().numpy().tobytes())
        return exchange.fingerprint(digest.hexdigest(), self._max_tokens, held is None, self._fingerprint)


def _refuse(counts: torch.Tensor, wrong: int) -> NoReturn:
    """Say what the core found in the counts."""
    if wrong < 0:
        total = sum(counts.flatten().tolist())
        raise ValueError(f"counts add up to {total}, allowed are at most {MOST_BATCH} tokens")
    at = np.unravel_index(wrong - 1, counts.shape)
    index = ", ".join(str(int(i)) for i in at)
    raise ValueError(f"counts[{index}] is {int(counts[at])}, allowed is 0 or more")
