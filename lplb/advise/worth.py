"""What pays: modelled times of every way to run a layer, over batch sizes, and the advice that follows from them.

An `Option` is a number of redundant slots, a policy that fills them, and a split of the tokens. `Study` holds the
options of one deployment; its advice is read off their times alone, so that anybody can check it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lplb.cost import Hardware
from lplb.models import ModelShape

__all__ = ["FACTORS", "MOST_DIRECT", "WORTH", "Advice", "Option", "Study", "in_words", "pays_at"]

WORTH = 0.01
"""What saves less than this part of a layer's time is not advised: the model is not as exact as that."""

FACTORS = (0.5, 1.0, 2.0)
"""The planner's assumed time is looked at times these."""

MOST_DIRECT = 256
"""Up to so many tokens per rank every choice of a token travels by itself: DeepEP's documentation wants fewer than 256
tokens for its low-latency kernels, which do that; beyond, its normal kernels are modelled."""

_Floats = npt.NDArray[np.float64]
_GIB = 2.0**30


def pays_at(sizes: Sequence[int], using: _Floats, without: _Floats) -> list[tuple[int, int]]:
    """Return the runs of sizes at which something saves at least `WORTH`, each by its first and last size.

    Args:
        sizes: ascending.
        using: times with it, ``[sizes]``.
        without: times without it, ``[sizes]``.
    """
    runs: list[tuple[int, int]] = []
    before = False
    for size, pays in zip(sizes, (using <= (1 - WORTH) * without).tolist(), strict=True):
        if pays:
            runs = [*runs[:-1], (runs[-1][0], size)] if before else [*runs, (size, size)]
        before = pays
    return runs


@dataclass(frozen=True, eq=False)
class Option:
    """One way to run a layer; arrays are by batch size, means over the profile's batches."""

    redundant: int
    """Slots per rank beyond those that every expert needs once."""
    policy: str
    """``"none"``: one slot per expert, in order; or a policy of `lplb.place`."""
    split: str
    """``"even"``, or ``"lp"``: solved in every batch."""
    imbalance: _Floats
    """Busiest rank's tokens over the mean."""
    seconds: dict[str, _Floats]
    """A layer's time without the planner's, for each hardware by name."""
    floor: _Floats
    """Part of that time, on the study's own hardware, that slots in use cost however few tokens they have."""

    @property
    def words(self) -> str:
        """The option without its redundancy."""
        if self.policy == "none":
            return "experts in order"
        return f"policy {self.policy}, {'an LP in every batch' if self.split == 'lp' else 'even splits'}"


@dataclass(frozen=True)
class Advice:
    """What to do at one batch size."""

    tokens_per_rank: int
    """Tokens of each rank."""
    option: Option
    """The cheapest option in memory, then effort, of those within `WORTH` of the fastest."""
    seconds: float
    """Its modelled time, with the assumed planner's."""
    nothing: float
    """The time of doing nothing: no redundancy, and experts in order where that is possible."""

    @property
    def saving(self) -> float:
        """Part of the time of doing nothing that is saved."""
        return 1 - self.seconds / self.nothing


