"""Megatron-style token dispatchers: routing map and probabilities of logical experts become those of physical ones.

The interface is that of Megatron Core (``megatron/core/transformer/moe``): a router returns ``probs`` and
``routing_map``, both ``[tokens, experts]``, which a dispatcher's ``dispatch_preprocess(hidden_states, routing_map,
probs)`` takes; earlier versions have ``token_permutation(hidden_states, probs, routing_map)``. Between the two:

    probs, routing_map = self.router(hidden_states)
    routing_map, probs = physical_routing(planner, routing_map, probs)
    hidden_states, probs = self.token_dispatcher.dispatch_preprocess(hidden_states, routing_map, probs)

Router and auxiliary losses keep the number of logical experts; the dispatcher and the experts are made for the physical
ones: ``num_moe_experts = n_physical`` in the configuration that they are given, ``num_local_experts =
planner.placement.slots_per_rank``. Weights and gradients of copies are `lplb.weights.ReplicaSync`'s work.
"""

import torch
from torch import Tensor

from lplb.arguments import seen
from lplb.planner import Planner

__all__ = ["physical_routing"]


def physical_routing(
    planner: Planner, routing_map: Tensor, probs: Tensor, *, is_padding: Tensor | None = None, lag: int = 0
) -> tuple[Tensor, Tensor]:
    """Say for every token which physical experts it goes to; collective under the planner's group.

    Any number of experts per token is allowed, so tokens may have been dropped before.

    Args:
        planner: of the dispatcher's expert-parallel group.
        routing_map: which experts a token goes to, bool ``[tokens, n_logical]``, on the planner's device.
        probs: its probabilities, floating ``[tokens, n_logical]``; differentiable.
        is_padding: bool, ``tokens`` elements, true for tokens that are padding: they go nowhere and count nowhere.
            Megatron's own ``padding_mask`` has the opposite meaning in some of its versions.
        lag: as for `Planner.run`.

    Returns:
        The same for physical experts: bool and floating ``[tokens, n_physical]``. Where the map is false,
        probabilities are 0.

    Raises:
        TypeError, ValueError: an argument is not allowed, on any rank.
    """
    error = _refusal(planner, routing_map, probs, is_padding)
    if error is not None:
        planner.refuse(error, lag=lag)
    wanted = routing_map if is_padding is None else routing_map & ~is_padding.reshape(-1, 1)
    expert = torch.arange(routing_map.shape[1], dtype=torch.int32, device=routing_map.device)
    slot = planner.run(torch.where(wanted, expert, -1), None, lag=lag).long() + 1
    # Column 0 takes what goes nowhere, so that no index has to be looked for, nor waited for on a GPU.
    shape = len(routing_map), planner.n_routed_experts + 1
    mapped = torch.zeros(shape, dtype=torch.bool, device=slot.device).scatter(1, slot, wanted)[:, 1:]
    shares = torch.zeros(shape, dtype=probs.dtype, device=slot.device).scatter(1, slot, probs)[:, 1:]
    return mapped, shares


def _refusal(planner: Planner, routing_map: Tensor, probs: Tensor, is_padding: Tensor | None) -> Exception | None:
    n_logical = planner.n_logical_routed_experts
    if not isinstance(routing_map, Tensor) or routing_map.dtype != torch.bool:
        return TypeError(f"routing_map is {seen(routing_map)}, allowed is a bool tensor [tokens, {n_logical}]")
    if routing_map.dim() != 2 or routing_map.shape[1] != n_logical:
        return ValueError(f"routing_map has shape {list(routing_map.shape)}, allowed is [tokens, {n_logical}]")
    if not isinstance(probs, Tensor) or not probs.dtype.is_floating_point:
        return TypeError(f"probs is {seen(probs)}, allowed is a floating tensor {list(routing_map.shape)}")
    if probs.shape != routing_map.shape:
        return ValueError(f"probs has shape {list(probs.shape)}, allowed is that of routing_map")
    if is_padding is None:
        return None
    if not isinstance(is_padding, Tensor) or is_padding.dtype != torch.bool:
        return TypeError(f"is_padding is {seen(is_padding)}, allowed is a bool tensor or None")
    if is_padding.numel() != len(routing_map):
        return ValueError(f"is_padding has {is_padding.numel()} elements, allowed is one per token, {len(routing_map)}")
    return None
