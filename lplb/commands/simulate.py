"""The command ``lplb simulate``: its options, a progress bar, one table, and files."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import numpy.typing as npt

from lplb.advise.choices import EXCHANGES, by_exchange, nodes_of
from lplb.advise.worth import MOST_DIRECT
from lplb.arguments import MOST_TOKENS
from lplb.commands.loads import MANY, add_first_axis, check_paths
from lplb.cost import ASSUMED_PLANNER_SECONDS, HARDWARE, Hardware, hardware_by_name, layer_time
from lplb.models import MODELS, ModelShape, model_by_name
from lplb.scenes import SCENES, Scene, make, trace
from lplb.simulate import SPLITS, LayerSeconds, Simulation, results
from lplb.simulate.placers import NAMES
from lplb.simulate.verdict import remark

if TYPE_CHECKING:
    from lplb.formats.loads import FirstAxis
    from lplb.placement import Placement
    from lplb.simulate.compare import Configuration

__all__ = ["add_arguments", "run"]

_NEEDS = {"rich": "demo", "plotly": "report"}  # extras that bring what may be missing
_DESCRIPTION = """\
Runs loads through policies that place experts, and splits that share out every batch, for any numbers of ranks; prints
one table beside the certified lower bound. Without a choice the loads are the recorded router trace."""
_SIZES = {"batches": 320, "layers": 4, "experts": 256, "tokens": 32768}
"""Of generated loads."""
_ROUGH = 0.01  # of a file's loads, that rounding to whole tokens may change
_POLICIES = ["none", "eplb", "eplb-distinct", "lp", "lp-change"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = _DESCRIPTION
    group = parser.add_argument_group("loads")
    loads = group.add_mutually_exclusive_group()
    loads.add_argument("--trace", action="store_true", help="the recorded router trace (the default)")
    loads.add_argument("--load", action="append", metavar="FILE", help=f"a file of recorded loads; {MANY}")
    loads.add_argument(
        "--scene", nargs="+", metavar=("NAME", "KEY=VALUE"), help=f"generated: {', '.join(SCENES)}; see lplb.scenes"
    )
    add_first_axis(group)
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--batches", type=int, metavar="N", help=f"only the first N (generated: {_SIZES['batches']})")
    sizes.add_argument("--layers", type=int, metavar="N", help=f"only the first N (generated: {_SIZES['layers']})")
    sizes.add_argument("--experts", type=int, metavar="N", help=f"of a file, or generated: {_SIZES['experts']}")
    sizes.add_argument("--tokens", type=int, metavar="N", help=f"of generated batches (default: {_SIZES['tokens']})")
    sizes.add_argument("--seed", type=int, default=0, metavar="N", help="of generated loads (default: 0)")
    sizes.add_argument("--scale", type=int, default=1, metavar="N", help="count every token N times (default: 1)")
    what = parser.add_argument_group("configurations")
    what.add_argument("--ranks", type=int, nargs="+", default=[8, 32], metavar="N", help="default: 8 32")
    what.add_argument(
        "--policy",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        help=f"of {', '.join(NAMES)} (default: {' '.join(_POLICIES)})",
    )
    what.add_argument("--split", nargs="+", default=["even", "lp"], choices=SPLITS, help="default: even lp")
    slots = what.add_mutually_exclusive_group()
    slots.add_argument("--redundant", type=int, default=2, metavar="N", help="spare slots per rank (default: 2)")
    slots.add_argument("--slots", type=int, metavar="N", help="slots on all ranks instead")
    what.add_argument(
        "--nodes",
        type=int,
        metavar="N",
        help="nodes: traffic between them is counted (default: not; the layer's time then takes one per 8 ranks)",
    )
    what.add_argument("--group-size", type=int, metavar="N", help="consecutive ranks that balance among themselves")
    what.add_argument("--refresh", type=int, default=16, metavar="N", help="batches between placements (default: 16)")
    what.add_argument("--window", type=int, default=32, metavar="N", help="batches placed from (default: 32)")
    what.add_argument("--solver", default="ipm", choices=["ipm", "flow"], help="default: ipm")
    cost = parser.add_argument_group("what it costs")
    cost.add_argument("--model", default="deepseek-v3", choices=MODELS, help="experts' shape (default: deepseek-v3)")
    cost.add_argument("--hardware", default="h200", choices=HARDWARE, help="default: h200")
    cost.add_argument(
        "--exchange", default="auto", choices=EXCHANGES, help="how tokens travel between nodes (default: auto)"
    )
    cost.add_argument(
        "--planner-seconds",
        type=float,
        default=ASSUMED_PLANNER_SECONDS,
        metavar="S",
        help=f"of the LP per layer in the model (default: {ASSUMED_PLANNER_SECONDS:g}, assumed)",
    )
    out = parser.add_argument_group("output")
    out.add_argument("-o", "--output", metavar="DIR", help="CSV, JSON and report into a folder")
    out.add_argument("--csv", metavar="FILE", help="a row per configuration, batch and layer")
    out.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="everything; without FILE it is printed, not the table"
    )
    out.add_argument("--report", metavar="FILE", help="one HTML page that needs nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Simulate, print and write.

    Returns:
        The exit status: 0, 1 when something failed, 2 when a package is missing.
    """
    from lplb.replay import CheckFailed

    try:
        _run(arguments)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _NEEDS:
            raise
        print(f'lplb simulate needs {package}: pip install "lplb[{_NEEDS[package]}]"', file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except (CheckFailed, ValueError, TypeError, OSError) as error:
        print(f"lplb simulate: {error}", file=sys.stderr)
        return 1
    return 0


def _run(a: argparse.Namespace) -> None:
    from lplb.simulate import compare

    printed = a.json == "-"
    if not printed:
        from rich.console import Console
    _check_paths(a)
    if a.report is not None or a.output is not None:
        importlib.import_module("lplb.simulate.report")  # before the work: it needs plotly
    _check_nodes(a)
    scene = _loads(a)
    wanted, notes = _wanted(a, scene.counts.shape[-1])
    model, hardware = _shape(a.model, scene), hardware_by_name(a.hardware)
    layer_time(np.zeros((1, 1)), 1, model, hardware, planner_seconds=a.planner_seconds)  # checks before the work
    options = {
        "slots": a.slots,
        "redundant": a.redundant,
        "n_nodes": 1 if a.nodes is None else a.nodes,
        "group_size": a.group_size,
        "refresh": a.refresh,
        "window": a.window,
        "solver": a.solver,
        "expert_bytes": int(model.expert_bytes),
        "layer_seconds": partial(_seconds, a=a, model=model, hardware=hardware),
    }
    start = time.perf_counter()
    counted = len(scene.counts) - (a.refresh or a.window)
    with _bar(max(1, counted * len(wanted)), sys.stderr if printed else sys.stdout) as on_batches:
        done = compare.compare(scene, wanted, on_batches=on_batches, **options)
    took = time.perf_counter() - start
    notes = [*filter(None, [remark(done, model.top_k, a.planner_seconds)]), *notes]
    costs = _costs(a, model, hardware)
    paths = _write(a, done, scene, costs, " ".join(notes))  # first: who reads the table may stop reading
    written = [f"Written: {os.path.abspath(path)}" for path in paths]
    if printed:
        print(results.to_json(done, scene.phase, scene.name))
        print(*notes, *written, sep="\n", file=sys.stderr, end="\n" * bool(notes or written))
        return
    console = Console()
    console.print(compare.table(done, scene.name))
    for note in notes:
        console.print(f"{note}\n", markup=False, highlight=False)
    console.print(compare.notes(done, costs))
    console.print(f"Checked: {sum(s.max_load.size for s in done):,} plans, every token served. {took:.1f} s")
    for line in written:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _wanted(a: argparse.Namespace, n_logical: int) -> tuple[list[Configuration], list[str]]:
    """The configurations, and what is left out of those that nobody asked for by name."""
    from lplb.simulate import compare

    wanted = compare.configurations(a.ranks, a.policy or _POLICIES, a.split)
    odd = [] if a.policy else [n for n in dict.fromkeys(a.ranks) if n > 0 and n_logical % n]
    if not odd:
        return wanted, []
    note = f"Without none on {' and '.join(map(str, odd))} ranks: {n_logical} experts do not divide evenly there."
    return [c for c in wanted if c.policy != "none" or c.n_ranks not in odd], [note]


def _check_nodes(a: argparse.Namespace) -> None:
    for n in a.ranks if a.nodes is not None else ():
        if n > 0 and (a.nodes < 1 or n % a.nodes):
            raise ValueError(f"--nodes is {a.nodes}, allowed is a divisor of --ranks {n}")


@contextmanager
def _bar(total: int, file: TextIO) -> Iterator[Callable[[Configuration, int], None]]:
    """Yield an ``on_batches`` that shows how far the work is, on a terminal and with rich."""
    if not file.isatty():
        yield lambda c, n: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda c, n: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(file=file), transient=True) as progress:
        bar = progress.add_task("batches", total=total)
        yield lambda c, n: progress.update(bar, advance=n, description=f"{c.n_ranks} ranks, {c.policy}, {c.split}")


