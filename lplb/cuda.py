"""The stages on a CUDA device: memory and streams around `lplb._C.CudaPlanner`.

Memory is torch's. Work goes to the caller's current stream; nothing here waits for the device. What goes wrong on the
device is written to pinned host memory, and raised by whatever call finds it there.
"""

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import ClassVar

import torch

from lplb import _C, devices, exchange
from lplb.backend import Counted
from lplb.exchange import EarlierFault, Exchange
from lplb.overlap import OnStream, Overlap
from lplb.plan import SOLVERS, SPLITS, Plan, Rules, empty_plan

_FAULTS_PER_PAGE = 128


class FaultWords:
    """Four int64 in pinned host memory, into which kernels write what they find wrong.

    The memory is never given back: a kernel may be on its way, or in a graph, when its planner goes.
    """

    _lock = threading.Lock()
    _pages: ClassVar[list[torch.Tensor]] = []
    _free: ClassVar[list[torch.Tensor]] = []  # rows of the pages

    def __init__(self) -> None:
        """Take four zeros of a page."""
        with FaultWords._lock:
            if not FaultWords._free:
                page = torch.zeros(_FAULTS_PER_PAGE, 4, dtype=torch.int64, device="cpu", pin_memory=True)
                FaultWords._free.extend(page)
                FaultWords._pages.append(page)
            row = FaultWords._free.pop()
        self.address = row.data_ptr()
        self._words: memoryview[int] = memoryview(row.numpy())  # type: ignore[arg-type, unused-ignore]
        self._raised_outside = 0

    @property
    def indices_outside(self) -> int:
        """Indices outside ``[-1, n_logical)``, as far as the device has got."""
        return int(self._words[0])

    def _take(self, word: int) -> int:
        """What a kernel has written, which is then forgotten."""
        value = self._words[word]
        if value:
            self._words[word] = 0
        return value

    def _check_outside(self, n_logical: int, strict: bool) -> None:
        outside = self._words[0]
        if strict and outside > self._raised_outside:
            new, self._raised_outside = outside - self._raised_outside, outside
            raise EarlierFault(
                f"idx had {new} indices in earlier calls that are not allowed and were mapped to -1; allowed is -1 "
                f"(masked) or 0 to n_logical - 1 = {n_logical - 1}"
            )


class Faults(FaultWords):
    """What kernels report of wrong input to a planner."""

    def check(self, n_logical: int, strict: bool) -> None:
        """Raise what the device reported since the last time; indices outside only where ``strict``."""
        if differing := self._take(1):
            raise EarlierFault(
                f"rank {differing - 1} refused its input, has another placement or other settings than this rank, or "
                "called another method, or another planner of the group, in an earlier call, whose results are all -1. "
                f"Rank {differing - 1} says what it was where it raised; allowed is the same placement, settings and "
                "method on every rank, and where several threads call planners of one group, one order of calls"
            )
        if self._take(2):
            raise EarlierFault(
                f"an expert had more than {2**31 - 1} tokens over all ranks in an earlier call, allowed are {2**31 - 1}"
            )
        self._check_outside(n_logical, strict)


class StreamOrder:
    """One caller's memory on several streams, one call after another.

    Args:
        device: a CUDA device, whose current stream the memory was made on.
    """

    def __init__(self, device: torch.device) -> None:
        """See the class."""
        self._device = device
        self._captured: torch.cuda.Stream | None = None  # the last stream that a call was captured on
        self._last = torch.cuda.current_stream(device)
        self._seen = {self._last.cuda_stream}

    def stream(self, buffers: Callable[[], Iterable[torch.Tensor]]) -> int:
        """The caller's current stream, made to wait for the last one if that is another.

        During capture it waits for another stream of the capture only: a graph does not depend on what is outside.
        ``buffers`` are what the calls share; they are freed only when every stream is done with them.
        """
        stream = torch.cuda.current_stream(self._device)
        handle = stream.cuda_stream
        if torch.cuda.is_current_stream_capturing():
            before, self._captured = self._captured, stream
            if before is not None and before.cuda_stream != handle and _is_capturing(before):
                stream.wait_stream(before)
            return handle
        if handle != self._last.cuda_stream:
            if not _is_capturing(self._last):
                stream.wait_stream(self._last)
            self._last = stream
            if handle not in self._seen:
                self._seen.add(handle)
                for tensor in buffers():
                    tensor.record_stream(stream)
        return handle


