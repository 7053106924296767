"""Arguments that have one name in MindIE-SD's documents and another in its code."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["either"]

T = TypeVar("T")


def either(name: str, value: T | None, other_name: str, other: T | None) -> T:
    """Return the one of two that is given.

    Raises:
        TypeError: none is, or both are.
    """
    if (value is None) == (other is None):
        given = "neither is" if value is None else "both are"
        raise TypeError(f"{given} given of {name} and {other_name}, allowed is one: they are the same")
    found = other if value is None else value
    assert found is not None
    return found
