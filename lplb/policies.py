"""Where experts live: one entry for every policy, and the score by which placements are compared.

`place` makes a placement from load history. `optima` and `imbalance` say what the LP reaches on a placement, batch by
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lplb import _C
from lplb.arguments import check_divides, checked_group_size, seen, whole_number
from lplb.eplb import rebalance_capped, rebalance_experts, spread_copies
from lplb.placement import Placement

__all__ = ["FALLBACKS", "POLICIES", "imbalance", "likely_loads", "optima", "place"]

POLICIES = ("lp", "eplb", "eplb-distinct")
FALLBACKS = ("lp", "even")

_MOST_LOAD = 1e30  # of one expert: sums stay finite
_LEAST_SUM = 1e-200  # of loads, where not 0: no subnormal number comes near
_MOST_THREADS = 1024

_Floats = npt.NDArray[np.float64]
_Array = torch.Tensor | npt.NDArray[Any] | Sequence[Any]


def place(
    history: _Array,
    *,
    n_ranks: int,
    n_physical: int,
    policy: str = "lp",
    group_size: int | None = None,
    n_groups: int = 1,
    n_nodes: int = 1,
    fallback: str = "lp",
    sources: _Array | None = None,
    threads: int = 1,
) -> Placement | list[Placement]:
    """Make a placement from load history; from that of several layers, one placement for each.

    Args:
        history: loads of each logical expert, for example tokens: ``[n_logical]``, their mean; ``[batches,
            n_logical]``; or ``[layers, batches, n_logical]``. Two dimensions are always batches of one layer: the means
            of several layers, as `lplb.history.LoadHistory.mean` returns them, are ``history.mean()[:, None]``. A
            tensor on any device, an array, or nested sequences; any real dtype but ``bool``; finite, not negative, not
            all zero in a layer (`lplb.formats.with_equal_loads` fills such layers); a batch adds up to 0, or 1e-200 or
            more.
        n_ranks: number of ranks.
        n_physical: number of slots on all ranks; a multiple of ``n_ranks``, at least ``n_logical``, and at most
            ``n_logical * n_ranks``, as no rank holds an expert twice.
        policy: ``"lp"`` minimises the LP's optimum over `likely_loads`, and is no worse there than the other two.
            ``"eplb"`` is DeepSeek's EPLB, without copies of an expert beyond one on each rank, and with copies that it
            puts twice on one rank exchanged away. ``"eplb-distinct"`` is the same idea, never twice to begin with.
        group_size: how many consecutive ranks balance among themselves: every expert stays in one such group. All
            ranks by default.
        n_groups: number of groups of experts that node-limited routing knows, consecutive experts each.
        n_nodes: number of nodes, consecutive ranks each. Where ``n_groups`` is a multiple of it, every group of
            experts stays on one node. Otherwise ``"lp"`` puts ranks on nodes so that most tokens find a copy on their
            own; to balance all ranks of a ``group_size`` are alike.
        fallback: what shares out batches when no LP does. ``"even"`` keeps ``"lp"`` from placements that are good for
            the LP alone: there even splits count as much as the LP's.
        sources: loads by the rank that sends them, ``[n_ranks, n_logical]`` or ``[layers, n_ranks, n_logical]``, for
            ``"lp"`` with several nodes; by default all nodes send alike.
        threads: how many layers are placed at once; the result is the same for any number.

    Returns:
        A placement, or a list of one per layer.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a value, shape or combination is not allowed; the message has the value seen and the value
            allowed.
    """
    layers, many = checked_history(history)
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}, allowed are {', '.join(map(repr, POLICIES))}")
    if fallback not in FALLBACKS:
        raise ValueError(f"fallback is {fallback!r}, allowed are {', '.join(map(repr, FALLBACKS))}")
    threads = whole_number("threads", threads, 1, _MOST_THREADS)
    sizes = _checked_sizes(layers.shape[-1], n_ranks, n_physical, group_size, n_groups, n_nodes)
    sent = _sent_by_node(sources, layers, many, sizes)
    weight = torch.from_numpy(layers.mean(axis=1))
    weight /= weight.sum(dim=1, keepdim=True)  # nothing overflows float32
    phy2log = _eplb(weight, sizes, distinct=policy != "eplb", threads=threads)
    if policy == "lp":
        spread = _eplb(weight, sizes, distinct=False, threads=threads)
        phy2log = _better_for_lp((phy2log, spread), layers, sent, sizes, fallback == "even", threads)
    placed = [Placement(row, sizes.n_ranks, sizes.n_logical) for row in phy2log]
    return placed if many else placed[0]


def likely_loads(history: _Array) -> _Floats:
    """The loads on which the policy ``"lp"`` compares placements of a layer: drawn around its history, always the same.

    From one load, the mean, experts drift log-normally, each by itself, in half of the scenarios with σ = 0.3 and in
    half with 0.6. From several batches σ is estimated, for each expert, 0.3 at least, and a scenario goes four fifths
    of the way, in variance, with one of the batches: experts that drift together do so here.

    Args:
        history: of one layer, as for `place`.

    Returns:
        float64 ``[scenarios, n_logical]``, each scenario adding up to 1.

    Raises:
        TypeError: as `place`.
        ValueError: as `place`, or a history of several layers.
    """
    layers, many = checked_history(history)
    if many:
        raise ValueError(f"history has {layers.ndim} dimensions, allowed are 1 or 2: one layer")
    _, batches, n_logical = layers.shape
    out = np.empty((_C.scenarios, n_logical))
    _C.likely_loads(layers.ctypes.data, batches, n_logical, out.ctypes.data)
    return out


def optima(
    placement: Placement, loads: _Array, group_size: int | None = None, *, threads: int = 1
) -> npt.NDArray[np.float64]:
    """The LP's optimum for every load: the largest rank load of the best fractional split of each group.

    Args:
        placement: where the experts are.
        loads: of each logical expert, ``[n_logical]`` or ``[batch, n_logical]``, as ``history`` of `place`, zeros
            allowed.
        group_size: how many consecutive ranks balance among themselves; all by default.
        threads: how many loads are looked at at once; the result is the same for any number.

    Returns:
        float64 ``[groups]`` or ``[batch, groups]``, in the loads' unit. Exact for whole tokens but for the last bits,
        1e-9 of the sum otherwise.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a shape or value is not allowed, or the placement is not closed in groups of that size.
    """
    if not isinstance(placement, Placement):
        raise TypeError(f"placement is {seen(placement)}, allowed is a lplb.Placement")
    rows = _checked_loads("loads", loads)
    if rows.ndim not in (1, 2) or rows.shape[-1] != placement.n_logical:
        raise ValueError(
            f"loads has shape {list(rows.shape)}, allowed is [n_logical] = [{placement.n_logical}] or a batch "
            f"[n, {placement.n_logical}]"
        )
    group_size = checked_group_size(placement.n_ranks, group_size)
    placement.check_groups(group_size)
    threads = whole_number("threads", threads, 1, _MOST_THREADS)
    batch = np.atleast_2d(rows)
    out = np.empty((len(batch), placement.n_ranks // group_size))
    _C.placement_optima(
        placement.phy2log.data_ptr(),
        placement.n_physical,
        placement.n_logical,
        placement.n_ranks,
        group_size,
        batch.ctypes.data,
        len(batch),
        out.ctypes.data,
        threads,
    )
    shaped: _Floats = out.reshape(rows.shape[:-1] + out.shape[-1:])
    return shaped


def imbalance(
    placement: Placement, loads: _Array, group_size: int | None = None, *, threads: int = 1
) -> npt.NDArray[np.float64]:
    """The LP's largest rank load over the mean of all ranks, at least 1, for every load; 1 for one without tokens.

    Args:
        placement: where the experts are.
        loads: as for `optima`.
        group_size: as for `optima`.
        threads: as for `optima`.

    Returns:
        float64, ``[]`` or ``[batch]``.

    Raises:
        TypeError: as `optima`.
        ValueError: as `optima`.
    """
    most = optima(placement, loads, group_size, threads=threads).max(axis=-1)
    mean = _checked_loads("loads", loads).sum(axis=-1) / placement.n_ranks
    ratio: _Floats = np.divide(most, mean, out=np.ones_like(most), where=mean > 0)
    return ratio


# ---- policies


class _Sizes(NamedTuple):
    """What is to be placed where. Parts are equal runs of consecutive ranks; no expert has copies in two."""

    n_logical: int
    n_ranks: int
    n_physical: int
    n_groups: int  # of experts that routing knows; 1 where it is not limited to nodes
    n_nodes: int  # that such a group stays in; 1 where routing is not limited
    parts_per_node: int
    ranks_per_node: int


def _eplb(weight: torch.Tensor, sizes: _Sizes, *, distinct: bool, threads: int) -> torch.Tensor:
    """EPLB's placements of loads [layers, n_logical], no expert twice on a rank, int64 [layers, n_physical]."""
    layers = len(weight)
    if sizes.n_nodes > 1 and sizes.parts_per_node > 1:
        # Groups of experts on nodes first; every node is then a case of its own, with experts on its parts.
        experts = _experts_by_node(weight, sizes)
        rows = weight.gather(1, experts).view(layers * sizes.n_nodes, -1)
        of_node = _Sizes(
            rows.shape[1],
            sizes.ranks_per_node,
            sizes.n_physical // sizes.n_nodes,
            1,
            1,
            sizes.parts_per_node,
            sizes.ranks_per_node,
        )
        local = _eplb(rows, of_node, distinct=distinct, threads=threads).view(layers, sizes.n_nodes, -1)
        return experts.view(layers, sizes.n_nodes, -1).gather(2, local).view(layers, -1)
    if sizes.parts_per_node > 1:  # experts are packed on parts as groups of experts are on nodes
        shape = sizes.n_logical, sizes.parts_per_node, sizes.n_ranks
    else:
        shape = sizes.n_groups, sizes.n_nodes, sizes.n_ranks
    mode = "hierarchical" if shape[1] > 1 else "global"
    if distinct:
        return rebalance_experts(weight, sizes.n_physical, *shape, mode=mode, distinct=True, threads=threads)[0]
    phy2log = rebalance_capped(weight, sizes.n_physical, *shape, mode=mode, threads=threads)
    rows = phy2log.view(layers * shape[1], -1)
    most = sizes.n_ranks // shape[1]
    return spread_copies(rows, most, weight.repeat_interleave(shape[1], dim=0)).view(layers, -1)


