"""Why a placement is as good as it is: what each copy is worth, and what holds the maximum up."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lplb import _C
from lplb.arguments import checked_group_size, seen, whole_number
from lplb.placement import Placement

__all__ = ["Bottleneck", "ExpertCopies", "Explanation", "Relief", "explain"]

_Floats = npt.NDArray[np.float64]
_Bools = npt.NDArray[np.bool_]

_MOST_LOAD = 1e300  # in all
_MOST_TOKENS = 2.0**51  # of a load in whole tokens, so that sums of it are exact in float64
_BALANCED = 1 + 1e-9  # of the mean: no maximum is lower
_CANDIDATES = 8  # experts, and ranks for each, that are tried for one more copy


@dataclass(frozen=True)
class ExpertCopies:
    """One expert's copies, and what the last of them is worth. Loads are in the unit of the loads given."""

    expert: int
    """Logical expert."""
    load: float
    """Load of the expert."""
    ranks: tuple[int, ...]
    """Ranks that hold a copy, ascending."""
    per_copy: float
    """Load of each copy under an even split."""
    with_one_less: float | None
    """What each copy would carry without the last one; ``None`` where there is one only."""
    with_one_more: float | None
    """What each copy would carry with another; ``None`` where every rank of the group has one."""
    earned: bool
    """Whether EPLB's rule keeps the last copy under these loads: with one less, no expert of the group that could take
    the copy instead would carry more per copy. True where there is one copy."""


@dataclass(frozen=True)
class Relief:
    """What one more copy of an expert would do for a group's optimum."""

    expert: int
    """Logical expert, confined to the binding ranks now."""
    rank: int
    """Where the copy would go, outside of the binding ranks."""
    lp_load: float
    """The LP's optimum then."""


@dataclass(frozen=True)
class Bottleneck:
    """What holds the busiest rank of one group up. Loads are in the unit of the loads given."""

    group: int
    """Which group of consecutive ranks."""
    mean_load: float
    """Mean load of its ranks; nothing is lower."""
    even_load: float
    """Load of the busiest rank if every copy takes an even share."""
    even_rank: int
    """That rank, the first of equals."""
    even_experts: tuple[int, ...]
    """The experts on it, largest share first."""
    lp_load: float
    """The LP's optimum, the least that any split can make of the busiest rank: what ``confined`` carry, divided by the
    number of ``lp_ranks``."""
    lp_ranks: tuple[int, ...]
    """The binding ranks: the largest set that no other rank can relieve at the optimum; all ranks where the group is
    balanced; none without load."""
    confined: tuple[int, ...]
    """The experts whose copies are all on ``lp_ranks``, largest load first; those without load are left out."""
    reliefs: tuple[Relief, ...]
    """Single copies that would lower the optimum, best first, among the largest confined experts on the ranks outside
    that are lightest under an even split. Where two sets of ranks bind apart from each other, none does."""
    next_copy: int | None
    """The expert to which EPLB's rule gives the next copy: most load per copy, the first of equals, among those that
    not every rank of the group has; ``None`` where all are everywhere."""
    least_needed: int | None
    """The expert that could best do with a copy less: least load per copy then; ``None`` where all have one."""

    @property
    def balanced(self) -> bool:
        """Whether the LP brings every rank to the mean."""
        return self.lp_load <= self.mean_load * _BALANCED


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. ``str()`` is a text for people, `as_dict` plain data."""

    n_ranks: int
    """Ranks of the placement."""
    n_physical: int
    """Slots of the placement."""
    group_size: int
    """Consecutive ranks that balance among themselves."""
    experts: tuple[ExpertCopies, ...]
    """One entry per logical expert, in their order."""
    groups: tuple[Bottleneck, ...]
    """One entry per group, in their order."""

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as dicts, lists, numbers and ``None``, ready for JSON."""
        plain: dict[str, Any] = _plain(self)
        return plain

    def __str__(self) -> str:
        """Describe the copies and each group's bottleneck in a screen of text."""
        lines = [
            f"{len(self.experts)} experts in {self.n_physical} slots on {self.n_ranks} ranks"
            + (f", balanced in groups of {self.group_size}" if self.group_size < self.n_ranks else "")
        ]
        lines += _copy_lines(self.experts)
        for group in self.groups:
            lines += ["", *_group_lines(group, self)]
        return "\n".join(lines)


