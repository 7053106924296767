"""The command ``lplb``."""

import argparse
import os
import sys
from collections.abc import Sequence

from lplb import __version__
from lplb.commands import advise, placements, simulate

__all__ = ["main"]

_DEMO_NEEDS = ("rich", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0, 1 when something failed or nobody reads the output any more, 2 when something is missing,
        130 when interrupted. Wrong usage exits with 2.
    """
    parser = argparse.ArgumentParser(prog="lplb", description="Certified load balancing for expert parallelism")
    parser.add_argument("--version", action="version", version=f"lplb {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, add_options, what in (
        ("demo", _add_demo, "replay the recorded router trace on simulated ranks, on the CPU"),
        ("advise", advise.add_arguments, "what pays: redundant slots, a policy, an LP, and from what batch size"),
        (
            "simulate",
            simulate.add_arguments,
            "loads through policies and splits: what balances them, and what it costs",
        ),
        ("place", placements.add_place, "make placements from a file of loads, and say what they are worth"),
        ("diff", placements.add_diff, "what has to move from one file of placements to another"),
        ("show", placements.add_show, "a placement in the terminal, or as a picture"),
        ("env", _add_env, "versions, devices, what this build can do, and what is missing"),
    ):
        add_options(commands.add_parser(name, help=what))
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()  # here, where a closed pipe can still be told from other errors
    except BrokenPipeError:
        _silence()
        return 1
    except KeyboardInterrupt:
        print("lplb: interrupted", file=sys.stderr)
        return 130
    return status


def _silence() -> None:
    """Let what is still buffered go nowhere: Python flushes at its end, which would fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


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
    except BrokenPipeError:
        raise
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