def _experts_by_node(weight: torch.Tensor, sizes: _Sizes) -> torch.Tensor:
    """The experts of each node, node by node, int64 [layers, n_logical], every group of experts on one node."""
    groups = weight.view(len(weight), sizes.n_groups, -1)
    slots = sizes.n_groups  # a slot for each group: EPLB packs without copying
    order = rebalance_experts(groups.sum(-1), slots, slots, sizes.n_nodes, sizes.n_nodes, mode="hierarchical")[0]
    per_group = groups.shape[2]
    return (order[:, :, None] * per_group + torch.arange(per_group)).view(len(weight), -1)


def _better_for_lp(
    given: tuple[torch.Tensor, torch.Tensor],
    layers: _Floats,
    sent: _Floats,
    sizes: _Sizes,
    even: bool,
    threads: int,
) -> torch.Tensor:
    """For each layer a placement with the parts of the given ones, or the better of these where no other is better."""
    phy2log, also = (placed.to(torch.int32).contiguous() for placed in given)
    n_parts = sizes.n_nodes * sizes.parts_per_node
    geometry = sizes.n_logical, sizes.n_ranks, sizes.n_physical, n_parts, sizes.ranks_per_node
    n_layers, batches, _ = layers.shape
    _C.place_for_lp(
        geometry,
        even,
        layers.ctypes.data,
        n_layers,
        batches,
        sent.ctypes.data,
        also.data_ptr(),
        phy2log.data_ptr(),
        threads,
    )
    return phy2log


