"""How every rank learns every rank's counts, and that no rank raises alone.

An exchange gathers rows: each rank gives an int32 row and gets the table of all ranks' rows. The last columns carry an
error word and a fingerprint, so that a refusal on one rank is raised on all of them.

All that lplb sends over one process group travels in rows of one width, one gather at a time, with the words at their
end. So whatever meets in a gather, of two planners or of two methods, is found by its words on every rank.
"""

import contextlib
import hashlib
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.distributed as dist

from lplb.overlap import Worker

__all__ = ["Distributed", "Exchange", "Known", "Local", "LostRankError", "exchange_for"]

WORDS = 4
"""Columns behind the counts of a row: error word, which method was called, and a fingerprint in two."""

RUN, SOLVE_PROBS, RUN_LAGGED = METHODS = 0, 1, 2
"""Collective methods of a planner by number, so that ranks that call different ones find out."""

LAYER = 3
"""The exchanges of counts and of split sizes in `lplb.nn`."""

AGREE, MESSAGE, REBALANCE = -1, -2, -3
"""What is sent besides: settings, what a rank that refused its input has to say, and what `lplb.dynamic` is up to."""

_NAMES = {
    RUN: "run",
    RUN_LAGGED: "run with lag=1",
    SOLVE_PROBS: "solve_probs",
    LAYER: "counting a layer's choices",
    AGREE: "an agreement (constructors, update_redundancy_mapping, init_from_deep_ep, lplb.weights, lplb.dynamic)",
    MESSAGE: "telling the other ranks what one refused",
    REBALANCE: "rebalancing",
}

_LEAST_COLUMNS = 64
"""Rows of a process group are this wide at least, so that a message needs few of them."""

KINDS: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError)
"""What a rank can refuse with, by number; error word 0 is none, 1 the first."""
_MESSAGE_BYTES = 1024

T = TypeVar("T")


class LostRankError(RuntimeError):
    """An all-gather failed: a rank died, or did not come in time."""


class EarlierFault(ValueError):
    """What was wrong with an earlier call, known only since then: CUDA devices report it when they get there."""


class Exchange(Protocol):
    """The ranks of one expert-parallel group as the planner sees them."""

    rank: int
    """This rank."""
    size: int
    """How many ranks."""

    def gather(self, row: torch.Tensor, table: torch.Tensor) -> None:
        """Fill int32 ``table [size, columns]`` with every rank's int32 ``row [columns]``. Collective.

        The last `WORDS` columns of a row are not counts. On one rank, ``table`` may be a view of ``row``. With
        ``lag=1`` it is called from another thread, one call at a time.
        """


class Local:
    """One rank: the given tokens are the whole batch."""

    rank = 0
    size = 1

    def gather(self, row: torch.Tensor, table: torch.Tensor) -> None:
        """The own row is the table."""
        table[0] = row


class _Line:
    """What all exchanges of one process group have in common in this process."""

    _of: ClassVar["weakref.WeakKeyDictionary[dist.ProcessGroup, _Line]"] = weakref.WeakKeyDictionary()
    _making = threading.Lock()

    def __init__(self) -> None:
        self.turn = threading.RLock()  # gloo mixes up gathers that two threads start at once
        self.planners = 0
        self.worker = Worker()  # for all planners of the group: their overlapped calls come in one order on all ranks
        self.background: Distributed | None = None
        self.free: dict[str, dict[int, dist.ProcessGroup]] = {}  # by backend and number
        self.made = 0
        self._width = [_LEAST_COLUMNS]

    @property
    def columns(self) -> int:
        """Width of rows; wider ones travel as they are."""
        return self._width[0]

    @columns.setter
    def columns(self, columns: int) -> None:
        self._width[0] = columns

    def stand_behind(self, other: "_Line") -> None:
        """Be the background of another group: with its thread, and rows of its width from now on."""
        self.worker, self._width = other.worker, other._width

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "_Line":
        """The line of a process group."""
        with cls._making:
            return cls._of.setdefault(group, cls())


