"""Options for files of loads that ``lplb advise`` and ``lplb simulate`` share."""

import argparse
from collections.abc import Sequence

__all__ = ["MANY", "add_first_axis", "check_paths"]

MANY = "given several times, files follow each other, or are added up where each has the counts of one rank"
"""What ``--load`` does with more than one file."""


def add_first_axis(parser: argparse._ActionsContainer) -> None:
    """Add ``--first-axis``, as ``lplb place`` has it."""
    parser.add_argument(
        "--first-axis", choices=["layers", "batches"], help="of plain arrays (default: batches of two, layers of three)"
    )


def check_paths(option: str, paths: Sequence[str | None], allowed: str) -> None:
    """Refuse an empty path, which a shell makes of a variable that is not set.

    Raises:
        ValueError: there is one.
    """
    if "" in paths:
        raise ValueError(f"{option} is '', allowed is {allowed}")
