"""What a layer of experts costs: one transparent model of its time on given hardware.

    layer = slowest rank's experts + dispatch + combine + planner + transfers

- **Experts**: a rank computes its slots one after the other. A slot with tokens takes the longer of reading its weights
  and multiplying, with its tokens rounded up to whole tiles; a slot without tokens takes nothing. So a small batch pays
  for every copy that is used, and a large one for its tokens.
- **Dispatch and combine**: tokens come from all ranks alike. What a rank takes from its own node comes over NVLink, the
  rest over its network card; the two go on beside each other, and the slowest rank decides. ``"direct"`` sends every
  choice of a token by itself, as DeepEP's low-latency kernels do; ``"by_node"`` sends a token to a node once, where
  NVLink passes it on, as its normal kernels do (https://github.com/deepseek-ai/DeepEP, docs/legacy.md).
- **Transfers**: weights that travel for one batch (`lplb.TransferPlanner`), by `transfer_time`. They use the links that
  the tokens use, so their time is added, also where they are under way at the same time. Every expert goes over a tree:
  once to each node that wants it, where a first rank gets it over its network card and others have it over NVLink, and
  a rank that has it passes it on: in every round each rank that has the expert sends it to one that has not, in the
  order of the table (a binomial tree), so that ``n`` copies take ``ceil(log2(n + 1))`` rounds. The sends of all trees
  are counted for the ranks that make them, who pass on included. The rank with the most copies out or in decides,
  NVLink and cards beside each other; that a copy must have come before it goes on, and that rounds of different
  trees may wait for each other, is not in it. A forward pass only: in a backward pass, in which experts compute twice
  as much, the weights may come once more and gradients go home, which is about twice as much on the links too.
- **Planner**: what the caller says. lplb's kernels have not been measured on a GPU; `ASSUMED_PLANNER_SECONDS` is
  LPLB's figure, and an assumption.

Not in it: the latency of kernels and links (the same for every plan), reading and writing activations, shared experts
and attention, overlap of the parts, and where tokens come from: a split that keeps tokens at home, or a router that
picks few nodes for each token, is better than this.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch

from lplb.arguments import check_divides, real_number, seen, whole_number
from lplb.models import ModelShape

__all__ = [
    "ASSUMED_PLANNER_SECONDS",
    "EXCHANGES",
    "HARDWARE",
    "Hardware",
    "LayerParts",
    "hardware_by_name",
    "layer_parts",
    "layer_time",
    "transfer_time",
]

ASSUMED_PLANNER_SECONDS = 100e-6
"""Planner's time per layer and batch, assumed: LPLB's authors say about 100 µs for a solve within a node. Theirs of
UltraEP is 67 to 78 µs for the plan and 36 to 39 for the tokens; benchmarks/PREDICTIONS.md predicts 24 to 224 µs for
lplb, without the exchange. Nothing of lplb has been measured on a GPU."""

EXCHANGES = ("direct", "by_node")
"""How tokens travel between nodes: every choice by itself, or once to each node."""

TILES = {"direct": 64, "by_node": 128}
"""Tokens of an expert are multiplied in tiles of as many, by exchange: 64 is the M of Hopper's wgmma (PTX ISA), the
least block of kernels for few tokens; 128 is what DeepGEMM aligns experts to in its contiguous layout, for many."""

_MOST_LOAD = 1e30  # of one slot: sums stay finite

_Floats = npt.NDArray[np.float64]
_Loads = torch.Tensor | npt.NDArray[Any]


@dataclass(frozen=True)
class Hardware:
    """One GPU and its links, by data sheet; every rate is multiplied by one ``efficiency``.

    The efficiency is an assumption, 0.75 by default. It is near what others report of single parts: DeepGEMM reaches
    up to 1,550 of 1,979 FP8 TFLOPS on an H800, DeepEP 726 to 740 of 900 GB/s over NVLink 5, and 39 to 58 of 50 GB/s
    over a 400 Gb/s card (with traffic that stays on its rank counted).

    Raises:
        TypeError: a number is not one.
        ValueError: a number is not positive, or ``efficiency`` is above 1.
    """

    name: str
    """What reports call it."""
    bf16_flops: float
    """Dense BF16 operations per second."""
    fp8_flops: float
    """Dense FP8 operations per second."""
    memory_bytes: float
    """Memory."""
    memory_bandwidth: float
    """Bytes per second."""
    nvlink_bandwidth: float
    """Bytes per second in one direction; data sheets name the sum of both."""
    rdma_bandwidth: float
    """Bytes per second in one direction of the GPU's share of network cards."""
    efficiency: float = 0.75
    """Part of every rate above that is reached, assumed."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for field in fields(self)[1:]:
            given = getattr(self, field.name)
            value = real_number(field.name, given)
            if isinstance(given, np.generic):
                object.__setattr__(self, field.name, value)
            if not 0 < value < float("inf"):  # false for NaN as well
                raise ValueError(f"{field.name} is {value}, allowed is above 0")
        if self.efficiency > 1:
            raise ValueError(f"efficiency is {self.efficiency}, allowed is at most 1")

    def flops(self, precision: str) -> float:
        """Dense operations per second in ``"bf16"`` or ``"fp8"``, by data sheet."""
        return {"bf16": self.bf16_flops, "fp8": self.fp8_flops}[precision]


# Data sheets. NVIDIA's tables of H100, H200 and B200 give operations with sparsity: twice the dense ones used here.
#   H100 SXM  https://www.nvidia.com/en-us/data-center/h100/   BF16 1,979, FP8 3,958 TFLOPS (sparse), 80 GB, 3.35 TB/s,
#             NVLink 900 GB/s
#   H200 SXM  https://www.nvidia.com/en-us/data-center/h200/   as H100; 141 GB, 4.8 TB/s
#   HGX B200  https://resources.nvidia.com/en-us-blackwell-architecture (Blackwell data sheet, per GPU of HGX B200):
#             BF16 4.5, FP8 9 PFLOPS (sparse), 180 GB, 7.7 TB/s, NVLink 1.8 TB/s
#   network   https://docs.nvidia.com/dgx/dgxh100-user-guide/   one ConnectX-7 port of 400 Gb/s per GPU; taken for all
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("h100", 989.5e12, 1979e12, 80e9, 3.35e12, 450e9, 50e9),
        Hardware("h200", 989.5e12, 1979e12, 141e9, 4.8e12, 450e9, 50e9),
        Hardware("b200", 2250e12, 4500e12, 180e9, 7.7e12, 900e9, 50e9),
    )
}
"""The presets by name: SXM modules with one 400 Gb/s network port per GPU."""


def hardware_by_name(name: str) -> Hardware:
    """Return a preset.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    if name not in HARDWARE:
        raise ValueError(f"hardware is {name!r}, allowed are {', '.join(map(repr, HARDWARE))}")
    return HARDWARE[name]


