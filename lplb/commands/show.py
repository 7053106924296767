"""Placements in the terminal: tables of what `lplb.commands.placing` finds out, and a grid of ranks and experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["difference_table", "grid", "placed_table"]

_STYLES = ("dim", "cyan", "green", "yellow", "magenta", "bold red")
"""Of experts by their number of copies, from one copy to as many as that or more."""
_BAR = 12  # cells of the longest bar


def placed_table(report: Mapping[str, Any]) -> RenderableType:
    """Return what placements are worth on their history, layer by layer; see `lplb.commands.placing.placed`."""
    moving = report["moves"] is not None
    table = _table("layer", "even split", "LP", "bound", *["moves"] * moving)
    for layer in report["layers"]:
        table.add_row(str(layer["layer"]), *_ratios(layer), *[str(layer["moves"])] * moving)
    if len(report["layers"]) > 1:
        table.add_section()
        table.add_row("mean", *_ratios(report["mean"]), *[""] * moving, style="bold")
    sizes = f"{report['n_logical']} experts in {report['n_physical']} slots on {report['n_ranks']} ranks"
    note = f"busiest rank / mean, on the {report['batches']} batches that the placement was made from"
    lines: list[RenderableType] = [Text(f"{report['policy']}: {sizes}", "bold"), table, Text(note, "dim")]
    if moving:
        slots = report["n_physical"] * len(report["layers"])
        lines.append(Text(f"{report['moves']} of {slots} slots are filled from another rank than in the current ones"))
    return Group(*lines)


def _table(*names: str) -> Table:
    table = Table()
    for name in names:
        table.add_column(name, justify="right")
    return table


def _ratios(entry: Mapping[str, Any]) -> list[str]:
    return ["-" if entry[name] is None else f"{entry[name]:.3f}" for name in ("even", "lp", "bound")]


def difference_table(report: Mapping[str, Any]) -> RenderableType:
    """Return what moves from one placement to another, layer by layer; see `lplb.commands.placing.differences`."""
    total, sized = report["total"], report["total"]["bytes"] is not None
    names = ["layer", "moves", "within", "experts\nmoved", "copies\nchanged", "most into\na rank", "most from\na rank"]
    table = _table(*names, *(["bytes"] if sized else []))
    for layer in report["layers"]:
        cells = [layer["layer"], layer["moves"], layer["within_rank"], len(layer["experts"]), len(layer["copies"])]
        cells += [max(layer["received"]), max(layer["sent"])]
        table.add_row(*map(str, cells), *([_bytes(layer["bytes"])] if sized else []))
    if len(report["layers"]) > 1:
        table.add_section()
        cells = ["all", total["moves"], total["within_rank"], "", "", max(total["received"]), max(total["sent"])]
        table.add_row(*map(str, cells), *([_bytes(total["bytes"])] if sized else []), style="bold")
    headline = f"{total['moves']} of {report['slots']} slots are filled from another rank"
    note = "moves: slots filled from another rank; within: from one of the same rank"
    renamed = [Text("of the second, ranks and slots are renamed so that most experts stay", "dim")]
    return Group(Text(headline, "bold"), table, Text(note, "dim"), *(renamed if report["relabelled"] else []))


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def grid(report: Mapping[str, Any], entry: Mapping[str, Any]) -> RenderableType:
    """Return the experts of every rank, coloured by their copies, beside rank loads where there are some.

    Args:
        report: of `lplb.commands.placing.shown`.
        entry: one of its layers.
    """
    copies = entry["copies"]
    width = len(str(len(copies) - 1))
    of_layers = f"layer {entry['layer']} of {report['n_layers']}, " if report["n_layers"] > 1 else ""
    table = Table()
    table.add_column("rank", justify="right")
    table.add_column("experts")
    loads = "even_loads" in entry
    for name in ("even split", "LP") if loads else ():
        table.add_column(name, no_wrap=True)
    most = max([*entry["even_loads"], *entry["lp_loads"], 1e-300]) if loads else 1.0
    for rank, experts in enumerate(entry["ranks"]):
        held = Text(" ").join(Text(f"{expert:>{width}}", _style(copies[expert])) for expert in experts)
        bars = [_bar(entry[name][rank], most) for name in ("even_loads", "lp_loads")] if loads else []
        table.add_row(str(rank), held, *bars)
    title = f"{of_layers}{len(copies)} experts on {report['n_ranks']} ranks"
    lines: list[RenderableType] = [Text(title, "bold"), table, _legend(max(copies))]
    if loads and entry["lp"] is not None:
        even, lp, bound = _ratios(entry)
        lines.append(Text(f"busiest rank / mean: even split {even}, LP {lp}, bound {bound}"))
    return Group(*lines)


def _style(copies: int) -> str:
    return _STYLES[min(copies, len(_STYLES)) - 1]


def _legend(most: int) -> Text:
    legend = Text("copies: ")
    for number in range(1, min(most, len(_STYLES)) + 1):
        more = " or more" if number == len(_STYLES) and most > number else ""
        legend.append(f"{number}{more}  ", _style(number))
    return legend


def _bar(load: float, most: float) -> Text:
    return Text("█" * round(_BAR * load / most) + f" {load:.0f}")
