"""DeepSeek's EPLB in NumPy, all layers at once: what `lplb.eplb.rebalance_experts` is compared with. Nothing of lplb.

Loads are float32. Of equals the lowest index comes first, as in the published code with a stable sort.
"""

import numpy as np
import numpy.typing as npt
import torch

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]


def rebalance_reference(
    weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[_Ints, _Ints, _Ints]:
    """phy2log [layers, num_replicas], log2phy [layers, n_logical, most copies] and logcnt [layers, n_logical]."""
    loads = weight.detach().float().cpu()
    layers, n_logical = loads.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1  # the global policy
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
    return phy2log, log2phy, logcnt


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
