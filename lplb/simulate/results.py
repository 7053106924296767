"""Simulations as text: the numbers of a table, CSV for spreadsheets and data frames, JSON with everything."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lplb.simulate.simulation import Simulation

__all__ = [
    "BATCH_COLUMNS",
    "HEADINGS",
    "NOTES",
    "SUMMARY_COLUMNS",
    "batches_csv",
    "cells",
    "in_bytes",
    "rank_loads_csv",
    "section",
    "summary_csv",
    "to_json",
    "write_files",
    "write_text",
]

HEADINGS = (
    ("imbal.", "mean"),
    ("lower", "bound"),
    ("imbal.", "p99"),
    ("bal-", "anced"),
    ("cross-", "node"),
    ("moved", "each"),
    ("time", "(model)"),
)
"""Of the columns of `cells`, in two lines."""


def section(s: Simulation) -> str:
    """Return which part of the table a simulation is in: ``"32 ranks in 4 nodes"``."""
    here = s.setting
    groups = f", groups of {here.group_size}" if here.group_size < here.n_ranks else ""
    nodes = f" in {here.n_nodes} nodes" if here.n_nodes > 1 else ""
    return f"{here.n_ranks} ranks{nodes}{groups}"


def cells(s: Simulation) -> list[str]:
    """Return a simulation's numbers as the table shows them, in the order of its columns."""
    n = s.summary
    return [
        f"{n.imbalance_mean:.3f}",
        f"{n.bound_mean:.3f}",
        f"{n.imbalance_p99:.3f}",
        f"{n.balancedness:.3f}",
        "-" if n.cross_node_share is None else f"{n.cross_node_share:.1%}",
        _moved(s),
        "-" if n.layer_seconds_mean is None else f"{n.layer_seconds_mean * 1e6:.0f} µs",
    ]


def _moved(s: Simulation) -> str:
    n = s.summary
    if s.setting.policy == "none" or not n.refreshes:
        return "-"
    if s.expert_bytes:
        return in_bytes(n.moved_bytes / n.refreshes)
    return f"{n.slots_moved / n.refreshes:.0f}"