class Distributed:
    """The ranks of a torch.distributed process group; an all-gather with whatever backend the group has.

    Tensors of the CPU travel over the GPU where the group's backend carries those only, as NCCL does. Rows that are
    narrower than those of other planners of the group are padded in front: gloo ends a process that receives rows of
    another width, and NCCL overwrites memory.

    Args:
        group: an initialised process group that this process belongs to.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        """See the class."""
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the given group, allowed is a group that it belongs to")

        self.line = _Line.of(group)
        carried = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
        self._carries_cpu = "cpu:" in carried
        # renamed in torch 2.13
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def gather(self, row: torch.Tensor, table: torch.Tensor) -> None:
        """All-gather of the rows. Raises what torch.distributed raises when a rank is lost or times out."""
        padding = self.line.columns - len(row)
        if padding <= 0:
            self._gather(row, table)
            return
        wide = row.new_zeros(self.line.columns)
        wide[padding:] = row
        wide_table = row.new_empty(self.size, self.line.columns)
        self._gather(wide, wide_table)
        table.copy_(wide_table[:, padding:])

    def _gather(self, row: torch.Tensor, table: torch.Tensor) -> None:
        if row.device.type == "cpu" and not self._carries_cpu:
            carried = torch.empty_like(table, device="cuda")
            self._all_gather(carried, row.view(1, -1).cuda(), group=self.group)
            table.copy_(carried)
            return
        self._all_gather(table, row.view(1, -1), group=self.group)  # gloo wants the dimensions of the table


_making_groups = threading.Lock()  # new_group is not for two threads at once


def background(ranks: "Exchange") -> "Exchange":
    """Return an exchange between the same ranks that keeps no order with other traffic of their group.

    A process group carries one collective after the other, in the same order on all ranks; what goes on in the
    background needs another group. All planners of a group share one, and the thread of its line. The first call is
    collective; where several threads make the first calls of several groups, names may cross, which the fingerprints
    then tell (`group_name`).
    """
    if not isinstance(ranks, Distributed):
        return ranks
    with _making_groups:
        if ranks.line.background is None:
            ranks.line.background = Distributed(_another_group(ranks, dist.get_backend_config(ranks.group)))
            ranks.line.background.line.stand_behind(ranks.line)
        return ranks.line.background


class Apart:
    """Another process group of the same ranks in the same order, with the same time-out. Collective to make.

    Torch gives a group that comes after a destroyed one the same name, under which gloo finds the addresses of the
    destroyed one. So these are never destroyed, but given back.

    Args:
        ranks: the ranks.
        backend: of the group, for example ``"gloo"``; by default as theirs.
    """

    group: dist.ProcessGroup
    """To be used by one user at a time."""

    def __init__(self, ranks: Distributed, backend: str | None = None) -> None:
        """See the class."""
        backend = dist.get_backend_config(ranks.group) if backend is None else backend
        with _making_groups, ranks.line.turn:
            self._free = ranks.line.free.setdefault(backend, {})
            number = min(self._free, default=-1)
            row = torch.tensor([number, 0, AGREE, *fingerprint("apart", backend)], dtype=torch.int32, device="cpu")
            table = torch.empty(ranks.size, len(row), dtype=torch.int32, device="cpu")
            gather(ranks, AGREE, row, table)
            raise_together(ranks, table[:, 1:].tolist(), None)
            if number >= 0 and bool((table[:, 0] == number).all()):
                self._number, self.group = number, self._free.pop(number)
            else:  # on some rank its last user has not given it back yet
                self._number = ranks.line.made
                ranks.line.made += 1
                self.group = _another_group(ranks, backend)

    def give_back(self) -> None:
        """Let others use the group: nothing is under way on it on any rank. Local."""
        self._free[self._number] = self.group


def _another_group(ranks: Distributed, backend: str) -> dist.ProcessGroup:
    members = [dist.get_global_rank(ranks.group, rank) for rank in range(ranks.size)]
    options: dict[str, Any] = {"use_local_synchronization": True}  # other ranks of the world may be anywhere
    if members != sorted(members):
        options["sort_ranks"] = False  # older versions of torch always sort
    group: dist.ProcessGroup = dist.new_group(members, _timeout(ranks.group), backend=backend, **options)
    return group


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """How long a group waits for a rank; ``None`` where torch does not tell."""
    for device in ("cpu", "cuda"):
        with contextlib.suppress(Exception):
            found = group._get_backend(torch.device(device)).options._timeout
            if isinstance(found, timedelta):
                return found
    return None


class Known:
    """A rank of a replay: what the other ranks would send is known beforehand.

    Replays of recorded batches and tests run many ranks in one process, one after the other. Only what this rank counts
    is compared with what is known of it: the other ranks are taken to have counted as said, with the same placement.

    Args:
        rank: which rank this is.
        size: how many there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        """See the class."""
        if not 0 <= rank < size:
            raise ValueError(f"rank is {rank}, allowed is 0 to size - 1 = {size - 1}")
        self.rank = rank
        self.size = size
        self.counts: torch.Tensor | None = None
        """int32 ``[size, n_logical]``, every rank's counts of the batch that comes next."""

    def gather(self, row: torch.Tensor, table: torch.Tensor) -> None:
        """Fill in the known counts.

        Raises:
            ValueError: `counts` is not set, has another shape, or its own row is not what this rank counted.
        """
        table.copy_(row.expand_as(table))
        if len(row) == WORDS:  # settings only: all ranks of a replay have the same
            return
        counts, words = row[:-WORDS], row[-WORDS:]
        if self.counts is None or self.counts.shape != (self.size, len(counts)):
            seen = None if self.counts is None else tuple(self.counts.shape)
            raise ValueError(f"counts of a Known exchange has shape {seen}, allowed is {(self.size, len(counts))}")
        if words[0] == 0 and not torch.equal(counts, self.counts[self.rank].to(counts)):
            raise ValueError(f"rank {self.rank} counted other tokens than counts[{self.rank}] of its Known exchange")
        table[:, :-WORDS] = self.counts