def explain(
    placement: Placement,
    loads: torch.Tensor | npt.NDArray[Any] | Sequence[float],
    *,
    group_size: int | None = None,
    most_reliefs: int = 3,
) -> Explanation:
    """Explain a placement under a load: why each expert has its copies, and where the bottleneck is.

    The bottleneck is given twice: for an even split, as EPLB has it, the busiest rank; for the LP, the ranks that bind
    (design: the optimum is the largest, over sets of ranks, of the load that only they can take over their number). The
    set comes from the flow solver; its load is added up here, so the text is its own certificate. Rank speeds and
    traffic do not enter. Takes milliseconds; nothing is mutated.

    Args:
        placement: where the experts are.
        loads: load of each expert, ``[n_logical]``, tokens or any other unit, finite, 0 or more; or of several batches,
            ``[batches, n_logical]``, of which the mean is explained.
        group_size: consecutive ranks that balance among themselves; all of them by default.
        most_reliefs: how many single copies that would help to name for each group; 0 saves looking.

    Raises:
        TypeError: an argument has another type.
        ValueError: loads of another shape or not allowed, or a ``group_size`` for which the placement is not closed.
    """
    if not isinstance(placement, Placement):
        raise TypeError(f"placement is {seen(placement)}, allowed is a Placement")
    load = _checked_loads(loads, placement.n_logical)
    size = checked_group_size(placement.n_ranks, group_size)
    placement.check_groups(size)
    most_reliefs = whole_number("most_reliefs", most_reliefs, 0)
    held = np.zeros((placement.n_logical, placement.n_ranks), dtype=np.bool_)
    held[placement.phy2log.numpy(), placement.rank_of.numpy()] = True
    experts: list[ExpertCopies] = []
    bottlenecks = []
    for first in range(0, placement.n_ranks, size):
        here = held[:, first : first + size]
        members = np.flatnonzero(here.any(1))
        group = _Group(first, members, load[members], here[members])
        experts += group.copies()
        bottlenecks.append(group.bottleneck(most_reliefs))
    experts.sort(key=lambda e: e.expert)
    return Explanation(placement.n_ranks, placement.n_physical, size, tuple(experts), tuple(bottlenecks))


