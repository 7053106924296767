"""Expert placements from loads, after DeepSeek's EPLB, and the repair of experts placed twice on a rank.

`rebalance_experts` gives the placements that https://github.com/deepseek-ai/EPLB gives: heavy experts get
more slots, greedily; slots are packed on GPUs, heaviest first, greedily. With node-limited routing the groups
of experts are packed on nodes before that, and every node is then a small case of its own.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lplb.arguments import whole_number

__all__ = ["rebalance_experts", "spread_copies"]

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]

_MAX_TOTAL_LOAD = 1e38  # per layer: no float32 sum of loads may reach infinity


def rebalance_experts(
    weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Place experts by load, with the results of DeepSeek's EPLB.

    If ``num_groups`` is a multiple of ``num_nodes``, the hierarchical policy keeps each group of experts on
    one node; otherwise the global policy looks at neither groups nor nodes. Loads are float32, as there;
    equal loads, such as those of one expert's copies, go to the lowest index, as in the published code with
    a stable sort; its default sort may order them otherwise, and then mostly ``log2phy`` differs. The result
    may hold an expert twice on one GPU; `spread_copies` repairs that.

    Args:
        weight: load of each expert, for example tokens, ``[layers, n_logical]``: any real dtype but ``bool``,
            on any device; finite, not negative, at most 1e38 in a layer.
        num_replicas: number of slots, ``n_physical`` elsewhere here; at least ``n_logical``, a multiple of
            ``num_gpus``.
        num_groups: number of groups that routing knows; divides ``n_logical`` in the hierarchical policy.
        num_nodes: number of nodes; divides ``num_gpus`` in the hierarchical policy.
        num_gpus: number of GPUs.

    Returns:
        ``(phy2log, log2phy, logcnt)``, int64 on the CPU: the expert of each slot ``[layers, num_replicas]``;
        the slots of each expert in the order in which they were added, padded with -1,
        ``[layers, n_logical, max(logcnt)]``; the number of slots of each expert ``[layers, n_logical]``.

    Raises:
        TypeError: ``weight`` is not a tensor of a real dtype, or a number is not an int.
        ValueError: a shape, load or number is not allowed; the message has the value seen and the value
            allowed.
    """
    loads = _checked_loads(weight, dims=2)
    layers, n_logical = loads.shape
    num_replicas = whole_number("num_replicas", num_replicas, n_logical)
    num_groups = whole_number("num_groups", num_groups, 1)
    num_nodes = whole_number("num_nodes", num_nodes, 1)
    num_gpus = whole_number("num_gpus", num_gpus, 1)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1  # the global policy
    _check_multiple("n_logical", n_logical, "num_groups", num_groups)
    _check_multiple("num_replicas", num_replicas, "num_gpus", num_gpus)
    _check_multiple("num_gpus", num_gpus, "num_nodes", num_nodes)

    experts = _experts_by_node(loads, num_groups, num_nodes)
    # From here on every row is one node of one layer, and experts are counted within it.
    node_loads = np.take_along_axis(loads.numpy(), experts, axis=1).reshape(layers * num_nodes, -1)
    local, copy, count = _replicate(node_loads, num_replicas // num_nodes)
    slot_loads = np.take_along_axis(_load_per_copy(node_loads, count), local, axis=1)
    packed = _pack(slot_loads, num_gpus // num_nodes)
    local = np.take_along_axis(local, packed, axis=1)
    copy = np.take_along_axis(copy, packed, axis=1).reshape(layers, num_replicas)

    first_of_node = np.arange(num_nodes)[:, None] * (n_logical // num_nodes)
    by_node = (local.reshape(layers, num_nodes, -1) + first_of_node).reshape(layers, num_replicas)
    phy2log = np.take_along_axis(experts, by_node, axis=1)
    logcnt = np.empty((layers, n_logical), dtype=np.int64)
    np.put_along_axis(logcnt, experts, count.reshape(layers, n_logical), axis=1)
    log2phy = np.full((layers, n_logical, logcnt.max()), -1, dtype=np.int64)
    log2phy[np.arange(layers)[:, None], phy2log, copy] = np.arange(num_replicas)
    return torch.from_numpy(phy2log), torch.from_numpy(log2phy), torch.from_numpy(logcnt)


def spread_copies(phy2log: torch.Tensor, n_ranks: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Exchange slots between ranks until no rank holds an expert twice.

    Every expert keeps its number of slots. A slot is exchanged with the first slot that makes matters better,
    or, if ``weight`` is given, with the one whose load is nearest, the first of several. A layer without a
    doubled expert comes back as it was. This always succeeds when no expert has more slots than there are
    ranks.

    Exchanges cross nodes. To stay inside groups of ``group_size`` ranks, pass each group as a layer of its
    own: ``spread_copies(phy2log.view(-1, group_size * slots_per_rank), group_size).view_as(phy2log)``.

    Args:
        phy2log: expert of each slot, ``[n_physical]`` or ``[layers, n_physical]``, an integer dtype, on any
            device; ``n_physical`` is a multiple of ``n_ranks``; not changed.
        n_ranks: number of ranks.
        weight: load of each expert, ``[n_logical]`` or ``[layers, n_logical]`` as in ``phy2log``; otherwise
            as in `rebalance_experts`. A slot carries its expert's load over the expert's number of slots.

    Returns:
        A new tensor like ``phy2log`` in shape, dtype and device.

    Raises:
        TypeError: ``phy2log`` is not a tensor of an integer dtype, ``weight`` not one of a real dtype, or
            ``n_ranks`` is not an int.
        ValueError: a shape or value is not allowed, or an expert has more slots than there are ranks; the
            message names it.
    """
    n_ranks = whole_number("n_ranks", n_ranks, 1)
    rows = _checked_experts(phy2log, n_ranks)
    loads = None
    if weight is not None:
        loads = np.atleast_2d(_checked_loads(weight, dims=phy2log.dim()).numpy())
        if len(loads) != len(rows):
            raise ValueError(f"weight has {len(loads)} layers, allowed is {len(rows)} as in phy2log")
        if rows.size and rows.max() >= loads.shape[1]:
            raise ValueError(f"phy2log has expert {rows.max()}, allowed by weight is 0 to {loads.shape[1] - 1}")
    for layer, row in enumerate(rows):
        _spread_row(row, n_ranks, layer, None if loads is None else loads[layer])
    return torch.from_numpy(rows).reshape(phy2log.shape).to(dtype=phy2log.dtype, device=phy2log.device)


def _experts_by_node(loads: torch.Tensor, num_groups: int, num_nodes: int) -> _Ints:
    """Pack groups on nodes; return each layer's experts node by node, int64 [layers, n_logical]."""
    layers, n_logical = loads.shape
    group_size = n_logical // num_groups
    # torch's own sum: another order of additions could round differently, and so pack differently.
    group_loads = loads.reshape(layers, num_groups, group_size).sum(-1).numpy()
    groups = _pack(group_loads, num_nodes)
    return (groups[:, :, None] * group_size + np.arange(group_size)).reshape(layers, n_logical)


def _replicate(loads: _Floats, n_slots: int) -> tuple[_Ints, _Ints, _Ints]:
    """Give each expert a slot, then each further slot to the expert with most load per slot.

    Returns, for loads [rows, n]: the expert of each slot and which of the expert's copies it is, [rows,
    n_slots], and the number of copies of each expert, [rows, n].
    """
    rows, n = loads.shape
    expert = np.tile(np.arange(n_slots), (rows, 1))
    copy = np.zeros((rows, n_slots), dtype=np.int64)
    count = np.ones((rows, n), dtype=np.int64)
    row = np.arange(rows)
    for slot in range(n, n_slots):
        heaviest = _load_per_copy(loads, count).argmax(axis=1)
        expert[:, slot] = heaviest
        copy[:, slot] = count[row, heaviest]
        count[row, heaviest] += 1
    return expert, copy, count


def _load_per_copy(loads: _Floats, count: _Ints) -> _Floats:
    # In float32, as torch divides; NumPy alone would take float32 over int64 to float64.
    per_copy: _Floats = np.divide(loads, count, dtype=np.float32)
    return per_copy


def _pack(loads: _Floats, n_packs: int) -> _Ints:
    """Pack items into packs of equal number: heaviest first, each into the lightest pack that has room.

    Returns, for loads [rows, items], the items pack by pack, in the order in which they came, [rows, items].
    """
    rows, items = loads.shape
    capacity = items // n_packs
    if capacity == 1:
        return np.tile(np.arange(items), (rows, 1))
    packed = np.empty((rows, items), dtype=np.int64)
    pack_loads = np.zeros((rows, n_packs), dtype=np.float32)
    filled = np.zeros((rows, n_packs), dtype=np.int64)
    row = np.arange(rows)
    for item in np.argsort(-loads, axis=1, kind="stable").T:
        pack = np.where(filled < capacity, pack_loads, np.float32(np.inf)).argmin(axis=1)
        packed[row, pack * capacity + filled[row, pack]] = item
        pack_loads[row, pack] += loads[row, item]
        filled[row, pack] += 1
    return packed


def _spread_row(row: _Ints, n_ranks: int, layer: int, load: npt.NDArray[Any] | None) -> None:
    """Spread one layer in place.

    Call the surplus the number of slots that repeat an expert of their rank. An exchange that lowers it
    always exists. Let rank r hold expert e twice. As e has no more slots than there are ranks, some rank q
    lacks e. If q holds an f that r lacks, e for f takes one repeat from r and adds none. Otherwise q's
    experts are among the at most slots_per_rank - 2 others on r, so q repeats one of them, f; e for f takes a
    repeat from r, adds one to r, and takes one from q. No rank but r ever gains a repeat, so one pass over
    the slots is enough.
    """
    slots_per_rank = len(row) // n_ranks
    names, expert, count = np.unique(row, return_inverse=True, return_counts=True)
    if count.max() > n_ranks:
        e = count.argmax()
        raise ValueError(
            f"expert {names[e]} has {count[e]} slots in layer {layer}, "
            f"allowed is at most n_ranks = {n_ranks}: one on each rank"
        )
    slot_load = np.zeros(len(names)) if load is None else load[names] / count
    rank_of = np.arange(len(row)) // slots_per_rank
    held = np.zeros((n_ranks, len(names)), dtype=np.int64)
    np.add.at(held, (rank_of, expert), 1)
    for slot, r in enumerate(rank_of):
        while held[r, expert[slot]] > 1:
            e = expert[slot]
            lacks_e = held[rank_of, e] == 0
            better = np.flatnonzero(lacks_e & ((held[r, expert] == 0) | (held[rank_of, expert] > 1)))
            other = better[np.abs(slot_load[expert[better]] - slot_load[e]).argmin()]
            q, f = rank_of[other], expert[other]
            held[[r, q], [e, f]] -= 1
            held[[r, q], [f, e]] += 1
            expert[[slot, other]] = f, e
    row[:] = names[expert]


def _checked_loads(weight: torch.Tensor, dims: int) -> torch.Tensor:
    """Return the loads in float32 on the CPU after checks of type, shape and values."""
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}, allowed is a torch.Tensor")
    if weight.dtype.is_complex or weight.dtype == torch.bool:
        raise TypeError(f"weight has dtype {weight.dtype}, allowed is a real dtype")
    if weight.dim() != dims or weight.numel() == 0:
        allowed = "[layers, n_logical]" if dims == 2 else "[n_logical]"
        raise ValueError(f"weight has shape {list(weight.shape)}, allowed is {allowed} and not empty")
    loads = weight.detach().float().cpu()
    bad = (~torch.isfinite(loads) | (loads < 0)).nonzero()
    if len(bad):
        index = bad[0].tolist()
        raise ValueError(f"weight{index} is {loads[tuple(index)].item()}, allowed is finite and 0 or more")
    largest = loads.double().sum(-1).max().item()
    if largest > _MAX_TOTAL_LOAD:
        raise ValueError(f"weight adds up to {largest} in a layer, allowed is at most {_MAX_TOTAL_LOAD}")
    return loads


def _checked_experts(phy2log: torch.Tensor, n_ranks: int) -> _Ints:
    """Return phy2log as a new int64 array [layers, n_physical] after checks of type, shape and values."""
    if not isinstance(phy2log, torch.Tensor):
        raise TypeError(f"phy2log is a {type(phy2log).__name__}, allowed is a torch.Tensor")
    dtype = phy2log.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(f"phy2log has dtype {dtype}, allowed is an integer dtype")
    if phy2log.dim() not in (1, 2) or phy2log.shape[-1] == 0:
        raise ValueError(f"phy2log has shape {list(phy2log.shape)}, allowed is [n_physical] or [layers, n_physical]")
    _check_multiple("n_physical", phy2log.shape[-1], "n_ranks", n_ranks)
    rows: _Ints = np.atleast_2d(phy2log.cpu().numpy()).astype(np.int64)
    if rows.size and rows.min() < 0:
        layer, slot = np.argwhere(rows < 0)[0]
        raise ValueError(f"phy2log has {rows[layer, slot]} in layer {layer}, slot {slot}, allowed is 0 or more")
    return rows


def _check_multiple(name: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name} is {value}, allowed is a multiple of {of} = {divisor}")
