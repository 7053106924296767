"""What ``lplb place``, ``lplb diff`` and ``lplb show`` find out, as JSON can hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lplb.assess import Worth, change, worth
from lplb.change import plan_change
from lplb.eplb import spread_copies
from lplb.files import Path
from lplb.formats import read_placements, read_slots, with_equal_loads
from lplb.placement import Placement
from lplb.policies import place
from lplb.relabel import nested_blocks, relabel

__all__ = ["differences", "placed", "read_spread", "shown"]


def placed(
    loads: npt.NDArray[Any],
    *,
    n_ranks: int,
    n_physical: int,
    policy: str,
    group_size: int | None = None,
    n_groups: int = 1,
    n_nodes: int = 1,
    fallback: str = "lp",
    first_layer: int = 0,
    current: Sequence[Placement] | None = None,
    max_moves: int | None = None,
) -> tuple[list[Placement], dict[str, Any]]:
    """Make a placement for every layer and say what it is worth on the loads that it was made from.

    Args:
        loads: ``[layers, batches, n_logical]``; layers without any are placed as if all experts had the same.
        n_ranks: as for `lplb.policies.place`, like the other settings.
        n_physical: number of slots on all ranks.
        policy: which policy.
        group_size: consecutive ranks that balance among themselves.
        n_groups: groups of experts that routing knows.
        n_nodes: number of nodes.
        fallback: what shares out batches when no LP does.
        first_layer: what the report calls the first of them.
        current: placements in use, one for each layer or one for all: the new ones get the names of ranks and slots by
            which most experts stay where they are, and the report has the moves. Layers without loads stay.
        max_moves: do not place anew, but change ``current`` by at most so many moves in each layer, as
            `lplb.plan_change` does, few batches taken for what loads will be; for ``policy="lp"``.

    Returns:
        The placements and the report. Its imbalances are means over batches, ``None`` for layers without loads; moves
        are ``None`` without ``current``.

    Raises:
        ValueError: a setting is not allowed.
    """
    if not loads.any():
        raise ValueError("loads are 0 everywhere, allowed is at least one above 0")
    settings: dict[str, Any] = {"n_ranks": n_ranks, "n_physical": n_physical, "policy": policy}
    settings |= {"group_size": group_size, "n_groups": n_groups, "n_nodes": n_nodes, "fallback": fallback}
    moves: list[int] | list[None] = [None] * len(loads)
    if current is None:
        placements = _listed(place(with_equal_loads(loads), **settings))
    else:
        current = _checked_current(current, len(loads), n_physical)
        placements = _following(current, loads, max_moves, settings)
        moves = [change(*pair).moves for pair in zip(current, placements, strict=True)]
    layers: list[dict[str, Any]] = []
    for i, (placement, batches) in enumerate(zip(placements, loads, strict=True)):
        ratios = _ratios(worth(placement, batches, group_size))
        named = {"layer": first_layer + i, **ratios, "moves": moves[i]}
        layers.append({**named, "phy2log": placement.phy2log.tolist()})
    report = {
        "policy": policy,
        "n_ranks": n_ranks,
        "n_logical": loads.shape[2],
        "n_physical": n_physical,
        "batches": loads.shape[1],
        "mean": {name: _mean([layer[name] for layer in layers]) for name in ("even", "lp", "bound")},
        "moves": None if current is None else sum(layer["moves"] for layer in layers),
        "layers": layers,
    }
    return placements, report


def _following(
    current: Sequence[Placement], loads: npt.NDArray[Any], max_moves: int | None, settings: dict[str, Any]
) -> list[Placement]:
    """Return what follows the current placements, one for each layer; those of layers without loads stay."""
    if max_moves is not None and settings["policy"] != "lp":
        raise ValueError(f"policy is {settings['policy']!r}, allowed with a limit of moves is 'lp'")
    n_ranks, n_nodes, group_size = (settings[name] for name in ("n_ranks", "n_nodes", "group_size"))
    nested_blocks(n_ranks, n_ranks if group_size is None else group_size, n_nodes)  # checks before the work
    loaded = np.flatnonzero(loads.any(axis=(1, 2))).tolist()
    placements = list(current)
    if not loaded:
        return placements
    used = [current[i] for i in loaded]
    if max_moves is None:
        pairs = zip(used, _listed(place(loads[loaded], **settings)), strict=True)
        found = [relabel(old, new, group_size=group_size, n_nodes=n_nodes) for old, new in pairs]
    else:
        # Experts keep to nodes where their groups can be dealt out to these; otherwise they go anywhere.
        nodes = n_nodes if settings["n_groups"] % n_nodes == 0 else 1
        limits: dict[str, Any] = {"max_moves": max_moves, "group_size": group_size, "n_nodes": nodes}
        if settings["fallback"] != "lp":
            raise ValueError(
                f"fallback is {settings['fallback']!r} with max_moves, allowed is 'lp': moves are for the LP"
            )
        changes = plan_change(used, loads[loaded], steady=True, **limits)
        found = [one.placement for one in (changes if isinstance(changes, list) else [changes])]
    for i, one in zip(loaded, found, strict=True):
        placements[i] = one
    return placements


def _listed(found: Placement | list[Placement]) -> list[Placement]:
    return [found] if isinstance(found, Placement) else found


def _checked_current(current: Sequence[Placement], n_layers: int, n_physical: int) -> list[Placement]:
    """Return the current placement of each layer; a single one is that of all."""
    if len(current) not in (1, n_layers):
        raise ValueError(f"the current placements are of {len(current)} layers, allowed are those of loads, {n_layers}")
    for i, one in enumerate(current):
        if one.n_physical != n_physical:
            raise ValueError(f"the current placement of layer {i} has {one.n_physical} slots, allowed are {n_physical}")
    return list(current) if len(current) == n_layers else [current[0]] * n_layers


def _ratios(found: Worth) -> dict[str, float | None]:
    return {name: _mean(getattr(found, name).tolist()) for name in ("even", "lp", "bound")}


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def read_spread(path: Path, n_ranks: int | None, spread: bool) -> list[Placement]:
    """Read placements; with ``spread``, experts that are twice on a rank are exchanged away first.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `lplb.formats.read_placements`, or no exchange helps.
    """
    if not spread:
        return read_placements(path, n_ranks)
    slots = read_slots(path)
    ranks = n_ranks if slots.n_ranks is None else slots.n_ranks
    if ranks is None or (n_ranks is not None and ranks != n_ranks):
        return read_placements(path, n_ranks)  # which says what is wrong
    experts = slots.n_logical or max(int(layer.max()) + 1 for layer in slots.phy2log)
    placements = []
    for i, layer in enumerate(slots.phy2log):
        try:
            placements.append(Placement(spread_copies(torch.from_numpy(layer), ranks), ranks, experts))
        except ValueError as error:
            raise ValueError(f"{path}: layer {i}: {error}") from error
    return placements


def differences(
    before: Sequence[Placement],
    after: Sequence[Placement],
    expert_bytes: int | None = None,
    *,
    relabelled: bool = False,
) -> dict[str, Any]:
    """Say what has to move, layer by layer.

    Args:
        before: a placement for each layer.
        after: for as many layers.
        expert_bytes: weights of one expert of one layer.
        relabelled: give the ranks and slots of ``after`` the names by which most experts stay (`lplb.relabel`).

    Returns:
        The report; bytes are ``None`` without ``expert_bytes``.

    Raises:
        ValueError: other numbers of layers, ranks or experts.
    """
    if len(before) != len(after):
        raise ValueError(f"the second file has {len(after)} layers, allowed are as many as in the first, {len(before)}")
    layers = []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        try:
            found = change(old, relabel(old, new) if relabelled else new)
        except ValueError as error:
            raise ValueError(f"layer {i}: {error}") from error
        copies = {str(expert): list(pair) for expert, pair in found.copies.items()}
        size = None if expert_bytes is None else expert_bytes * found.moves
        layers.append({"layer": i, **found._asdict(), "copies": copies, "bytes": size})
    n_ranks = after[0].n_ranks
    total = {
        "moves": sum(layer["moves"] for layer in layers),
        "within_rank": sum(layer["within_rank"] for layer in layers),
        "bytes": None if expert_bytes is None else sum(layer["bytes"] for layer in layers),
        "received": [sum(layer["received"][rank] for layer in layers) for rank in range(n_ranks)],
        "sent": [sum(layer["sent"][rank] for layer in layers) for rank in range(n_ranks)],
    }
    slots = sum(one.n_physical for one in after)
    return {"n_ranks": n_ranks, "slots": slots, "relabelled": relabelled, "total": total, "layers": layers}


def shown(
    placements: Sequence[Placement],
    layers: Sequence[int],
    loads: npt.NDArray[Any] | None = None,
    group_size: int | None = None,
) -> dict[str, Any]:
    """Say what ranks hold and, with loads, what they have to do.

    Args:
        placements: one for each layer.
        layers: which of them.
        loads: ``[layers, batches, n_logical]`` of as many layers as ``placements``, or of one for all.
        group_size: consecutive ranks that balance among themselves.

    Returns:
        The report; loads are means over batches.

    Raises:
        ValueError: the loads are of other layers or experts.
    """
    if loads is not None and len(loads) not in (1, len(placements)):
        raise ValueError(f"the loads are of {len(loads)} layers, allowed are those of the placement, {len(placements)}")
    entries = []
    for i in layers:
        one = placements[i]
        entry: dict[str, Any] = {
            "layer": i,
            "ranks": one.phy2log.view(one.n_ranks, -1).tolist(),
            "copies": one.logcnt.tolist(),
        }
        if loads is not None:
            found = worth(one, loads[i if len(loads) > 1 else 0], group_size)
            entry |= {**_ratios(found), "even_loads": found.even_loads.tolist(), "lp_loads": found.lp_loads.tolist()}
        entries.append(entry)
    first = placements[0]
    return {"n_ranks": first.n_ranks, "n_logical": first.n_logical, "n_layers": len(placements), "layers": entries}
