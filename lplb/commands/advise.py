"""The command ``lplb advise``: its options, a late progress bar, tables and sentences."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from lplb.advise import choices
from lplb.advise.worth import FACTORS, Study, in_words
from lplb.commands.loads import MANY, add_first_axis, check_paths
from lplb.cost import ASSUMED_PLANNER_SECONDS, HARDWARE
from lplb.models import MODELS
from lplb.plan import SOLVERS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["add_arguments", "late_progress", "run", "show"]

_DESCRIPTION = """\
Models a layer's time for every redundancy, policy and split, and says what pays, and from what batch size. Nothing in
it is measured: rates are data sheets times an efficiency, the planner's time is an assumption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = _DESCRIPTION
    add = parser.add_argument
    add("--model", required=True, choices=MODELS, help="whose experts")
    add("--hardware", default="h200", choices=HARDWARE, help="what each rank is (default: h200)")
    add("--ranks", type=int, required=True, metavar="N", help="ranks of the expert-parallel group")
    add("--nodes", type=int, metavar="N", help="nodes that they are on (default: one per 8 ranks)")
    add("--group-size", type=int, metavar="N", help="consecutive ranks that balance among themselves (default: all)")
    add(
        "--load",
        action="append",
        metavar="LOADS",
        help=f"lognormal (default), trace (the recorded one), or a file; {MANY}",
    )
    add_first_axis(parser)
    add("--sigma", type=float, default=0.85, help="spread of lognormal's popularities; 0: balanced (default: 0.85)")
    add("--noise", type=float, default=0.3, help="spread of each batch's own factors (default: 0.3)")
    add("--tokens", type=int, nargs="+", default=[64, 4096], metavar="N", help="tokens per rank (default: 64 4096)")
    add("--redundancy", type=int, nargs="+", default=[0, 1, 2, 4], metavar="N", help="slots per rank to look at")
    add(
        "--planner-seconds",
        type=float,
        default=ASSUMED_PLANNER_SECONDS,
        metavar="S",
        help=f"of the LP per layer (default: {ASSUMED_PLANNER_SECONDS:g}, assumed); half and twice of it are shown too",
    )
    add("--exchange", default="auto", choices=choices.EXCHANGES, help="how tokens travel between nodes (default: auto)")
    add("--solver", default="ipm", choices=SOLVERS, help="of the LP (default: ipm)")
    add("--seed", type=int, default=0, metavar="N", help="of generated loads and drawn tokens (default: 0)")
    add("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Study and print.

    Returns:
        The exit status: 0, 1 when something failed, 2 when a package is missing.
    """
    try:
        _run(arguments)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        print('lplb advise needs rich for its tables: pip install "lplb[demo]", or use --json', file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError) as error:
        print(f"lplb advise: {error}", file=sys.stderr)
        return 1
    return 0


def _run(a: argparse.Namespace) -> None:
    if not a.json:
        from rich.console import Console
    names = a.load or ["lognormal"]
    check_paths("--load", names, f"{', '.join(choices.LOADS)}, or a file")
    if a.nodes is None and a.ranks > 8 and a.ranks % 8:
        raise ValueError(f"--ranks is {a.ranks}, allowed without --nodes is up to 8 or a multiple of 8")
    model = MODELS[a.model]
    with late_progress() as on_progress:
        found = choices.study(
            a.model,
            a.hardware,
            a.ranks,
            loads=choices.loads_by_name(
                names, model, sigma=a.sigma, noise=a.noise, seed=a.seed, first_axis=a.first_axis
            ),
            n_nodes=a.nodes,
            group_size=a.group_size,
            redundancy=a.redundancy,
            tokens=a.tokens,
            planner_seconds=a.planner_seconds,
            exchange=a.exchange,
            solver=a.solver,
            seed=a.seed,
            on_progress=on_progress,
        )
    if a.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        show(found, Console())


def show(found: Study, console: Console) -> None:
    """Print tables and sentences; needs rich."""
    from rich.markup import escape

    nodes = "1 node" if found.n_nodes == 1 else f"{found.n_nodes} nodes"
    console.print(
        f"[bold]{found.model.name}[/bold] on {found.n_ranks} × {found.hardware.name} ({nodes}, balance groups of "
        f"{found.group_size}); loads {escape(found.loads)}"
    )
    console.print(_options_table(found))
    if any(option.split == "lp" for option in found.options):
        console.print(_crossover_table(found))
    for text in [*found.notes, *found.sentences()]:
        console.print(f"• {escape(text)}")


def _table(title: str) -> Table:
    """A table whose columns fit a terminal of 80."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)


def _options_table(found: Study) -> Table:
    """For each asked size a section, for each redundancy a row: the fastest even split and the fastest LP."""
    shown = _table(
        "A layer's modelled time; the LP's with the assumed planner's.\nSaved: of the time of doing nothing."
    )
    shown.add_column("redundant\nslots a rank", no_wrap=True)
    shown.add_column("memory\na rank", justify="right", no_wrap=True)
    for split in ("even:", "LP:"):
        shown.add_column(f"{split}\npolicy")
        for name in ("imbal.", "time"):
            shown.add_column(f"\n{name}", justify="right", no_wrap=True)
    shown.add_column("\nsaved", justify="right", no_wrap=True)
    for size in found.asked:
        i, advised = found.sizes.index(size), found.advice(size)
        shown.add_row(f"{size:,} tokens", style="bold")
        for level in found.levels():
            cells, fastest = [], float("inf")
            for split in ("even", "lp"):
                option = found.best(level, split, size)
                if option is None:
                    cells += ["-", "-", "-"]
                    continue
                seconds = float(found.seconds(option)[i])
                fastest = min(fastest, seconds)
                mark = "[bold green]{}[/bold green]" if option is advised.option else "{}"
                cells += [mark.format(t) for t in (option.policy, f"{option.imbalance[i]:.2f}", in_words(seconds))]
            saved = f"{1 - fastest / advised.nothing:.1%}"
            shown.add_row(f"  {level}", f"{found.memory(level):.1f} GiB", *cells, saved)
        shown.add_section()
    return shown


def _crossover_table(found: Study) -> Table:
    """From what size the LP pays: redundancies by hardware and planner's time."""
    shown = _table("The LP pays from so many tokens per rank on,\nif its planner takes so long (assumed).")
    shown.add_column("redundant\nslots", no_wrap=True)
    names = list(found.options[0].seconds)
    for name in names:
        for factor in FACTORS:
            shown.add_column(f"{name}\n{in_words(found.planner_seconds * factor)}", justify="right")
    for level in found.levels():
        sizes = [found.lp_pays_from(level, name, factor) for name in names for factor in FACTORS]
        none = "never" if any((o.redundant, o.split) == (level, "lp") for o in found.options) else "-"
        shown.add_row(str(level), *(none if size is None else f"{size:,}" for size in sizes))
    return shown


@contextmanager
def late_progress(after: float = 2.0) -> Iterator[Callable[[int, int], None]]:
    """Yield an ``on_progress`` for `lplb.advise.study`: a bar on the standard error, after so many seconds."""
    begin, bars = time.perf_counter(), ExitStack()
    update: Callable[[int, int], None] | None = None

    def tick(done: int, of: int) -> None:
        nonlocal update
        if update is None and time.perf_counter() - begin >= after:
            update = _bar(bars)
        if update is not None:
            update(done, of)

    with bars:
        yield tick


def _bar(bars: ExitStack) -> Callable[[int, int], None]:
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return lambda done, of: None
    bar = bars.enter_context(Progress(console=Console(stderr=True), transient=True))
    task = bar.add_task("options")
    return lambda done, of: bar.update(task, completed=done, total=of)