class LayerParts(NamedTuple):
    """A layer's time in seconds by its parts, each float64 ``[...]``; the time is their sum."""

    experts: _Floats
    """The slowest rank's experts."""
    dispatch: _Floats
    """Tokens to their experts."""
    combine: _Floats
    """Results back."""
    planner: _Floats
    """What the caller gave, everywhere."""
    transfers: _Floats
    """Weights that travel for this batch, as the caller gave it."""
    floor: _Floats
    """Not added: what of ``experts`` the slots in use cost however few tokens they have, for weights or one tile."""


def layer_time(
    tokens: _Loads,
    n_ranks: SupportsIndex,
    model: ModelShape,
    hardware: Hardware,
    *,
    ranks_per_node: SupportsIndex | None = None,
    exchange: str = "by_node",
    planner_seconds: float = 0.0,
    tile: SupportsIndex | None = None,
    transfer_seconds: float | _Floats = 0.0,
) -> _Floats:
    """Model the time of one layer's experts, in seconds; see the module for what is in it.

    Args:
        tokens: tokens of each slot, ``[..., n_physical]``, for example a plan's ``quota``: an array or a tensor of any
            real dtype but ``bool``, 0 to 1e30. Slots are dealt to ranks in blocks, as in a `Placement`. A
            token counts once for each of its experts.
        n_ranks: number of ranks, a divisor of ``n_physical``.
        model: the experts' shape.
        hardware: what each rank is.
        ranks_per_node: consecutive ranks that NVLink joins, a divisor of ``n_ranks``; by default 8, or all ranks if
            there are fewer.
        exchange: how tokens travel between nodes, ``"direct"`` or ``"by_node"``.
        planner_seconds: the planner's own time, in every layer.
        tile: tokens of a slot are rounded up to multiples of it; by default `TILES` of the exchange.
        transfer_seconds: from `transfer_time`, one number or ``[...]``.

    Returns:
        Seconds, float64 ``[...]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a value or shape is not allowed; the message has the value seen and the value allowed.
    """
    parts = layer_parts(
        tokens,
        n_ranks,
        model,
        hardware,
        ranks_per_node=ranks_per_node,
        exchange=exchange,
        planner_seconds=planner_seconds,
        tile=tile,
        transfer_seconds=transfer_seconds,
    )
    seconds: _Floats = parts.experts + parts.dispatch + parts.combine + parts.planner + parts.transfers
    return seconds