class _Group:
    """One group of ranks: experts and ranks are numbered within it, but for what it returns."""

    def __init__(self, first_rank: int, members: npt.NDArray[np.int64], load: _Floats, held: _Bools) -> None:
        self.first_rank = first_rank
        self.members = members  # [n] their logical numbers
        self.load = load  # [n]
        self.held = held  # [n, size]
        self.count = held.sum(1)
        self.per_copy = load / self.count
        self.takes_more = self.count < held.shape[1]

    def copies(self) -> list[ExpertCopies]:
        """The entry of each expert."""
        rival = np.where(self.takes_more, self.per_copy, -1.0)
        entries = []
        for i, (e, n, load) in enumerate(
            zip(self.members.tolist(), self.count.tolist(), self.load.tolist(), strict=True)
        ):
            others = np.delete(rival, i)
            one_less = load / (n - 1) if n > 1 else None
            entries.append(
                ExpertCopies(
                    expert=e,
                    load=load,
                    ranks=self._ranks(self.held[i]),
                    per_copy=load / n,
                    with_one_less=one_less,
                    with_one_more=load / (n + 1) if self.takes_more[i] else None,
                    earned=one_less is None or not others.size or bool(one_less >= others.max()),
                )
            )
        return entries

    def bottleneck(self, most_reliefs: int) -> Bottleneck:
        """What holds the group's busiest rank up."""
        size = self.held.shape[1]
        even = self.per_copy @ self.held
        busiest = int(even.argmax())
        on_it = np.flatnonzero(self.held[:, busiest])
        binding, lp_load = _optimum(self.held, self.load)
        mean = float(self.load.sum()) / size
        confined = np.flatnonzero(_confined(self.held, binding) & (self.load > 0))
        confined = confined[np.argsort(-self.load[confined], kind="stable")]
        takers = np.where(self.takes_more, self.per_copy, -1.0)
        losers = np.where(self.count > 1, self.load / np.maximum(self.count - 1, 1), np.inf)
        return Bottleneck(
            group=self.first_rank // size,
            mean_load=mean,
            even_load=float(even[busiest]),
            even_rank=self.first_rank + busiest,
            even_experts=self._named(on_it[np.argsort(-self.per_copy[on_it], kind="stable")]),
            lp_load=lp_load,
            lp_ranks=self._ranks(binding),
            confined=self._named(confined),
            reliefs=self._reliefs(binding, lp_load, confined[:_CANDIDATES], even)[:most_reliefs]
            if most_reliefs
            else (),
            next_copy=int(self.members[takers.argmax()]) if self.takes_more.any() else None,
            least_needed=int(self.members[losers.argmin()]) if (self.count > 1).any() else None,
        )

    def _reliefs(
        self, binding: _Bools, lp_load: float, candidates: npt.NDArray[np.int64], even: _Floats
    ) -> tuple[Relief, ...]:
        outside = np.flatnonzero(~binding)
        outside = outside[np.argsort(even[outside], kind="stable")][:_CANDIDATES]
        found = []
        for i in candidates.tolist():
            for r in outside.tolist():
                held = self.held.copy()
                held[i, r] = True
                _, relieved = _optimum(held, self.load)
                if relieved < lp_load / _BALANCED:
                    found.append(Relief(int(self.members[i]), self.first_rank + r, relieved))
        best_of_expert: dict[int, Relief] = {}
        for relief in sorted(found, key=lambda f: f.lp_load):
            best_of_expert.setdefault(relief.expert, relief)
        return tuple(best_of_expert.values())

    def _ranks(self, mask: _Bools) -> tuple[int, ...]:
        return tuple((self.first_rank + np.flatnonzero(mask)).tolist())

    def _named(self, experts: npt.NDArray[np.int64]) -> tuple[int, ...]:
        return tuple(self.members[experts].tolist())


def _optimum(held: _Bools, load: _Floats) -> tuple[_Bools, float]:
    """Return the ranks that bind, bool [size], and the LP's optimum, for experts held [n, size] by ranks."""
    n, size = held.shape
    on_rank = [np.flatnonzero(held[:, r]).tolist() for r in range(size)]
    width = max(map(len, on_rank))
    n_logical = n
    slots: list[int] = []
    for experts in on_rank:  # ranks must have as many slots: experts without load fill them up
        fill = width - len(experts)
        slots += [*experts, *range(n_logical, n_logical + fill)]
        n_logical += fill
    whole = np.zeros(n_logical, dtype=np.int64)
    whole[:n] = _whole(load)
    binding = np.array(_C.bottleneck_ranks(slots, n_logical, size, size, whole.ctypes.data))
    if not binding.any():
        return binding, 0.0
    return binding, float(load[_confined(held, binding)].sum()) / int(binding.sum())


def _confined(held: _Bools, ranks: _Bools) -> _Bools:
    """Whether each expert has all its copies on those ranks."""
    confined: _Bools = np.logical_not(held[:, ~ranks].any(axis=1, keepdims=False))
    return confined


def _whole(load: _Floats) -> npt.NDArray[np.int64]:
    """Return the loads as whole tokens, in a unit so small that rounding does not matter if they are fractions."""
    total = float(load.sum())
    if total > 0 and (total > _MOST_TOKENS or bool((load != np.floor(load)).any())):
        load = np.rint(np.ldexp(load, math.frexp(_MOST_TOKENS)[1] - 1 - math.frexp(total)[1]))
    return load.astype(np.int64)


