"""``python -m lplb.eplb_scheduler``: the scheduler service, with MindIE-SD's flags.

An auth key on the command line is there for everybody who may run ``ps``, and one in the environment for everybody who
may read ``/proc``. So the program takes the key, and runs itself anew without it: the key goes through a pipe. Until
Python has come so far, a second or two, ``--auth_key`` is to be seen; ``EPLB_AUTH_KEY`` is not by other users.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from lplb.arguments import whole_number
from lplb.dynamic.keys import KEY_VARIABLE, checked_key

if TYPE_CHECKING:
    from lplb.dynamic.scheduler import Scheduler

__all__ = ["main"]

_FD = "--auth_key_fd"
_MOST_KEY_BYTES = 2**12  # that are read; a pipe holds as many


def main(argv: Sequence[str] | None = None) -> int:
    """Run the scheduler until SIGTERM or SIGINT.

    Args:
        argv: arguments after the program's name; by default those of the process. ``--auth_key`` is taken from them,
            but this function does not hide it.

    Returns:
        The exit status: 0 after a signal, 1 when the address cannot be listened on, 2 when something is missing. Wrong
        usage exits with 2.
    """
    parser = _parser()
    rest, keys = _apart(sys.argv[1:] if argv is None else argv)
    arguments, unknown = parser.parse_known_args(rest)
    if unknown:  # by name alone: what comes after a misspelt --auth_key is no business of a log
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        parser.error(f"unknown: {', '.join(options) or f'{len(unknown)} words that belong to no option'}")
    from lplb.dynamic.scheduler import Flags, Scheduler

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    names = ("world_size", "expert_num", "block_num", "max_move", "redundant", "mode")
    try:
        flags = Flags(**{name: getattr(arguments, name) for name in names})
        key = _key(keys, getattr(arguments, "auth_key_fd", None))
        most = getattr(arguments, "max_memory", None)
        scheduler = Scheduler(
            flags,
            host=arguments.host,
            port=arguments.port,
            auth_key=key,
            most_memory=None if most is None else whole_number("max_memory", most, 1, 2**40) << 20,
        )
    except ImportError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    _raise_limit_of_files()
    return _run(parser.prog, scheduler)


def _raise_limit_of_files() -> None:
    """Allow as many connections as the system lets this process have."""
    try:
        import resource
    except ImportError:  # not POSIX
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems have a lower one yet
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _run(name: str, scheduler: Scheduler) -> int:
    def end(number: int, frame: FrameType | None) -> None:
        scheduler.stop()

    signal.set_wakeup_fd(scheduler.waker.fileno(), warn_on_full_buffer=False)  # a poll under way ends at once
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    try:
        ended = scheduler.serve(lambda address: print(f"lplb scheduler listens on {address}", flush=True))
    except OSError as error:
        print(f"{name}: {error.strerror or error}", file=sys.stderr)
        return 1
    finally:
        signal.set_wakeup_fd(-1)
    if not ended:  # Python would end while C++ still plans
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lplb.eplb_scheduler",
        description="Plan placements for the ranks of a model, as a service; see docs/dynamic.md",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--world_size", type=int, default=8, help="ranks that share the experts")
    parser.add_argument("--host", default="localhost", help="interface to listen on; not loopback: with a key only")
    parser.add_argument("--port", type=int, default=50001, help="0 picks a free one, and prints it")
    parser.add_argument("--expert_num", type=int, default=32, help="logical experts of a layer")
    parser.add_argument("--block_num", type=int, default=30, help="MoE layers")
    parser.add_argument("--max_move", type=int, default=5, help="mode EX: most experts written in a cycle")
    parser.add_argument("--redundant", type=int, default=0, help="spare slots on each rank")
    parser.add_argument("--mode", default="A2A", help="A2A, AG or EX")
    parser.add_argument(
        "--max_memory",
        type=int,
        default=argparse.SUPPRESS,
        metavar="MIB",
        help="by how much the process may grow before it closes all connections (default: by the other flags)",
    )
    parser.add_argument(
        "--auth_key",
        default=argparse.SUPPRESS,
        help=f"what clients must have too; the environment's {KEY_VARIABLE} is better kept",
    )
    parser.add_argument(
        _FD, type=int, default=argparse.SUPPRESS, metavar="N", help="read the auth key from this open file, to its end"
    )
    return parser


# ---- the key


def _apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without auth keys, and the keys, so that no message of argparse can show one.

    ``--auth-key``, ``--authkey`` and all that begins with ``--auth`` is taken for it.
    """
    rest: list[str] = []
    keys: list[str] = []
    left = iter(words)
    for word in left:
        option, equals, value = word.partition("=")
        if not option.startswith("--auth") or option == _FD:
            rest.append(word)
        else:
            keys.append(value if equals else next(left, ""))
    return rest, keys


def _key(keys: Sequence[str], fd: int | None) -> bytes | None:
    """The key given last on the command line, or in a file; None leaves it to the environment."""
    if keys:
        return checked_key(keys[-1])
    if fd is None:
        return None
    if not 0 <= fd < 2**31:  # a C int; Python's own errors name no option
        raise ValueError(f"auth_key_fd is {fd}, allowed is a file open for reading, 0 to 2**31 - 1")
    try:
        with open(fd, "rb") as file:
            key = file.read(_MOST_KEY_BYTES)
    except OSError as error:
        raise ValueError(f"auth_key_fd is {fd}, allowed is a file open for reading: {error.strerror}") from error
    return checked_key(key.removesuffix(b"\n"))


def _hide_key() -> None:
    """Where a key is to be seen, become the same program without it."""
    rest, keys = _apart(sys.argv[1:])
    kept = os.environ.pop(KEY_VARIABLE, None)
    if not keys and not kept:
        return
    if keys or not any(word.partition("=")[0] == _FD for word in rest):
        try:
            key = checked_key(keys[-1] if keys else kept)
        except ValueError as error:
            _parser().error(str(error))
        rest += [_FD, str(_pipe_with(key + b"\n"))]
    python = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    os.execv(sys.executable, [*python, *rest])


def _pipe_with(content: bytes) -> int:
    """The end of a pipe from which this program's successor can read."""
    reads, writes = os.pipe()
    os.write(writes, content)
    os.close(writes)
    os.set_inheritable(reads, True)
    return reads


if __name__ == "__main__":
    _hide_key()
    sys.exit(main())