# ---- checks


def _checked_loads(name: str, loads: object) -> _Floats:
    """Loads as contiguous float64 of any shape, finite and not negative, no row all but 0."""
    if isinstance(loads, torch.Tensor):
        if loads.dtype.is_complex or loads.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {loads.dtype}, allowed is a real dtype")
        if loads.layout != torch.strided or loads.device.type == "meta":
            raise TypeError(f"{name} has layout {loads.layout} on {loads.device}, allowed is torch.strided with values")
        values = loads.detach().to(device="cpu", dtype=torch.float64).numpy()
    elif isinstance(loads, (np.ndarray, Sequence)) and not isinstance(loads, (str, bytes)):
        try:
            given = np.asarray(loads)
        except ValueError as error:  # rows of different lengths
            raise ValueError(f"{name} is no array: {error}") from error
        if given.dtype.kind not in "iuf":
            raise TypeError(f"{name} has dtype {given.dtype}, allowed is a real dtype")
        values = given.astype(np.float64)
    else:
        raise TypeError(f"{name} is {seen(loads)}, allowed is a tensor, an array or a sequence of numbers")
    if values.ndim == 0:
        raise ValueError(f"{name} has shape [], allowed is at least one dimension, [n_logical]")
    odd = ~((values >= 0) & (values <= _MOST_LOAD))  # true for NaN as well
    if odd.any():
        index = np.argwhere(odd)[0].tolist()
        raise ValueError(f"{name}{index} is {values[tuple(index)]}, allowed are 0 to {_MOST_LOAD}")
    sums = np.atleast_1d(values).sum(axis=-1)
    tiny = (sums > 0) & (sums < _LEAST_SUM)
    if tiny.any():
        index = np.argwhere(tiny)[0].tolist() if values.ndim > 1 else ""
        raise ValueError(f"{name}{index} adds up to {sums[tiny][0]}, allowed is 0, or {_LEAST_SUM} or more")
    return np.ascontiguousarray(values)