def in_bytes(n: float) -> str:
    """Return bytes with a decimal unit: ``"12.3 GB"``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            break
        n /= 1000
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"


NOTES = (
    (
        "imbalance",
        "Busiest rank's tokens / mean over ranks, 1 is perfect. Mean and 99th percentile over batches and layers.",
    ),
    (
        "lower bound",
        "No split of the tokens over this placement has a lower mean imbalance: a proof, from the LP's dual.",
    ),
    ("green", "The least mean imbalance, and the least modelled time, on as many ranks: not always the same row's."),
    ("balanced", "Mean over busiest, averaged: what serving engines print."),
    (
        "cross-node",
        "Share of tokens, each once per expert, that leave their node; copies take their own node's tokens first.",
    ),
    (
        "moved each",
        "What ranks get anew each time that experts are placed again, ranks being named so that most experts stay: "
        "weights, all layers together.",
    ),
)
"""What the words in the table mean."""


# ---- files

SUMMARY_COLUMNS = {
    "configuration": "policy and split",
    "policy": "who placed experts",
    "split": "how batches were shared out: lp or even",
    "n_ranks": "ranks",
    "n_logical": "experts",
    "n_physical": "slots on all ranks",
    "group_size": "consecutive ranks that balance among themselves",
    "n_nodes": "nodes",
    "refresh": "batches from one placement to the next; 0: placed once",
    "window": "batches that a placement is made from",
    "solver": "ipm or flow",
    "expert_bytes": "bytes of one expert's weights",
    "imbalance_mean": "busiest rank's tokens / mean of all ranks, over counted batches and layers: mean",
    "imbalance_p99": "its 99th percentile",
    "imbalance_max": "its largest value",
    "bound_mean": "certified lower bound on this placement / mean of all ranks: mean",
    "balancedness": "mean / busiest: mean",
    "cross_node_share": "share of tokens, each once per expert, that go to another node; empty: sources not known",
    "slots_moved": "slots that new placements filled with an expert new to their rank, all refreshes and layers",
    "moved_bytes": "the same in bytes",
    "refreshes": "placements after the first",
    "layer_seconds_mean": "modelled seconds of a layer: mean; empty: not modelled",
    "iterations_mean": "solver's steps or cuts: mean",
    "iterations_max": "the most",
    "gap_max": "largest certified relative gap of a solve",
    "unsolved": "solves that did not end as solved",
}
"""Columns of summary.csv, a row per configuration, and what they mean."""

BATCH_COLUMNS = {
    "configuration": "policy and split",
    "n_ranks": "ranks",
    "batch": "batch of the loads, from 0; the first ones are history only and have no row",
    "phase": "what the batch is made of",
    "layer": "layer, from 0",
    "tokens": "tokens, each once per expert",
    "max_load": "tokens on the busiest rank",
    "mean_load": "tokens on a rank on average",
    "imbalance": "max_load / mean_load; 1 without tokens",
    "lower_bound": "no split over this placement has a smaller max_load",
    "bound_imbalance": "lower_bound / mean_load; 1 without tokens",
    "iterations": "solver's steps or cuts, of the balance group with most",
    "gap": "certified relative gap of the solve, the largest of the balance groups",
    "solved": "1 if every balance group was solved",
    "cross_node_tokens": "tokens that go to another node; empty: sources not known",
    "layer_seconds": "modelled seconds of the layer; empty: not modelled",
    "slots_moved": "slots filled with an expert new to their rank before this batch; 0 where nothing was placed",
    "moved_bytes": "the same in bytes",
}
"""Columns of batches.csv, a row per configuration, batch and layer, and what they mean."""


def summary_csv(simulations: Sequence[Simulation]) -> str:
    """Return one row per simulation; columns are `SUMMARY_COLUMNS`."""
    rows = ({"configuration": s.setting.name, **s.row()} for s in simulations)
    return _csv(list(SUMMARY_COLUMNS), ([row[name] for name in SUMMARY_COLUMNS] for row in rows))


def batches_csv(simulations: Sequence[Simulation], phase: Sequence[str]) -> str:
    """Return one row per simulation, batch and layer; columns are `BATCH_COLUMNS`.

    Args:
        simulations: of the same loads.
        phase: what each batch of the loads is made of.
    """
    return _csv(list(BATCH_COLUMNS), (row for s in simulations for row in _batches(s, phase)))


def _batches(s: Simulation, phase: Sequence[str]) -> Iterator[list[Any]]:
    moved = dict(zip(s.placed_at, s.slots_moved.tolist(), strict=True))
    tokens = s.rank_load.sum(-1)
    for b, layer in ((b, layer) for b in range(len(s.rank_load)) for layer in range(s.rank_load.shape[1])):
        batch, at = s.first + b, (b, layer)
        slots = moved[batch][layer] if batch in moved else 0
        yield [
            s.setting.name,
            s.setting.n_ranks,
            batch,
            phase[batch],
            layer,
            int(tokens[at]),
            int(s.max_load[at]),
            float(s.mean_load[at]),
            float(s.imbalance[at]),
            float(s.lower_bound[at]),
            float(s.bound_imbalance[at]),
            int(s.iterations[at]),
            float(s.gap[at]),
            int(s.solved[at]),
            None if s.cross_node is None else int(s.cross_node[at]),
            None if s.layer_seconds is None else float(s.layer_seconds[at]),
            slots,
            slots * s.expert_bytes,
        ]


def rank_loads_csv(simulations: Sequence[Simulation]) -> str:
    """Return one row per simulation, batch and layer: configuration, n_ranks, batch, layer, then tokens of each rank.

    Columns ``rank_0``, ``rank_1``, … go up to the most ranks of all; where a simulation has fewer they are empty.
    """
    most = max(s.setting.n_ranks for s in simulations)
    header = ["configuration", "n_ranks", "batch", "layer", *(f"rank_{r}" for r in range(most))]
    rows = (
        [s.setting.name, s.setting.n_ranks, s.first + b, layer, *load, *[None] * (most - len(load))]
        for s in simulations
        for b, layers in enumerate(s.rank_load.tolist())
        for layer, load in enumerate(layers)
    )
    return _csv(header, rows)


def _csv(header: list[str], rows: Any) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def to_json(simulations: Sequence[Simulation], phase: Sequence[str], loads: str) -> str:
    """Return everything as JSON text.

    An object with ``format`` ``"lplb.simulations"``, ``version`` 1, ``loads`` (their name), ``phase`` (of each batch),
    ``columns`` (what the keys of settings, summaries and batches mean), and ``simulations``, a list of objects:
    ``setting`` and ``summary``, as in `SUMMARY_COLUMNS`; ``first``, the batch of the first row of ``batches``;
    ``batches``, arrays ``[batches][layers]`` as in `BATCH_COLUMNS`, and ``rank_load [batches][layers][ranks]``;
    ``placements``, a list of ``before_batch``, ``slots_moved [layers]`` and ``phy2log [layers][slots]``.

    Args:
        simulations: of the same loads.
        phase: what each batch of the loads is made of.
        loads: what the loads are called.
    """
    return json.dumps(
        {
            "format": "lplb.simulations",
            "version": 1,
            "loads": loads,
            "phase": list(phase),
            "columns": {"summary": SUMMARY_COLUMNS, "batches": BATCH_COLUMNS},
            "simulations": [_object(s) for s in simulations],
        },
        allow_nan=False,
    )


def _object(s: Simulation) -> dict[str, Any]:
    row = {"configuration": s.setting.name, **s.row()}
    names = list(row)
    of_setting = names[: names.index("imbalance_mean")]
    return {
        "setting": {name: row[name] for name in of_setting},
        "summary": {name: row[name] for name in names if name not in of_setting},
        "first": s.first,
        "batches": {
            "rank_load": s.rank_load.tolist(),
            "max_load": s.max_load.tolist(),
            "mean_load": s.mean_load.tolist(),
            "imbalance": s.imbalance.tolist(),
            "lower_bound": s.lower_bound.tolist(),
            "bound_imbalance": s.bound_imbalance.tolist(),
            "iterations": s.iterations.tolist(),
            "gap": s.gap.tolist(),
            "solved": s.solved.tolist(),
            "cross_node_tokens": None if s.cross_node is None else s.cross_node.tolist(),
            "layer_seconds": None if s.layer_seconds is None else s.layer_seconds.tolist(),
        },
        "placements": [
            {"before_batch": at, "slots_moved": moved, "phy2log": [p.phy2log.tolist() for p in placed]}
            for at, moved, placed in zip(s.placed_at, s.slots_moved.tolist(), s.placements, strict=True)
        ],
    }


def write_files(
    folder: str | os.PathLike[str], simulations: Sequence[Simulation], phase: Sequence[str], loads: str
) -> list[str]:
    """Write summary.csv, batches.csv, rank_loads.csv and simulation.json into a folder, which is made if need be.

    Args:
        folder: where they go.
        simulations: of the same loads.
        phase: what each batch of the loads is made of.
        loads: what the loads are called.

    Returns:
        The paths.

    Raises:
        OSError: a file cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    files = {
        "summary.csv": summary_csv(simulations),
        "batches.csv": batches_csv(simulations, phase),
        "rank_loads.csv": rank_loads_csv(simulations),
        "simulation.json": to_json(simulations, phase, loads),
    }
    paths = []
    for name, text in files.items():
        paths.append(os.path.join(folder, name))
        write_text(paths[-1], text)
    return paths


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8, lines as they are."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
