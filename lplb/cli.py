"""The command ``lplb``."""

import argparse
import json
import sys
from collections.abc import Sequence

from lplb import __version__
from lplb.cost import HARDWARE
from lplb.models import MODELS

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
    _add_env(commands.add_parser("env", help="versions, devices, what this build can do, and what is missing"))
    _add_advise(commands.add_parser("advise", help="what pays: redundant slots, a policy, an LP, from what batch size"))
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


def _add_advise(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, choices=sorted(MODELS), help="whose experts")
    add("--hardware", default="h200", choices=sorted(HARDWARE), help="what each rank is (default: h200)")
    add("--ranks", type=int, required=True, metavar="N", help="ranks of the expert-parallel group")
    add("--nodes", type=int, metavar="N", help="nodes that they are on (default: 8 ranks each)")
    add("--group-size", type=int, metavar="N", help="consecutive ranks that balance among themselves (default: all)")
    add("--load", default="lognormal", metavar="LOADS", help="lognormal (default), trace (the recorded one), or a file")
    add("--sigma", type=float, default=0.85, help="spread of lognormal's popularities; 0: balanced (default: 0.85)")
    add("--noise", type=float, default=0.3, help="spread of each batch's own factors (default: 0.3)")
    add("--tokens", type=int, nargs="+", default=[64, 4096], metavar="N", help="tokens per rank (default: 64 4096)")
    add("--redundancy", type=int, nargs="+", default=[0, 1, 2, 4], metavar="N", help="slots per rank to look at")
    add("--planner-us", type=float, default=100.0, metavar="T", help="planner's time per layer, assumed (default: 100)")
    add("--exchange", default="auto", choices=["auto", "direct", "by_node"], help="how tokens travel between nodes")
    add("--solver", default="ipm", choices=["ipm", "flow"], help="of the LP (default: ipm)")
    add("--seed", type=int, default=0, help="of generated loads and drawn tokens (default: 0)")
    add("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_advise)


def _advise(arguments: argparse.Namespace) -> int:
    from lplb import advise

    a = arguments
    try:
        if not a.json:
            from rich.console import Console
        with advise.late_progress() as on_progress:
            found = advise.study(
                a.model,
                a.hardware,
                a.ranks,
                loads=advise.loads_by_name(a.load, MODELS[a.model], sigma=a.sigma, noise=a.noise, seed=a.seed),
                n_nodes=a.nodes,
                group_size=a.group_size,
                redundancy=a.redundancy,
                tokens=a.tokens,
                planner_seconds=a.planner_us / 1e6,
                exchange=a.exchange,
                solver=a.solver,
                seed=a.seed,
                on_progress=on_progress,
            )
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        print('lplb advise needs rich for its tables: pip install "lplb[demo]", or use --json', file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"lplb advise: {error}", file=sys.stderr)
        return 1
    if a.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        advise.show(found, Console())
    return 0
