"""The command ``lplb simulate``: its options, a progress bar, one table, and files."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lplb.cost import ASSUMED_PLANNER_SECONDS, HARDWARE, Hardware, hardware_by_name, layer_time
from lplb.models import MODELS, ModelShape, model_by_name
from lplb.scenes import SCENES, Scene, make, trace
from lplb.simulate import SPLITS, LayerSeconds
from lplb.simulate.placers import NAMES

if TYPE_CHECKING:
    from lplb.simulate.compare import Configuration

__all__ = ["add_arguments", "run"]

_NEEDS = {"rich": "demo", "plotly": "report"}  # extras that bring what may be missing
_DESCRIPTION = """\
Runs loads through policies that place experts, and splits that share out every batch, for any numbers of ranks; prints
one table beside the certified lower bound. Without a choice the loads are the recorded router trace."""
_SIZES = {"batches": 320, "layers": 4, "experts": 256, "tokens": 32768}
"""Of generated loads."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = _DESCRIPTION
    loads = parser.add_argument_group("loads").add_mutually_exclusive_group()
    loads.add_argument("--trace", action="store_true", help="the recorded router trace (the default)")
    loads.add_argument("--load", metavar="FILE", help="a file of recorded loads")
    loads.add_argument(
        "--scene", nargs="+", metavar=("NAME", "KEY=VALUE"), help=f"generated: {', '.join(SCENES)}; see lplb.scenes"
    )
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
        default=["none", "eplb", "eplb-distinct", "lp", "lp-change"],
        choices=NAMES,
        metavar="NAME",
        help=f"of {', '.join(NAMES)} (default: none eplb eplb-distinct lp lp-change)",
    )
    what.add_argument("--split", nargs="+", default=["even", "lp"], choices=SPLITS, help="default: even lp")
    slots = what.add_mutually_exclusive_group()
    slots.add_argument("--redundant", type=int, default=2, metavar="N", help="spare slots per rank (default: 2)")
    slots.add_argument("--slots", type=int, metavar="N", help="slots on all ranks instead")
    what.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1; else traffic is counted)")
    what.add_argument("--group-size", type=int, metavar="N", help="consecutive ranks that balance among themselves")
    what.add_argument("--refresh", type=int, default=16, metavar="N", help="batches between placements (default: 16)")
    what.add_argument("--window", type=int, default=32, metavar="N", help="batches placed from (default: 32)")
    what.add_argument("--solver", default="ipm", choices=["ipm", "flow"], help="default: ipm")
    cost = parser.add_argument_group("what it costs")
    cost.add_argument("--model", default="deepseek-v3", choices=MODELS, help="experts' shape (default: deepseek-v3)")
    cost.add_argument("--hardware", default="h200", choices=HARDWARE, help="default: h200")
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
    out.add_argument("--json", metavar="FILE", help="everything; - prints it in the place of the table")
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
    except (CheckFailed, ValueError, TypeError, OSError) as error:
        print(f"lplb simulate: {error}", file=sys.stderr)
        return 1
    return 0


