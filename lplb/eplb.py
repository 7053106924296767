"""Expert placements from loads, after DeepSeek's EPLB, and the repair of experts placed twice on a rank.

`rebalance_experts` gives the placements that https://github.com/deepseek-ai/EPLB gives: heavy experts get
more slots, greedily; slots are packed on GPUs, heaviest first, greedily. With node-limited routing the groups
of experts are packed on nodes before that, and every node is then a small case of its own. The work is done by
``csrc/core/eplb.h``; ``distinct`` placements come from ``csrc/core/eplb_distinct.h``.
"""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lplb import _C
from lplb.arguments import whole_number

__all__ = ["MODES", "rebalance_experts", "spread_copies"]

MODES = ("auto", "hierarchical", "global")
"""What groups and nodes are for, by name; see `rebalance_experts`."""

_Ints = npt.NDArray[np.int64]

_MAX_TOTAL_LOAD = 1e38  # per layer: no float32 sum of loads may reach infinity
_MOST_SLOTS = 2**31 - 1
_MOST_THREADS = 1024


def rebalance_experts(
    weight: torch.Tensor,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    mode: str = "auto",
    distinct: bool = False,
    threads: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Place experts by load, with the results of DeepSeek's EPLB or, with ``distinct``, after its idea.

    Loads are float32, as there; equal loads, such as those of one expert's copies, go to the lowest index, as in the
    published code with a stable sort; its default sort may order them otherwise, and then mostly ``log2phy`` differs.
    The published result may hold an expert twice on one GPU, which a `Placement` refuses; ``distinct`` avoids that.

    ``mode`` says what groups and nodes are for:

    - ``"hierarchical"`` keeps each group of experts on one node; copies of an expert stay there too. Where
      ``num_nodes`` does not divide ``num_groups``, which the published code does not serve, some nodes get one
      group more than others.
    - ``"global"`` looks at neither groups nor nodes.
    - ``"auto"`` is DeepSeek's rule: hierarchical where ``num_groups`` is a multiple of ``num_nodes``, else global.

    With ``distinct`` an expert gets at most as many copies as there are GPUs (of its node, in the hierarchical mode); a
    copy goes to the lightest GPU that lacks the expert; then slots are exchanged between the busiest GPU and others of
    its node while that lowers the maximum. On a GPU slots stand heaviest first. The busiest GPU carries no more than
    the published placement's wherever that has no expert twice on a GPU. Where it has, more is possible: on common
    shapes in less than 1 % of layers, over very wide geometries in 1.4 %.

    Args:
        weight: load of each expert, for example tokens, ``[layers, n_logical]``: any real dtype but ``bool``,
            on any device; finite, not negative, at most 1e38 in a layer.
        num_replicas: number of slots, ``n_physical`` elsewhere here; at least ``n_logical``, a multiple of
            ``num_gpus``, since every GPU has as many slots.
        num_groups: number of groups that routing knows; divides ``n_logical`` in the hierarchical mode.
        num_nodes: number of nodes; divides ``num_gpus`` in the hierarchical mode.
        num_gpus: number of GPUs.
        mode: ``"auto"``, ``"hierarchical"`` or ``"global"``.
        distinct: never place an expert twice on one GPU.
        threads: threads that share the layers; the result does not depend on it. Other Python threads run meanwhile.

    Returns:
        ``(phy2log, log2phy, logcnt)``, int64 on the CPU: the expert of each slot ``[layers, num_replicas]``;
        the slots of each expert in the order in which they were added, padded with -1,
        ``[layers, n_logical, max(logcnt)]``; the number of slots of each expert ``[layers, n_logical]``.

    Raises:
        TypeError: ``weight`` is not a tensor of a real dtype, a number is not an int, ``mode`` not a str, or
            ``distinct`` not a bool.
        ValueError: a shape, load, number or mode is not allowed; the message has the value seen and the value
            allowed.
    """
    loads = _checked_loads(weight, dims=2)
    sizes = _checked_sizes(loads.shape[1], num_replicas, num_groups, num_nodes, num_gpus, mode)
    if not isinstance(distinct, bool):
        raise TypeError(f"distinct is {distinct!r}, allowed is a bool")
    if distinct:
        _check_room_for_distinct(sizes)
    threads = whole_number("threads", threads, 1, _MOST_THREADS)

    return _placed(loads, sizes, _Rule.DISTINCT if distinct else _Rule.PUBLISHED, threads)


def rebalance_capped(
    weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, *, mode: str, threads: int
) -> torch.Tensor:
    """The published placement, but no expert has more copies than there are GPUs (of its node): its ``phy2log``.

    As published where that has no more. Copies may still be twice on a GPU; `spread_copies` moves them.
    """
    loads = _checked_loads(weight, dims=2)
    sizes = _checked_sizes(loads.shape[1], num_replicas, num_groups, num_nodes, num_gpus, mode)
    _check_room_for_distinct(sizes)
    return _placed(loads, sizes, _Rule.CAPPED, whole_number("threads", threads, 1, _MOST_THREADS))[0]


class _Rule(IntEnum):
    """As in ``csrc/core/eplb.h``."""

    PUBLISHED = 0
    CAPPED = 1
    DISTINCT = 2


def _placed(
    loads: torch.Tensor, sizes: "_Sizes", rule: _Rule, threads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """phy2log, log2phy and logcnt of `rebalance_experts`."""
    layers, n_logical = loads.shape
    group_loads = None
    if 1 < sizes.n_groups != sizes.n_nodes:
        # torch's own sum: another order of additions could round differently, and so pack differently.
        group_loads = loads.reshape(layers, sizes.n_groups, n_logical // sizes.n_groups).sum(-1)
    loads = loads.contiguous()
    phy2log = torch.empty(layers, sizes.n_slots, dtype=torch.int64, device="cpu")
    copy = torch.empty(layers, sizes.n_slots, dtype=torch.int32, device="cpu")
    logcnt = torch.empty(layers, n_logical, dtype=torch.int64, device="cpu")
    arrays = (
        loads.data_ptr(),
        0 if group_loads is None else group_loads.data_ptr(),
        phy2log.data_ptr(),
        copy.data_ptr(),
        logcnt.data_ptr(),
    )
    most_copies = _C.eplb_place(sizes, layers, arrays, rule, threads)
    log2phy = torch.empty(layers, n_logical, most_copies, dtype=torch.int64, device="cpu")
    _C.eplb_log2phy(sizes, layers, arrays, most_copies, log2phy.data_ptr(), threads)
    return phy2log, log2phy, logcnt


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


class _Sizes(NamedTuple):
    """As `lplb._C` wants them; 1 group and 1 node in the global mode."""

    n_logical: int
    n_slots: int
    n_groups: int
    n_nodes: int
    n_gpus: int


def _checked_sizes(
    n_logical: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, mode: str
) -> _Sizes:
    num_replicas = whole_number("num_replicas", num_replicas, n_logical)
    num_groups = whole_number("num_groups", num_groups, 1)
    num_nodes = whole_number("num_nodes", num_nodes, 1)
    num_gpus = whole_number("num_gpus", num_gpus, 1)
    if not isinstance(mode, str):
        raise TypeError(f"mode is {mode!r}, allowed is one of {', '.join(map(repr, MODES))}")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, allowed is one of {', '.join(map(repr, MODES))}")
    if num_replicas > _MOST_SLOTS:
        raise ValueError(f"num_replicas is {num_replicas}, allowed is at most {_MOST_SLOTS}")
    if mode == "global" or (mode == "auto" and num_groups % num_nodes):
        num_groups = num_nodes = 1
    _check_multiple("n_logical", n_logical, "num_groups", num_groups)
    _check_multiple("num_replicas", num_replicas, "num_gpus", num_gpus)
    _check_multiple("num_gpus", num_gpus, "num_nodes", num_nodes)
    if num_groups < num_nodes:
        raise ValueError(f"num_groups is {num_groups}, allowed is num_nodes = {num_nodes} or more: every node gets one")
    most_groups = -(-num_groups // num_nodes)
    most_experts = most_groups * (n_logical // num_groups)
    if num_replicas // num_nodes < most_experts:
        gpus_per_node = num_gpus // num_nodes
        enough = num_gpus * -(-most_experts // gpus_per_node)
        raise ValueError(
            f"num_replicas is {num_replicas}, allowed is {enough} or more: "
            f"a node with {most_groups} of {num_groups} groups holds {most_experts} experts"
        )
    return _Sizes(n_logical, num_replicas, num_groups, num_nodes, num_gpus)


def _check_room_for_distinct(sizes: _Sizes) -> None:
    """Refuse more slots on a GPU than there are experts to fill them with."""
    fewest_experts = sizes.n_groups // sizes.n_nodes * (sizes.n_logical // sizes.n_groups)
    if sizes.n_slots > fewest_experts * sizes.n_gpus:
        where = "a node" if sizes.n_nodes > 1 else "all nodes"
        raise ValueError(
            f"num_replicas is {sizes.n_slots}, allowed with distinct is at most {fewest_experts * sizes.n_gpus}: "
            f"each of {sizes.n_gpus} GPUs once each of the {fewest_experts} experts of {where}"
        )


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
    least, most = (bound.item() for bound in loads.aminmax())  # NaN if there is one
    if least >= 0 and most * loads.shape[-1] <= _MAX_TOTAL_LOAD:
        return loads
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