def _checked_loads(loads: object, n_logical: int) -> _Floats:
    """Return the loads in float64 after checks of type, shape and values."""
    if isinstance(loads, torch.Tensor):
        if loads.dtype.is_complex or loads.dtype == torch.bool:
            raise TypeError(f"loads has dtype {loads.dtype}, allowed is a real dtype")
        if loads.layout != torch.strided or loads.device.type == "meta":
            raise TypeError(f"loads has layout {loads.layout} on {loads.device}, allowed is torch.strided with values")
        values = loads.detach().to(dtype=torch.float64, device="cpu").numpy()
    else:
        try:
            found = np.asarray(loads)
        except ValueError as error:  # rows of unequal length
            raise ValueError(f"loads is no array: {error}; allowed is [n_logical] = [{n_logical}]") from error
        if found.dtype.kind not in "iuf":
            raise TypeError(f"loads is {seen(loads)} of {found.dtype}, allowed are numbers [n_logical]")
        values = found.astype(np.float64)
    if values.ndim not in (1, 2) or values.shape[-1] != n_logical or not len(values):
        raise ValueError(
            f"loads has shape {list(values.shape)}, allowed is [n_logical] = [{n_logical}] or [batches, {n_logical}]"
        )
    odd = ~(np.isfinite(values) & (values >= 0))
    if odd.any():
        index = np.argwhere(odd)[0].tolist()
        raise ValueError(f"loads{index} is {values[tuple(index)]}, allowed is finite and 0 or more")
    with np.errstate(over="ignore"):
        total = float(values.sum())
    if total > _MOST_LOAD:
        raise ValueError(f"loads add up to {total}, allowed is at most {_MOST_LOAD}")
    mean: _Floats = values if values.ndim == 1 else values.mean(axis=0)
    return mean


# ---- as text and as data

_SHOWN = 8  # experts, or ranks, that a line names


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _named(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return ", ".join(map(str, numbers[:_SHOWN])) + more


def _copy_lines(experts: Sequence[ExpertCopies]) -> list[str]:
    several = sorted((e for e in experts if len(e.ranks) > 1), key=lambda e: (-len(e.ranks), -e.load, e.expert))
    if not several:
        return ["every expert has one copy"]
    lines = [
        f"{len(several)} have several copies; the last is earned if no other expert had more need of it:",
        "  expert  copies        load    per copy    one less  earned  ranks",
    ]
    for e in several[:_SHOWN]:
        lines.append(
            f"  {e.expert:6d}  {len(e.ranks):6d}  {e.load:10.6g}  {e.per_copy:10.6g}  {e.with_one_less:10.6g}  "
            f"{'yes' if e.earned else 'no':6s}  {_named(e.ranks)}"
        )
    rest = several[_SHOWN:]
    if rest:
        lines.append(f"  and {len(rest)} more, {sum(e.earned for e in rest)} of them earned")
    return lines


def _group_lines(group: Bottleneck, of: Explanation) -> list[str]:
    where = f"group {group.group}: " if len(of.groups) > 1 else ""
    if not group.lp_ranks:
        return [f"{where}no load"]

    def times(load: float) -> str:
        return f"{load:.6g} ({load / group.mean_load:.3f} x mean)"

    share = {e.expert: e.per_copy for e in of.experts}
    on_it = ", ".join(f"{e} ({share[e]:.6g})" for e in group.even_experts[:_SHOWN])
    more = len(group.even_experts) - _SHOWN
    lines = [
        f"{where}mean rank load {group.mean_load:.6g}",
        f"  even split: {times(group.even_load)} on rank {group.even_rank}, "
        f"with experts {on_it}" + (f" and {more} more" if more > 0 else ""),
    ]
    if group.balanced:
        lines.append("  LP: every rank at the mean; no placement does better under these loads")
    else:
        n = len(group.lp_ranks)
        who = f"ranks {_named(group.lp_ranks)} ({n} of {of.group_size}), which alone hold"
        if n == 1:
            who = f"rank {group.lp_ranks[0]}, which alone holds"
        lines.append(
            f"  LP: {times(group.lp_load)} on {who} experts {_named(group.confined)}: {n * group.lp_load:.6g} in all"
        )
        lines += [
            f"  a copy of {r.expert} on rank {r.rank} would lower that to {times(r.lp_load)}" for r in group.reliefs
        ]
    if group.next_copy is not None:
        lines.append(f"  the next copy is expert {group.next_copy}'s: {share[group.next_copy]:.6g} per copy, the most")
    if group.least_needed is not None:
        e = of.experts[group.least_needed]
        lines.append(f"  expert {e.expert} could best do with one less: {e.with_one_less:.6g} per copy then")
    return lines