def exchange_for(group: "dist.ProcessGroup | Exchange | None") -> Exchange:
    """Return the exchange for what a user gives as ``group``.

    Raises:
        TypeError: it is neither a process group, an exchange nor ``None``.
    """
    if group is None:
        return Local()
    if isinstance(group, (Local, Known, Distributed)):
        return group
    if isinstance(group, dist.ProcessGroup):
        return Distributed(group)
    if all(hasattr(group, name) for name in ("rank", "size", "gather")) and isinstance(group.rank, int):
        return group
    raise TypeError(
        f"group is a {type(group).__name__}, allowed is a torch.distributed.ProcessGroup, an lplb.exchange.Exchange "
        "or None"
    )


def turn(exchange: Exchange) -> contextlib.AbstractContextManager[object]:
    """Keep other threads of this process from the process group, for one gather or for several that belong together."""
    return exchange.line.turn if isinstance(exchange, Distributed) else contextlib.nullcontext()


def gather(exchange: Exchange, method: int, row: torch.Tensor, table: torch.Tensor) -> None:
    """`Exchange.gather`, one thread at a time; what fails says in which collective. Collective.

    Args:
        exchange: the ranks.
        method: what the rows are for.
        row: as for `Exchange.gather`.
        table: as for `Exchange.gather`.

    Raises:
        LostRankError: a rank is lost, or did not come within the group's timeout; the cause is torch.distributed's.
        Other exceptions: as the exchange raises them.
    """
    try:
        with turn(exchange):
            exchange.gather(row, table)
    except RuntimeError as error:
        raise LostRankError(
            f"lplb's all-gather in {_NAMES.get(method, method)} failed on rank {exchange.rank} of {exchange.size}, "
            "most likely because another rank died or did not make this call within the group's timeout. Look for "
            "what the other ranks raised first, and check that every rank makes every call, without tokens too "
            "(Planner.run_idle). The planner is as before the call; a group that lost a rank is of no more use. "
            f"torch.distributed says: {error}"
        ) from error


def number_planner(exchange: Exchange) -> int:
    """Return how many planners its process group had before: the same on all ranks, which make them in one order.

    Two planners of a group may be used from two threads, whose calls can meet in one gather; being part of the
    fingerprint, the number tells them apart. 0 for exchanges without a process group.
    """
    if not isinstance(exchange, Distributed):
        return 0
    with exchange.line.turn:
        exchange.line.planners += 1
        return exchange.line.planners - 1


def group_name(exchange: Exchange) -> str:
    """What torch calls the process group, the same on all ranks; empty without one."""
    return str(getattr(exchange.group, "group_name", "")) if isinstance(exchange, Distributed) else ""


def drain(exchange: Exchange) -> None:
    """Wait for what goes on in the background of the process group: rows under way must not change their width."""
    if isinstance(exchange, Distributed):
        exchange.line.worker.drain()


def widen(exchange: Exchange, n_logical: int) -> None:
    """Make the rows of the process group wide enough for a planner, once all ranks have agreed on it.

    Within the same `turn`, so that all ranks widen between the same two gathers.
    """
    if isinstance(exchange, Distributed):
        exchange.line.columns = max(exchange.line.columns, n_logical + WORDS)