def layer_parts(
    tokens: _Loads,
    n_ranks: SupportsIndex,
    model: ModelShape,
    hardware: Hardware,
    *,
    ranks_per_node: SupportsIndex | None = None,
    exchange: str = "by_node",
    planner_seconds: float = 0.0,
    tile: SupportsIndex | None = None,
    transfer_seconds: float | _Floats = 0.0,
) -> LayerParts:
    """Return what `layer_time` adds up. Arguments and errors are its own."""
    ranks = whole_number("n_ranks", n_ranks, 1)
    loads = _checked_tokens(tokens, ranks)
    node = _checked_node(ranks, model, hardware, ranks_per_node)
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange is {exchange!r}, allowed are {', '.join(map(repr, EXCHANGES))}")
    planner_seconds = real_number("planner_seconds", planner_seconds)
    if not 0 <= planner_seconds < float("inf"):
        raise ValueError(f"planner_seconds is {planner_seconds}, allowed is 0 or more")

    travel = np.asarray(transfer_seconds)
    if travel.dtype.kind not in "iuf" or travel.shape not in ((), loads.shape[:-2]):
        raise TypeError(
            f"transfer_seconds is {transfer_seconds!r}, allowed is a number or an array {list(loads.shape[:-2])}"
        )
    if not ((travel >= 0) & (travel < np.inf)).all():
        raise ValueError(f"transfer_seconds is {transfer_seconds}, allowed is 0 or more")

    tile = TILES[exchange] if tile is None else whole_number("tile", tile, 1)
    experts, floor = _experts(loads, model, hardware, tile)
    over_nvlink, over_rdma = _arrivals(loads.sum(-1), node, model.top_k, exchange)
    per_element = np.maximum(
        over_nvlink.max(-1) / hardware.nvlink_bandwidth, over_rdma.max(-1) / hardware.rdma_bandwidth
    ) * (model.hidden / hardware.efficiency)
    return LayerParts(
        experts,
        per_element * model.dispatch_bytes,
        per_element * model.combine_bytes,
        np.full(experts.shape, planner_seconds),
        np.full(experts.shape, travel, dtype=np.float64),
        floor,
    )


def transfer_time(
    transfers: torch.Tensor | npt.NDArray[Any],
    n_ranks: SupportsIndex,
    model: ModelShape,
    hardware: Hardware,
    *,
    ranks_per_node: SupportsIndex | None = None,
) -> float:
    """Model the time that the weights of one layer take which travel for one batch; see the module.

    Args:
        transfers: expert, rank that has it, rank that gets it, integers ``[n, 3]``, as `TransferPlan.transfers`; rows
            of -1 are none.
        n_ranks: as for `layer_time`, the arguments below too.
        model: the experts' shape.
        hardware: what each rank is.
        ranks_per_node: consecutive ranks that NVLink joins.

    Returns:
        Seconds.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a value or shape is not allowed; the message has the value seen and the value allowed.
    """
    ranks = whole_number("n_ranks", n_ranks, 1)
    node = _checked_node(ranks, model, hardware, ranks_per_node)
    nvlink, cards = _copies(_checked_transfers(transfers, ranks), ranks, node)
    per_byte = max(nvlink / hardware.nvlink_bandwidth, cards / hardware.rdma_bandwidth)
    return model.expert_bytes * per_byte / hardware.efficiency


