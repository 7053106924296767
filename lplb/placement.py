"""The placement of experts on ranks: which logical expert each physical slot holds."""

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lplb.arguments import MAX_GROUP_SIZE, seen, whole_number

__all__ = ["Placement", "split_evenly"]

_FORMAT = "lplb.placement"
_VERSION = 1
_MAX_LOGICAL = 2**31  # so that every expert fits in int32
_MOST_TOKENS = 2**62  # of one expert
_MAX_NAMED = 4  # how many missing experts a message lists


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Placement:
    """Which logical expert each physical slot holds, and what follows from it.

    Slots are dealt to ranks in blocks: rank ``r`` holds slots ``r * slots_per_rank`` up to the next rank's
    first. Every expert has at least one slot and at most one on each rank. The tensors live on the CPU, share
    no memory with the arguments, and are not to be written to. Placements compare and hash by content.

    Args:
        phy2log: logical expert of each slot, ``[n_physical]``: a tensor or an array of an integer dtype, or a
            sequence of ints; ``n_physical`` is a multiple of ``n_ranks``.
        n_ranks: number of ranks, at least 1.
        n_logical: number of logical experts; by default the largest entry plus one.

    Raises:
        TypeError: ``phy2log`` does not hold integers (``bool`` and floats are none), or a count is not an
            int.
        ValueError: wrong shape or size, an entry outside ``[0, n_logical)``, an expert without a slot, or an
            expert twice on one rank; the message has the value seen and the value allowed.
    """

    phy2log: torch.Tensor
    """Logical expert of each slot, int32 ``[n_physical]``."""
    n_ranks: int
    """Number of ranks."""
    n_logical: int
    """Number of logical experts."""
    log2phy: torch.Tensor
    """Slots of each expert in ascending order, padded with -1, int32 ``[n_logical, max(logcnt)]``."""
    logcnt: torch.Tensor
    """Number of slots of each expert, int32 ``[n_logical]``."""
    rank_of: torch.Tensor
    """Rank of each slot, int32 ``[n_physical]``."""

    def __init__(
        self,
        phy2log: torch.Tensor | npt.NDArray[np.integer[Any]] | Sequence[int],
        n_ranks: int,
        n_logical: int | None = None,
    ) -> None:
        """Check the arguments and derive the other tables; see the class."""
        values = _integers(phy2log)
        n_ranks = whole_number("n_ranks", n_ranks, 1)
        if len(values) % n_ranks:
            raise ValueError(f"phy2log has {len(values)} slots, allowed is a multiple of n_ranks = {n_ranks}")
        if n_logical is None:
            n_logical = min(max(int(values.max()) + 1, 1), _MAX_LOGICAL)
        n_logical = whole_number("n_logical", n_logical, 1, _MAX_LOGICAL)
        _check_range(values, n_logical)
        experts = values.astype(np.int64)
        _check_none_missing(experts, n_logical)
        slots_per_rank = len(experts) // n_ranks
        _check_none_doubled(experts, slots_per_rank, n_logical)

        logcnt = np.bincount(experts, minlength=n_logical)
        tables = {
            "phy2log": experts,
            "log2phy": _slots_by_expert(experts, logcnt),
            "logcnt": logcnt,
            "rank_of": np.arange(len(experts)) // slots_per_rank,
        }
        for name, table in tables.items():
            object.__setattr__(self, name, torch.from_numpy(table.astype(np.int32)))
        object.__setattr__(self, "n_ranks", n_ranks)
        object.__setattr__(self, "n_logical", n_logical)

    @property
    def n_physical(self) -> int:
        """Number of slots on all ranks together."""
        return len(self.phy2log)

    @property
    def slots_per_rank(self) -> int:
        """Number of slots on each rank."""
        return self.n_physical // self.n_ranks

    def check_groups(self, group_size: int) -> None:
        """Refuse a placement that is not group-closed.

        Args:
            group_size: how many consecutive ranks balance among themselves, 1 to `MAX_GROUP_SIZE`, a divisor
                of ``n_ranks``.

        Raises:
            TypeError: ``group_size`` is not an int.
            ValueError: ``group_size`` is not allowed, or an expert has slots in several groups; the message
                names the expert and the groups.
        """
        group_size = whole_number("group_size", group_size, 1, MAX_GROUP_SIZE)
        if self.n_ranks % group_size:
            raise ValueError(f"group_size is {group_size}, allowed is a divisor of n_ranks = {self.n_ranks}")
        experts = self.phy2log.numpy()
        group_of = self.rank_of.numpy() // group_size
        home = group_of[self.log2phy[:, 0].numpy()]
        away = np.flatnonzero(group_of != home[experts])
        if away.size:
            expert = experts[away].min()
            groups = np.unique(group_of[experts == expert]).tolist()
            raise ValueError(
                f"expert {expert} has slots in groups {groups} (of {group_size} ranks each), allowed is one group"
            )

    def to_json(self) -> str:
        """Return the placement as JSON text, which `from_json` reads."""
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "n_ranks": self.n_ranks,
                "n_logical": self.n_logical,
                "phy2log": self.phy2log.tolist(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Placement":
        """Read what `to_json` wrote. Keys it does not know are passed over.

        Args:
            text: a JSON object with ``format``, ``version``, ``n_ranks``, ``n_logical`` and ``phy2log``.

        Returns:
            The placement, checked like any other.

        Raises:
            TypeError: ``text`` is not a ``str``.
            ValueError: ``text`` is not JSON, not a placement, of another version, incomplete, or a value in
                it has the wrong type or is refused by `Placement`.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}, allowed is a str")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a placement must be JSON text: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"a placement must be a JSON object, not {type(content).__name__}")
        missing = [key for key in ("format", "version", "n_ranks", "n_logical", "phy2log") if key not in content]
        if missing:
            raise ValueError(f"a placement in JSON lacks {', '.join(missing)}")
        if content["format"] != _FORMAT:
            raise ValueError(f"format is {content['format']!r}, allowed is {_FORMAT!r}")
        # JSON's true and 1.0 equal 1 in Python.
        if type(content["version"]) is not int or content["version"] != _VERSION:
            raise ValueError(f"version is {content['version']!r}, allowed is {_VERSION}")
        if not isinstance(content["phy2log"], list):
            raise ValueError(f"phy2log is a {type(content['phy2log']).__name__}, allowed is a list of integers")
        n_logical = content["n_logical"]
        if n_logical is None:
            raise ValueError("n_logical is null, allowed is an integer")
        try:
            return cls(content["phy2log"], content["n_ranks"], n_logical)
        except TypeError as error:
            raise ValueError(f"a placement in JSON: {error}") from error

    def __eq__(self, other: object) -> bool:
        """Tell whether the other is a placement of the same experts in the same slots of as many ranks."""
        # phy2log names every expert, so it fixes n_logical.
        if not isinstance(other, Placement):
            return NotImplemented
        return self.n_ranks == other.n_ranks and torch.equal(self.phy2log, other.phy2log)

    def __hash__(self) -> int:
        """Hash by content."""
        return hash((self.n_ranks, self.phy2log.numpy().tobytes()))

    def __repr__(self) -> str:
        """Show the sizes, not the tables."""
        return f"Placement(n_ranks={self.n_ranks}, n_logical={self.n_logical}, n_physical={self.n_physical})"


def _integers(phy2log: object) -> npt.NDArray[Any]:
    """Return phy2log as a 1-D array of integers, not yet narrowed: a value may be of any size."""
    if isinstance(phy2log, torch.Tensor):
        dtype = phy2log.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise TypeError(f"phy2log has dtype {dtype}, allowed is an integer dtype")
        values: npt.NDArray[Any] = phy2log.cpu().numpy()
    elif isinstance(phy2log, np.ndarray):
        if phy2log.dtype.kind not in "iu":
            raise TypeError(f"phy2log has dtype {phy2log.dtype}, allowed is an integer dtype")
        values = phy2log
    elif isinstance(phy2log, Sequence):
        for slot, expert in enumerate(phy2log):
            if isinstance(expert, (bool, np.bool_)) or not hasattr(expert, "__index__"):
                raise TypeError(f"phy2log[{slot}] is {expert!r}, allowed is an int")
        values = np.array([operator.index(expert) for expert in phy2log], dtype=object)
    else:
        raise TypeError(f"phy2log is a {type(phy2log).__name__}, allowed is a tensor, an array or a sequence of ints")
    if values.ndim != 1 or not values.size:
        raise ValueError(f"phy2log has shape {list(values.shape)}, allowed is [n_physical] with at least one slot")
    return values


def _check_range(experts: npt.NDArray[Any], n_logical: int) -> None:
    outside = np.flatnonzero((experts < 0) | (experts >= n_logical))
    if outside.size:
        slot = outside[0]
        raise ValueError(f"phy2log[{slot}] is {experts[slot]}, allowed is 0 to {n_logical - 1}")


def _check_none_missing(experts: npt.NDArray[np.int64], n_logical: int) -> None:
    present = set(experts.tolist())
    n_missing = n_logical - len(present)
    if n_missing:
        first = list(islice((e for e in range(n_logical) if e not in present), _MAX_NAMED))
        more = " and others" if n_missing > len(first) else ""
        raise ValueError(
            f"{n_missing} of {n_logical} experts have no slot: {', '.join(map(str, first))}{more}; "
            "allowed is at least one slot each"
        )


def _check_none_doubled(experts: npt.NDArray[np.int64], slots_per_rank: int, n_logical: int) -> None:
    rank_of = np.arange(len(experts)) // slots_per_rank
    pairs, times = np.unique(rank_of * n_logical + experts, return_counts=True)
    doubled = np.flatnonzero(times > 1)
    if doubled.size:
        rank, expert = divmod(int(pairs[doubled[0]]), n_logical)
        slots = np.flatnonzero((rank_of == rank) & (experts == expert)).tolist()
        raise ValueError(
            f"expert {expert} is on rank {rank} {len(slots)} times, in slots {slots}, allowed is once; "
            "lplb.eplb.spread_copies repairs it"
        )


def _slots_by_expert(experts: npt.NDArray[np.int64], logcnt: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    slots = np.argsort(experts, kind="stable")
    copy = np.arange(len(slots)) - np.repeat(np.cumsum(logcnt) - logcnt, logcnt)
    log2phy = np.full((len(logcnt), logcnt.max()), -1, dtype=np.int64)
    log2phy[experts[slots], copy] = slots
    return log2phy


def split_evenly(placement: Placement, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the tokens of each slot if every expert's tokens are dealt out evenly over its copies.

    What is left of a division goes to one copy each, beginning with copy ``e`` (modulo the number of copies), so that
    no rank gets it always.

    Args:
        placement: where the experts are.
        counts: tokens of each expert, ``[n_logical]`` or batches ``[..., n_logical]``, of an integer dtype.

    Returns:
        int64 ``[n_physical]`` or ``[..., n_physical]``.

    Raises:
        TypeError: ``counts`` is no array, or not of integers.
        ValueError: another number of experts, or a count below 0 or above 2**62.
    """
    if not isinstance(counts, np.ndarray):
        raise TypeError(f"counts is {seen(counts)}, allowed is an array of integers")
    if counts.dtype.kind not in "iu":
        raise TypeError(f"counts has dtype {counts.dtype}, allowed is an integer dtype")
    if counts.ndim < 1 or counts.shape[-1] != placement.n_logical:
        raise ValueError(f"counts has shape {list(counts.shape)}, allowed is [..., n_logical = {placement.n_logical}]")
    odd = (counts < 0) | (counts > _MOST_TOKENS)
    if odd.any():
        raise ValueError(f"counts has {counts[odd][0]}, allowed are 0 to {_MOST_TOKENS} tokens")
    counts = counts.astype(np.int64, copy=False)
    expert = placement.phy2log.numpy()
    copies = placement.logcnt.numpy()[expert].astype(np.int64)
    number = np.empty_like(copies)  # which of its expert's copies a slot is
    for slots in placement.log2phy.numpy():
        held = slots[slots >= 0]
        number[held] = np.arange(len(held))
    each, left = np.divmod(counts[..., expert], copies)
    quota: npt.NDArray[np.int64] = each + ((number - expert) % copies < left)
    return quota