# ---- files


def _write(a: argparse.Namespace, done: Sequence[Simulation], scene: Scene, costs: str, remarks: str) -> list[str]:
    """Write what was asked for; return the paths."""
    paths = [] if a.output is None else results.write_files(a.output, done, scene.phase, scene.name)
    if a.csv is not None:
        results.write_text(a.csv, results.batches_csv(done, scene.phase))
        paths.append(a.csv)
    if a.json not in (None, "-"):
        results.write_text(a.json, results.to_json(done, scene.phase, scene.name))
        paths.append(a.json)
    pages = [a.report, None if a.output is None else os.path.join(a.output, "report.html")]
    for path in filter(None, pages):
        from lplb.simulate import report

        report.write(path, done, scene.phase, scene.name, costs, remarks)
        paths.append(path)
    return paths


def _check_paths(a: argparse.Namespace) -> None:
    """Refuse what cannot be read or written, before the work."""
    check_paths("--load", a.load or (), "a file")
    check_paths("--output", [a.output], "a folder")
    files = {"csv": a.csv, "json": None if a.json == "-" else a.json, "report": a.report}
    for kind, path in files.items():
        check_paths(f"--{kind}", [path], "a file")
    _check_folders(files, a.output)


def _check_folders(files: dict[str, str | None], output: str | None) -> None:
    """Refuse what could not be written, before the work."""
    for kind, path in files.items():
        if path is not None:
            folder = os.path.dirname(os.path.abspath(path))
            if not os.path.isdir(folder):
                raise FileNotFoundError(f"--{kind} is {path}, whose folder {folder} does not exist")
            if os.path.isdir(path):
                raise IsADirectoryError(f"--{kind} is {path}, a folder, allowed is a file")
    if output is not None and os.path.exists(output) and not os.path.isdir(output):
        raise NotADirectoryError(f"--output is {output}, a file, allowed is a folder")


