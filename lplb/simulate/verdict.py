"""Which configuration is best at what: the least imbalance and the least modelled time need not be the same one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lplb.simulate.results import HEADINGS, cells, section
from lplb.simulate.simulation import Simulation

__all__ = ["best_columns", "remark"]

_IMBALANCE, _TIME = HEADINGS.index(("imbal.", "mean")), HEADINGS.index(("time", "(model)"))


def _imbalance(s: Simulation) -> float:
    return s.summary.imbalance_mean


def _seconds(s: Simulation) -> float:
    """Modelled; infinite where nothing was."""
    return float("inf") if s.summary.layer_seconds_mean is None else s.summary.layer_seconds_mean


def _sections(simulations: Sequence[Simulation]) -> list[list[Simulation]]:
    names = dict.fromkeys(map(section, simulations))
    return [[s for s in simulations if section(s) == name] for name in names]


def best_columns(simulations: Sequence[Simulation]) -> list[set[int]]:
    """Return for each simulation the columns of `cells` in which none on as many ranks is shown with less.

    Looked at are the mean imbalance and the modelled time.

    Args:
        simulations: of the same loads.
    """
    least: dict[str, dict[int, str]] = {}
    for same in _sections(simulations):
        ways: list[tuple[int, Callable[[Simulation], float]]] = [(_IMBALANCE, _imbalance), (_TIME, _seconds)]
        best = {column: cells(min(same, key=value))[column] for column, value in ways}
        least[section(same[0])] = {column: text for column, text in best.items() if text != "-"}
    return [{column for column, text in least[section(s)].items() if cells(s)[column] == text} for s in simulations]


def remark(simulations: Sequence[Simulation], top_k: int, planner_seconds: float) -> str:
    """Say where the least imbalance is not the least modelled time, and why; empty where it is, or without a model.

    Args:
        simulations: of the same loads.
        top_k: experts that each token chooses.
        planner_seconds: what the model takes for the planner of ``"lp"`` splits.
    """
    found, costly = [], set()
    for same in _sections(simulations):
        even = min(same, key=lambda s: (_imbalance(s), _seconds(s)))
        fast = min(same, key=_seconds)
        if cells(fast)[_TIME] == cells(even)[_TIME]:
            continue
        choices = even.mean_load.mean()
        tokens = f"{choices / top_k:,.{0 if choices >= 10 * top_k else 1}f} tokens, {choices:,.0f} choices, per rank"
        found.append(
            f"on {section(even)} ({tokens}) {even.setting.name} {cells(even)[_TIME]}, {fast.setting.name} "
            f"{cells(fast)[_TIME]}"
        )
        planned = even.setting.split == "lp" and even.setting.policy != "none"
        if planned:
            costly.add("planner")
        if not planned or _seconds(even) - planner_seconds > _seconds(fast):
            costly.add("copies")
    if not found:
        return ""
    parts = {
        "copies": "copies in use, whose weights are read once more each,",
        "planner": f"the {planner_seconds * 1e6:.0f} µs that are assumed for the planner",
    }
    cost = " and ".join(text for name, text in parts.items() if name in costly)
    return (
        f"The least imbalance is not the fastest, by the model: {'; '.join(found)}. There {cost} cost more than "
        "balance saves; lplb advise says from how many tokens on it pays, and --scale N counts every token N times."
    )