def fingerprint(*parts: object) -> tuple[int, int]:
    """Two 31-bit words that differ, but for chance, when any of ``parts`` does (by its ``repr``)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little") >> 1, int.from_bytes(digest[4:], "little") >> 1


def error_word(error: Exception | None) -> int:
    """0 for none; otherwise 1 + the kind of error."""
    if error is None:
        return 0
    return 1 + next((i for i, kind in enumerate(KINDS) if isinstance(error, kind)), len(KINDS) - 1)


OTHER_SETTINGS = (
    "another placement or other settings than rank 0, or called another method, or another planner of the group; "
    "allowed is the same on every rank (r2o or placement and its order, expert counts, rank_speed, solver, split, "
    "ranks_per_node, min_tokens, traffic_weight), and, where several threads call planners of one group, one order of "
    "calls on every rank: give each thread a process group of its own"
)


def raise_together(
    exchange: Exchange,
    words: Sequence[Sequence[int]],
    error: Exception | None,
    has: str = OTHER_SETTINGS,
    settings: str | None = None,
) -> None:
    """Raise on every rank if any rank has an error or another fingerprint. Collective in that case only.

    To be called within the `turn` of the gather that the words are from.

    Args:
        exchange: the ranks.
        words: for every rank its `WORDS` last columns: all ranks see the same.
        error: this rank's own error, which it raises as it is.
        has: what a rank with another fingerprint has.
        settings: instead of ``has``, what this rank has: what the fingerprint is of, in words; the error then quotes
            two ranks that differ. On every rank or on none.

    Raises:
        ValueError, TypeError, RuntimeError: as the first rank in trouble; its message names that rank.
    """
    failed = [rank for rank, row in enumerate(words) if row[0] != 0]
    if failed:
        message = message_of(exchange, failed[0], "" if error is None else str(error))
        if error is not None:
            raise error
        kind = KINDS[words[failed[0]][0] - 1]
        raise kind(f"rank {failed[0]} refused its input, so no rank goes on: {message}")
    odd = next((rank for rank, row in enumerate(words) if tuple(row[1:]) != tuple(words[0][1:])), None)
    if odd is not None and settings is not None:
        seen, first = (message_of(exchange, rank, settings) for rank in (odd, 0))
        raise ValueError(f"rank {odd} has {seen}, allowed is the same on every rank, and rank 0 has {first}")
    if odd is not None:
        raise ValueError(f"rank {odd} has {has}")


def message_of(exchange: Exchange, rank: int, text: str) -> str:
    """Return what one rank has to say, on every rank; cut after 1024 bytes. Collective."""
    if isinstance(exchange, (Local, Known)):  # nobody else to tell
        return text
    said = text.encode(errors="backslashreplace")[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    row = torch.frombuffer(bytearray(said), dtype=torch.int32)
    table = torch.zeros(exchange.size, len(row), dtype=torch.int32, device="cpu")
    width = exchange.line.columns if isinstance(exchange, Distributed) else len(row)
    for first in range(0, len(row), width):
        part = row[first : first + width]
        got = torch.empty(exchange.size, len(part), dtype=torch.int32, device="cpu")
        gather(exchange, MESSAGE, part, got)
        table[:, first : first + width] = got
    return bytes(table[rank].numpy().tobytes()).rstrip(b"\0").decode(errors="replace")


def together(
    exchange: Exchange,
    action: Callable[[], T],
    print_of: Callable[[T], tuple[int, int]],
    has: str = OTHER_SETTINGS,
    settings: str | None = None,
) -> T:
    """Run ``action`` on every rank; if it fails on one, or its fingerprint differs, all ranks raise. Collective.

    ``has`` and ``settings`` as for `raise_together`.
    """
    if isinstance(exchange, Local):
        return action()
    error: Exception | None = None
    words = (0, 0)
    try:
        result = action()
        words = print_of(result)
    except Exception as problem:
        error = problem
    table = torch.zeros(exchange.size, WORDS, dtype=torch.int32, device="cpu")
    row = torch.tensor([error_word(error), AGREE, *words], dtype=torch.int32, device="cpu")
    with turn(exchange):
        gather(exchange, AGREE, row, table)
        raise_together(exchange, table.tolist(), error, has, settings)
    return result
