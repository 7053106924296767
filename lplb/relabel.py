"""The same placement under other names: which ranks and slots it takes, so that most experts stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt
import torch

from lplb import _C
from lplb.arguments import check_divides, seen, whole_number
from lplb.placement import Placement

__all__ = ["nested_blocks", "relabel"]


def relabel(
    current: Placement,
    target: Placement,
    *,
    group_size: int | None = None,
    n_nodes: int = 1,
    rank_speed: Sequence[float] | None = None,
) -> Placement:
    """Give the target's ranks and slots the order by which most experts stay where they are.

    Ranks change places within their node and their balance group; whole nodes and whole groups change places with
    others. Which of the target's ranks plays which of the current ones is the best pairing there is (the Hungarian
    algorithm, level by level); on its rank an expert that stays keeps its slot. The LP's optimum is the same for every
    load.

    Args:
        current: where experts are.
        target: where they are to be, on as many ranks, in as many slots.
        group_size: how many consecutive ranks balance among themselves; all by default.
        n_nodes: number of nodes, consecutive ranks each. Nodes divide groups, or groups nodes.
        rank_speed: speed of each rank, ``[n_ranks]``; only ranks of the same speed change places. All the same by
            default.

    Returns:
        The target under other names.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the sizes of the placements differ, or a size does not divide as it must.
    """
    for name, given in (("current", current), ("target", target)):
        if not isinstance(given, Placement):
            raise TypeError(f"{name} is {seen(given)}, allowed is a lplb.Placement")
    for size in ("n_ranks", "n_physical", "n_logical"):
        here, there = getattr(current, size), getattr(target, size)
        if here != there:
            raise ValueError(f"target has {size} {there}, allowed is the current placement's, {here}")
    n_ranks = current.n_ranks
    blocks = nested_blocks(n_ranks, n_ranks if group_size is None else group_size, n_nodes)
    kind = np.ascontiguousarray(_kinds(n_ranks, rank_speed))
    out = torch.empty_like(current.phy2log)
    _C.relabel(
        current.phy2log.data_ptr(),
        target.phy2log.data_ptr(),
        current.n_physical,
        current.n_logical,
        n_ranks,
        kind.ctypes.data,
        blocks,
        out.data_ptr(),
    )
    return Placement(out, n_ranks, current.n_logical)


def nested_blocks(n_ranks: int, group_size: SupportsIndex, n_nodes: SupportsIndex) -> list[int]:
    """Sizes of the blocks within which ranks, and then blocks, change places: from 1 to n_ranks."""
    group_size = whole_number("group_size", group_size, 1, n_ranks)
    n_nodes = whole_number("n_nodes", n_nodes, 1)
    check_divides("n_ranks", n_ranks, "group_size", group_size)
    check_divides("n_ranks", n_ranks, "n_nodes", n_nodes)
    per_node = n_ranks // n_nodes
    if group_size % per_node and per_node % group_size:
        raise ValueError(
            f"group_size is {group_size}, allowed with {per_node} ranks per node is a multiple or a divisor of that"
        )
    return sorted({1, group_size, per_node, n_ranks})


def _kinds(n_ranks: int, rank_speed: object) -> npt.NDArray[np.int32]:
    """Ranks of the same speed have the same number, int32 [n_ranks]."""
    if rank_speed is None:
        return np.zeros(n_ranks, dtype=np.int32)
    speeds = np.asarray(rank_speed)
    if speeds.dtype.kind not in "iuf":
        raise TypeError(f"rank_speed has dtype {speeds.dtype}, allowed is a real dtype")
    if speeds.shape != (n_ranks,):
        raise ValueError(f"rank_speed has shape {list(speeds.shape)}, allowed is [n_ranks] = [{n_ranks}]")
    if not (np.isfinite(speeds) & (speeds > 0)).all():
        raise ValueError(f"rank_speed is {speeds.tolist()}, allowed are finite speeds above 0")
    return np.unique(speeds, return_inverse=True)[1].astype(np.int32)