def checked_history(history: object) -> tuple[_Floats, bool]:
    """History as [layers, batches, n_logical], and whether it came with layers."""
    values = _checked_loads("history", history)
    if values.ndim not in (1, 2, 3) or values.size == 0:
        raise ValueError(
            f"history has shape {list(values.shape)}, allowed is [n_logical], [batches, n_logical] or [layers, "
            "batches, n_logical], and not empty"
        )
    layers = values.reshape((1,) * (3 - values.ndim) + values.shape)
    idle = np.flatnonzero(layers.sum(axis=(1, 2)) == 0)
    if idle.size:
        where = f" in layer {idle[0]}" if values.ndim == 3 else ""
        raise ValueError(
            f"history is 0 everywhere{where}, allowed is at least one load above 0; "
            "lplb.formats.with_equal_loads puts ones in such layers"
        )
    return layers, values.ndim == 3


def _checked_sizes(
    n_logical: int, n_ranks: int, n_physical: int, group_size: int | None, n_groups: int, n_nodes: int
) -> _Sizes:
    n_ranks = whole_number("n_ranks", n_ranks, 1)
    n_physical = whole_number("n_physical", n_physical, 1)
    check_divides("n_physical", n_physical, "n_ranks", n_ranks)
    if n_physical < n_logical:
        raise ValueError(f"n_physical is {n_physical}, allowed is n_logical = {n_logical} or more: a slot per expert")
    group_size = checked_group_size(n_ranks, group_size)
    check_divides("n_ranks", n_ranks, "group_size", group_size)
    n_groups = whole_number("n_groups", n_groups, 1)
    check_divides("n_logical", n_logical, "n_groups", n_groups)
    n_nodes = whole_number("n_nodes", n_nodes, 1)
    check_divides("n_ranks", n_ranks, "n_nodes", n_nodes)
    ranks_per_node = n_ranks // n_nodes
    if n_nodes == 1 or n_groups % n_nodes:
        n_groups = n_nodes = 1  # routing is not limited to nodes
    per_node = n_ranks // n_nodes
    if per_node % group_size and group_size % per_node:
        raise ValueError(
            f"group_size is {group_size}, allowed with {n_nodes} nodes is a divisor or a multiple of the {per_node} "
            "ranks of a node"
        )
    parts_per_node = max(1, per_node // group_size)
    most = n_logical // n_nodes // parts_per_node * n_ranks
    if n_physical > most:
        raise ValueError(
            f"n_physical is {n_physical}, allowed is at most {most}: {most // n_ranks} slots on each rank, as no rank "
            "holds an expert twice and no expert is in two groups or nodes"
        )
    return _Sizes(n_logical, n_ranks, n_physical, n_groups, n_nodes, parts_per_node, ranks_per_node)


def _sent_by_node(sources: object, layers: _Floats, many: bool, sizes: _Sizes) -> _Floats:
    """The loads that every node sends, [layers, n_nodes, n_logical]; all alike without sources."""
    n_layers, _, n_logical = layers.shape
    n_nodes = sizes.n_ranks // sizes.ranks_per_node
    if sources is None:
        return np.repeat(layers.mean(axis=1, keepdims=True), n_nodes, axis=1)
    by_rank = _checked_loads("sources", sources)
    shape = (n_layers, sizes.n_ranks, n_logical) if many else (sizes.n_ranks, n_logical)
    if by_rank.shape != shape:
        axes = "[layers, n_ranks, n_logical]" if many else "[n_ranks, n_logical]"
        raise ValueError(f"sources has shape {list(by_rank.shape)}, allowed is {axes} = {list(shape)}")
    by_node: _Floats = by_rank.reshape(n_layers, n_nodes, sizes.ranks_per_node, n_logical).sum(axis=2)
    return by_node
