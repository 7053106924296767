"""The commands ``lplb place``, ``diff`` and ``show``: their options, and what they do."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["add_diff", "add_place", "add_show"]

_DRAWING = ("rich", "matplotlib")


def add_place(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``lplb place``."""
    _add_loads(parser, required=True)
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="number of ranks")
    slots = parser.add_mutually_exclusive_group(required=True)
    slots.add_argument("--slots", type=int, metavar="N", help="slots on all ranks together")
    slots.add_argument("--redundant", type=int, metavar="N", help="slots beyond one for each expert")
    parser.add_argument("--policy", default="lp", choices=["lp", "eplb", "eplb-distinct"], help="default: lp")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="ranks that balance among themselves (default: all)"
    )
    parser.add_argument("--groups", type=int, default=1, metavar="N", help="groups of experts that routing knows")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes")
    parser.add_argument("--fallback", default="lp", choices=["lp", "even"], help="the split when no LP is solved")
    parser.add_argument(
        "--current", metavar="FILE", help="placements in use: ranks and slots are named so that most experts stay there"
    )
    parser.add_argument(
        "--max-moves", type=int, metavar="N", help="change those of --current, by at most so many moves in each layer"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="where the placements go (.json, or .pt for sglang)")
    parser.add_argument(
        "--format", choices=["lplb", "sglang", "vllm", "vllm-ascend"], help="of it (default: lplb, sglang for .pt)"
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON, with the placements")
    parser.set_defaults(run=_place)


def _place(arguments: argparse.Namespace) -> int:
    def work(tables: Any) -> None:
        from lplb import formats
        from lplb.arguments import whole_number
        from lplb.commands import placing
        from lplb.formats.placements import check_output

        if arguments.output is not None:
            check_output(arguments.output, arguments.format)
        if arguments.max_moves is not None and arguments.current is None:
            raise ValueError(f"--max-moves is {arguments.max_moves}, allowed only beside --current")
        loads = _loads(arguments)
        current = None
        if arguments.current is not None:
            current = formats.read_placements(arguments.current, arguments.ranks, n_logical=loads.shape[2])
            if arguments.layer is not None and len(current) > 1:
                whole_number("--layer", arguments.layer, 0, len(current) - 1)
                current = current[arguments.layer : arguments.layer + 1]
        placements, report = placing.placed(
            loads,
            current=current,
            max_moves=arguments.max_moves,
            n_ranks=arguments.ranks,
            n_physical=arguments.slots if arguments.redundant is None else loads.shape[2] + arguments.redundant,
            policy=arguments.policy,
            group_size=arguments.group_size,
            n_groups=arguments.groups,
            n_nodes=arguments.nodes,
            fallback=arguments.fallback,
            first_layer=arguments.layer or 0,
        )
        if arguments.output is not None:
            formats.write_placements(arguments.output, placements, arguments.format)
        _say(report, None if arguments.json else tables.placed_table(report))

    return _run("place", work, None if arguments.json else "show")


def add_diff(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``lplb diff``."""
    parser.add_argument("before", help="file of placements, any that lplb reads")
    parser.add_argument("after", help="the same, of as many layers and ranks")
    parser.add_argument("--expert-bytes", type=int, metavar="N", help="weights of one expert of one layer, for a sum")
    parser.add_argument(
        "--relabel", action="store_true", help="rename the second's ranks and slots first so that most experts stay"
    )
    _add_reading(parser)
    parser.set_defaults(run=_diff)


def _diff(arguments: argparse.Namespace) -> int:
    def work(tables: Any) -> None:
        from lplb.arguments import whole_number
        from lplb.commands import placing

        if arguments.expert_bytes is not None:
            whole_number("--expert-bytes", arguments.expert_bytes, 1)
        files = (arguments.before, arguments.after)
        before, after = (placing.read_spread(path, arguments.ranks, arguments.spread) for path in files)
        report = placing.differences(before, after, arguments.expert_bytes, relabelled=arguments.relabel)
        _say(report, None if arguments.json else tables.difference_table(report))

    return _run("diff", work, None if arguments.json else "show")


def add_show(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``lplb show``."""
    parser.add_argument("placement", help="file of placements, any that lplb reads")
    _add_loads(parser, required=False)
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="ranks that balance among themselves (default: all)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="draw a picture (.png, .svg, .pdf), not a table")
    _add_reading(parser)
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> int:
    def work(drawing: Any) -> None:
        from lplb import formats
        from lplb.arguments import whole_number
        from lplb.commands import placing

        if arguments.output is not None:
            drawing.check_name(arguments.output)
        placements = placing.read_spread(arguments.placement, arguments.ranks, arguments.spread)
        if arguments.layer is not None:
            whole_number("--layer", arguments.layer, 0, len(placements) - 1)
        one = arguments.layer is not None or not arguments.json or arguments.output is not None
        layers = [arguments.layer or 0] if one else range(len(placements))
        loads = None
        if arguments.load is not None:
            loads = formats.read_loads(arguments.load, first_axis=arguments.first_axis, n_logical=arguments.experts)
        report = placing.shown(placements, layers, loads, arguments.group_size)
        if arguments.output is not None:
            drawing.picture(report, report["layers"][0], arguments.output)
        if arguments.json or arguments.output is None:
            _say(report, None if arguments.json else drawing.grid(report, report["layers"][0]))

    drawn = "picture" if arguments.output is not None else None if arguments.json else "show"
    return _run("show", work, drawn)


def _add_loads(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--load",
        action="append",
        required=required,
        metavar="FILE",
        help="loads of experts: what SGLang and vLLM record, NumPy, CSV, JSON; given several times, files follow each "
        "other, or are added up where each has the counts of one rank",
    )
    parser.add_argument("--layer", type=int, metavar="N", help="only this one, from 0")
    parser.add_argument(
        "--first-axis", choices=["layers", "batches"], help="of plain arrays (default: batches of two, layers of three)"
    )
    parser.add_argument("--experts", type=int, metavar="N", help="logical experts, where the file may leave some out")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, metavar="N", help="number of ranks, where the file does not say")
    parser.add_argument("--spread", action="store_true", help="exchange away experts that are twice on a rank")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _loads(arguments: argparse.Namespace) -> Any:
    from lplb import formats

    return formats.read_loads(
        arguments.load, layer=arguments.layer, first_axis=arguments.first_axis, n_logical=arguments.experts
    )


def _run(command: str, work: Callable[[Any], None], drawn: str | None) -> int:
    """Do the work of a command, with the module that draws its results; say in one line what goes wrong."""
    try:
        module = None if drawn is None else importlib.import_module(f"lplb.commands.{drawn}")
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _DRAWING:
            raise
        print(f'lplb {command} needs {missing}: pip install "lplb[demo]"', file=sys.stderr)
        return 2
    try:
        work(module)
    except (ValueError, OSError) as error:
        print(f"lplb {command}: {error}", file=sys.stderr)
        return 1
    return 0


def _say(report: Any, table: Any) -> None:
    """Print the table, or the report as JSON where there is none."""
    if table is None:
        print(json.dumps(report))
        return
    from rich.console import Console

    Console().print(table)
