"""Load profiles for advice: how popular experts are, batch by batch, for a model of any number of experts.

A profile is cut into cases: batches that a placement may be made from, and batches after them that it has to serve.
`Profile.counts` draws those for any number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lplb.arguments import seen
from lplb.models import ModelShape

__all__ = ["BATCHES", "MOST_CASES", "Case", "Profile", "profile", "side_by_side"]

MOST_CASES = 4
"""Layers or times that are looked at."""
_HISTORY = 32  # batches that a placement is made from
_SERVED = 8  # batches of a case that it serves
BATCHES = _HISTORY + _SERVED
"""Batches that fill a case."""

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Case:
    """One layer at one time."""

    history: _Floats
    """Loads that a placement may be made from, ``[batches, n_logical]``."""
    share: _Floats
    """Each expert's share of the batches after them, ``[batches, n_logical]``; rows add up to 1."""


@dataclass(frozen=True, eq=False)
class Profile:
    """Loads as shares of experts, in cases of equal size."""

    name: str
    """What reports call it."""
    cases: list[Case]
    """At least one; as many batches of each kind in all."""
    notes: list[str]
    """What a reader must know of how they came about."""

    @property
    def n_logical(self) -> int:
        """Logical experts."""
        return int(self.cases[0].share.shape[1])

    def counts(self, choices: int, seed: int) -> _Ints:
        """Draw whole tokens for the served batches, by their shares.

        Args:
            choices: tokens of a batch, each once for each of its experts.
            seed: the same seed and number give the same counts.

        Returns:
            int64 ``[cases, batches, n_logical]``.
        """
        rng = np.random.default_rng([seed, choices])
        drawn: _Ints = rng.multinomial(choices, np.stack([case.share for case in self.cases]))
        return drawn


def side_by_side(counts: npt.NDArray[Any], model: ModelShape, name: str) -> tuple[npt.NDArray[Any], list[str]]:
    """Make layers of a model's experts from layers of fewer: those of consecutive layers stand side by side.

    Args:
        counts: ``[layers, batches, experts]``.
        model: whose experts they shall be.
        name: what messages call the loads.

    Returns:
        Loads ``[layers, batches, n_logical]``, and what a reader must know of it.

    Raises:
        ValueError: they do not make up the model's experts.
    """
    n_layers, n_batches, n_experts = counts.shape
    together, rest = divmod(model.n_logical, n_experts)
    if rest or not 1 <= together <= n_layers:
        allowed = ", ".join(str(n_experts * k) for k in range(1, n_layers + 1))
        raise ValueError(
            f"{name} has {n_layers} layers of {n_experts} experts, which make up models of {allowed} experts; "
            f"{model.name} has {model.n_logical}: take loads of your own, or generated ones"
        )
    if together == 1:
        return counts, []
    groups = n_layers // together
    stacked = counts[: groups * together].reshape(groups, together, n_batches, n_experts)
    note = (
        f"Layers of {name} have {n_experts} experts: {together} of them stand side by side for the {model.n_logical} "
        f"of a layer of {model.name}."
    )
    return stacked.transpose(0, 2, 1, 3).reshape(groups, n_batches, -1), [note]


def profile(loads: npt.NDArray[Any], model: ModelShape, name: str, notes: Sequence[str] = ()) -> Profile:
    """Cut loads into cases, spread evenly over layers and time.

    Args:
        loads: ``[layers, batches, n_logical]``, finite, not negative, not all zero. Layers without a token, which is
            how dense layers are recorded, are left out, and batches that are empty in one of the others.
        model: whose experts they are.
        name: what reports and messages call them.
        notes: what a reader must know of them.

    Raises:
        TypeError: ``loads`` is not an array of a real dtype.
        ValueError: they have another number of experts than the model, or a value or shape is not allowed.
    """
    values, told = _checked(loads, model, name)
    told = [*notes, *told]
    n_layers, n_batches, _ = values.shape
    history = min(_HISTORY, max(n_batches // 2, n_batches - _SERVED))
    served = min(_SERVED, n_batches - history)
    room = n_batches - history - served  # starts of a case: 0 to room
    n_cases = min(MOST_CASES, max(n_layers, room + 1))
    share = values / values.sum(-1, keepdims=True)
    cases = []
    for i in range(n_cases):
        layer = i * n_layers // n_cases
        start = round(i * room / max(n_cases - 1, 1))
        middle = start + history
        past = values[layer, start:middle] if history else values[layer, :1]
        cases.append(Case(past, share[layer, middle : middle + served]))
    if not history:
        told.append(
            "There is one batch only: placements are made from the loads that they serve, as if nothing drifted."
        )
    if n_layers > n_cases:
        told.append(f"Of {n_layers} layers {n_cases} are looked at, spread evenly.")
    hottest = max(float(case.share.max()) for case in cases)
    if hottest * model.top_k > 1.001:
        told.append(
            f"In some batch one expert has {hottest:.1%} of all choices, more than the {1 / model.top_k:.1%} that a "
            f"router with top-{model.top_k} can give it."
        )
    return Profile(name, cases, told)


def _checked(loads: object, model: ModelShape, name: str) -> tuple[_Floats, list[str]]:
    """Loads of the model's experts as float64, none of them empty, and what was left out."""
    if not isinstance(loads, np.ndarray) or loads.dtype.kind not in "iuf":
        raise TypeError(f"loads is {seen(loads)}, allowed is an array of a real dtype")
    if loads.ndim != 3 or not loads.size:
        raise ValueError(f"loads has shape {list(loads.shape)}, allowed is [layers, batches, n_logical], not empty")
    if loads.shape[2] != model.n_logical:
        raise ValueError(
            f"{name} has {loads.shape[2]} experts, allowed are those of {model.name}, {model.n_logical}: experts are "
            "not mapped to those of another model"
        )
    values = loads.astype(np.float64)
    odd = ~((values >= 0) & (values < 1e30))  # true for NaN as well; sums stay finite
    if odd.any():
        raise ValueError(f"{name} has {values[odd][0]} at {np.argwhere(odd)[0].tolist()}, allowed are 0 to 1e30")
    full = values.sum((1, 2)) > 0
    if not full.any():
        raise ValueError(f"{name} is 0 everywhere, allowed is at least one load above 0")
    used = values[full]
    busy = (used.sum(-1) > 0).all(0)
    if not busy.any():
        raise ValueError(
            f"{name} has in each of {len(busy)} batches a layer without tokens, allowed is a batch with all"
        )
    told = []
    if not full.all():
        told.append(f"{np.count_nonzero(~full)} of {len(full)} layers have no tokens and are left out.")
    if not busy.all():
        told.append(f"{np.count_nonzero(~busy)} of {len(busy)} batches have a layer without tokens and are left out.")
    return used[:, busy], told
