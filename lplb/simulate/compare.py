"""Many configurations on the same loads, side by side, and their table: what ``lplb simulate`` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lplb.arguments import whole_number
from lplb.scenes import Scene
from lplb.simulate.placers import CHANGE
from lplb.simulate.results import HEADINGS, NOTES, cells, section
from lplb.simulate.run import LayerSeconds, check_configuration, simulate
from lplb.simulate.simulation import Simulation
from lplb.simulate.verdict import best_columns

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Configuration", "compare", "configurations", "notes", "table"]


@dataclass(frozen=True)
class Configuration:
    """What differs from one simulation to the next."""

    n_ranks: int
    """Ranks."""
    policy: str
    """Who places experts."""
    split: str
    """Who shares out batches."""


def configurations(ranks: Sequence[int], policies: Sequence[str], splits: Sequence[str]) -> list[Configuration]:
    """Return every combination, in this order, each once; ``"none"`` has no choice of splits, and comes first;
    ``"lp-change"``, which is for the LP, has no even splits.

    Args:
        ranks: numbers of ranks.
        policies: as for `simulate`.
        splits: as for `simulate`.
    """
    for name, given in (("ranks", ranks), ("policies", policies), ("splits", splits)):
        if isinstance(given, str) or not len(given):
            raise ValueError(f"{name} is {given!r}, allowed is a sequence of one or more")
    wanted = []
    for n_ranks in ranks:
        wanted += [Configuration(n_ranks, "none", splits[0])] if "none" in policies else []
        pairs = [(p, split) for p in policies for split in splits if p != "none"]
        wanted += [Configuration(n_ranks, *pair) for pair in pairs if pair != (CHANGE, "even")]
    if not wanted:
        raise ValueError(
            f"policies is {list(policies)} with splits {list(splits)}, allowed is split 'lp', which it is for"
        )
    return list(dict.fromkeys(wanted))


def compare(
    scene: Scene,
    wanted: Sequence[Configuration],
    *,
    slots: int | None = None,
    redundant: int = 2,
    layer_seconds: Callable[[Configuration], LayerSeconds] | None = None,
    on_batches: Callable[[Configuration, int], object] | None = None,
    **options: Any,
) -> list[Simulation]:
    """Simulate every configuration on the same loads.

    All configurations are checked before the first is simulated.

    Args:
        scene: the loads.
        wanted: the configurations.
        slots: on all ranks; by default ``redundant`` says. ``"none"`` has one per expert.
        redundant: slots per rank beyond those that hold all experts once.
        layer_seconds: makes the model of a layer's time for a configuration.
        on_batches: called with a configuration and how many of its batches are done, after each placement's.
        options: of `simulate`, for all.

    Returns:
        The simulations, as in ``wanted``.

    Raises:
        TypeError, ValueError: an argument is not allowed.
        CheckFailed: see `simulate`.
    """
    redundant = whole_number("redundant", redundant, 0)
    n_logical = scene.counts.shape[-1]
    calls = []
    for c in wanted:
        spread = -(-n_logical // whole_number("n_ranks", c.n_ranks, 1)) + redundant
        n_physical = n_logical if c.policy == "none" else spread * c.n_ranks if slots is None else slots
        calls.append({"n_ranks": c.n_ranks, "n_physical": n_physical, "policy": c.policy, "split": c.split, **options})
        check_configuration(scene.counts, **calls[-1])
    done = []
    for c, call in zip(wanted, calls, strict=True):
        model = None if layer_seconds is None else layer_seconds(c)
        report = None if on_batches is None else (lambda n, c=c: on_batches(c, n))
        done.append(simulate(scene.counts, layer_seconds=model, on_batches=report, **call))
    return done


def table(simulations: Sequence[Simulation], loads: str) -> Table:
    """Return the results as one table, a section for each number of ranks; needs rich.

    The least mean imbalance and the least modelled time of a section are green, each in its column.

    Args:
        simulations: of the same loads.
        loads: what the loads are called.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    s = simulations[0]
    n_batches, n_layers, _ = s.rank_load.shape
    span = f"batches {s.first} to {s.first + n_batches - 1}, {n_layers} layers, {s.setting.n_logical} experts"
    shown = Table(title=Text(f"{loads}: {span}"), box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    shown.add_column("policy /\nsplit", min_width=22, max_width=22)
    for heading in HEADINGS:
        shown.add_column("\n".join(heading), justify="right", no_wrap=True)
    last = None
    for s, best in zip(simulations, best_columns(simulations), strict=True):
        if section(s) != last:
            last = section(s)
            shown.add_section()
            shown.add_row(f"[bold]{last}")
        texts = [Text(text, style="bold green" if i in best else "") for i, text in enumerate(cells(s))]
        shown.add_row(f"  {s.setting.name}", *texts)
    return shown


def notes(simulations: Sequence[Simulation], costs: str) -> Table:
    """Return what the words in the table mean, those that it uses; needs rich.

    Args:
        simulations: as for `table`.
        costs: what the layer time is a model of.
    """
    from rich.table import Table

    s = simulations[0]
    unused = {"cross-node"} if s.cross_node is None else set()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold dim", no_wrap=True)
    grid.add_column(style="dim")
    for word, meaning in NOTES:
        if word not in unused:
            grid.add_row(word, meaning)
    if s.layer_seconds is not None:
        grid.add_row("time", f"Of a layer: a model, not a measurement (lplb.cost): {costs}.")
    often = f"Made every {s.setting.refresh} batches" if s.setting.refresh else "Made once"
    slots = "; ".join(sorted({f"{o.setting.n_physical} on {o.setting.n_ranks} ranks" for o in simulations}, key=len))
    grid.add_row("slots", f"{slots}.")
    grid.add_row(
        "placements",
        f"{often} from the {s.setting.window} batches before; batches 0 to {s.first - 1} are history only and not "
        "counted for any method.",
    )
    return grid