@dataclass(frozen=True, eq=False)
class Study:
    """All options of one deployment, and what follows."""

    model: ModelShape
    """The model."""
    hardware: Hardware
    """What it runs on."""
    n_ranks: int
    """Ranks of the expert-parallel group."""
    n_nodes: int
    """Nodes that they are on."""
    group_size: int
    """Consecutive ranks that balance among themselves."""
    exchange: str
    """How tokens travel between nodes."""
    solver: str
    """What solves the LP."""
    loads: str
    """What loads it is for."""
    notes: list[str]
    """What a reader must know of these loads."""
    seed: int
    """Of the tokens that were drawn."""
    planner_seconds: float
    """The planner's time, per layer and batch: assumed."""
    sizes: list[int]
    """Tokens per rank that were looked at, ascending."""
    asked: list[int]
    """Those of them that advice is for."""
    options: list[Option] = field(repr=False)
    """Every option."""

    def seconds(self, option: Option, hardware: str | None = None, factor: float = 1.0) -> _Floats:
        """An option's time by size, with the planner's ``factor`` times what is assumed."""
        planner = self.planner_seconds * factor if option.split == "lp" else 0.0
        time: _Floats = option.seconds[hardware or self.hardware.name] + planner
        return time

    def levels(self) -> list[int]:
        """The numbers of redundant slots per rank that were looked at."""
        return sorted({option.redundant for option in self.options})

    def best(self, redundant: int, split: str, size: int) -> Option | None:
        """The fastest option of a redundancy and split at a size of `sizes`; None where there is none."""
        some = [o for o in self.options if o.redundant == redundant and o.split == split]
        return min(some, key=lambda o: self.at(o, size), default=None)

    def advice(self, size: int) -> Advice:
        """What to do at a size of `sizes`."""
        fastest = min(self.at(option, size) for option in self.options)
        near = [o for o in self.options if self.at(o, size) * (1 - WORTH) <= fastest]
        option = min(near, key=lambda o: (o.redundant, o.split == "lp", o.policy != "none", self.at(o, size)))
        idle = [o for o in self.options if o.redundant == 0 and o.split == "even"]
        nothing = min(idle, key=lambda o: (o.policy != "none", self.at(o, size)))
        return Advice(size, option, self.at(option, size), self.at(nothing, size))

    def lp_pays_at(self, redundant: int, hardware: str | None = None, factor: float = 1.0) -> list[tuple[int, int]]:
        """Runs of `sizes` at which the LP, with the planner's time, saves at least `WORTH`: first and last of each.

        Compared are the fastest LP with these redundant slots and the fastest even split with as many or fewer.
        """
        using = [self.seconds(o, hardware, factor) for o in self.options if (o.redundant, o.split) == (redundant, "lp")]
        if not using:
            return []
        even = [self.seconds(o, hardware) for o in self.options if o.redundant <= redundant and o.split == "even"]
        return pays_at(self.sizes, np.min(using, axis=0), np.min(even, axis=0))

    def lp_pays_from(self, redundant: int, hardware: str | None = None, factor: float = 1.0) -> int | None:
        """The size from which on the LP pays, at all larger ones of `sizes` too; None where it does not."""
        runs = self.lp_pays_at(redundant, hardware, factor)
        return runs[-1][0] if runs and runs[-1][1] == self.sizes[-1] else None

    def memory(self, redundant: int) -> float:
        """GiB of each rank's memory that so many slots cost, in all layers."""
        return redundant * self.model.slot_bytes / _GIB

    @property
    def looked_at(self) -> int:
        """The redundancy whose LP the sentences speak of: that advised for most tokens, or the least with an LP."""
        level = self.advice(max(self.asked)).option.redundant
        with_lp = sorted({o.redundant for o in self.options if o.split == "lp"})
        return level if level in with_lp or not with_lp else with_lp[0]

    def at(self, option: Option, size: int) -> float:
        """An option's time at a size of `sizes`, with the assumed planner's."""
        return float(self.seconds(option)[self.sizes.index(size)])

    # ---- words

    def sentences(self) -> list[str]:
        """The advice in plain sentences, the assumptions last."""
        return [*map(self._advise, self.asked), self._say_crossover(), self._say_floor(), self.assumptions()]

    def _advise(self, size: int) -> str:
        found = self.advice(size)
        option, share = found.option, self.memory(found.option.redundant) * _GIB / self.hardware.memory_bytes
        at = _at_size(size)
        if option.redundant == 0 and option.split == "even":
            fastest = min(self.at(o, size) for o in self.options)
            gain = 1 - fastest / found.seconds
            least = f"the best of the rest would save {gain:.1%}" if gain > 0 else "nothing else is faster"
            placed = (
                "" if option.policy == "none" else f" Placing the experts by {option.policy} saves {found.saving:.1%}."
            )
            return f"{at} neither redundant slots nor an LP pay here: {least}.{placed}"
        memory = f"{self.memory(option.redundant):.1f} GiB of each rank's memory, {share:.1%}"
        lp = option.split == "lp"
        even = self.best(option.redundant, "even", size)
        beside = f"; {in_words(self.at(even, size))} with even splits" if lp and even is not None else ""
        return (
            f"{at}: {_slots(option.redundant)} per rank ({memory}), {option.words}: {in_words(found.seconds)} per layer"
            f"{' with the planner' if lp else ''}, {found.saving:.1%} less than the {in_words(found.nothing)} of doing "
            f"nothing{beside}.{'' if lp else ' The LP does not pay at this size.'}"
        )

    def _say_crossover(self) -> str:
        if not any(o.split == "lp" for o in self.options):
            return "No expert has a second copy, so that an LP has nothing to decide."
        level = self.looked_at
        slots = f"With {_slots(level)} per rank"
        runs = self.lp_pays_at(level)
        half, one, twice = (self.lp_pays_from(level, factor=factor) for factor in FACTORS)
        if half is None:
            return (
                f"{slots} there is no size up to {self.sizes[-1]:,} tokens per rank from which on the LP pays, even if "
                f"the planner takes half of the {in_words(self.planner_seconds)} that are assumed."
            )
        island = ", ".join(f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in runs if b != self.sizes[-1])
        pays = f"pays from {one:,} tokens per rank on" if one else "does not pay for good at any size looked at"
        other = f" (and at {island}{self._why_it_ends(runs)})" if island else ""
        slower = f"from {twice:,} on" if twice else "never for good"
        return (
            f"{slots} the LP {pays}{other}, if the planner takes {in_words(self.planner_seconds)} per layer; from "
            f"{half:,} on at half of that, {slower} at twice as much."
        )

    def _why_it_ends(self, runs: Sequence[tuple[int, int]]) -> str:
        """Say so where a run ends because the model sends tokens another way from there on."""
        direct = [size for size in self.sizes if size <= MOST_DIRECT]
        if self.exchange != "auto" or not direct or direct[-1] not in [end for _, end in runs]:
            return ""
        return (
            f": that ends where the model's exchange changes, at {MOST_DIRECT} tokens per rank, and says nothing of "
            "the loads"
        )

    def _say_floor(self) -> str:
        size, level = min(self.asked), self.levels()[-1]
        part = self.advice(size).option.floor[self.sizes.index(size)]
        text = (
            f"{_at_size(size)}, {part:.0%} of a layer is what experts in use cost however few tokens they "
            "have (weights are read, a tile is multiplied)"
        )
        if level == 0:
            return text + "."
        before, after = (
            min(self.at(o, size) for o in self.options if o.redundant == r and o.split == "even") for r in (0, level)
        )
        pays = "slower: copies cost it again" if after > before else "faster: balance is worth more"
        return f"{text}; {_slots(level)} per rank make it {abs(after / before - 1):.1%} {pays}, with even splits."

    def assumptions(self) -> str:
        """What was taken, not measured."""
        return (
            f"Modelled, not measured: the planner's {in_words(self.planner_seconds)} per layer is assumed (nothing of "
            f"lplb has been measured on a GPU), and so is that {self.hardware.name} reaches "
            f"{self.hardware.efficiency:.0%} of its data sheet. What saves less than {WORTH:.0%} is not advised."
        )

    # ---- JSON

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; times are in seconds, with the assumed planner's."""
        return {
            "format": "lplb.advice",
            "version": 1,
            "model": asdict(self.model),
            "hardware": asdict(self.hardware),
            "ranks": self.n_ranks,
            "nodes": self.n_nodes,
            "group_size": self.group_size,
            "loads": {"name": self.loads, "notes": self.notes, "seed": self.seed},
            "assumed": {
                "planner_seconds": self.planner_seconds,
                "planner_is_measured": False,
                "efficiency": self.hardware.efficiency,
                "exchange": self.exchange,
                "solver": self.solver,
                "worth": WORTH,
            },
            "tokens_per_rank": self.sizes,
            "options": [self._option_dict(option) for option in self.options],
            "advice": [self._advice_dict(self.advice(size)) for size in self.asked],
            "lp_pays_from": [
                {
                    "redundant_slots": level,
                    "hardware": name,
                    "planner_seconds": self.planner_seconds * factor,
                    "tokens_per_rank": self.lp_pays_from(level, name, factor),
                }
                for level in self.levels()
                for name in self.options[0].seconds
                for factor in FACTORS
            ],
            "sentences": self.sentences(),
        }

    def _option_dict(self, option: Option) -> dict[str, Any]:
        return {
            "redundant_slots": option.redundant,
            "memory_gib": self.memory(option.redundant),
            "policy": option.policy,
            "split": option.split,
            "seconds": self.seconds(option).tolist(),
            "imbalance": option.imbalance.tolist(),
            "floor_part": option.floor.tolist(),
        }

    @staticmethod
    def _advice_dict(found: Advice) -> dict[str, Any]:
        return {
            "tokens_per_rank": found.tokens_per_rank,
            "redundant_slots": found.option.redundant,
            "policy": found.option.policy,
            "split": found.option.split,
            "seconds": found.seconds,
            "seconds_of_nothing": found.nothing,
            "saving": found.saving,
        }


def in_words(seconds: float) -> str:
    """Seconds as text with three digits."""
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _slots(number: int) -> str:
    return f"{number} redundant slot{'' if number == 1 else 's'}"


def _at_size(size: int) -> str:
    return f"At {size:,} token{'' if size == 1 else 's'} per rank"