# ---- loads


def _loads(a: argparse.Namespace) -> Scene:
    """The loads asked for; with where tokens come from where there are several nodes and somebody knows."""
    sources = a.nodes if a.nodes is not None and a.nodes > 1 else None
    if a.first_axis is not None and not a.load:
        raise ValueError(f"--first-axis is {a.first_axis}, allowed with --load only")
    if a.scene:
        scene = _generated(a, sources)
    else:
        for name in ("tokens",) if a.load else ("experts", "tokens"):
            if getattr(a, name) is not None:
                raise ValueError(f"--{name} is {getattr(a, name)}, allowed with --scene only")
        scene = _from_files(a.load, a.experts, a.first_axis) if a.load else _of_nodes(trace, sources)
        for name, axis in (("batches", 0), ("layers", 1)):
            most, n = scene.counts.shape[axis], getattr(a, name)
            if n is not None and not 1 <= n <= most:
                raise ValueError(f"--{name} is {n}, allowed is 1 to {most}")
        counts = scene.counts[: a.batches, : a.layers]
        scene = replace(scene, counts=counts, phase=scene.phase[: len(counts)])
    if a.scale < 1 or scene.counts.max(initial=0) > MOST_TOKENS // a.scale:
        raise ValueError(
            f"--scale is {a.scale}, allowed is 1 or more, up to {MOST_TOKENS} tokens of an expert: {scene.name} has "
            f"{scene.counts.max(initial=0)}"
        )
    if a.scale > 1:
        scene = replace(scene, counts=scene.counts * a.scale, name=f"{scene.name}, every token {a.scale} times")
    return scene


def _of_nodes(made: Callable[[int | None], Scene], sources: int | None) -> Scene:
    """Loads by the node that tokens come from; what does not divide is the number of nodes."""
    try:
        return made(sources)
    except ValueError as error:
        if "sources" not in str(error):
            raise
        raise ValueError(f"--nodes is {sources}: {error}") from error


