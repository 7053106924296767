"""The command ``lplb``."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lplb import __version__, advise_command, simulate_command

__all__ = ["main"]

_DEMO_NEEDS = ("rich", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0, 1 when something failed, 2 when something is missing. Wrong usage exits with 2.
    """
    parser = argparse.ArgumentParser(prog="lplb", description="Certified load balancing for expert parallelism")
    parser.add_argument("--version", action="version", version=f"lplb {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_demo(commands.add_parser("demo", help="replay the recorded router trace on simulated ranks, on the CPU"))
    advise_command.add_arguments(
        commands.add_parser("advise", help="what pays: redundant slots, a policy, an LP, and from what batch size")
    )
    simulate_command.add_arguments(
        commands.add_parser("simulate", help="loads through policies and splits: what balances them, and what it costs")
    )
    _add_place(commands.add_parser("place", help="make placements from a file of loads, and say what they are worth"))
    _add_diff(commands.add_parser("diff", help="what has to move from one file of placements to another"))
    _add_show(commands.add_parser("show", help="a placement in the terminal, or as a picture"))
    _add_env(commands.add_parser("env", help="versions, devices, what this build can do, and what is missing"))
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[8, 32], choices=[8, 16, 32], help="simulated ranks (default: 8 32)"
    )
    parser.add_argument("--batches", type=int, metavar="N", help="only the first N of the trace's 240 batches")
    parser.add_argument(
        "--picture", default="lplb-demo.png", metavar="PATH", help="where the picture goes (default: ./lplb-demo.png)"
    )
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from lplb import demo, replay
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _DEMO_NEEDS:
            raise
        print(f'lplb demo needs {" and ".join(_DEMO_NEEDS)}: pip install "lplb[demo]"', file=sys.stderr)
        return 2
    try:
        demo.run_demo(arguments.ranks, arguments.batches, arguments.picture)
    except (replay.CheckFailed, ValueError, OSError) as error:
        print(f"lplb demo: {error}", file=sys.stderr)
        return 1
    return 0


def _add_env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_env)


def _env(arguments: argparse.Namespace) -> int:
    from lplb import environment

    print(environment.text(environment.facts(), arguments.json))
    return 0


def _add_place(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("-o", "--output", metavar="FILE", help="where the placements go")
    parser.add_argument(
        "--format", choices=["lplb", "sglang", "vllm", "vllm-ascend"], help="of it (default: lplb, sglang for .pt)"
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON, with the placements")
    parser.set_defaults(run=_place)


def _place(arguments: argparse.Namespace) -> int:
    def work(tables: Any) -> None:
        from lplb import formats, placing

        loads = _loads(arguments)
        placements, report = placing.placed(
            loads,
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


def _add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", help="file of placements, any that lplb reads")
    parser.add_argument("after", help="the same, of as many layers and ranks")
    parser.add_argument("--expert-bytes", type=int, metavar="N", help="weights of one expert of one layer, for a sum")
    _add_reading(parser)
    parser.set_defaults(run=_diff)


def _diff(arguments: argparse.Namespace) -> int:
    def work(tables: Any) -> None:
        from lplb import placing
        from lplb.arguments import whole_number

        if arguments.expert_bytes is not None:
            whole_number("--expert-bytes", arguments.expert_bytes, 1)
        files = (arguments.before, arguments.after)
        before, after = (placing.read_spread(path, arguments.ranks, arguments.spread) for path in files)
        report = placing.differences(before, after, arguments.expert_bytes)
        _say(report, None if arguments.json else tables.difference_table(report))

    return _run("diff", work, None if arguments.json else "show")


def _add_show(parser: argparse.ArgumentParser) -> None:
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
        from lplb import formats, placing
        from lplb.arguments import whole_number

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

    drawn = "placement_picture" if arguments.output is not None else None if arguments.json else "show"
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
        module = None if drawn is None else importlib.import_module(f"lplb.{drawn}")
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _DEMO_NEEDS:
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