def _copies(transfers: list[list[int]], n_ranks: int, node: int) -> tuple[int, int]:
    """Copies in or out of the rank that has most of them, over NVLink and over its card."""
    trees: dict[tuple[int, int], dict[int, list[int]]] = {}  # by expert and its source, then targets by node
    for expert, source, to in transfers:
        trees.setdefault((expert, source), {}).setdefault(to // node, []).append(to)
    nvlink_out, nvlink_in, card_out, card_in = ([0] * n_ranks for _ in range(4))
    for (_, source), by_node in trees.items():
        near = by_node.pop(source // node, [])
        first = [source, *(ranks[0] for ranks in by_node.values())]
        _count_tree(first, card_out, card_in)
        for have in ([source, *near], *by_node.values()):
            _count_tree(have, nvlink_out, nvlink_in)
    return max(*nvlink_out, *nvlink_in), max(*card_out, *card_in)


def _count_tree(ranks: list[int], out: list[int], into: list[int]) -> None:
    """Add the copies by which what the first of ``ranks`` has comes to the others: each round, all who have it send."""
    have = 1
    while have < len(ranks):
        for source, to in zip(ranks[:have], ranks[have : 2 * have], strict=False):
            out[source] += 1
            into[to] += 1
        have *= 2


def _checked_transfers(transfers: object, n_ranks: int) -> list[list[int]]:
    """The rows of a table of transfers that are some."""
    given = transfers.detach().cpu().resolve_neg().numpy() if isinstance(transfers, torch.Tensor) else transfers
    if not isinstance(given, np.ndarray) or given.dtype.kind not in "iu":
        raise TypeError(f"transfers is {seen(transfers)}, allowed is a tensor or an array of integers [n, 3]")
    if given.ndim != 2 or given.shape[1] != 3:
        raise ValueError(f"transfers has shape {list(given.shape)}, allowed is [n, 3]: expert, from, to")
    rows = given[given[:, 0] >= 0]
    odd = (rows[:, 1:] < 0) | (rows[:, 1:] >= n_ranks)
    if odd.any():
        raise ValueError(f"transfers has rank {rows[:, 1:][odd][0]}, allowed are 0 to {n_ranks - 1}")
    listed: list[list[int]] = rows.tolist()
    return listed


def _checked_node(n_ranks: int, model: object, hardware: object, ranks_per_node: SupportsIndex | None) -> int:
    """Ranks of a node; refuses what is no model and no hardware."""
    for name, value, kind in (("model", model, ModelShape), ("hardware", hardware, Hardware)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {seen(value)}, allowed is a {kind.__name__}")
    node = min(8, n_ranks) if ranks_per_node is None else whole_number("ranks_per_node", ranks_per_node, 1)
    check_divides("n_ranks", n_ranks, "ranks_per_node", node)
    return node


def _checked_tokens(tokens: object, n_ranks: int) -> _Floats:
    """Tokens as float64 ``[..., ranks, slots_per_rank]``."""
    if isinstance(tokens, torch.Tensor):
        if tokens.dtype.is_complex or tokens.dtype == torch.bool:
            raise TypeError(f"tokens has dtype {tokens.dtype}, allowed is a real dtype")
        if tokens.layout != torch.strided or tokens.device.type == "meta":
            raise TypeError(
                f"tokens has layout {tokens.layout} on {tokens.device}, allowed is torch.strided with values"
            )
        given = tokens.detach().to(device="cpu", dtype=torch.float64).numpy()
    elif isinstance(tokens, np.ndarray):
        if tokens.dtype.kind not in "iuf":
            raise TypeError(f"tokens has dtype {tokens.dtype}, allowed is a real dtype")
        given = tokens
    else:
        raise TypeError(f"tokens is {seen(tokens)}, allowed is an array or a tensor")
    if given.ndim < 1 or given.shape[-1] == 0 or given.shape[-1] % n_ranks:
        raise ValueError(
            f"tokens has shape {list(given.shape)}, allowed is [..., n_physical] with n_physical a multiple of n_ranks "
            f"= {n_ranks}"
        )
    loads = given.astype(np.float64)
    odd = ~((loads >= 0) & (loads <= _MOST_LOAD))  # true for NaN as well
    if odd.any():
        raise ValueError(f"tokens has {loads[odd][0]}, allowed are 0 to {_MOST_LOAD}")
    return loads.reshape(*given.shape[:-1], n_ranks, given.shape[-1] // n_ranks)


def _experts(loads: _Floats, model: ModelShape, hardware: Hardware, tile: int) -> tuple[_Floats, _Floats]:
    """Seconds of the slowest rank, and what its slots in use cost at least; each ``[...]``."""
    reading = model.expert_bytes / (hardware.memory_bandwidth * hardware.efficiency)
    per_tile = tile * model.flops_per_token / (hardware.flops(model.precision) * hardware.efficiency)
    used = loads > 0
    rank = np.where(used, np.maximum(reading, np.ceil(loads / tile) * per_tile), 0.0).sum(-1)
    slowest = rank.argmax(-1)[..., None]
    floor = np.take_along_axis(used.sum(-1), slowest, -1)[..., 0] * max(reading, per_tile)
    return np.take_along_axis(rank, slowest, -1)[..., 0], floor


def _arrivals(rank_load: _Floats, node: int, top_k: int, exchange: str) -> tuple[_Floats, _Floats]:
    """Hidden states that reach each rank over NVLink ``[..., ranks]``, and over network cards, the same or by node.

    Every rank is the source of as many tokens, and each token's experts are on a rank by the rank's share of all.
    """
    n_ranks = rank_load.shape[-1]
    near, far = (node - 1) / n_ranks, (n_ranks - node) / n_ranks
    if exchange == "direct":
        return rank_load * near, rank_load * far
    node_load = rank_load.reshape(*rank_load.shape[:-1], n_ranks // node, node).sum(-1)
    # What another node sends arrives on one of the node's cards, all used alike, and goes on over NVLink but for what
    # is for that card's own rank.
    passed_on = near + far * (node - 1) / node
    return _once(rank_load, top_k) * passed_on, _once(node_load, top_k) * far / node


def _once(load: _Floats, top_k: int) -> _Floats:
    """Expected tokens of which at least one of ``top_k`` choices, taken as independent, is among these ``load``."""
    total = load.sum(-1, keepdims=True)
    share = np.divide(load, total, out=np.zeros_like(load), where=total > 0)
    with np.errstate(divide="ignore"):
        tokens: _Floats = total / top_k * -np.expm1(top_k * np.log1p(-share))
    return tokens
