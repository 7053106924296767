"""The report of simulations: one HTML page that needs nothing else, no network and no server.

Plotly's script is inlined (plotly.js, MIT licence, from the Python package); by a Content-Security-Policy the page
forbids itself any connection. Names that users gave are data: they are escaped in HTML and in the script's JSON, and
the script makes text nodes of them, or escapes them for Plotly. What does not fit into a page of bounded size is
down-sampled, and the page says how.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped, import-not-found, unused-ignore]

from lplb.simulate.results import NOTES, cells, section, write_text
from lplb.simulate.simulation import Simulation
from lplb.simulate.verdict import best_columns

__all__ = ["page", "write"]

MOST_COLUMNS = 240
"""Of heat maps and lines: consecutive batches share one where there are more."""
FEWEST_COLUMNS = 40
"""Rather than fewer, layers are left out."""
MOST_CELLS = 1_500_000
"""Of all heat maps together: 4 MB of the page."""
MOST_SLOTS = 600_000
"""Of all placements together: 1.6 MB of the page."""
CELL_SCALE = 1000
"""Heat maps hold load / mean in thousandths, as 16 bits."""

_Floats = npt.NDArray[np.float64]


def write(
    path: str | os.PathLike[str],
    simulations: Sequence[Simulation],
    phase: Sequence[str],
    loads: str,
    costs: str,
    remark: str = "",
) -> None:
    """Write the page; arguments and errors are those of `page`.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, page(simulations, phase, loads, costs, remark))


def page(simulations: Sequence[Simulation], phase: Sequence[str], loads: str, costs: str, remark: str = "") -> str:
    """Return the page.

    Args:
        simulations: of the same loads, one or more, all placed at the same batches.
        phase: what each batch of the loads is made of.
        loads: what the loads are called; any text.
        costs: what the layer time is a model of.
        remark: what a reader must know beside the headline, as `lplb.simulate.verdict.remark` says it; any text.

    Raises:
        ValueError: there is no simulation, or they are of different batches or layers.
    """
    _check(simulations, phase)
    best = min(simulations, key=lambda s: s.summary.imbalance_mean / _baseline(s, simulations).summary.imbalance_mean)
    data = _data(simulations, phase, best)
    parts = {
        "TITLE": html.escape(loads),
        "SPAN": html.escape(_span(simulations[0])),
        "HEADLINE": _headline(best, _baseline(best, simulations))
        + f" <small>{html.escape(remark)}</small>" * bool(remark),
        "ROWS": _rows(simulations),
        "NOTES": "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(text)}</dd>" for word, text in NOTES),
        "COSTS": html.escape(costs),
        "SAMPLING": html.escape(data.pop("sampling")),
        "PLACED": html.escape(_placed(simulations[0])),
        "STYLE": _file("report.css"),
        "PLOTLY": get_plotlyjs(),
        "DATA": _in_script(data),
        "SCRIPT": _file("report.js"),
    }
    # one pass, so that what one part holds is never taken for another's place
    pieces = _file("report.html").split("%%")
    return "".join(piece if i % 2 == 0 else parts[piece] for i, piece in enumerate(pieces))


def _file(name: str) -> str:
    return (resources.files("lplb") / "data" / name).read_text(encoding="utf-8")


