"""The demo: one table and one picture of the recorded router trace on simulated ranks; `run_demo` is ``lplb demo``."""

import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lplb.replay import (
    EVEN,
    LP,
    LPLB,
    METHODS,
    NONE,
    ON_EPLB,
    REFRESH,
    SPARE_SLOTS,
    TOPOLOGIES,
    WINDOW,
    Replay,
    replay_trace,
)
from lplb.trace import load_trace

__all__ = ["notes", "picture", "run_demo", "table"]


def table(replays: Sequence[Replay]) -> Table:
    """Return the results of one or more replays as one table, a section for each."""
    first = replays[0]
    n_batches, n_layers, _ = first.loads[NONE].shape
    span = f"batches {first.first_counted} to {n_batches - 1}"
    shown = Table(title=f"Rank loads of the router trace, {span}, {n_layers} layers")
    shown.add_column("")
    for name in ("imbalance\nmean", "imbalance\nworst", "tokens\nmoved", "plan time\n(median)"):
        shown.add_column(name, justify="right")
    for result in replays:
        counted = slice(result.first_counted, None)
        choices = int(result.loads[NONE][counted].sum())
        graph = TOPOLOGIES[result.n_ranks][0]
        shown.add_row(f"[bold]{result.n_ranks} ranks, {result.n_slots} slots")
        for method in METHODS:
            name = f"{method} ({graph})" if method == LPLB else method
            ratio = result.imbalance(method)[counted]
            moved = f"{result.moved[method][counted].sum() / choices:.1%}"
            micros = f"{np.median(result.micros[method]):.0f} µs" if method in result.micros else "-"
            style = "green" if method == LP else None
            shown.add_row(f"  {name}", f"{ratio.mean():.3f}", f"{ratio.max():.3f}", moved, micros, style=style)
        ratio = result.bound_imbalance[counted]
        shown.add_row("  certified lower bound", f"{ratio.mean():.3f}", f"{ratio.max():.3f}", "-", "-", style="dim")
        shown.add_section()
    return shown


_NOTES = (
    (
        "imbalance",
        f"Busiest rank's tokens / mean over ranks. All batches are planned and checked; where there are more than "
        f"{REFRESH}, the first {REFRESH}, which have no history, are not counted for any method.",
    ),
    (
        "tokens moved",
        "Share of token choices served by a copy that is not the expert's first (LPLB: by a redundant slot). "
        "Moving the experts themselves is not counted.",
    ),
    (
        "plan time",
        "One Planner.run of one rank on one core of this machine; a copy of known counts stands in for the all-gather.",
    ),
    (
        "lower bound",
        "No split of the tokens over the placement made for the LP has a smaller maximum; from the LP's dual.",
    ),
    (
        "placements",
        f"No balancing: one slot per expert, in order. The others: {SPARE_SLOTS} spare slots per rank, remade every "
        f"{REFRESH} batches from the loads of the {WINDOW} before; until then all use the topology, experts in order.",
    ),
)


