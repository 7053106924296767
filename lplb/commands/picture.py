"""A placement as a picture: ranks, the experts in their slots coloured by copies, and rank loads beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

__all__ = ["check_name", "picture"]

_INK, _FADED = "#24292f", "#6e7781"
_COLORS = ("#eaeef2", "#9ecbff", "#54aeff", "#0969da", "#8250df", "#cf222e")
"""Of experts by their number of copies, from one copy to as many as that or more."""
_EVEN, _LP = "#8250df", "#1a7f37"
_MOST_NUMBERS = 1200  # cells up to which experts are named


def check_name(path: str | os.PathLike[str]) -> None:
    """Refuse a picture that could not be written, before the work.

    Raises:
        FileNotFoundError: its folder is missing.
        ValueError: its suffix is none that can be drawn.
    """
    folder, name = os.path.split(os.path.abspath(path))
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the picture's folder {folder} does not exist")
    if os.path.splitext(name)[1].lstrip(".").lower() not in formats:
        raise ValueError(f"the picture's name is {name!r}, allowed is one that ends in .{', .'.join(formats)}")


def picture(report: Mapping[str, Any], entry: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw one layer.

    Args:
        report: of `lplb.commands.placing.shown`.
        entry: one of its layers.
        path: where the picture goes; the suffix decides about its format.

    Raises:
        OSError: it cannot be written.
    """
    experts = np.array(entry["ranks"])
    loads = "even_loads" in entry
    wide = min(18.0, max(6.0, 1.6 + 0.34 * experts.shape[1])) + (4.0 if loads else 0.0)
    figure = Figure(figsize=(wide, min(20.0, max(3.0, 1.5 + 0.22 * len(experts)))), dpi=160, layout="constrained")
    of_layers = f"layer {entry['layer']} of {report['n_layers']}: " if report["n_layers"] > 1 else ""
    title = f"{of_layers}{report['n_logical']} experts in {experts.size} slots on {report['n_ranks']} ranks"
    figure.suptitle(title, fontsize=13, color=_INK, fontweight="bold")
    axes = figure.subplots(1, 2 if loads else 1, sharey=True, squeeze=False)[0]
    _cells(figure, axes[0], experts, np.array(entry["copies"]))
    if loads:
        _loads(axes[1], entry)
    figure.savefig(path)


def _cells(figure: Figure, axes: Axes, experts: Any, copies: Any) -> None:
    most = min(int(copies.max()), len(_COLORS))
    norm = BoundaryNorm(np.arange(most + 1) + 0.5, most) if most > 1 else BoundaryNorm([0.5, 1.5], 1)
    shown = np.minimum(copies[experts], most)
    image = axes.imshow(shown, cmap=ListedColormap(_COLORS[:most]), norm=norm, aspect="auto", interpolation="nearest")
    if experts.size <= _MOST_NUMBERS:
        for (rank, slot), expert in np.ndenumerate(experts):
            ink = "white" if shown[rank, slot] > 3 else _INK
            axes.text(slot, rank, str(expert), ha="center", va="center", fontsize=7, color=ink)
    axes.set_ylabel("rank", fontsize=11, color=_INK)
    axes.set_xlabel("slot", fontsize=11, color=_INK)
    axes.tick_params(labelsize=9)
    bar = figure.colorbar(image, ax=axes, ticks=range(1, most + 1), pad=0.01)
    bar.set_label("copies of the expert", fontsize=10, color=_INK)
    if copies.max() > most:
        bar.ax.set_yticklabels([*map(str, range(1, most)), f"{most} or more"])


def _loads(axes: Axes, entry: Mapping[str, Any]) -> None:
    even, lp = np.array(entry["even_loads"]), np.array(entry["lp_loads"])
    ranks = np.arange(len(even))
    names = {"even": "even split", "lp": "LP"}
    labels = {k: f"{v}: {entry[k]:.2f}" if entry[k] is not None else v for k, v in names.items()}
    axes.barh(ranks - 0.2, even, height=0.4, color=_EVEN, label=labels["even"])
    axes.barh(ranks + 0.2, lp, height=0.4, color=_LP, label=labels["lp"])
    axes.axvline(float(even.mean()), color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel("tokens, mean over batches (dashed: mean over ranks)", fontsize=10, color=_FADED)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        fontsize=10, title="busiest rank / mean", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False
    )