def _in_script(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it is in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _check(simulations: Sequence[Simulation], phase: Sequence[str]) -> None:
    if not simulations:
        raise ValueError("simulations is empty, allowed is one or more")
    wanted = simulations[0].first, simulations[0].rank_load.shape[:2]
    for i, s in enumerate(simulations):
        found = s.first, s.rank_load.shape[:2]
        if found != wanted:
            raise ValueError(
                f"simulations[{i}] has {found} (first batch, (batches, layers)), allowed is that of the first, {wanted}"
            )
    end = wanted[0] + wanted[1][0]
    if len(phase) < end:
        raise ValueError(f"phase has {len(phase)} entries, allowed is one per batch, {end}")


# ---- text


def _baseline(s: Simulation, simulations: Sequence[Simulation]) -> Simulation:
    """What a simulation is compared with: no balancing on as many ranks, else the worst there."""
    same = [o for o in simulations if section(o) == section(s)]
    return max(same, key=lambda o: (o.setting.policy == "none", o.summary.imbalance_mean))


def _span(s: Simulation) -> str:
    n_batches, n_layers, _ = s.rank_load.shape
    return (
        f"batches {s.first} to {s.first + n_batches - 1} of {n_layers} layer{'s' * (n_layers > 1)} with "
        f"{s.setting.n_logical} experts"
    )


def _headline(best: Simulation, base: Simulation) -> str:
    ranks, mean = best.setting.n_ranks, best.summary.imbalance_mean
    proof = f"No split over that placement can be below {best.summary.bound_mean:.2f}×: certified."
    if best is base:
        return f"The busiest of {ranks} ranks carries <b>{mean:.2f}×</b> the mean. {proof}"
    before = "Without balancing" if base.setting.policy == "none" else f"With {html.escape(base.setting.name)}"
    return (
        f"{before} the busiest of {ranks} ranks carries <b>{base.summary.imbalance_mean:.2f}×</b> the mean; with "
        f"<em>{html.escape(best.setting.name)}</em> <b>{mean:.2f}×</b>. {proof}"
    )


def _placed(s: Simulation) -> str:
    often = f"every {s.setting.refresh} batches" if s.setting.refresh else "once"
    return (
        f"Experts are placed {often} from the {s.setting.window} batches before. Batches 0 to {s.first - 1} are "
        "history only and not counted for any method."
    )


def _rows(simulations: Sequence[Simulation]) -> str:
    """The table's body; a row's button makes the page show its simulation."""
    out, last = [], None
    for i, (s, best) in enumerate(zip(simulations, best_columns(simulations), strict=True)):
        if section(s) != last:
            last = section(s)
            out.append(f'<tr class="section"><th colspan="8" scope="rowgroup">{html.escape(last)}</th></tr>')
        name = html.escape(s.setting.name)
        texts = "".join(f"<td{' class=best' * (k in best)}>{html.escape(text)}</td>" for k, text in enumerate(cells(s)))
        out.append(f'<tr data-row="{i}"><th scope="row"><button type="button">{name}</button></th>{texts}</tr>')
    return "".join(out)


# ---- data


def _data(simulations: Sequence[Simulation], phase: Sequence[str], best: Simulation) -> dict[str, Any]:
    first, (n_batches, n_layers) = simulations[0].first, simulations[0].rank_load.shape[:2]
    layers, step = _sampled(simulations)
    starts = np.arange(0, n_batches, step)
    at = _placements_shown(simulations, len(layers))
    ends = np.minimum(starts + step, n_batches)
    base = _baseline(best, simulations)
    return {
        "layers": layers,
        "layer": int(np.argmax([base.imbalance[:, layer].mean() for layer in layers])),
        "columns": (first + (starts + ends - 1) / 2).tolist(),
        "ends": [first, first + n_batches - 1],
        "step": step,
        "phases": _runs(phase[first : first + n_batches], first),
        "before": simulations.index(base),
        "after": simulations.index(best),
        "scale": CELL_SCALE,
        "simulations": [_simulation(s, layers, starts, at) for s in simulations],
        "sampling": _sampling_text(layers, n_layers, step, len(at), len(simulations[0].placed_at)),
    }


def _sampled(simulations: Sequence[Simulation]) -> tuple[list[int], int]:
    """Which layers the page has, and how many batches share a column."""
    n_batches, n_layers = simulations[0].rank_load.shape[:2]
    per_column = sum(s.setting.n_ranks for s in simulations)
    fewest = min(FEWEST_COLUMNS, n_batches)
    keep = int(np.clip(MOST_CELLS // (per_column * fewest), 1, n_layers))
    columns = min(MOST_COLUMNS, n_batches, max(fewest, MOST_CELLS // (per_column * keep)))
    worst = np.argsort(-simulations[0].imbalance.mean(0), kind="stable")[:keep]
    return sorted(worst.tolist()), -(-n_batches // columns)


def _placements_shown(simulations: Sequence[Simulation], n_layers: int) -> list[int]:
    """Which of the placements the page has: the first, the last, and some between, evenly."""
    n = len(simulations[0].placed_at)
    per_placement = n_layers * sum(s.setting.n_physical for s in simulations)
    shown = int(np.clip(MOST_SLOTS // per_placement, 1, n))
    return [n - 1] if shown == 1 else np.unique(np.linspace(0, n - 1, shown).round().astype(int)).tolist()


def _sampling_text(layers: list[int], n_layers: int, step: int, shown: int, placed: int) -> str:
    said = []
    if step > 1:
        said.append(
            f"A column of a heat map is the mean of {step} batches; lines are means of as many, their shade reaches to "
            "the worst of them."
        )
    if len(layers) < n_layers:
        said.append(f"Of {n_layers} layers the {len(layers)} with the largest imbalance before can be looked at.")
    if shown < placed:
        said.append(f"Of {placed} placements {shown} can be looked at.")
    return " ".join([*said, "Numbers in text and table are of all batches and layers."])


def _runs(phase: Sequence[str], first: int) -> list[list[Any]]:
    """Runs of equal phases: first and last batch, name."""
    runs: list[list[Any]] = []
    for batch, name in enumerate(phase, first):
        if runs and runs[-1][2] == name:
            runs[-1][1] = batch
        else:
            runs.append([batch, batch, name])
    return runs


def _simulation(s: Simulation, layers: list[int], starts: npt.NDArray[Any], at: list[int]) -> dict[str, Any]:
    setting = s.setting
    mean_load = np.where(s.mean_load > 0, s.mean_load, 1)[..., None]
    ratio = np.where(s.mean_load[..., None] > 0, s.rank_load / mean_load, 1.0)[:, layers]
    heat = _mean(ratio, starts)  # [columns, layers, ranks]
    cells16 = np.minimum(np.rint(heat * CELL_SCALE), 65535).astype("<u2")

    def lines(values: npt.NDArray[Any], digits: int = 4) -> list[list[float]]:
        by_layer: list[list[float]] = np.round(values, digits).T.tolist()
        return by_layer

    return {
        "name": setting.name,
        "section": section(s),
        "setting": asdict(setting),
        "summary": asdict(s.summary),
        "cells": cells(s),
        "heat": [_packed(cells16[:, i]) for i in range(len(layers))],
        "mean": lines(_mean(s.imbalance[:, layers], starts)),
        "worst": lines(np.maximum.reduceat(s.imbalance[:, layers], starts, axis=0)),
        "bound": lines(_mean(s.bound_imbalance[:, layers], starts)),
        "of_layer": [_of_layer(s, layer) for layer in layers],
        "gap": np.maximum.reduceat(s.gap[:, layers], starts, axis=0).T.tolist(),
        "iterations": [np.bincount(s.iterations[:, layer]).tolist() for layer in layers],
        "placed_at": [s.placed_at[i] for i in at],
        "moved": s.slots_moved[at][:, layers].tolist(),
        "placements": [[_packed(s.placements[i][layer].phy2log.numpy().astype("<u2")) for layer in layers] for i in at],
    }


def _of_layer(s: Simulation, layer: int) -> dict[str, float]:
    """A layer's own means, over its counted batches."""
    return {
        "imbalance": float(s.imbalance[:, layer].mean()),
        "p99": float(np.percentile(s.imbalance[:, layer], 99)),
        "bound": float(s.bound_imbalance[:, layer].mean()),
    }


def _mean(values: npt.NDArray[Any], starts: npt.NDArray[Any]) -> _Floats:
    """Means of consecutive batches, axis 0."""
    sizes = np.diff([*starts.tolist(), len(values)])
    mean: _Floats = np.add.reduceat(values, starts, axis=0) / sizes.reshape(-1, *[1] * (values.ndim - 1))
    return mean


def _packed(values: npt.NDArray[Any]) -> str:
    """16-bit numbers, little-endian, as base64."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