def notes() -> Table:
    """Return what the words in the table mean."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold dim", no_wrap=True)
    grid.add_column(style="dim")
    for word, meaning in _NOTES:
        grid.add_row(word, meaning)
    return grid


_INK, _FADED = "#24292f", "#6e7781"
_COLORS = {NONE: "#b35900", EVEN: "#8250df", LPLB: "#0969da", ON_EPLB: "#0a8a8a", LP: "#1a7f37"}


def picture(result: Replay, path: str | os.PathLike[str], layer: int | None = None) -> None:
    """Draw the rank loads before and after, and the imbalance of every method, over the batches of one layer.

    Args:
        result: a replay.
        path: where the picture goes; the suffix decides about its format.
        layer: which layer; by default the one with the largest mean imbalance without balancing.
    """
    if layer is None:
        layer = int(result.imbalance(NONE).mean(0).argmax())
    figure = Figure(figsize=(10, 8.2), dpi=160, layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=[1, 0.02], height_ratios=[1, 1, 1.15])
    before, after, lines = (figure.add_subplot(grid[row, 0]) for row in range(3))
    figure.suptitle(
        f"Tokens on each of {result.n_ranks} ranks, batch after batch (layer {layer} of the router trace)",
        fontsize=14,
        color=_INK,
        fontweight="bold",
    )
    _heat(before, result, layer, NONE, "Before: one copy of every expert")
    image = _heat(after, result, layer, LP, f"After: {SPARE_SLOTS} spare slots per rank, placed for the LP, LP split")
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[:2, 1]), extend="max", ticks=[0, 0.5, 1, 1.5, 2, 2.5, 3])
    bar.set_label("rank load / mean", fontsize=11, color=_INK)
    _lines(lines, result, layer)
    _mark_domains(before, result.domain, named=True)
    for axes in (after, lines):
        _mark_domains(axes, result.domain, named=False)
    _mark_refreshes(after, len(result.domain))
    lines.set_xlabel("batch", fontsize=11, color=_INK)
    figure.savefig(path)


def _heat(axes: Axes, result: Replay, layer: int, method: str, title: str) -> AxesImage:
    """Rank by batch: load over mean, on the same scale in every call."""
    loads = result.loads[method][:, layer]
    ratio = (loads / loads.mean(1, keepdims=True)).T
    image = axes.imshow(
        ratio, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1, 0, 3), interpolation="nearest", origin="lower"
    )
    busiest = result.imbalance(method)[result.first_counted :, layer].mean()
    axes.set_title(title, fontsize=12, color=_INK, loc="left", pad=22 if method == NONE else 6)
    axes.set_title(
        f"busiest rank: {busiest:.2f}× the mean",
        fontsize=12,
        color=_COLORS[method],
        loc="right",
        pad=22 if method == NONE else 6,
        fontweight="bold",
    )
    axes.set_ylabel("rank", fontsize=11, color=_INK)
    axes.tick_params(bottom=False, labelbottom=False, labelsize=10)
    return image


def _lines(axes: Axes, result: Replay, layer: int) -> None:
    """Imbalance of every method and the lower bound, batch after batch."""
    batches = np.arange(len(result.domain))
    for method in METHODS:
        ratio = result.imbalance(method)[:, layer]
        width = 2.0 if method == LP else 1.3
        label = f"{method}: {ratio[result.first_counted :].mean():.2f}"
        axes.plot(batches, ratio, color=_COLORS[method], linewidth=width, label=label)
    bound = result.bound_imbalance[:, layer]
    label = f"certified lower bound: {bound[result.first_counted :].mean():.2f}"
    axes.plot(batches, bound, color=_INK, linewidth=1, linestyle=(0, (2, 2)), label=label)
    axes.set_xlim(-0.5, len(batches) - 0.5)
    axes.set_ylim(bottom=1)
    axes.set_ylabel("busiest rank / mean", fontsize=11, color=_INK)
    axes.tick_params(labelsize=10)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=10, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _mark_domains(axes: Axes, domain: Sequence[str], *, named: bool) -> None:
    """Mark where the text of the trace changes, and name it above the axes."""
    starts = [b for b in range(len(domain)) if b == 0 or domain[b] != domain[b - 1]]
    for start, end in zip(starts, [*starts[1:], len(domain)], strict=True):
        if start:
            axes.axvline(start - 0.5, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))
        if named:
            place: dict[str, Any] = {"xy": ((start + end - 1) / 2, 1), "xycoords": axes.get_xaxis_transform()}
            offset: dict[str, Any] = {"xytext": (0, 5), "textcoords": "offset points"}
            name = domain[start].replace("prose-code", "prose → code")
            axes.annotate(name, **place, **offset, ha="center", fontsize=10, color=_FADED)


def _mark_refreshes(axes: Axes, n_batches: int) -> None:
    """Mark under the axes where the experts were placed anew."""
    at = np.arange(REFRESH, n_batches, REFRESH) - 0.5
    marks = axes.plot(at, np.full(len(at), -0.035), "^", color=_FADED, markersize=5, clip_on=False)
    marks[0].set_transform(axes.get_xaxis_transform())
    axes.set_xlabel(
        f"▲ experts placed anew, from the {WINDOW} batches before; until the first there is no history (not counted)",
        fontsize=10,
        color=_FADED,
        loc="right",
        labelpad=11,
    )


def _check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a picture that could not be written, before the work."""
    folder, name = os.path.split(os.path.abspath(path))
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the picture's folder {folder} does not exist")
    if os.path.splitext(name)[1].lstrip(".").lower() not in formats:
        raise ValueError(f"the picture's name is {name!r}, allowed is one that ends in .{', .'.join(formats)}")


def run_demo(
    ranks: Sequence[int] = (8, 32),
    n_batches: int | None = None,
    path: str | os.PathLike[str] = "lplb-demo.png",
    console: Console | None = None,
) -> list[Replay]:
    """Replay the packaged trace, print the table and write the picture.

    Args:
        ranks: numbers of ranks, each 8, 16 or 32; the picture shows the last.
        n_batches: how many batches; by default all 240.
        path: where the picture goes.
        console: where the table goes; by default the standard output.

    Returns:
        The replays, as in ``ranks``.

    Raises:
        ValueError: an argument is not allowed.
        CheckFailed: a planner did not return what it planned.
        OSError: the picture cannot be written.
    """
    _check_writable(path)
    console = console or Console()
    start = time.perf_counter()
    trace = load_trace()
    n_batches = len(trace.domain) if n_batches is None else n_batches
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    replays = []
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = [progress.add_task(f"{n} ranks", total=n_batches, start=False) for n in ranks]
        for n_ranks, task in zip(ranks, tasks, strict=True):
            progress.start_task(task)
            replays.append(replay_trace(trace, n_ranks, n_batches, partial(progress.advance, task)))
    console.print(table(replays))
    console.print(notes())
    runs = sum(micros.size for result in replays for micros in result.micros.values())
    console.print(f"Checked: {runs:,} planner runs, each index of the expert asked for, loads equal to quotas.")
    picture(replays[-1], path)
    console.print(
        f"Picture: {os.path.abspath(path)}  ({time.perf_counter() - start:.0f} s)", soft_wrap=True, markup=False
    )
    return replays