class Backend:
    """An `lplb.backend.Backend` for a CUDA device.

    Args:
        rules: where the experts are, which ranks balance among themselves, and how sources share out quotas.
        speed: how fast each rank is.
        solver: of the plans that `solve_gathered` makes.
        min_tokens: below it a group is not solved.
        traffic_weight: 0; others are refused.
        ranks: how ranks learn each other's counts.
        fingerprint: of placement and settings, the same on every rank.
        device: a CUDA device that `devices.check_backend` does not refuse.
        before: the planner's backend of the placement before; its faults go on being reported.
    """

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
        before: "Backend | None",
    ) -> None:
        """See the class."""
        if traffic_weight > 0:
            raise ValueError(
                f"traffic_weight is {traffic_weight}, allowed on CUDA is 0: the kernels have no costs yet; the CPU has"
            )
        self._device = device
        self._n_logical = n_logical = max(rules.phy2log) + 1
        self._strict = strict()
        properties = torch.cuda.get_device_properties(device)
        self._sms = properties.multi_processor_count
        self._planner = _C.CudaPlanner(
            rules.phy2log,
            n_logical,
            rules.n_ranks,
            rules.group_size,
            speed,
            devices.linalg(),
            devices.shared_bytes(device),
            self._sms,
        )
        self.name = f"CUDA ({properties.name}, {self._planner.linalg})"
        self._rules = rules
        self._min_tokens = min_tokens
        self._ranks = ranks
        self._alone = isinstance(ranks, exchange.Local)
        self._solver = solver
        self._fingerprint = fingerprint
        with self.guard:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a planner is made, and mapped anew, outside of CUDA graph capture; this is inside")
            self._make_buffers(before)
        self.overlap: Overlap = OnStream(device)

    def _make_buffers(self, before: "Backend | None") -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        n_logical, size = self._n_logical, self._ranks.size
        self._tables = torch.frombuffer(bytearray(self._planner.tables), dtype=torch.uint8).to(self._device)
        self._scratch = zeros(self._planner.scratch_bytes, dtype=torch.uint8)
        self._prefix = zeros(self._sms, n_logical)
        # What this rank sends, with the words that say all is well: a row per method, as graphs may keep on sending it.
        self._rows, self._words = {}, {}
        for method in exchange.METHODS:
            words = [method, *self._fingerprint]
            row = torch.tensor([0] * n_logical + [0, *words], dtype=torch.int32, device=self._device)
            self._rows[method], self._words[method] = row, words
        self._table = zeros(size, n_logical + exchange.WORDS)
        self._own_counts = zeros(n_logical)  # of count and assign by themselves
        self.loads = zeros(n_logical, dtype=torch.int64)
        self._nobody = zeros(n_logical)  # tokens of sources that are not known
        counts = None if self._alone else self._table[:, :n_logical]
        self.plan = replace(empty_plan((), self._rules, self._solver, self._device), counts=counts)
        self._plan_addresses = self.plan.addresses()
        self._planned = False
        self._faults: Faults = Faults() if before is None else before._faults
        self._planner.bind(self._tables.data_ptr(), self._scratch.data_ptr(), self._faults.address)
        self._order = StreamOrder(self._device)

    @property
    def guard(self) -> AbstractContextManager[object]:
        """Makes the planner's device current; a new one each time, for torch's changes when it is left."""
        return torch.cuda.device(self._device)

    def _buffers(self) -> list[torch.Tensor]:
        own = [self._tables, self._scratch, self._prefix, *self._rows.values(), self._table]
        return [*own, self._own_counts, self._nobody, self.loads, *self.plan.tensors()]

    @property
    def workspace_bytes(self) -> int:
        """Bytes kept on the device."""
        return sum(t.numel() * t.element_size() for t in self._buffers())

    @property
    def indices_outside(self) -> int:
        """Indices outside ``[-1, n_logical)`` that were mapped to -1, as far as the device has got."""
        return self._faults.indices_outside

    def last_plan(self) -> Plan | None:
        """A copy of the last plan, if there is one, made in the order of the current stream."""
        self.check_earlier()
        return self.plan_in_use() if self._planned else None

    def plan_in_use(self) -> Plan:
        """A copy of the last plan, made in the order of the current stream; before the first, of one without tokens."""
        self._stream()
        return self.plan.copy()

    def use(self, ranks: Exchange) -> None:
        """Exchange counts through another transport between the same ranks from now on."""
        self._ranks = ranks

    def check_earlier(self) -> None:
        """Raise what the device has reported of earlier calls.

        Raises:
            EarlierFault: once for each report.
        """
        self._faults.check(self._n_logical, self._strict)

    def wait(self) -> None:
        """Wait for the current stream, and raise what the device has reported."""
        torch.cuda.current_stream(self._device).synchronize()
        self.check_earlier()

    def _stream(self) -> int:
        return self._order.stream(self._buffers)

    # ---- the stages, one after the other

    def run(self, idx: torch.Tensor, counter: torch.Tensor | None, n_sms: int | None) -> torch.Tensor:
        """All stages of a planner without a group, in one call."""
        source = idx.contiguous()
        physical = torch.empty(idx.shape, dtype=idx.dtype, device=self._device)
        self._planner.run(
            source.data_ptr(),
            source.element_size(),
            source.numel(),
            self._blocks_at_most(n_sms),
            self._rows[exchange.RUN].data_ptr(),
            self._min_tokens,
            self.loads.data_ptr(),
            SOLVERS[self._solver],
            self._plan_addresses,
            *_address_and_bytes(counter),
            physical.data_ptr(),
            self._stream(),
        )
        self._planned = True
        return physical

    def count_own(self, idx: torch.Tensor, n_sms: int | None, method: int) -> Counted:
        """Count this rank's batch into the row that `gather` with the same method sends."""
        return self._count(idx, n_sms, self._rows[method])

    def put_own(self, counts: torch.Tensor) -> None:
        """Take given counts for this rank's row."""
        self._stream()
        self._rows[exchange.SOLVE_PROBS][: self._n_logical] = counts

    def gather(self, method: int, error: Exception | None, *, blamed: bool = True) -> None:
        """Exchange this rank's row or its error for the table of all ranks. Collective.

        A rank with an error raises it after the collective. The others find it in the table, on the device: their
        results are -1, and they raise at the next call after that. A rank that raises for such an earlier call takes
        part in this one without tokens; nothing is wrong with it for the others.
        """
        self._gathered = method
        if error is not None and isinstance(self._ranks, (exchange.Local, exchange.Known)):  # nobody else to tell
            raise error
        self._stream()
        row = self._rows[method]
        if error is not None:
            row = row.clone()
            row[: self._n_logical] = 0
            blamed = blamed and not isinstance(error, EarlierFault)
            row[self._n_logical] = exchange.error_word(error) if blamed else 0
        exchange.gather(self._ranks, method, row, self._table)
        if error is not None:
            raise error

    def solve_gathered(self, counter: torch.Tensor | None, log: torch.Tensor | None) -> None:
        """Plan the sum of the gathered table into `plan`, and raise the counter by the groups solved."""
        self._planner.solve_table(
            self._sources(),
            [] if self._alone else self._words[self._gathered],
            self._min_tokens,
            self.loads.data_ptr(),
            SOLVERS[self._solver],
            self._plan_addresses,
            *_address_and_bytes(counter),
            0 if log is None else log.data_ptr(),
            self._stream(),
        )
        self._planned = True

    def assign_gathered(self, counted: Counted) -> torch.Tensor:
        """Map the counted batch by the last plan: of the gathered loads, or of an earlier batch's."""
        return self._assign(counted, self._sources(), self._plan_addresses)

    # ---- each by itself

    def count(self, idx: torch.Tensor, n_chunks: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts of a batch, and of its chunks up to and with each."""
        source, stream = idx.contiguous(), self._stream()
        n, bytes_each = source.numel(), source.element_size()
        prefix = torch.empty(n_chunks, self._n_logical, dtype=torch.int32, device=self._device)
        for first in range(0, n_chunks, self._sms):  # one launch has a block per multiprocessor at most
            blocks = min(self._sms, n_chunks - first)
            begin = min(first * length, n)
            part = prefix[first : first + blocks]
            self._planner.count(
                source.data_ptr() + begin * bytes_each,
                bytes_each,
                min(n - begin, blocks * length),
                blocks,
                length,
                part.data_ptr(),
                self._own_counts.data_ptr(),
                stream,
            )
            if first:
                part += prefix[first - 1]
        return prefix[-1].clone(), prefix

    def solve(self, loads: torch.Tensor, plan: Plan, log: torch.Tensor | None) -> None:
        """Plan one load or a batch of them into an empty plan, in one launch."""
        n_loads = loads.numel() // self._n_logical
        log_address = 0 if log is None else log.data_ptr()
        if n_loads:
            self._planner.solve(
                loads.data_ptr(), n_loads, SOLVERS[plan.solver], plan.addresses(), log_address, self._stream()
            )

    def assign(self, idx: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Map a batch by a plan. Where it has no counts its quotas are taken for this rank's alone."""
        counted, counts = self._count(idx, None, self._own_counts), plan.counts
        sources = self._nobody.data_ptr(), 0, 1, 0
        if counts is not None:
            sources = counts.data_ptr(), counts.stride(0), len(counts), plan.rules.ranks_per_node
        return self._assign(counted, sources, plan.addresses())

    def new_log(self) -> torch.Tensor:
        """Memory for the iterations of one load's solve, whose report waits for the device."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "verbose is True, which waits for the device to print; allowed in CUDA graph capture is verbose=False"
            )
        shape = len(self.plan.max_load), _C.max_iterations + 1, len(_C.log_fields)
        return torch.zeros(shape, dtype=torch.float64, device=self._device)

    # ---- addresses

    def _blocks_at_most(self, n_sms: int | None) -> int:
        return self._sms if n_sms is None else min(n_sms, self._sms)

    def _count(self, idx: torch.Tensor, n_sms: int | None, row: torch.Tensor) -> Counted:
        source = idx.contiguous()
        physical = torch.empty(idx.shape, dtype=idx.dtype, device=self._device)
        n = source.numel()
        blocks, length = self._planner.blocks(n, self._blocks_at_most(n_sms))
        self._planner.count(
            source.data_ptr(),
            source.element_size(),
            n,
            blocks,
            length,
            self._prefix.data_ptr(),
            row.data_ptr(),
            self._stream(),
        )
        return Counted(source, physical, blocks, length)

    def _sources(self) -> tuple[int, int, int, int]:
        return self._table.data_ptr(), self._table.stride(0), self._ranks.size, self._rules.ranks_per_node

    def _assign(self, counted: Counted, sources: tuple[int, int, int, int], plan: list[int]) -> torch.Tensor:
        source, physical, blocks, length = counted
        self._planner.assign(
            source.data_ptr(),
            source.element_size(),
            source.numel(),
            blocks,
            length,
            self._prefix.data_ptr(),
            sources,
            self._ranks.rank if sources[3] else 0,
            SPLITS[self._rules.split],
            plan,
            physical.data_ptr(),
            self._stream(),
        )
        return physical


def _is_capturing(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


def _address_and_bytes(counter: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if counter is None else (counter.data_ptr(), counter.element_size())


def strict() -> bool:
    """Whether indices outside are errors: LPLB_CHECK in the environment."""
    value = os.environ.get("LPLB_CHECK") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"LPLB_CHECK is {value!r}, allowed is 0 or 1")
    return value == "1"