def _run(a: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lplb.simulate import compare, results

    files = {"csv": a.csv, "json": None if a.json == "-" else a.json, "report": a.report}
    _check_folders(files, a.output)
    report_wanted = a.report is not None or a.output is not None
    if report_wanted:
        from lplb.simulate import report
    scene = _loads(a)
    wanted = compare.configurations(a.ranks, a.policy, a.split)
    model, hardware = _shape(a.model, scene), hardware_by_name(a.hardware)
    layer_time(np.zeros((1, 1)), 1, model, hardware, planner_seconds=a.planner_seconds)  # checks before the work
    options = {
        "slots": a.slots,
        "redundant": a.redundant,
        "n_nodes": a.nodes,
        "group_size": a.group_size,
        "refresh": a.refresh,
        "window": a.window,
        "solver": a.solver,
        "expert_bytes": int(model.expert_bytes),
        "layer_seconds": partial(_seconds, model=model, hardware=hardware, nodes=a.nodes, planner=a.planner_seconds),
    }
    console = Console(stderr=a.json == "-")
    start = time.perf_counter()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        counted = len(scene.counts) - (a.refresh or a.window)
        bar = progress.add_task("batches", total=max(1, counted * len(wanted)))

        def advance(c: Configuration, n: int) -> None:
            progress.update(bar, advance=n, description=f"{c.n_ranks} ranks, {c.policy}, {c.split}")

        done = compare.compare(scene, wanted, on_batches=advance, **options)
    took = time.perf_counter() - start
    costs = f"{model.name}'s experts on {hardware.name}, planner {a.planner_seconds * 1e6:.0f} µs (assumed)"
    if a.json == "-":
        print(results.to_json(done, scene.phase, scene.name))
    else:
        console.print(compare.table(done, scene.name))
        console.print(compare.notes(done, costs))
        console.print(f"Checked: {sum(s.max_load.size for s in done):,} plans, every token served. {took:.1f} s")
    paths = [] if a.output is None else results.write_files(a.output, done, scene.phase, scene.name)
    for path, text in ((a.csv, results.batches_csv), (files["json"], partial(results.to_json, loads=scene.name))):
        if path is not None:
            results.write_text(path, text(done, scene.phase))
            paths.append(path)
    for path in [a.report] * bool(a.report) + [os.path.join(a.output or "", "report.html")] * bool(a.output):
        report.write(path, done, scene.phase, scene.name, costs)
        paths.append(path)
    for path in paths:
        console.print(f"Written: {os.path.abspath(path)}", soft_wrap=True, markup=False, highlight=False)


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
    sources = a.nodes if a.nodes > 1 else None
    if a.scene:
        scene = _generated(a, sources)
    else:
        for name in ("tokens",) if a.load else ("experts", "tokens"):
            if getattr(a, name) is not None:
                raise ValueError(f"--{name} is {getattr(a, name)}, allowed with --scene only")
        scene = _from_file(a.load, a.experts) if a.load else trace(sources)
        for name, axis in (("batches", 0), ("layers", 1)):
            most, n = scene.counts.shape[axis], getattr(a, name)
            if n is not None and not 1 <= n <= most:
                raise ValueError(f"--{name} is {n}, allowed is 1 to {most}")
        counts = scene.counts[: a.batches, : a.layers]
        scene = replace(scene, counts=counts, phase=scene.phase[: len(counts)])
    if a.scale < 1 or scene.counts.max(initial=0) > (2**31 - 1) // a.scale:
        raise ValueError(f"--scale is {a.scale}, allowed is 1 or more, up to {2**31 - 1} tokens of an expert")
    if a.scale > 1:
        scene = replace(scene, counts=scene.counts * a.scale, name=f"{scene.name}, every token {a.scale} times")
    return scene


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
    fixed = {"tokens": size["tokens"], "seed": a.seed, "sources": sources}
    if twice := sorted(fixed.keys() & options.keys()):
        raise ValueError(f"--scene has {twice[0]}, allowed is the option --{twice[0]}")
    try:
        scene = make(name, size["batches"], size["layers"], size["experts"], **fixed, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(
            f"--scene {name}: {str(error).partition('() ')[2]}; lplb.scenes lists what there is"
        ) from error
    return replace(scene, name=" ".join(a.scene))


def _from_file(path: str, n_logical: int | None) -> Scene:
    """A file's loads; averages are rounded to whole tokens, layers without any (not recorded) are left out."""
    from lplb.formats import read_loads

    loads = np.rint(read_loads(path, n_logical=n_logical))
    recorded = loads.any((1, 2))
    if not recorded.any():
        raise ValueError(f"{path} has no tokens, allowed is at least one")
    name = os.path.basename(path).encode(errors="replace").decode()
    if not recorded.all():
        name += f", {recorded.sum()} of {len(loads)} layers"
    counts = loads[recorded].transpose(1, 0, 2).astype(np.int64)
    return Scene(name, counts, ["recorded"] * len(counts))


# ---- costs


def _shape(name: str, scene: Scene) -> ModelShape:
    """A model's experts, as many as the loads have."""
    model, n = model_by_name(name), scene.counts.shape[-1]
    if n == model.n_logical:
        return model
    return replace(model, n_logical=n, top_k=min(model.top_k, n), n_group=1, topk_group=1)


def _seconds(c: Configuration, *, model: ModelShape, hardware: Hardware, nodes: int, planner: float) -> LayerSeconds:
    with_lp = c.split == "lp" and c.policy != "none"
    return lambda quota, placement: layer_time(
        quota,
        placement.n_ranks,
        model,
        hardware,
        ranks_per_node=placement.n_ranks // nodes,
        planner_seconds=planner if with_lp else 0.0,
    )