def _generated(a: argparse.Namespace, sources: int | None) -> Scene:
    name, *pairs = a.scene
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            options[key] = int(value) if value.lstrip("+-").isdigit() else float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--scene has {pair!r}, allowed are KEY=NUMBER")
    size = {key: default if getattr(a, key) is None else getattr(a, key) for key, default in _SIZES.items()}
    fixed: dict[str, Any] = {"tokens": size["tokens"], "seed": a.seed}
    if twice := sorted({*fixed, "sources"} & options.keys()):
        option = "nodes" if twice[0] == "sources" else twice[0]
        raise ValueError(f"--scene has {twice[0]}, allowed is the option --{option}")
    try:
        scene = _of_nodes(
            lambda n: make(name, size["batches"], size["layers"], size["experts"], sources=n, **fixed, **options),
            sources,
        )
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(
            f"--scene {name}: {str(error).partition('() ')[2]}; lplb.scenes lists what there is"
        ) from error
    return replace(scene, name=" ".join(a.scene))


def _from_files(paths: Sequence[str], n_logical: int | None, first_axis: FirstAxis | None) -> Scene:
    """Loads of files in whole tokens, see `_whole`; layers without any (not recorded) are left out."""
    from lplb.formats import read_loads

    loads = read_loads(paths, n_logical=n_logical, first_axis=first_axis)
    recorded = loads.any((1, 2))
    said = ", ".join(map(os.path.basename, paths[:3])) + ", …" * (len(paths) > 3)
    name = said.encode(errors="replace").decode()
    if not recorded.any():
        raise ValueError(f"{name} has no tokens, allowed is at least one")
    if not recorded.all():
        name += f", {recorded.sum()} of {len(loads)} layers"
    if loads.max() > MOST_TOKENS:
        raise ValueError(f"{name} has {loads.max():.0f} tokens of an expert, allowed are up to {MOST_TOKENS}")
    counts, how = _whole(loads[recorded].transpose(1, 0, 2))
    return Scene(name + how, counts, ["recorded"] * len(counts))


def _whole(loads: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], str]:
    """Whole tokens, and what was done for that: averages are rounded; shares get, on average, as many tokens as
    generated loads have.
    """
    rounded = np.rint(loads)
    if np.abs(rounded - loads).sum() <= _ROUGH * loads.sum():
        return rounded.astype(np.int64), ""
    batches = loads.sum(-1)
    scaled = loads * (_SIZES["tokens"] / batches[batches > 0].mean())
    if scaled.max() > MOST_TOKENS:
        raise ValueError(
            f"loads have {loads.max():g} beside much smaller ones, allowed are whole tokens, averages, or shares"
        )
    return np.rint(scaled).astype(np.int64), f", scaled to {_SIZES['tokens']:,} a batch, as they are no whole tokens"


# ---- costs


def _shape(name: str, scene: Scene) -> ModelShape:
    """A model's experts, as many as the loads have."""
    model, n = model_by_name(name), scene.counts.shape[-1]
    if n == model.n_logical:
        return model
    return replace(model, n_logical=n, top_k=min(model.top_k, n), n_group=1, topk_group=1)


def _seconds(c: Configuration, *, a: argparse.Namespace, model: ModelShape, hardware: Hardware) -> LayerSeconds:
    nodes = nodes_of(c.n_ranks) if a.nodes is None else a.nodes
    planner = a.planner_seconds if c.split == "lp" and c.policy != "none" else 0.0

    def seconds(quota: npt.NDArray[np.int64], placement: Placement) -> npt.NDArray[np.float64]:
        took = np.empty(len(quota))
        for exchange, some in by_exchange(a.exchange, quota.sum(-1) / (model.top_k * placement.n_ranks)):
            took[some] = layer_time(
                quota[some],
                placement.n_ranks,
                model,
                hardware,
                ranks_per_node=placement.n_ranks // nodes,
                planner_seconds=planner,
                exchange=exchange,
            )
        return took

    return seconds


def _costs(a: argparse.Namespace, model: ModelShape, hardware: Hardware) -> str:
    """What the layer's time is a model of."""
    nodes = [f"{n} ranks in {nodes_of(n) if a.nodes is None else a.nodes}" for n in dict.fromkeys(a.ranks)]
    ways = {
        "direct": "every choice of a token travels by itself",
        "by_node": "a token travels to each node once",
        "auto": f"choices travel one by one up to {MOST_DIRECT} tokens per rank, to each node once beyond",
    }
    return (
        f"{model.name}'s experts on {hardware.name}, planner {a.planner_seconds * 1e6:.0f} µs (assumed), "
        f"{', '.join(nodes)} {'nodes (assumed: at most 8 each)' if a.nodes is None else 'nodes'}, {ways[a.exchange]}"
    )
